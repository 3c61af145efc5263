//go:build linux

package connectx

import (
	"errors"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/sys"
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
		// Before Linux 4.2 bind would choose one, which does not know it.
		if sys.SetInt(a.fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1) != nil {
			a.fallBack(errNoBindAddressNoPort)
			return a.connectTCPExplicit()
		}
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
		if a.brief && tries == 2 {
			return a.exhausted(a.local.Addr(), taken{})
		}
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

var (
	errNoLocalPortRange    = errors.New("the kernel does not know IP_LOCAL_PORT_RANGE for this socket")
	errNoBindAddressNoPort = errors.New("the kernel does not know IP_BIND_ADDRESS_NO_PORT for this socket")
)

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
	if a.brief {
		return a.exhausted(a.local.Addr(), taken{})
	}
	if protocol, _ := sys.Int(a.fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); protocol == unix.IPPROTO_MPTCP {
		// net.Dialer dials again without MPTCP.
		return a.exhausted(a.local.Addr(), taken{})
	}
	if err := a.fullTCP(); err != nil {
		return err
	}
	return a.connectTCPBoundPort(start, a.hook.ports == (PortRange{}))
}

// fullTCP returns the error of a search that has found no port a moment ago, if
// there was one.
func (a *attempt) fullTCP() error {
	if a.brief {
		return nil // that has been looked at
	}
	if known, full, _ := a.ns.full.recently(a.flow(a.local.Addr(), a.boundDevice())); full {
		return a.exhausted(known.source, known.taken)
	}
	return nil
}

// connectTCPLastPort lets the kernel search the whole range, and so gives it
// the last word on whether a port is free.
//
// The range is named to it even where it is the system's: of that, the kernel
// leaves out one port if their number is odd (__inet_hash_connect).
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
		parts = nil
		if a.ports.Low() < avoid {
			parts = append(parts, [2]uint16{a.ports.Low(), avoid - 1})
		}
		if avoid < a.ports.High() {
			parts = append(parts, [2]uint16{avoid + 1, a.ports.High()})
		}
		parts = append(parts, [2]uint16{avoid, avoid})
	}
	for _, part := range parts {
		low, high := part[0], part[1]
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
	return a.connectTCPBoundPort(start, a.hook.ports == (PortRange{}))
}

// connectTCPExplicit connects from a port of a range that the kernel cannot be
// told to choose from: one that is not a part of the system's, any PortRange before
// Linux 6.3, or any range at all of a chosen source address before 4.2.
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
	if err := a.usePorts(a.ns.refresh()); err != nil {
		return err
	}
	return a.connectTCPBoundPort(start, false)
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
