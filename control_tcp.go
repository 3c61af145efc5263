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
	if err := a.shareTCP(); err != nil {
		return err
	}
	if a.local.Port() != 0 {
		return a.connectTCPFrom()
	}
	if a.local.Addr().IsValid() {
		// Leaves the choice of a port to connect, which knows the destination.
		// An error means a kernel before 4.2, where bind takes a port of its own.
		_ = sys.SetInt(a.fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
		if err := a.bind(a.local); err != nil {
			return os.NewSyscallError("bind", err)
		}
	}
	err := a.connectTCPPicked()
	if err == nil && a.ns.full.used.Load() {
		a.ns.full.forget(a.flow())
	}
	return err
}

// shareTCP lets others share the socket's port. Every socket does, even one that
// is not bound to an explicit port itself: bind to that port succeeds later only
// if all sockets on it have the flag.
func (a *attempt) shareTCP() error {
	return os.NewSyscallError("setsockopt", sys.SetInt(a.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
}

// connectTCPFrom connects from the port that the caller chose.
func (a *attempt) connectTCPFrom() error {
	switch err := a.bind(a.local); err {
	case nil:
	case unix.EADDRINUSE:
		return &inUseError{"the source port is held by a socket that does not share it", a.chosen(), a.remote, err}
	default:
		return os.NewSyscallError("bind", err)
	}
	sa := a.remoteSockaddr()
	switch err := connectTCP(a.fd, &sa); err {
	case unix.EADDRNOTAVAIL:
		return &inUseError{"the 4-tuple is in use or in TIME_WAIT", a.chosen(), a.remote, err}
	default:
		return os.NewSyscallError("connect", err)
	}
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

// connectTCPPicked connects from a port of the ephemeral range.
//
// The destination's own port comes last: on this host it could be the socket's
// own, and TCP would connect it to itself.
func (a *attempt) connectTCPPicked() error {
	ports := a.ns.ports.Load()
	avoid := a.remote.Port()
	walk := a.ns.order.Walk(ports, a.local.Addr(), a.remote)
	sa := a.remoteSockaddr()
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
			low, high = window(ports, port, windows[tries], avoid)
			tries++
		}
		if !a.setPortRange(low, high) {
			return a.connectTCPAnyPort(&sa)
		}
		if err := connectTCP(a.fd, &sa); err != unix.EADDRNOTAVAIL {
			return os.NewSyscallError("connect", err)
		}
		if err := a.ended(); err != nil {
			return err
		}
		if tries == 1 {
			if err := a.fullTCP(ports); err != nil {
				return err
			}
		}
	}
	return a.connectTCPLastPort(&sa)
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

// connectTCPAnyPort leaves the search to the kernel.
func (a *attempt) connectTCPAnyPort(sa *sys.Sockaddr) error {
	start := time.Now()
	if err := connectTCP(a.fd, sa); err != unix.EADDRNOTAVAIL {
		return os.NewSyscallError("connect", err)
	}
	ports := a.ns.refresh()
	if protocol, _ := sys.Int(a.fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); protocol == unix.IPPROTO_MPTCP {
		// net.Dialer dials again without MPTCP.
		return &exhaustedError{ports, a.local.Addr(), a.remote, unix.EADDRNOTAVAIL}
	}
	if err := a.fullTCP(ports); err != nil {
		return err
	}
	return a.connectTCPBoundPort(ports, start)
}

// fullTCP returns the error of a search that has found no port a moment ago, if
// there was one.
func (a *attempt) fullTCP(ports *portpick.Ports) error {
	if source, full, _ := a.ns.full.recently(a.flow()); full {
		return &exhaustedError{ports, source, a.remote, unix.EADDRNOTAVAIL}
	}
	return nil
}

// connectTCPLastPort lets the kernel search the whole range, and so gives it
// the last word on whether a port is free.
//
// The range is named to it even where it is the system's: of that, the kernel
// leaves out the last port if their number is odd (__inet_hash_connect).
func (a *attempt) connectTCPLastPort(sa *sys.Sockaddr) error {
	start := time.Now()
	ports := a.ns.refresh()
	avoid := a.remote.Port()
	parts := [][2]uint16{{ports.Low(), ports.High()}}
	if ports.Low() <= avoid && avoid <= ports.High() {
		parts = [][2]uint16{{ports.Low(), avoid - 1}, {avoid + 1, ports.High()}, {avoid, avoid}}
	}
	for _, part := range parts {
		if part[0] > part[1] {
			continue
		}
		a.setPortRange(part[0], part[1])
		err := connectTCP(a.fd, sa)
		if err == unix.EADDRNOTAVAIL {
			continue
		}
		if err == nil && part[0] == avoid {
			if bound, err := sys.LocalAddr(a.fd); err == nil && bound == a.remote {
				break // connected to itself
			}
		}
		return os.NewSyscallError("connect", err)
	}
	return a.connectTCPBoundPort(ports, start)
}

// connectTCPBoundPort connects from a port that the kernel leaves out of its
// own choice: one that a socket was bound to explicitly, for another
// destination (tb->fastreuse in __inet_hash_connect). To a socket that is bound
// to it as well, such a port is as good as any.
//
// It is called when all other ports are taken, so most lookups find the socket
// that is in the way. start is when the search for those began.
func (a *attempt) connectTCPBoundPort(ports *portpick.Ports, start time.Time) error {
	exhausted := &exhaustedError{ports, a.local.Addr(), a.remote, unix.EADDRNOTAVAIL}
	conn, err := a.ns.conn()
	if err != nil {
		return exhausted
	}
	failed := false
	defer func() { a.ns.release(conn, failed) }()

	device := a.boundDevice()
	if !a.local.Addr().IsValid() {
		route, err := a.route(conn, device)
		if errors.Is(err, lookup.ErrNoSource) {
			// What the errno means here is that this host has no address to
			// connect from.
			return os.NewSyscallError("connect", unix.EADDRNOTAVAIL)
		}
		if err != nil {
			return exhausted
		}
		exhausted.sourceAddr = route.Source
	}
	walk := a.ns.order.Walk(ports, exhausted.sourceAddr, a.remote)
	var room [lookup.MaxPorts]uint16
	for batch := nextPorts(&walk, room[:]); len(batch) > 0; batch = nextPorts(&walk, room[:]) {
		if err := a.ended(); err != nil {
			return err
		}
		sockets, err := conn.TCPPorts(exhausted.sourceAddr, batch, a.remote, device)
		if err != nil {
			failed = true
			return exhausted
		}
		for i, port := range batch {
			local := netip.AddrPortFrom(exhausted.sourceAddr, port)
			if sockets[i] != (lookup.Socket{}) || local == a.remote {
				continue // taken, or would be connected to itself
			}
			switch err := a.bind(local); err {
			case nil:
			case unix.EADDRINUSE:
				continue
			default:
				return os.NewSyscallError("bind", err)
			}
			sa := a.remoteSockaddr()
			if err := connectTCP(a.fd, &sa); err != unix.EADDRNOTAVAIL {
				return os.NewSyscallError("connect", err)
			}
			// Somebody was faster.
			if err := a.renew(); err != nil {
				return err
			}
			if err := a.shareTCP(); err != nil {
				return err
			}
		}
	}
	a.ns.full.remember(a.flow(), exhausted.sourceAddr, start)
	return exhausted
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
