//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os/exec"
	"runtime"
	"time"
)

// A run is what goes on.
type run struct {
	*result
	crew     *crew
	claims   *claims
	progress io.Writer
	start    int64
	random   *rand.Rand
	dialers  []*process
	others   []*process // neighbours
	checker  *process
}

// stress carries out a run, in the calling thread's network namespace. The result
// is nil if there is an error.
func stress(ctx context.Context, o options, progress io.Writer) (*result, error) {
	// The processes live only as long as the thread that starts them.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	l := o.layout
	if err := setUpNetwork(l); err != nil {
		return nil, err
	}
	cl, file, err := newClaims(l)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	r := &run{
		result: newResult(o),
		claims: cl, progress: progress, start: now(), random: rand.New(rand.NewPCG(o.seed, math.MaxUint64)),
	}
	r.crew = &crew{claims: file, collect: func(report Report) { r.collect(report, progress) }}
	r.crew.ctx, r.crew.cancel = context.WithCancelCause(context.Background())
	defer r.endAll()
	if err := r.startAll(); err != nil {
		return nil, err
	}
	began := time.Now()
	if err := r.killUntilDone(ctx); err != nil {
		return nil, err
	}
	r.elapsed = time.Since(began).Round(time.Second / 10)
	if err := r.stopAll(); err != nil {
		return nil, err
	}
	r.regain()
	return r.result, nil
}

func (r *run) config(process, incarnation int) Config {
	return Config{Layout: r.options.layout, Seed: r.options.seed, Hold: r.options.hold, Start: r.start, Process: process, Incarnation: incarnation}
}

// startAll starts the processes, those first that others depend on.
func (r *run) startAll() error {
	l := r.options.layout
	for _, role := range []string{"udp", "tcp"} {
		if err := r.startNeighbour(role, l.processes(), true); err != nil {
			return err
		}
	}
	if r.options.listeners {
		// As long as the listeners are there, the port is never free.
		r.claims.at(plainFlow(l, udp, 0, 0, 0), l.listenPort()).Store(forever(l.processes(), 0))
		if err := r.startNeighbour("listen", l.processes(), true); err != nil {
			return err
		}
	}
	if r.options.python {
		if _, err := exec.LookPath(python); err != nil {
			r.missing = "the follower in Python, because there is no " + python
		} else if err := r.startNeighbour("python", l.pythonProcess(), true); err != nil {
			return err
		}
	}
	if r.options.plain {
		if err := r.startNeighbour("plain", l.plainProcess(), false); err != nil {
			return err
		}
	}
	var err error
	if r.checker, err = r.crew.start("check", r.config(l.processes(), 0)); err != nil {
		return err
	}
	for i := range l.Processes {
		p, err := r.crew.start("dial", r.config(i, 0))
		if err != nil {
			return err
		}
		r.dialers = append(r.dialers, p)
	}
	return nil
}

// startNeighbour starts a process of another kind, and waits until it is ready if
// that is needed.
func (r *run) startNeighbour(role string, process int, await bool) error {
	p, err := r.crew.start(role, r.config(process, 0))
	if err != nil {
		return err
	}
	r.others = append(r.others, p)
	if await {
		return r.crew.await(p)
	}
	return nil
}

// progressEvery is how often a line tells how far the run has come.
const progressEvery = 10 * time.Second

// killUntilDone kills processes and starts them again, until the time is over or
// the context ends.
func (r *run) killUntilDone(ctx context.Context) error {
	done := time.NewTimer(r.options.duration)
	defer done.Stop()
	progress := time.NewTicker(progressEvery)
	defer progress.Stop()
	kill := r.nextKill()
	for {
		select {
		case <-done.C:
			return nil
		case <-ctx.Done():
			return nil
		case <-r.crew.ctx.Done():
			return context.Cause(r.crew.ctx)
		case <-progress.C:
			r.line()
		case <-kill:
			if err := r.killOne(); err != nil {
				return err
			}
			kill = r.nextKill()
		}
	}
}

// nextKill fires at a random time. The mean is what the flag says.
func (r *run) nextKill() <-chan time.Time {
	if r.options.kill == 0 {
		return nil
	}
	return time.After(r.options.kill/2 + time.Duration(r.random.Int64N(int64(r.options.kill))))
}

// killOne kills a process and starts it again.
func (r *run) killOne() error {
	i := r.random.IntN(len(r.dialers))
	old := r.dialers[i].config
	if err := r.killAndReap(r.dialers[i]); err != nil {
		return err
	}
	p, err := r.crew.start("dial", r.config(old.Process, old.Incarnation+1))
	r.dialers[i] = p
	return err
}

// killAndReap kills a process, and gives up its claims when it is gone.
func (r *run) killAndReap(p *process) error {
	r.mu.Lock()
	i := len(r.deaths)
	r.deaths = append(r.deaths, death{sender: Sender{p.config.Process, p.config.Incarnation}, killed: now()})
	r.mu.Unlock()
	p.kill()
	<-p.ended
	r.mu.Lock()
	r.deaths[i].gone = now()
	r.mu.Unlock()
	left, err := tuples(r.options.layout)
	if err != nil {
		return err
	}
	r.claims.reap(p.config.Process, left)
	return nil
}

// line tells how far the run has come.
func (r *run) line() {
	r.mu.Lock()
	defer r.mu.Unlock()
	fmt.Fprintf(r.progress, "%4.0f s  %9d dials  %9d echoes  %4d kills  %6d dumps  %d failures\n",
		time.Duration(now()-r.start).Seconds(), r.tally.total().Dials, r.tally.Echoes, len(r.deaths), r.tally.Dumps, len(r.failures))
}

// stopPatience is how long a process may take for what it is at.
const stopPatience = 60 * time.Second

// stopAll ends all processes with connections and the listeners, every other one
// of those that dial with SIGKILL, and then the checker.
func (r *run) stopAll() error {
	for i, p := range r.dialers {
		if i%2 == 1 {
			if err := r.killAndReap(p); err != nil {
				return err
			}
		}
	}
	for _, p := range append(r.dialers, r.others[2:]...) {
		p.stop()
	}
	for _, p := range append(r.dialers, r.others[2:]...) {
		if err := p.wait(); err != nil {
			return err
		}
	}
	r.checker.stop()
	return r.checker.wait()
}

// wait waits for a process that was told to stop.
func (p *process) wait() error {
	select {
	case <-p.ended:
		if p.err != nil && !p.killed.Load() {
			return fmt.Errorf("process %q: %w", p.role, p.err)
		}
		return nil
	case <-time.After(stopPatience):
		return fmt.Errorf("process %q has not ended within %v", p.role, stopPatience)
	}
}

// endAll kills whatever is left, and returns when it is gone.
func (r *run) endAll() {
	for _, p := range append(append(r.dialers, r.others...), r.checker) {
		if p != nil {
			p.kill()
		}
	}
	r.crew.waiting.Wait()
}
