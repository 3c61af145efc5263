//go:build linux

package connectx

import (
	"errors"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/sys"
	"github.com/seed22601231/connectx/lookup"
	"github.com/seed22601231/connectx/portpick"
)

// connectTCP connects the socket: the TCP rows of the contract.
func (a *attempt) connectTCP() error {
	if err := a.prepareTCP(); err != nil {
		return err
	}
	if a.local.Port() != 0 {
		return a.connectTCPFrom()
	}
	err := a.connectTCPPicked()
	if err == nil && a.ns.full.used.Load() {
		a.ns.full.forget(a.flow(a.local.Addr(), a.boundDevice()))
	}
	return err
}

// prepareTCP sets what a fresh socket needs.
//
// Every socket lets others share its port, even one that is not bound to an
// explicit port itself: bind to that port succeeds later only if all sockets on
// it have the flag.
func (a *attempt) prepareTCP() error {
	if a.hook.fastOpen {
		// An error means that net.ipv4.tcp_fastopen does not have it.
		_ = sys.SetInt(a.fd, unix.SOL_TCP, unix.TCP_FASTOPEN_CONNECT, 1)
	}
	return os.NewSyscallError("setsockopt", sys.SetInt(a.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
}

// connectTCPFrom connects from the port that the caller chose.
func (a *attempt) connectTCPFrom() error {
	switch o, err := a.tryTCPPort(a.local); o {
	case contention:
		return &inUseError{"the source port is held by a socket that does not share it", a.chosen(), a.remote, unix.EADDRINUSE}
	case conflict:
		return &inUseError{"the 4-tuple is in use or in TIME_WAIT", a.chosen(), a.remote, unix.EADDRNOTAVAIL}
	default:
		return err
	}
}

// tryTCPPort tries to connect from one port, to which it binds the socket. Unless
// the outcome is contention, the socket is bound then.
func (a *attempt) tryTCPPort(local netip.AddrPort) (o outcome, err error) {
	a.begin(local.Port(), local.Port())
	switch err := a.bind(local); err {
	case nil:
		return a.startTCP(local.Port(), local.Port())
	case unix.EADDRINUSE:
		a.end(local.Port(), local.Port(), contention)
		return contention, nil
	default:
		a.end(local.Port(), local.Port(), failed)
		return failed, os.NewSyscallError("bind", err)
	}
}

// tryTCP tries to connect from one of the ports low to high, among which the
// kernel chooses.
func (a *attempt) tryTCP(low, high uint16) (outcome, error) {
	a.begin(low, high)
	return a.startTCP(low, high)
}

// startTCP starts to connect, and with that ends the try.
func (a *attempt) startTCP(low, high uint16) (o outcome, err error) {
	sa := a.remoteSockaddr()
	switch err = connectTCP(a.fd, &sa); err {
	case nil:
		o = won
	case unix.EADDRNOTAVAIL:
		o, err = conflict, nil
	default:
		o, err = failed, os.NewSyscallError("connect", err)
	}
	a.end(low, high, o)
	return o, err
}

// connectTCP starts to connect, and returns nil if it can go on from there.
func connectTCP(fd int, sa *sys.Sockaddr) error {
	switch err := sys.ConnectTCP(fd, sa); err {
	case unix.EINPROGRESS, unix.EALREADY, unix.EISCONN, unix.EINTR:
		return nil
	default:
		return err
	}
}

// windows are the sizes of the parts of the range that the kernel is told to
// search, once few ports are free, before it is told to search all of it. A try
// of one port costs some two microseconds, and each further port of a window a
// tenth of one.
var windows = [...]uint16{64, 512, 4096}

// connectTCPPicked connects from a port of the range.
func (a *attempt) connectTCPPicked() error {
	if a.outside {
		return a.connectTCPExplicit()
	}
	if a.local.Addr().IsValid() {
		// Leaves the choice of a port to connect, which knows the destination.
		// An error means a kernel before 4.2, where bind takes a port of its own.
		_ = sys.SetInt(a.fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
		if err := a.bind(a.local); err != nil {
			return os.NewSyscallError("bind", err)
		}
	}
	err := a.connectTCPRange()
	if err != nil || !a.strayed() {
		return err
	}
	if err := a.renewTCP(); err != nil {
		return err
	}
	return a.connectTCPExplicit()
}

// strayed reports whether the socket has a port outside of PortRange. The kernel
// knows no such range that is not a part of the system's, and that one may have
// changed a moment ago.
func (a *attempt) strayed() bool {
	if a.hook.ports == (PortRange{}) {
		return false
	}
	local, err := sys.LocalAddr(a.fd)
	return err == nil && !a.hook.ports.Contains(local.Port())
}

// renewTCP is renew, with the socket ready for another try.
func (a *attempt) renewTCP() error {
	if err := a.renew(); err != nil {
		return err
	}
	return a.prepareTCP()
}

// connectTCPRange connects from a port of the range that the kernel does not have
// to be told with bind.
//
// The destination's own port comes last: on this host it could be the socket's
// own, and TCP would connect it to itself.
func (a *attempt) connectTCPRange() error {
	avoid := a.remote.Port()
	walk := a.ns.order.Walk(a.ports, a.local.Addr(), a.remote)
	for tries := 0; tries < len(windows); {
		port, ok := walk.Next()
		if !ok {
			break
		}
		if port == avoid {
			continue
		}
		low, high := port, port
		if walk.Crowded() {
			low, high = window(a.ports, port, windows[tries], avoid)
			tries++
		}
		if !a.setPortRange(low, high) {
			return a.connectTCPAnyPort()
		}
		if o, err := a.tryTCP(low, high); o == won || err != nil {
			return err
		}
		if err := a.ended(); err != nil {
			return err
		}
		if tries == 1 {
			if err := a.fullTCP(); err != nil {
				return err
			}
		}
	}
	return a.connectTCPLastPort()
}

// setPortRange limits the ports that connect may choose, on this socket. It
// returns false if the kernel cannot: before 6.3, or on an MPTCP socket.
func (a *attempt) setPortRange(low, high uint16) bool {
	return sys.SetInt(a.fd, unix.SOL_IP, unix.IP_LOCAL_PORT_RANGE, int32(uint32(high)<<16|uint32(low))) == nil
}

// window returns the part of the range, of at most the given size, that
// surrounds port but does not contain avoid.
func window(ports *portpick.Ports, port, size, avoid uint16) (low, high uint16) {
	low = port - min(port-ports.Low(), size/2)
	high = low + min(ports.High()-low, size-1)
	switch {
	case low <= avoid && avoid < port:
		low = avoid + 1
	case port < avoid && avoid <= high:
		high = avoid - 1
	}
	return low, high
}

var errNoLocalPortRange = errors.New("the kernel does not know IP_LOCAL_PORT_RANGE for this socket")

// connectTCPAnyPort leaves the search to the kernel.
func (a *attempt) connectTCPAnyPort() error {
	a.fallBack(errNoLocalPortRange)
	if a.hook.ports != (PortRange{}) {
		return a.connectTCPExplicit()
	}
	start := time.Now()
	if o, err := a.tryTCP(a.ports.Low(), a.ports.High()); o == won || err != nil {
		return err
	}
	if err := a.usePorts(a.ns.refresh()); err != nil {
		return err
	}
	if protocol, _ := sys.Int(a.fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); protocol == unix.IPPROTO_MPTCP {
		// net.Dialer dials again without MPTCP.
		return a.exhausted(a.local.Addr(), taken{})
	}
	if err := a.fullTCP(); err != nil {
		return err
	}
	return a.connectTCPBoundPort(start)
}

// fullTCP returns the error of a search that has found no port a moment ago, if
// there was one.
func (a *attempt) fullTCP() error {
	if known, full, _ := a.ns.full.recently(a.flow(a.local.Addr(), a.boundDevice())); full {
		return a.exhausted(known.source, known.taken)
	}
	return nil
}

// connectTCPLastPort lets the kernel search the whole range, and so gives it
// the last word on whether a port is free.
//
// The range is named to it even where it is the system's: of that, the kernel
// leaves out the last port if their number is odd (__inet_hash_connect).
func (a *attempt) connectTCPLastPort() error {
	start := time.Now()
	if err := a.usePorts(a.ns.refresh()); err != nil {
		return err
	}
	if a.outside {
		return a.connectTCPExplicit()
	}
	avoid := a.remote.Port()
	parts := [][2]uint16{{a.ports.Low(), a.ports.High()}}
	if a.ports.Low() <= avoid && avoid <= a.ports.High() {
		parts = [][2]uint16{{a.ports.Low(), avoid - 1}, {avoid + 1, a.ports.High()}, {avoid, avoid}}
	}
	for _, part := range parts {
		low, high := part[0], part[1]
		if low > high {
			continue
		}
		a.setPortRange(low, high)
		o, err := a.tryTCP(low, high)
		if err != nil {
			return err
		}
		if o != won {
			continue
		}
		if low == avoid {
			if bound, err := sys.LocalAddr(a.fd); err == nil && bound == a.remote {
				// Connected to itself.
				if err := a.renewTCP(); err != nil {
					return err
				}
				break
			}
		}
		return nil
	}
	return a.connectTCPBoundPort(start)
}

// connectTCPExplicit connects from a port of a range that the kernel cannot be
// told to choose from: one that is not a part of the system's, or any before
// Linux 6.3.
func (a *attempt) connectTCPExplicit() error {
	start := time.Now()
	walk := a.ns.order.Walk(a.ports, a.local.Addr(), a.remote)
	for range 2 {
		port, ok := walk.Next()
		if !ok || walk.Crowded() {
			break
		}
		if o, err := a.tryTCPExplicit(netip.AddrPortFrom(a.local.Addr(), port)); o == won || err != nil {
			return err
		}
	}
	if err := a.fullTCP(); err != nil {
		return err
	}
	return a.connectTCPBoundPort(start)
}

// tryTCPExplicit is tryTCPPort after which the socket is ready for another try,
// unless it has won.
func (a *attempt) tryTCPExplicit(local netip.AddrPort) (outcome, error) {
	if local == a.remote || !local.Addr().IsValid() && local.Port() == a.remote.Port() {
		return conflict, nil // it would, or might, be connected to itself
	}
	o, err := a.tryTCPPort(local)
	if o == conflict {
		err = a.renewTCP()
	}
	return o, err
}

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
	case errors.Is(err, lookup.ErrNoSource):
		// What the errno means here is that this host has no address to
		// connect from.
		return os.NewSyscallError("connect", unix.EADDRNOTAVAIL)
	case err != nil && a.hook.ports == (PortRange{}):
		return a.exhausted(s.source, s.taken)
	}
	walk := a.ns.order.Walk(a.ports, s.source, a.remote)
	for n := 8; ; n = min(2*n, len(s.room)) {
		batch := nextPorts(&walk, s.room[:n])
		if len(batch) == 0 {
			break
		}
		if o, err := s.try(batch); o == won || err != nil {
			return err
		}
		if s.broken && a.hook.ports == (PortRange{}) {
			return a.exhausted(s.source, s.taken)
		}
		if err := a.ended(); err != nil {
			return err
		}
	}
	a.ns.full.remember(a.flow(a.local.Addr(), a.boundDevice()), s.source, s.taken, start)
	return a.exhausted(s.source, s.taken)
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
	s.source = route.Source
	return err
}

func (s *tcpSearch) close() {
	if s.conn != nil {
		s.ns.release(s.conn, s.broken)
	}
}

// try tries the ports of a batch that nobody is found on.
func (s *tcpSearch) try(batch []uint16) (o outcome, err error) {
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
