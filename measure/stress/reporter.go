//go:build linux

package main

import (
	"cmp"
	"encoding/json"
	"io"
	"sync"
	"time"
)

// A reporter tells the parent what was done, every reportEvery and at the end.
type reporter struct {
	mu      sync.Mutex
	pending Report
	out     *json.Encoder
}

// reportEvery is what is lost at most of the counts of a process that is killed.
const reportEvery = 100 * time.Millisecond

func newReporter(w io.Writer) *reporter { return &reporter{out: json.NewEncoder(w)} }

func (r *reporter) run() {
	for range time.Tick(reportEvery) {
		r.flush()
	}
}

func (r *reporter) flush() {
	r.mu.Lock()
	defer r.mu.Unlock()
	// An error means that the parent is gone, and then so is this process.
	_ = r.out.Encode(r.pending)
	r.pending = Report{}
}

// ready tells the parent that others can depend on this process.
func (r *reporter) ready() {
	r.mu.Lock()
	r.pending.Ready = true
	r.mu.Unlock()
	r.flush()
}

func (r *reporter) count(f func(*Tally)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f(&r.pending.Tally)
}

func (r *reporter) dialled(kind string, o Outcomes) {
	r.count(func(t *Tally) { t.add(Tally{Dials: map[string]Outcomes{kind: o}}) })
}

// fail reports a failure at once.
func (r *reporter) fail(failures ...Failure) {
	if len(failures) == 0 {
		return
	}
	for i := range failures {
		failures[i].At = cmp.Or(failures[i].At, now())
	}
	r.mu.Lock()
	r.pending.Failures = append(r.pending.Failures, failures...)
	r.mu.Unlock()
	r.flush()
}
