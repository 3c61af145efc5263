//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/seed22601231/connectx"
)

// A run is what goes on, and what has come of it.
type run struct {
	options    options
	start      time.Time
	flows      *flows
	faults     faults
	foreign    atomic.Int64 // foreign sockets that are open
	broken     atomic.Int64 // threads on which a system call failed
	namespaces fleetingNamespaces
	tally      tally

	// quiet is held for reading by whoever has something under way, and for
	// writing when a sample is taken.
	quiet   sync.RWMutex
	stop    atomic.Bool
	working sync.WaitGroup

	server  *server
	silence silence
	storm   *storm

	goroutines    int // of the run
	before, after usage
	wrong         bool // the last sample had too much of something
	samples       []sample
	regained      int // 4-tuples that could be had at the end
}

func (r *run) stopped() bool { return r.stop.Load() }

// soak carries out a run, in the process's network namespace. The result is nil if
// there is an error.
func soak(ctx context.Context, o options, progress io.Writer) (*run, error) {
	r := newRun(o)
	if err := setUpNetwork(o); err != nil {
		return nil, err
	}
	defer r.silence.close()
	if err := r.silence.open(); err != nil {
		return nil, err
	}
	var err error
	if r.storm, err = newStorm(); err != nil {
		return nil, err
	}
	defer r.storm.netlink.Close()
	if r.server, err = startServer(); err != nil {
		return nil, err
	}
	defer func() { r.server.kill() }()
	if r.before, err = inUse(); err != nil {
		return nil, err
	}
	for range keptNamespaces {
		r.dialInNamespace()
	}
	r.startAll()
	err = r.sampleUntilDone(ctx, progress)
	r.stop.Store(true)
	r.working.Wait()
	if err != nil {
		return nil, err
	}
	r.closeAll()
	r.regain()
	fmt.Fprintln(progress, "all connections are closed; waiting until the library is idle")
	return r, r.awaitIdle()
}

func newRun(o options) *run {
	r := &run{options: o, flows: newFlows(o.ports)}
	r.tally.errors, r.tally.reasons, r.tally.losses = make(map[string]int), make(map[reason]int), make(map[reason]int)
	// A port that is not shared for want of descriptors is held until its dial is over.
	r.faults.files.lasts = time.Second
	r.samples = make([]sample, 0, int(o.duration/o.interval())+1)
	return r
}

// startAll starts what goes on beside the samples.
func (r *run) startAll() {
	r.start = time.Now()
	begin := func(f func()) {
		r.goroutines++
		r.working.Go(f)
	}
	for i := range r.options.workers {
		w := r.newWorker(i)
		begin(w.work)
	}
	for i, f := range []func(*rand.Rand){r.runFaults, r.runStorm, r.runForeign, r.runNamespaces, r.runBrokenCalls} {
		random := rand.New(rand.NewPCG(r.options.seed, uint64(maxWorkers+i)))
		begin(func() { f(random) })
	}
}

// progressEvery is how often a line tells how far the run has come.
const progressEvery = 10 * time.Second

// sampleUntilDone takes samples until the time is over, the context ends, or so much
// is wrong that more does not tell more.
func (r *run) sampleUntilDone(ctx context.Context, progress io.Writer) error {
	r.awaitFull(ctx)
	done := time.NewTimer(r.options.duration)
	defer done.Stop()
	ticks := time.NewTicker(r.options.interval())
	defer ticks.Stop()
	line := time.Now()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-done.C:
			return nil
		case <-ticks.C:
		}
		s, err := r.sample()
		if err != nil {
			return err
		}
		if r.samples = append(r.samples, s); r.hopeless() {
			return nil
		}
		if time.Since(line) >= progressEvery {
			line = time.Now()
			fmt.Fprintf(progress, "%6.0f s  %s\n", s.at.Seconds(), s.row())
		}
	}
}

// awaitFull returns when the connections are there that are to be, nearly, so that
// the first sample is like all others.
func (r *run) awaitFull(ctx context.Context) {
	most := allFlows * r.flows.target()
	for deadline := time.Now().Add(r.options.duration); r.flows.held() < most*95/100; time.Sleep(time.Millisecond) {
		if ctx.Err() != nil || r.hopeless() {
			return
		}
		if time.Now().After(deadline) {
			r.fail("after %v: %d connections, want %d", r.options.duration, r.flows.held(), most*95/100)
			return
		}
	}
}

func (r *run) hopeless() bool {
	r.tally.mu.Lock()
	defer r.tally.mu.Unlock()
	return len(r.tally.failures) == maxFailures
}

func (r *run) closeAll() {
	random := rand.New(rand.NewPCG(r.options.seed, 0))
	for i := range allFlows {
		for c := r.flows.pick(flowOf(i), random); c != nil; c = r.flows.pick(flowOf(i), random) {
			r.flows.drop(c)
		}
	}
}

// regain takes all 4-tuples, which have to be free. Then every destination has to be
// full.
func (r *run) regain() {
	for i := range allFlows {
		f := flowOf(i)
		w := r.newWorker(0)
		j := job{flow: f, kind: sourceAddress}
		for n := 0; ; n++ {
			conn, err := j.dial()
			if n == r.options.ports && errors.Is(err, connectx.ErrPortsExhausted) {
				break
			}
			if err != nil {
				r.fail("afterwards, %s: %d of %d 4-tuples can be had, then: %v", j, n, r.options.ports, err)
				break
			}
			if _, what := w.accept(j, conn, time.Now()); what != "" {
				r.fail("afterwards, %s: %s", j, what)
				conn.Close()
				break
			}
			r.regained++
		}
	}
	for i := range allFlows {
		a := &r.flows.each[i]
		for _, c := range a.held {
			if c != nil {
				r.flows.drop(c)
			}
		}
	}
}

// awaitIdle returns when as much is in use as before the first dial, or the library
// should have seen to that.
func (r *run) awaitIdle() (err error) {
	var what string
	d := r.before.again()
	if r.after, what, err = awaitUsage(d, 2*lingers, time.Second/10); what != "" {
		r.fail("idle, after the end: %s", what)
	}
	return err
}
