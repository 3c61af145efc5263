package connectx

import (
	"net/netip"
	"time"

	"github.com/seed22601231/connectx/lookup"
	"github.com/seed22601231/connectx/portpick"
)

// connectPicked connects from a port of the range.
func (l *tupleLock) connectPicked(source netip.Addr) error {
	f := l.flow(source, l.device)
	for system := l.ns.ports.Load(); ; {
		s := search{tupleLock: l, source: source, walk: l.ns.order.Walk(l.ports, source, l.remote)}
		o, err := s.run(f)
		if o == won {
			l.ns.full.forget(f)
		}
		if o == won || err != nil {
			return err
		}
		if l.brief {
			return l.exhausted(source, s.taken)
		}
		now := l.ns.refresh()
		if now == system {
			return l.exhausted(source, s.taken)
		}
		system = now // the range is another one by now
		if err := l.usePorts(now); err != nil {
			return err
		}
	}
}

// A search looks for a port from which the 4-tuple is free.
type search struct {
	*tupleLock
	source netip.Addr
	walk   portpick.Walk
	room   [lookup.MaxPorts]uint16
	locked []uint16 // passed over because of contention
	taken  taken
}

// maxLocked bounds the ports that are tried again after contention. There are
// never many that are locked; what else causes contention, sockets that do not
// share, does not pass.
const maxLocked = 64

// run returns won, or an error; or neither if there is no port.
//
// As long as most ports are free, the fastest way is to try one after the other.
// One that is not free costs a lookup of some four microseconds, though; among
// many in one request, less than two.
func (s *search) run(f flow) (outcome, error) {
	for range 2 {
		if port, ok := s.walk.Next(); ok {
			if o, err := s.tryPort(port, false); o == won || err != nil {
				return o, err
			}
		}
		if s.walk.Crowded() {
			break
		}
	}
	for n := 4; !s.walk.Crowded(); n *= 2 {
		if o, more, err := s.tryNext(n); o == won || err != nil {
			return o, err
		} else if !more {
			break
		}
	}
	again := false
	if !s.brief { // else that has been looked at
		known, full, elected := s.ns.full.recently(f)
		if full {
			s.taken = known.taken
			return conflict, nil
		}
		again = elected
	}
	if o, err := s.tryAny(again); o == won || err != nil {
		return o, err
	}
	if s.brief {
		o, _, err := s.tryNext(len(s.room))
		return o, err
	}
	start := time.Now()
	for n := 8; ; n = min(2*n, len(s.room)) {
		o, more, err := s.tryNext(n)
		if o == won || err != nil {
			return o, err
		}
		if !more {
			break
		}
	}
	o, err := s.tryLocked()
	if o != won && err == nil {
		s.ns.full.remember(f, s.source, s.taken, start, len(s.hook.sources))
	}
	return o, err
}

// tryPort tries to take the 4-tuple from one port. Unless it has won, the socket
// is ready for the next port.
func (s *search) tryPort(port uint16, looked bool) (outcome, error) {
	local := netip.AddrPortFrom(s.source, port)
	if local == s.remote {
		return conflict, nil // it would talk to itself
	}
	s.begin(port, port)
	o, _, err := s.take(local, looked)
	if o == conflict || o == contention {
		s.passOver(port, o)
		err = s.reuse()
	}
	s.end(port, port, o)
	if o == won || err != nil {
		return o, err
	}
	return o, s.ended()
}

// passOver notes that a port is taken. One that may be free in a moment is worth
// another try.
func (s *search) passOver(port uint16, o outcome) {
	s.taken.tried++
	if o == contention {
		s.taken.held++
		if len(s.locked) < maxLocked {
			s.locked = append(s.locked, port)
		}
	}
}

// tryNext looks at the next n ports at once, and tries those on which nobody was
// found. It reports whether there may be more.
func (s *search) tryNext(n int) (o outcome, more bool, err error) {
	ports := nextPorts(&s.walk, s.room[:n])
	if len(ports) == 0 {
		return conflict, false, nil
	}
	if !s.canLook() {
		return failed, false, s.blind
	}
	s.did.Lookups += uint64(len(ports))
	sockets, err := s.conn.UDPPorts(s.source, ports, s.remote, s.device)
	if err != nil {
		s.blind = err
		return failed, false, err
	}
	for i, port := range ports {
		if sockets[i] != (lookup.Socket{}) {
			o := s.inTheWay(sockets[i])
			s.begin(port, port)
			s.passOver(port, o)
			s.end(port, port, o)
			continue
		}
		if o, err := s.tryPort(port, true); o == won || err != nil {
			return o, false, err
		}
	}
	return conflict, true, s.ended()
}

// tryAny tries to take a port that nobody is on. In vain, the kernel walks
// through all UDP sockets of the machine for that, whatever the size of the
// range: a millisecond, and with a million sockets tens of them. Only three
// percent of the time are spent on it, unless the alternative is to search the
// whole range again.
func (s *search) tryAny(again bool) (outcome, error) {
	if s.ports.Len() < 1024 || s.outside {
		return conflict, nil // looking at each of them is faster, or all there is
	}
	f := flow{protocol: "udp", source: s.source, ports: s.hook.ports, device: s.device}
	if _, full, _ := s.ns.full.recently(f); full && !again {
		return conflict, nil
	}
	if s.hook.ports != (PortRange{}) && !s.setPortRange(s.ports.Low(), s.ports.High()) {
		return conflict, nil
	}
	start := time.Now()
	s.begin(s.ports.Low(), s.ports.High())
	o, err := s.takeAny(s.source)
	if o == conflict {
		s.ns.full.rememberFor(f, fullFlow{source: s.source}, 32*time.Since(start))
		err = s.reuse()
	}
	s.end(s.ports.Low(), s.ports.High(), o)
	if o == won {
		s.ns.full.forget(f)
	}
	return o, err
}

// tryLocked tries the ports again that were passed over because of contention:
// one that was locked may be free in a moment. All source addresses of a dial
// together wait for not quite loadedPatience; each gets one more try at least.
func (s *search) tryLocked() (outcome, error) {
	if len(s.locked) == 0 {
		return conflict, nil
	}
	left := max(loadedPatience()-s.waited, 2*time.Millisecond)
	for pause := time.Millisecond; pause < left && len(s.locked) > 0; pause *= 2 {
		left -= pause
		s.waited += pause
		if err := s.sleep(pause); err != nil {
			return failed, err
		}
		again := s.locked
		s.locked = s.locked[:0]
		s.taken.tried -= len(again)
		s.taken.held -= len(again)
		for _, port := range again {
			if o, err := s.tryPort(port, false); o == won || err != nil {
				return o, err
			}
		}
	}
	return conflict, nil
}
