//go:build linux

package main

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/measure/internal/echo"
)

// A holder is a goroutine that holds connections.
type holder struct {
	Config
	claims    *claims
	goroutine int
	random    *rand.Rand
	reports   *reporter
	stop      *atomic.Bool
	numbers   uint64
	conns     []held
}

// held is a connection and the claim for it.
type held struct {
	echoer
	protocol protocol
	flow     int
}

func newHolder(c Config, cl *claims, goroutine int, reports *reporter, stop *atomic.Bool) *holder {
	return &holder{
		Config: c, claims: cl, goroutine: goroutine, reports: reports, stop: stop,
		random:  rand.New(rand.NewPCG(c.Seed, uint64(c.Process)<<48|uint64(c.Incarnation)<<16|uint64(goroutine))),
		numbers: uint64(goroutine) << 48,
	}
}

// runDialers runs the goroutines of one process that dial with connectx.
func runDialers(c Config, cl *claims, reports *reporter, stop *atomic.Bool) error {
	var wg sync.WaitGroup
	for goroutine := range c.Layout.Each {
		h := newHolder(c, cl, goroutine, reports, stop)
		wg.Go(func() { h.run(h.dial) })
	}
	wg.Wait()
	return nil
}

// fallbacks is how many dials have done without a feature of the kernel so far.
var fallbacks atomic.Uint64

// checkFallbacks reports those that are new. All features are there.
func (h *holder) checkFallbacks() {
	s := connectx.ReadStats()
	n := s.UDP.Fallbacks + s.TCP.Fallbacks
	if before := fallbacks.Swap(n); before < n {
		h.reports.fail(Failure{Promise: spurious, What: fmt.Sprintf("%d dials did not share their port: %+v", n-before, s)})
	}
}

const (
	// Every period, those that share their ports let go of all of them for
	// as long as the pause is. Otherwise those that do not would never find
	// a port with nobody on it.
	period = 3 * time.Second
	pause  = 100 * time.Millisecond
)

// pausing reports whether it is time to pause.
func (h *holder) pausing() bool {
	return time.Duration(now()-h.Start)%period < pause
}

// run dials, up to a random number of connections, uses them, and closes some.
func (h *holder) run(dial func()) {
	for !h.stop.Load() {
		if h.pausing() {
			h.closeDownTo(0)
			time.Sleep(pause / 10)
			continue
		}
		for target := 1 + h.random.IntN(h.Hold); len(h.conns) < target && !h.stop.Load() && !h.pausing(); {
			before := len(h.conns)
			dial()
			if len(h.conns) == before && h.random.IntN(4) == 0 {
				break
			}
		}
		for range h.random.IntN(4) {
			if !h.stop.Load() {
				h.use()
			}
		}
		h.closeDownTo(h.random.IntN(len(h.conns) + 1))
	}
}

// dial dials with connectx.
func (h *holder) dial() {
	j := newJob(h.Layout, h.Layout.own(h.Process, h.goroutine), h.random)
	w := h.claims.open(j.protocol, j.flows(h.Layout))
	certain := j.port != 0 && j.protocol == udp && j.destination >= sharedDestinations && !w.mayBeTaken(j.flows(h.Layout)[0], j.port) &&
		!h.Layout.plain().Contains(j.port) && !w.isHeld(j.port)
	for _, flow := range j.flows(h.Layout) {
		h.claims.begin(h.Process, flow)
		defer h.claims.end(h.Process, flow)
	}
	conn, err := j.dial(h.Layout)
	o, failure := j.judge(err, w)
	if failure != "" {
		h.reports.fail(Failure{Promise: spurious, What: failure})
	}
	h.checkFallbacks()
	h.reports.dialled(fmt.Sprintf("%s, %s", j.protocol, j.kind), o)
	if certain {
		h.reports.count(func(t *Tally) { t.Certain++ })
	}
	if err == nil {
		h.connected(&goConn{Conn: conn}, j)
	}
}

// connected claims the 4-tuple that a dial has got, which must be one of those
// that it was for.
func (h *holder) connected(c echoer, j job) {
	local := c.local()
	flow, ok := h.Layout.find(j.protocol, local, destination(j.family, j.destination))
	asked := false
	for _, f := range j.flows(h.Layout) {
		asked = asked || ok && f == flow
	}
	if !asked || !j.ports(h.Layout).Contains(local.Port()) {
		h.reports.fail(Failure{Promise: spurious, What: fmt.Sprintf("%s: is connected from %s", j, local)})
		c.close(false)
		return
	}
	h.keep(c, j.protocol, flow)
}

// keep holds a connection from now on. A port in TIME_WAIT is of no use to sockets
// that do not share it: on those of theirs there is to be none, not even of a
// process that is killed.
func (h *holder) keep(c echoer, p protocol, flow int) {
	if g, ok := c.(*goConn); ok && h.Layout.plain().Contains(c.local().Port()) {
		g.noTimeWait()
	}
	h.claims.at(flow, c.local().Port()).Store(forever(h.Process, h.goroutine))
	h.conns = append(h.conns, held{c, p, flow})
}

// use verifies one of the connections.
func (h *holder) use() {
	if len(h.conns) == 0 {
		return
	}
	h.numbers++
	t := newToken(h.Process, h.Incarnation, h.numbers, h.random)
	failures := verify(h.conns[h.random.IntN(len(h.conns))], t)
	h.reports.fail(failures...)
	h.reports.count(func(t *Tally) { t.Echoes++ })
}

// closeDownTo closes random connections until so many are left.
func (h *holder) closeDownTo(n int) {
	for len(h.conns) > n {
		i := h.random.IntN(len(h.conns))
		c := h.conns[i]
		h.conns[i] = h.conns[len(h.conns)-1]
		h.conns = h.conns[:len(h.conns)-1]
		h.closeOne(c)
	}
}

// closeOne closes a connection, after a last look for what is not its own. Half of
// those of TCP go through TIME_WAIT, as long as most ports of their flow do not,
// and their port is not one of those that others need for themselves.
func (h *holder) closeOne(c held) {
	if g, ok := c.echoer.(*goConn); ok {
		if b, err := g.left(); err != nil || b != nil {
			h.reports.fail(strayOf(c.String(), b, err))
		}
	}
	port := c.local().Port()
	timeWait := c.protocol == tcp && !h.Layout.plain().Contains(port) &&
		h.random.IntN(2) == 0 && h.claims.inTimeWait(c.flow) < h.Layout.rows()/4
	c.close(timeWait)
	free := now()
	if timeWait {
		free += int64(lingers)
	}
	h.claims.at(c.flow, port).CompareAndSwap(forever(h.Process, h.goroutine), free)
}

// strayOf is the failure that something can be read on a connection that expects
// nothing.
func strayOf(of string, b []byte, err error) Failure {
	f := Failure{Promise: misdelivered, What: fmt.Sprintf("%s has %x to read, %v", of, b, err)}
	if len(b) == echo.AnswerSize {
		t := token(b[:echo.TokenSize])
		f.At, f.Sender = now(), &Sender{t.process(), t.incarnation()}
	}
	return f
}
