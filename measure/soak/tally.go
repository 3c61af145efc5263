//go:build linux

package main

import (
	"fmt"
	"sync"
	"time"
)

// A tally counts what has become of dials and connections.
type tally struct {
	mu        sync.Mutex
	connected [protocols]int
	echoes    int
	errors    map[string]int // by errno
	reasons   map[reason]int
	losses    map[reason]int // of connections
	failures  []string
	more      int // failures that are not kept

	// Since the last sample.
	latencies, references [protocols]latency
	cpu, referenceCPU     [protocols]latency
	dials, failed         int
}

// maxFailures is how many failures are kept. A run that has more has failed anyway.
const maxFailures = 20

func (r *run) fail(format string, args ...any) {
	r.tally.mu.Lock()
	defer r.tally.mu.Unlock()
	r.tally.failLocked(fmt.Sprintf(format, args...))
}

func (t *tally) failLocked(what string) {
	if len(t.failures) == maxFailures {
		t.more++
		return
	}
	t.failures = append(t.failures, what)
}

// dialled counts a dial that has succeeded. With a context that is cancelled it is
// not one that is as fast as the others.
func (r *run) dialled(j job, took, cpu time.Duration) {
	t := &r.tally
	t.mu.Lock()
	defer t.mu.Unlock()
	p := j.flow.protocol
	t.connected[p]++
	t.dials++
	if j.cancelled == 0 {
		t.latencies[p].add(took)
		t.cpu[p].add(cpu)
	}
}

// failed counts a dial that has failed, and is a failure itself if nothing explains
// it.
func (r *run) failed(why reason, err error, what func() string) {
	t := &r.tally
	t.mu.Lock()
	defer t.mu.Unlock()
	t.failed++
	t.errors[errnoOf(err)]++
	if why == unexplained {
		t.failLocked("unexplained: " + what())
		return
	}
	t.reasons[why]++
}

// lost does the same for a connection.
func (r *run) lost(why reason, what func() string) {
	t := &r.tally
	t.mu.Lock()
	defer t.mu.Unlock()
	if why == unexplained {
		t.failLocked("connection: " + what())
		return
	}
	t.losses[why]++
}

func (r *run) echoed() {
	r.tally.mu.Lock()
	defer r.tally.mu.Unlock()
	r.tally.echoes++
}

func (r *run) compared(p protocol, took, cpu time.Duration) {
	r.tally.mu.Lock()
	defer r.tally.mu.Unlock()
	r.tally.references[p].add(took)
	r.tally.referenceCPU[p].add(cpu)
}
