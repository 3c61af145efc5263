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

	// A search that takes less than minRemember may as well be repeated.
	minRemember = time.Millisecond

	// maxFull bounds how many flows are remembered at once.
	maxFull = 1024
)

// A flow is what a port is for.
type flow struct {
	protocol    string         // "tcp" or "udp"
	source      netip.Addr     // invalid for TCP where the caller has chosen none
	destination netip.AddrPort // invalid for all of them
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
	until   time.Time
	elected bool // a dial is searching again
}

// remember notes that a search which began at start has found no port, and from
// which source address.
func (t *fullTable) remember(f flow, source netip.Addr, start time.Time) {
	if took := time.Since(start); took >= minRemember {
		t.rememberFor(f, source, min(took, maxRemember))
	}
}

// rememberFor is remember for a time that has nothing to do with the search.
func (t *fullTable) rememberFor(f flow, source netip.Addr, d time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.flows == nil || len(t.flows) >= maxFull {
		t.flows = make(map[flow]fullFlow)
	}
	t.flows[f] = fullFlow{source: source, until: time.Now().Add(d)}
	t.used.Store(true)
}

// recently reports whether no port was found a moment ago, and from which source
// address. When it is time to search again, one dial is told so; for the others
// what is known is good for another maxRemember.
func (t *fullTable) recently(f flow) (source netip.Addr, full, again bool) {
	if !t.used.Load() {
		return netip.Addr{}, false, false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	known, ok := t.flows[f]
	if !ok {
		return netip.Addr{}, false, false
	}
	switch over := time.Since(known.until); {
	case over < 0, over < maxRemember && known.elected:
		return known.source, true, false
	case over < maxRemember:
		known.elected = true
		t.flows[f] = known
		return netip.Addr{}, false, true
	default:
		delete(t.flows, f)
		return netip.Addr{}, false, false
	}
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
