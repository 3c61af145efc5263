//go:build linux

package connectx

import (
	"errors"
	"hash/maphash"
	"net/netip"
	"os"
	"sync"
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
	return a.connectTCPPicked()
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

// How the range is searched for a free port before the kernel is asked to
// search it. A try of one port costs some two microseconds, one of a window
// more than that only if it is full; the kernel's own search of the default
// range takes hundreds.
const singleTries = 24

var windows = [...]uint16{16, 64, 256, 1024}

// connectTCPPicked connects from a port of the ephemeral range.
//
// The destination's own port comes last: on this host it could be the socket's
// own, and TCP would connect it to itself.
func (a *attempt) connectTCPPicked() error {
	ports := a.ns.ports.Load()
	avoid := a.remote.Port()
	walk := a.ns.order.Walk(ports, a.local.Addr(), a.remote)
	sa := a.remoteSockaddr()
	for tries := 0; tries < singleTries+len(windows); tries++ {
		port, ok := walk.Next()
		if !ok {
			break
		}
		if port == avoid {
			continue
		}
		low, high := port, port
		if tries >= singleTries {
			low, high = window(ports, port, windows[tries-singleTries], avoid)
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
	if err := connectTCP(a.fd, sa); err != unix.EADDRNOTAVAIL {
		return os.NewSyscallError("connect", err)
	}
	return a.connectTCPBoundPort(a.ns.refresh())
}

// connectTCPLastPort lets the kernel search the whole range, and so gives it
// the last word on whether a port is free.
//
// The range is named to it even where it is the system's: of that, the kernel
// leaves out the last port if their number is odd (__inet_hash_connect).
func (a *attempt) connectTCPLastPort(sa *sys.Sockaddr) error {
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
	return a.connectTCPBoundPort(ports)
}

// connectTCPBoundPort connects from a port that the kernel leaves out of its
// own choice: one that a socket was bound to explicitly, for another
// destination (tb->fastreuse in __inet_hash_connect). To a socket that is bound
// to it as well, such a port is as good as any.
//
// It is called when all other ports are taken, so most lookups find the socket
// that is in the way.
func (a *attempt) connectTCPBoundPort(ports *portpick.Ports) error {
	exhausted := &exhaustedError{ports, a.local.Addr(), a.remote, unix.EADDRNOTAVAIL}
	if protocol, _ := sys.Int(a.fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); protocol == unix.IPPROTO_MPTCP {
		return exhausted // net.Dialer dials again without MPTCP
	}
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
	if a.ns.full.recently(exhausted.sourceAddr, a.remote) {
		return exhausted
	}
	walk := a.ns.order.Walk(ports, exhausted.sourceAddr, a.remote)
	for port, ok := walk.Next(); ok; port, ok = walk.Next() {
		local := netip.AddrPortFrom(exhausted.sourceAddr, port)
		if local == a.remote {
			continue // it would be connected to itself
		}
		if err := a.ended(); err != nil {
			return err
		}
		switch _, err := conn.TCP(local, a.remote, device); err {
		case nil:
			continue
		case lookup.ErrNotFound:
		default:
			failed = true
			return exhausted
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
	a.ns.full.remember(exhausted.sourceAddr, a.remote)
	return exhausted
}

// rememberFull is for how long the search of connectTCPBoundPort is not
// repeated. It takes a lookup for each port, and rarely finds one.
const rememberFull = 100 * time.Millisecond

// A fullTable remembers for which 4-tuples there was no port a moment ago. Its
// size is fixed; pairs of addresses may displace each other.
type fullTable struct {
	mu      sync.Mutex
	entries [64]struct {
		source      netip.Addr
		destination netip.AddrPort
		at          time.Time
	}
}

var fullSeed = maphash.MakeSeed()

func (t *fullTable) index(destination netip.AddrPort) int {
	return int(maphash.Comparable(fullSeed, destination) % uint64(len(t.entries)))
}

func (t *fullTable) remember(source netip.Addr, destination netip.AddrPort) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := &t.entries[t.index(destination)]
	e.source, e.destination, e.at = source, destination, time.Now()
}

func (t *fullTable) recently(source netip.Addr, destination netip.AddrPort) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := &t.entries[t.index(destination)]
	return e.source == source && e.destination == destination && time.Since(e.at) < rememberFull
}
