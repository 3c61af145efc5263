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
// free. Of the system's range these are the ports that the kernel leaves out of
// its own choice: those that a socket was bound to explicitly, for another
// destination (tb->fastreuse in __inet_hash_connect). To a socket that is bound
// to it as well, such a port is as good as any.
//
// Of the system's range all other ports are taken when it is called, so most
// lookups find the socket that is in the way. start is when the search for those
// began.
func (a *attempt) connectTCPBoundPort(start time.Time) error {
	s := tcpSearch{attempt: a, source: a.local.Addr()}
	defer s.close()
	switch err := s.prepare(); {
	case err != nil && !noAnswer(err):
		return os.NewSyscallError("connect", a.whyNoSource(err))
	case err != nil && a.hook.ports == (PortRange{}):
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
		if s.broken && a.hook.ports == (PortRange{}) {
			return a.exhausted(s.source, s.taken)
		}
		if err := a.ended(); err != nil {
			return err
		}
	}
	a.ns.full.remember(a.flow(a.local.Addr(), a.boundDevice()), s.source, s.taken, start, len(a.hook.sources))
	return a.exhausted(s.source, s.taken)
}

// whyNoSource is the errno for a destination that the kernel has no route to, or no
// address of this host to connect from. Of the system's range, connect has said
// EADDRNOTAVAIL already, which it says of both where IPv6 is turned off. Ports of
// PortRange may all have been refused by bind, which knows nothing of a destination.
func (a *attempt) whyNoSource(err error) unix.Errno {
	if errno, ok := errors.AsType[unix.Errno](err); ok && a.hook.ports != (PortRange{}) {
		return errno
	}
	return unix.EADDRNOTAVAIL
}

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
