package portpick

import (
	"crypto/rand"
	"encoding/binary"
	mathrand "math/rand/v2"
	"net/netip"
	"sync/atomic"
)

const (
	// sets × ways cursors of 8 bytes: 128 KiB.
	sets = 4096
	ways = 4

	// probes is how many ports of one half a walk is offered before it looks
	// at the other. It decides how readily odd ports are used while some even
	// ones are still free: with probes = 16 and half of the even ports taken
	// at random, by one dial in 65,536 and the up to 255 that follow it, 0.4 %
	// of all.
	probes = 16
)

// An Order holds the secret and, for every pair of source and destination that
// was dialled lately, how far its walk has come. It is safe for concurrent
// use.
type Order struct {
	secret [2]uint64
	table  [sets][ways]atomic.Uint64 // cursors
}

// NewOrder returns an Order with a secret of its own.
func NewOrder() *Order {
	var key [16]byte
	rand.Read(key[:]) // never fails
	o := new(Order)
	o.secret[0] = binary.LittleEndian.Uint64(key[:8])
	o.secret[1] = binary.LittleEndian.Uint64(key[8:])
	return o
}

// A cursor is what an Order remembers of one pair: how many ports of the even
// and of the odd half were offered (modulo the size of the half), and for how
// many more dials the odd half comes first, because the even one was found
// used up.
//
// bits 0-15 even, 16-31 odd, 32-39 credit, 40-63 tag of the pair (never 0)
type cursor uint64

const tagShift = 40

func (c cursor) position(parity uint32) uint32 { return uint32(c>>(16*parity)) & 0xffff }
func (c cursor) credit() uint32                { return uint32(c>>32) & 0xff }
func (c cursor) tag() uint64                   { return uint64(c >> tagShift) }

func (c cursor) withPosition(parity, position uint32) cursor {
	shift := 16 * parity
	return c&^(0xffff<<shift) | cursor(position&0xffff)<<shift
}

func (c cursor) withCredit(n uint32) cursor { return c&^(0xff<<32) | cursor(n)<<32 }

// Walk begins the search for a port for one dial from source to destination.
// An invalid source stands for one that is not known yet. Zones are not looked
// at. Each range of ports has an order of its own.
func (o *Order) Walk(ports *Ports, source netip.Addr, destination netip.AddrPort) Walk {
	var message [39]byte
	if source.IsValid() {
		a := source.As16()
		copy(message[:], a[:])
		message[34] = 1
	}
	if destination.Addr().IsValid() {
		a := destination.Addr().As16()
		copy(message[16:], a[:])
	}
	binary.LittleEndian.PutUint16(message[32:], destination.Port())
	binary.LittleEndian.PutUint16(message[35:], ports.low)
	binary.LittleEndian.PutUint16(message[37:], ports.high)
	key := siphash(o.secret, message[:])

	w := Walk{ports: ports, key: key, slot: o.slot(mix(key))}
	if w.ports.half(1) == 0 {
		return w
	}
	// Take one dial off the credit of the odd half.
	for {
		c := cursor(w.slot.Load())
		if c.credit() == 0 {
			return w
		}
		if w.slot.CompareAndSwap(uint64(c), uint64(c.withCredit(c.credit()-1))) {
			w.parity, w.crowded = 1, true
			return w
		}
	}
}

// slot returns the cursor for a pair, a new one if the pair has none. A pair
// whose cursor had to make room for another starts again from a random place:
// that costs it a few taken ports, no more.
func (o *Order) slot(hash uint64) *atomic.Uint64 {
	set := &o.table[hash%sets]
	tag := hash>>tagShift | 1
	for {
		var seen [ways]uint64
		free := -1
		for way := range set {
			seen[way] = set[way].Load()
			switch c := cursor(seen[way]); {
			case c.tag() == tag:
				return &set[way]
			case c == 0 && free < 0:
				free = way
			}
		}
		if free < 0 {
			free = mathrand.IntN(ways)
		}
		// If another dial was quicker, it may have been one of the same pair,
		// and then the two have to share.
		if set[free].CompareAndSwap(seen[free], tag<<tagShift|uint64(mathrand.Uint32())) {
			return &set[free]
		}
	}
}

