//go:build linux

package main

import (
	"sync"
	"time"
)

// A window is when something was on that may be the reason for an error. Several
// may have it on at once.
type window struct {
	lasts time.Duration // how long the consequences do

	mu    sync.Mutex
	on    int
	off   time.Time // when it was last on
	times int       // that it was turned on
}

func (w *window) begin() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.on++
	w.times++
}

func (w *window) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.on--
	w.off = time.Now().Add(w.lasts)
}

// since reports whether it was on at any time since t.
func (w *window) since(t time.Time) bool { return w.moreThan(0, t) }

// othersSince reports the same for somebody who has it on.
func (w *window) othersSince(t time.Time) bool { return w.moreThan(1, t) }

func (w *window) moreThan(n int, t time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.on > n || !w.off.Before(t)
}

func (w *window) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.times
}
