package connectx

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// A search for a port that has found none is not repeated for as long as it
	// took, but never for longer than maxRemember: the default range takes up
	// to 50 ms, and a port that becomes free then is to be found within 100.
	maxRemember = 30 * time.Millisecond

	// A search that takes less than minRemember may as well be repeated, and so
	// may one that has taken longer only because the processor was busy: more than
	// perPort for each port.
	minRemember = time.Millisecond
	perPort     = 4 * time.Microsecond

	// maxFull bounds how many flows are remembered at once.
	maxFull = 1024
)

// A flow is what a port is for.
type flow struct {
	brief       bool           // whether a brief search for it pays
	protocol    string         // "tcp" or "udp"
	source      netip.Addr     // invalid for TCP where the caller has chosen none
	destination netip.AddrPort // invalid for all of them
	ports       PortRange      // zero for the system's
	device      uint32         // interface that the socket is bound to, else 0

	// What else the source depends on, where it is not known.
	mark, unicastInterface uint32
}

// A fullTable remembers where there was no port a moment ago, so that a storm of
// dials to a destination that has none left does not search for one over and
// over.
type fullTable struct {
	used  atomic.Bool // saves forget the lock while nothing is full
	mu    sync.Mutex
	flows map[flow]fullFlow
}

type fullFlow struct {
	source  netip.Addr
	taken   taken
	until   time.Time
	elected bool // a dial is searching again
}

// remember notes that a search which began at start has found no port, from which
// source address, and what it has found instead. Where a dial has several source
// addresses to search, what is found out about the first is to hold until it is
// through with the last.
func (t *fullTable) remember(f flow, source netip.Addr, by taken, start time.Time, sources int) {
	took := min(time.Since(start), time.Duration(by.tried)*perPort, maxRemember)
	if took >= minRemember {
		t.rememberFor(f, fullFlow{source: source, taken: by}, took*time.Duration(max(sources, 1)))
	}
}

// rememberFor is remember for a time that has nothing to do with the search.
func (t *fullTable) rememberFor(f flow, known fullFlow, d time.Duration) {
	known.until = time.Now().Add(d)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.flows == nil || len(t.flows) >= maxFull {
		t.flows = make(map[flow]fullFlow)
	}
	t.flows[f] = known
	t.used.Store(true)
}

// recently reports whether no port was found a moment ago, and from which source
// address. When it is time to search again, one dial is told so; for the others
// what is known is good for another maxRemember.
func (t *fullTable) recently(f flow) (known fullFlow, full, again bool) {
	if !t.used.Load() {
		return fullFlow{}, false, false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	known, ok := t.flows[f]
	if !ok {
		return fullFlow{}, false, false
	}
	switch {
	case known.holds():
		return known, true, false
	case time.Since(known.until) < maxRemember:
		known.elected = true
		t.flows[f] = known
		return fullFlow{}, false, true
	default:
		delete(t.flows, f)
		return fullFlow{}, false, false
	}
}

// holds reports whether it is not yet, or somebody else's, time to search again.
func (f *fullFlow) holds() bool {
	over := time.Since(f.until)
	return over < 0 || over < maxRemember && f.elected
}

// isKnown is recently for somebody who does not mean to search again.
func (t *fullTable) isKnown(f flow) (known fullFlow, full bool) {
	if !t.used.Load() {
		return fullFlow{}, false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	known, ok := t.flows[f]
	return known, ok && known.holds()
}

// forget notes that a port was found.
func (t *fullTable) forget(f flow) {
	if !t.used.Load() {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.flows, f)
}

// expire drops what is out of date.
func (t *fullTable) expire() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for f, known := range t.flows {
		if time.Since(known.until) > maxRemember {
			delete(t.flows, f)
		}
	}
	t.used.Store(len(t.flows) > 0)
}
