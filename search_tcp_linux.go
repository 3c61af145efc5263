package connectx

import (
	"errors"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/lookup"
	"github.com/seed22601231/connectx/portpick"
)

// connectTCPBoundPort looks at each port, and binds the socket to one that is
// free. If the kernel has searched the range already, these are the ports that it
// leaves out of its own choice: those that a socket was bound to explicitly, for
// another destination (tb->fastreuse in __inet_hash_connect). To a socket that is
// bound to it as well, such a port is as good as any.
//
// All other ports are taken then, so most lookups find the socket that is in the
// way, and without lookups it is not worth the search. start is when the search
// of the range began.
func (a *attempt) connectTCPBoundPort(start time.Time, searched bool) error {
	s := tcpSearch{attempt: a, source: a.local.Addr()}
	defer s.close()
	err := s.prepare()
	noRoute := errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH)
	switch {
	case errors.Is(err, lookup.ErrNoSource), noRoute && searched:
		return errNoAddress
	case err != nil && searched:
		return a.exhausted(s.source, s.taken)
	}
	walk := a.ns.order.Walk(a.ports, s.source, a.remote)
	if a.brief {
		if o, err := s.tryBatch(nextPorts(&walk, s.room[:])); o == won || err != nil {
			return err
		}
		return a.exhausted(s.source, s.taken)
	}
	for n := 8; ; n = min(2*n, len(s.room)) {
		batch := nextPorts(&walk, s.room[:n])
		if len(batch) == 0 {
			break
		}
		if o, err := s.tryBatch(batch); o == won || err != nil {
			return err
		}
		if s.broken && searched {
			return a.exhausted(s.source, s.taken)
		}
		if err := a.ended(); err != nil {
			return err
		}
	}
	if noRoute && s.taken.held < s.taken.tried {
		return errNoAddress
	}
	a.ns.full.remember(a.flow(a.local.Addr(), a.boundDevice()), s.source, s.taken, start, len(a.hook.sources))
	return a.exhausted(s.source, s.taken)
}

// errNoAddress is what connect says of each port where this host has no address to
// connect from: because of the destination's scope, or, where IPv6 is turned off,
// because there is no route to it.
var errNoAddress = os.NewSyscallError("connect", unix.EADDRNOTAVAIL)

// A tcpSearch looks at the ports of the range in batches.
type tcpSearch struct {
	*attempt
	conn   *lookup.Conn // nil if the kernel does not answer
	broken bool
	source netip.Addr // invalid if it is not known
	device uint32
	taken  taken
	room   [lookup.MaxPorts]uint16
}

// prepare opens the connection for lookups, and finds out what they ask for.
func (s *tcpSearch) prepare() (err error) {
	if s.conn, err = s.ns.conn(); err != nil {
		return err
	}
	s.device = s.boundDevice()
	if s.source.IsValid() {
		return nil
	}
	route, err := s.route(s.conn, s.device)
	s.source, s.broken = route.Source, noAnswer(err)
	return err
}

func (s *tcpSearch) close() {
	if s.conn != nil {
		s.ns.release(s.conn, s.broken)
	}
}

// tryBatch tries the ports of a batch that nobody is found on.
func (s *tcpSearch) tryBatch(batch []uint16) (o outcome, err error) {
	sockets := s.look(batch)
	for i, port := range batch {
		if sockets != nil && sockets[i] != (lookup.Socket{}) {
			s.found(port, sockets[i])
			continue
		}
		o, err := s.tryTCPExplicit(netip.AddrPortFrom(s.source, port))
		if o == won || err != nil {
			return o, err
		}
		s.taken.tried++
		if o == contention {
			s.taken.held++
		}
	}
	return conflict, nil
}

// found notes that a lookup has found a socket: one on the 4-tuple, or one that
// listens.
func (s *tcpSearch) found(port uint16, by lookup.Socket) {
	o := conflict
	s.taken.tried++
	switch {
	case by.TimeWait:
		s.taken.timeWait++
	case !by.Connected():
		s.taken.held++
		o = contention
	}
	s.begin(port, port)
	s.end(port, port, o)
}

// look returns the sockets on the ports, or nil if the kernel does not answer.
func (s *tcpSearch) look(batch []uint16) []lookup.Socket {
	if s.conn == nil || s.broken || !s.source.IsValid() {
		return nil
	}
	s.did.Lookups += uint64(len(batch))
	sockets, err := s.conn.TCPPorts(s.source, batch, s.remote, s.device)
	s.broken = err != nil
	return sockets
}

// nextPorts takes as many ports off the walk as there are, or as there is room
// for. It pauses where the walk becomes crowded.
func nextPorts(walk *portpick.Walk, room []uint16) []uint16 {
	crowded := walk.Crowded()
	for i := range room {
		port, ok := walk.Next()
		if !ok {
			return room[:i]
		}
		room[i] = port
		if walk.Crowded() != crowded {
			return room[:i+1]
		}
	}
	return room
}
