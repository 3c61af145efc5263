//go:build linux

package main

import (
	"math/rand/v2"
	"sync"
	"time"
)

// destinations is how many of each family are dialled by all.
const destinations = 2

// A flow is what a port is for.
type flow struct {
	protocol            protocol
	family              family
	destination, source int
}

func (f flow) index() int {
	return ((int(f.protocol)*families+int(f.family))*destinations+f.destination)*sources + f.source
}

const allFlows = int(protocols) * families * destinations * sources

// flowOf is the inverse of index.
func flowOf(i int) flow {
	return flow{
		source: i % sources, destination: i / sources % destinations,
		family: family(i / sources / destinations % families), protocol: protocol(i / sources / destinations / families),
	}
}

// An account is what is known of one flow.
type account struct {
	held     []*connection // by port, nil where there is none
	taken    []window      // by port: as long as there may be a connection
	dials    window
	n        int // connections
	dialling int // dials that may get one
}

// flows keep account of all flows. It is what says whether an error of a dial
// follows from the connections that there are.
type flows struct {
	ports int

	mu    sync.Mutex
	each  [allFlows]account
	total int // connections

	// foreign sockets that hold a port, which is the same for all destinations.
	foreign [protocols][families][sources][]window
}

func newFlows(ports int) *flows {
	t := &flows{ports: ports}
	for i := range t.each {
		t.each[i].held = make([]*connection, ports)
		t.each[i].taken = make([]window, ports)
	}
	for p := range t.foreign {
		for f := range t.foreign[p] {
			for s := range t.foreign[p][f] {
				t.foreign[p][f][s] = make([]window, ports)
			}
		}
	}
	return t
}

func (t *flows) foreignAt(f flow, port int) *window {
	return &t.foreign[f.protocol][f.family][f.source][port]
}

// target is how many 4-tuples of each flow are kept taken.
func (t *flows) target() int { return t.ports * 9 / 10 }

// begin notes that a dial is about to begin, unless one of the flows, which it
// returns, has its share already.
func (t *flows) begin(all []flow) (full flow, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, f := range all {
		if a := &t.each[f.index()]; a.n+a.dialling >= t.target() {
			return f, false
		}
	}
	for _, f := range all {
		a := &t.each[f.index()]
		a.dialling++
		a.dials.begin()
	}
	return flow{}, true
}

// end notes that a dial is over, and what it has got is kept.
func (t *flows) end(all []flow) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, f := range all {
		a := &t.each[f.index()]
		a.dialling--
		a.dials.end()
	}
}

// keep notes a connection, unless there is one on the 4-tuple, which it returns.
func (t *flows) keep(c *connection) (other *connection) {
	t.mu.Lock()
	defer t.mu.Unlock()
	a := &t.each[c.flow.index()]
	if other := a.held[c.port]; other != nil {
		return other
	}
	a.held[c.port] = c
	a.taken[c.port].begin()
	a.n++
	t.total++
	return nil
}

// pick returns one of the flow's connections, for the caller alone, or nil.
func (t *flows) pick(f flow, random *rand.Rand) *connection {
	t.mu.Lock()
	defer t.mu.Unlock()
	a := &t.each[f.index()]
	for i, start := 0, random.IntN(t.ports); i < t.ports; i++ {
		if c := a.held[(start+i)%t.ports]; c != nil && !c.busy {
			c.busy = true
			return c
		}
	}
	return nil
}

// putBack ends the use of a connection that was picked.
func (t *flows) putBack(c *connection) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c.busy = false
}

// drop closes a connection that was picked. Its 4-tuple may be had again before
// this is known here.
func (t *flows) drop(c *connection) {
	t.mu.Lock()
	a := &t.each[c.flow.index()]
	a.held[c.port] = nil
	a.n--
	t.total--
	t.mu.Unlock()
	c.Close()
	t.mu.Lock()
	defer t.mu.Unlock()
	a.taken[c.port].end()
}

// isHeld reports whether there is a connection from a port just now.
func (t *flows) isHeld(f flow, port int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.each[f.index()].held[port] != nil
}

// mayBeTaken reports whether there may have been a connection from a port at any
// time since start, when a dial began on the flow.
func (t *flows) mayBeTaken(f flow, port int, start time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	a := &t.each[f.index()]
	return a.taken[port].since(start) || a.dials.othersSince(start)
}

// mayBeFull reports whether all ports may have been taken since then, if those that
// dial had one each.
func (t *flows) mayBeFull(f flow, start time.Time, dialling int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := dialling
	a := &t.each[f.index()]
	for port := range t.ports {
		if a.taken[port].since(start) || t.foreignAt(f, port).since(start) {
			n++
		}
	}
	return n >= t.ports
}

// held is how many connections there are.
func (t *flows) held() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.total
}
