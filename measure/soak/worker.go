//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"time"

	"github.com/seed22601231/connectx"
)

// A worker is a goroutine that opens, uses and closes connections.
type worker struct {
	*run
	goroutine int
	random    *rand.Rand
	tokens    uint64
}

func (r *run) newWorker(goroutine int) *worker {
	return &worker{run: r, goroutine: goroutine, random: rand.New(rand.NewPCG(r.options.seed, uint64(goroutine)))}
}

// maxRest bounds the time from one step of a worker to the next, which leaves most
// of two processors idle.
const maxRest = 4 * time.Millisecond

// work goes on until the run stops. In between two steps the worker has nothing
// open that is not accounted for.
func (w *worker) work() {
	for !w.stopped() {
		w.quiet.RLock()
		w.step()
		w.quiet.RUnlock()
		time.Sleep(time.Duration(w.random.Int64N(int64(maxRest))))
	}
}

func (w *worker) step() {
	switch n := w.random.IntN(32); {
	case n < 8:
		w.dialReference()
	case n < 12:
		w.use(flowOf(w.random.IntN(allFlows)))
	case n == 12:
		w.dialInVain()
	default:
		w.dialOrDrop()
	}
}

func (w *worker) token() token {
	w.tokens++
	return newToken(uint64(w.goroutine), w.tokens, w.random)
}

// dialOrDrop dials, or closes a connection if the flow has its share of them.
func (w *worker) dialOrDrop() {
	j := newJob(w.options.ports, w.random)
	// Most explicit ports are taken, but not most of those that are asked for.
	for range 16 {
		if j.kind != sourceAddressAndPort || w.random.IntN(32) == 0 || !w.flows.isHeld(j.flow, j.port) {
			break
		}
		j.port = w.random.IntN(w.options.ports)
	}
	if full, ok := w.flows.begin(j.flows()); !ok {
		if c := w.flows.pick(full, w.random); c != nil {
			w.flows.drop(c)
		}
		return
	}
	w.dial(j)
}

// dial dials, and keeps what it gets.
func (w *worker) dial(j job) {
	start := time.Now()
	cpu := startCPU()
	conn, err := j.dial()
	took, busy := time.Since(start), cpu.stop()
	if err != nil {
		why := w.explainDial(j, err, start)
		w.flows.end(j.flows())
		w.failed(why, err, func() string { return fmt.Sprintf("%s: %v after %v", j, err, took) })
		return
	}
	c, what := w.accept(j, conn, start)
	if c == nil {
		// As long as it is there, the dial is not over.
		abandon(conn)
		conn.Close()
	}
	w.flows.end(j.flows())
	if what != "" {
		w.fail("%s: %s", j, what)
		return
	}
	w.dialled(j, took, busy)
	if c != nil && w.echo(c) {
		w.flows.putBack(c)
	}
}

// accept keeps a connection, for the caller alone, unless it is one to close at
// once; or it says what is wrong with it.
func (w *worker) accept(j job, conn net.Conn, start time.Time) (c *connection, what string) {
	local := addrPort(conn.LocalAddr())
	c = &connection{Conn: conn, flow: j.flow, port: int(local.Port()) - firstPort, opened: start, busy: true, used: start}
	for _, f := range j.flows() {
		if sourceAddr(f.family, f.source) == local.Addr() {
			c.flow = f
		}
	}
	switch {
	case sourceAddr(c.flow.family, c.flow.source) != local.Addr(), c.port < 0 || c.port >= w.options.ports,
		j.kind == sourceAddressAndPort && c.port != j.port:
		return nil, "is connected from " + local.String()
	case !shares(conn) && w.faults.files.since(start):
		return nil, "" // others could not have the port
	case !shares(conn):
		return nil, "does not share its port: " + c.String()
	}
	other := w.flows.keep(c)
	switch {
	case other == nil:
		return c, ""
	case j.flow.protocol == tcp && w.faults.server.since(other.opened):
		return nil, "" // a reset has left the other one without its 4-tuple
	}
	return nil, "has the 4-tuple of another: " + c.String()
}

// use verifies one of the connections.
func (w *worker) use(f flow) {
	if c := w.flows.pick(f, w.random); c != nil && w.echo(c) {
		w.flows.putBack(c)
	}
}

// echo verifies a connection that was picked. If that fails, the connection is
// closed.
func (w *worker) echo(c *connection) bool {
	start := time.Now()
	var why reason
	err := verify(c, w.token(), func() bool {
		why = w.explainFaults(context.DeadlineExceeded, c.used, c.flow.source == fleetingSource)
		return why != unexplained
	})
	if err == nil {
		c.used = start
		w.echoed()
		return true
	}
	if why == unexplained && !errors.Is(err, errWrongBytes) {
		why = w.explainFaults(err, c.used, c.flow.source == fleetingSource)
	}
	w.lost(why, func() string { return fmt.Sprintf("%s: %v", c, err) })
	w.flows.drop(c)
	return false
}

// dialReference has net.Dialer dial, from a port that nobody else uses, to tell how
// fast the machine is at the moment.
func (w *worker) dialReference() {
	p, f := protocol(w.random.IntN(int(protocols))), family(w.random.IntN(families))
	local := netip.AddrPortFrom(sourceAddr(f, referenceSource), firstReference+uint16(w.goroutine))
	d := net.Dialer{LocalAddr: netAddr(p, local), Timeout: dialPatience, Control: leaveNoTimeWait}
	start := time.Now()
	cpu := startCPU()
	conn, err := d.Dial(p.String(), destination(f, mainNet, w.random.IntN(destinations)).String())
	took := time.Since(start)
	busy := cpu.stop()
	if err != nil {
		return // that tells nothing about connectx
	}
	abandon(conn)
	conn.Close()
	w.compared(p, took, busy)
}

// dialInVain dials a destination that does not answer, until the context ends.
func (w *worker) dialInVain() {
	f := family(w.random.IntN(families))
	patience := time.Duration(w.random.Int64N(int64(5 * time.Millisecond)))
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	to := netip.AddrPortFrom(destination(f, mainNet, 0).Addr(), silentPort)
	var d connectx.Dialer
	start := time.Now()
	conn, err := dialTo(ctx, &d, way(w.random.IntN(2)), "tcp", to.String())
	if err == nil {
		w.fail("a connection to %s, which has no room for one", to)
		conn.Close()
		return
	}
	why := w.explainFaults(err, start, false)
	if isOneOf(err, afterDeadline) {
		why = noAnswer
	}
	w.failed(why, err, func() string { return fmt.Sprintf("tcp to %s, which does not answer: %v", to, err) })
}
