//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync"
	"time"
)

// A result is what has become of a plan.
type result struct {
	plan      plan
	processes int
	atOnce    int // processes that dialled at a time

	elapsed       time.Duration // for all dials
	p50, p99, max time.Duration // of one

	tuples tuples
	tally  Tally

	kernelBytes  float64 // the kernel's memory, for each connection
	processBytes float64 // the memory of the processes that dial, likewise

	net netResult
}

// A netResult is where net.Dialer stops.
type netResult struct {
	opened  int
	failure string // empty if nothing stopped it
}

// hold sees how far net.Dialer gets, and then opens, holds and checks the
// connections of a plan.
//
// The kernel's memory is compared with that of atRest, from before there was any
// connection: that of closed ones is not free at once.
func hold(ctx context.Context, p plan, atRest memory, stderr io.Writer) (*result, error) {
	// The processes live only as long as the thread that starts them.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	r := &result{plan: p, processes: p.processes(), atOnce: runtime.NumCPU()}
	var err error
	if r.net, err = holdWithNet(ctx, p, stderr); err != nil {
		return nil, err
	}
	if err := r.hold(ctx, atRest, stderr); err != nil {
		return nil, err
	}
	return r, nil
}

var errStopped = errors.New("a dial has failed")

// holdWithNet dials with net.Dialer, in the same way, until it fails. It takes
// only as many processes as can hold one connection more than there are ports.
func holdWithNet(ctx context.Context, p plan, stderr io.Writer) (netResult, error) {
	var n netResult
	p.total = min(p.total, p.ports.size()+1)
	c := newCrew(ctx)
	defer c.stop()
	if err := c.startServers(p, p.processes()); err != nil {
		return n, err
	}
	dialers, err := c.startDialers(p.processes(), Config{Network: p.network})
	if err != nil {
		return n, err
	}
	bar := newProgress(stderr, p.protocol()+", net.Dialer", p.total)
	defer bar.end()
	var mu sync.Mutex
	err = atOnce(runtime.NumCPU(), p.shares(), func(s share) error {
		var reply DialReply
		if err := c.call(dialers[s.process], "Dial", DialJob{s.destination.String(), s.count}, &reply); err != nil {
			return err
		}
		bar.add(reply.Opened)
		mu.Lock()
		defer mu.Unlock()
		n.opened += reply.Opened
		if reply.Failure != "" {
			n.failure = reply.Failure
			return errStopped
		}
		return nil
	})
	if err != nil && err != errStopped {
		return n, err
	}
	return n, c.closeAll(dialers)
}

func (c *crew) closeAll(dialers []*process) error {
	return atOnce(runtime.NumCPU(), dialers, func(d *process) error {
		return c.call(d, "Close", struct{}{}, new(struct{}))
	})
}

func (r *result) hold(ctx context.Context, atRest memory, stderr io.Writer) error {
	p := r.plan
	c := newCrew(ctx)
	defer c.stop()
	if err := c.startServers(p, r.processes); err != nil {
		return err
	}
	servers := len(c.pids)
	dialers, err := c.startDialers(r.processes, Config{Network: p.network, Connectx: true})
	if err != nil {
		return err
	}
	memoryNow := func() (memory, error) {
		if err := atOnce(r.atOnce, dialers, func(d *process) error {
			return c.call(d, "Collect", struct{}{}, new(struct{}))
		}); err != nil {
			return memory{}, err
		}
		return memoryInUse(c.pids[servers:])
	}

	before, err := memoryNow()
	if err != nil {
		return err
	}
	if err := r.dial(c, dialers, newProgress(stderr, p.protocol()+", connectx.Dialer", p.total)); err != nil {
		return err
	}
	if err := r.latencies(c, dialers); err != nil {
		return err
	}
	after, err := memoryNow()
	if err != nil {
		return err
	}
	all := float64(p.total)
	r.processBytes = float64(after.dialers-before.dialers) / all
	r.kernelBytes = float64(after.kernel-atRest.kernel) / all

	if r.tuples, err = dumpTuples(p.tcp()); err != nil {
		return err
	}
	if err := r.echo(c, dialers, newProgress(stderr, p.protocol()+", echo", p.total)); err != nil {
		return err
	}
	return c.closeAll(dialers)
}

// dial opens all connections.
func (r *result) dial(c *crew, dialers []*process, bar *progress) error {
	defer bar.end()
	start := time.Now()
	err := atOnce(r.atOnce, r.plan.shares(), func(s share) error {
		var reply DialReply
		d := dialers[s.process]
		if err := c.call(d, "Dial", DialJob{s.destination.String(), s.count}, &reply); err != nil {
			return err
		}
		bar.add(reply.Opened)
		if reply.Failure != "" {
			return fmt.Errorf("%s: %s", d.name, reply.Failure)
		}
		return nil
	})
	r.elapsed = time.Since(start)
	return err
}

// latencies collects how long the dials took.
func (r *result) latencies(c *crew, dialers []*process) error {
	all := make([]time.Duration, 0, r.plan.total)
	for _, d := range dialers {
		var some []time.Duration
		if err := c.call(d, "Latencies", struct{}{}, &some); err != nil {
			return err
		}
		all = append(all, some...)
	}
	slices.Sort(all)
	r.p50, r.p99, r.max = quantile(all, 0.5), quantile(all, 0.99), quantile(all, 1)
	return nil
}

// quantile is the smallest value that at least the part q of all are not above.
// The values are sorted.
func quantile(sorted []time.Duration, q float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	n := int(q*float64(len(sorted)) + 0.5)
	return sorted[min(max(n, 1), len(sorted))-1]
}

// echo verifies all connections.
func (r *result) echo(c *crew, dialers []*process, bar *progress) error {
	defer bar.end()
	var mu sync.Mutex
	window := max(1, maxInFlight/r.atOnce)
	if err := atOnce(r.atOnce, dialers, func(d *process) error {
		var t Tally
		if err := c.call(d, "Echo", window, &t); err != nil {
			return err
		}
		bar.add(t.Own)
		mu.Lock()
		defer mu.Unlock()
		r.tally.add(t)
		return nil
	}); err != nil {
		return err
	}
	return atOnce(r.atOnce, dialers, func(d *process) error {
		var strays int
		if err := c.call(d, "Strays", struct{}{}, &strays); err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		r.tally.Wrong += strays
		return nil
	})
}

// full is how many destinations have a connection from every port of the range.
func (r *result) full() int {
	n := 0
	for _, connections := range r.tuples.to {
		if connections == r.plan.ports.size() {
			n++
		}
	}
	return n
}

// verdict is nil if everything was as it should be.
func verdict(results []*result) error {
	var errs []error
	for _, r := range results {
		fail := func(format string, args ...any) {
			errs = append(errs, fmt.Errorf(r.plan.protocol()+": "+format, args...))
		}
		if r.tuples.total != r.plan.total {
			fail("sock_diag lists %d connections, and there should be %d", r.tuples.total, r.plan.total)
		}
		if r.tuples.duplicates != 0 {
			fail("%d connections have the 4-tuple of another", r.tuples.duplicates)
		}
		if t := r.tally; t.Own != r.plan.total || t.Wrong != 0 || t.Missing != 0 {
			fail("%d connections got their own bytes back, %d wrong ones, %d none (%s)", t.Own, t.Wrong, t.Missing, t.Failure)
		}
	}
	return errors.Join(errs...)
}
