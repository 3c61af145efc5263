//go:build linux

package main

import (
	"fmt"
	"io"
	"slices"
	"sync"
	"time"
)

// A result is what has come of a run.
type result struct {
	options options
	elapsed time.Duration
	missing string // a neighbour that was left out, and why

	mu       sync.Mutex
	tally    Tally
	failures []Failure
	shown    map[promise]int

	deaths   []death
	late     int // answers to processes that had been killed
	regained int // 4-tuples that could be had at the end
}

// maxShown bounds how many failures are shown while they happen, of each promise.
const maxShown = 10

func newResult(o options) *result { return &result{options: o, shown: make(map[promise]int)} }

func (r *result) collect(report Report, progress io.Writer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.tally.add(report.Tally)
	for _, f := range report.Failures {
		if r.isLate(f) {
			r.late++
			continue
		}
		r.failures = append(r.failures, f)
		if r.shown[f.Promise]++; r.shown[f.Promise] <= maxShown {
			fmt.Fprintf(progress, "%s: %s%s\n", f.Promise, f.What, r.deathBefore(f.At))
		}
	}
}

// A death is that of a process that was killed.
type death struct {
	sender Sender
	killed int64
	gone   int64 // when it was over, or 0
}

// deathBefore says which process was killed not long before, for what that may
// have to do with a failure.
func (r *result) deathBefore(t int64) string {
	for _, d := range slices.Backward(r.deaths) {
		if d.killed > t || t-d.killed > int64(time.Second) {
			continue
		}
		s := fmt.Sprintf(" (%.1f ms after SIGKILL to process %d, which was", float64(t-d.killed)/1e6, d.sender.Process)
		if d.gone == 0 {
			return s + " not gone yet)"
		}
		return fmt.Sprintf("%s gone after %.1f ms)", s, float64(d.gone-d.killed)/1e6)
	}
	return ""
}

// isLate reports whether a failure is only the answer to a process that was
// killed before it came.
func (r *result) isLate(f Failure) bool {
	return f.Sender != nil && slices.ContainsFunc(r.deaths, func(d death) bool { return d.sender == *f.Sender && d.killed <= f.At })
}

// count is how often a promise was broken.
func (r *result) count(p promise) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for _, f := range r.failures {
		if f.Promise == p {
			n++
		}
	}
	return n
}