// A Walk offers the ports of a range to one dial. It is a plain value for use
// by one goroutine.
type Walk struct {
	ports *Ports
	key   uint64
	slot  *atomic.Uint64

	crowded bool
	parity  uint32 // of the half that is being offered
	phase   uint8  // 0 and 1: probing a half; 2 and 3: all the rest of a half
	tries   uint32 // ports offered in this phase

	seen [2]span   // what the probes of each half have covered
	rest [2]uint32 // positions left in phases 2 and 3
	next [2]uint32 // the next of them
}

// A span is a run of positions, or empty.
type span struct {
	first, count uint32
	broken       bool // other walks took positions in between
}

// Next returns the next port to try. Calling it again says that the port
// before was of no use. It returns false once every port was offered.
//
// Dials that run side by side towards the same destination share the walk:
// they are offered different ports, and each of them is still offered all
// before Next returns false. In such a case, a port can come a second time.
func (w *Walk) Next() (port uint16, ok bool) {
	for {
		switch w.phase {
		case 0, 1:
			if w.tries < probes {
				if port, ok := w.probe(); ok {
					w.tries++
					return port, true
				}
			}
			if w.phase == 0 && w.parity == 0 {
				w.grantCredit()
			}
			w.phase++
			w.crowded = true
			w.tries = 0
			w.parity ^= 1
			if w.phase == 2 {
				w.parity = 0
				w.startRest(0)
				w.startRest(1)
			}
		case 2, 3:
			if port, ok := w.takeRest(); ok {
				return port, true
			}
			w.phase++
			w.parity = 1
		default:
			return 0, false
		}
	}
}

// Crowded reports whether few ports are free: the probes of the even half have
// all been of no use, in this walk or in one towards the same destination not
// many dials ago. From then on, looking at many ports at once pays.
func (w *Walk) Crowded() bool { return w.crowded }

// probe takes the next position of the current half off the shared cursor. It
// returns false if the walk has been through the whole half.
func (w *Walk) probe() (uint16, bool) {
	n := w.ports.half(w.parity)
	s := &w.seen[w.parity]
	for s.count < n {
		var at uint32
		for {
			c := cursor(w.slot.Load())
			at = c.position(w.parity) % n
			if w.slot.CompareAndSwap(uint64(c), uint64(c.withPosition(w.parity, (at+1)%n))) {
				break
			}
		}
		if s.count == 0 {
			s.first = at
		} else if at != (s.first+s.count)%n {
			s.broken = true
		}
		s.count++
		if port := w.port(at, n); !w.ports.isReserved(port) {
			return port, true
		}
	}
	return 0, false
}

// grantCredit lets the next dials begin with the odd half: as many as it takes
// to make the probes of a used-up even half a small part of the work, and few
// enough to notice soon that even ports are free again.
func (w *Walk) grantCredit() {
	credit := min(max(w.ports.half(0)/probes, 1), 255)
	for {
		c := cursor(w.slot.Load())
		if w.slot.CompareAndSwap(uint64(c), uint64(c.withCredit(credit))) {
			return
		}
	}
}

// startRest prepares the walk through what the probes of a half have left.
func (w *Walk) startRest(parity uint32) {
	n := w.ports.half(parity)
	s := w.seen[parity]
	if s.count == 0 || s.broken {
		w.rest[parity] = n
		if n > 0 {
			w.next[parity] = cursor(w.slot.Load()).position(parity) % n
		}
		return
	}
	w.rest[parity] = n - s.count
	w.next[parity] = (s.first + s.count) % n
}

// takeRest returns the next port of the current half, and leaves the shared
// cursor behind it for the dials that follow.
func (w *Walk) takeRest() (uint16, bool) {
	n := w.ports.half(w.parity)
	for w.rest[w.parity] > 0 {
		at := w.next[w.parity]
		w.rest[w.parity]--
		w.next[w.parity] = (at + 1) % n
		port := w.port(at, n)
		if w.ports.isReserved(port) {
			continue
		}
		c := cursor(w.slot.Load())
		w.slot.CompareAndSwap(uint64(c), uint64(c.withPosition(w.parity, (at+1)%n)))
		return port, true
	}
	return 0, false
}

// port returns the port at a position of a half that holds n.
func (w *Walk) port(at, n uint32) uint16 {
	offset := 2*permute(w.key+uint64(w.parity), at, n) + w.parity
	return w.ports.low + uint16(offset)
}
