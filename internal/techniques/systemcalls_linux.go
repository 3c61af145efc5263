package techniques

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/sys"
)

// systemCalls is the floor: what the kernel takes for a connection from a port
// that is chosen beforehand, without package net and its poller.
//
//	TCP: socket, setsockopt SO_REUSEADDR, bind, connect
//	UDP: socket, bind, connect, setsockopt SO_REUSEADDR
//
// UDP binds while the flag is off and so has the port to itself until it is
// connected; what it leaves out are lookups, so it does not share a port that
// somebody is on.
type systemCalls struct {
	source    netip.Addr
	low, high uint16
	next      atomic.Uint32 // how far the walk through the range has come
}

func newSystemCalls(_ string, source netip.Addr, low, high uint16) Dialer {
	d := &systemCalls{source: source, low: low, high: high}
	d.next.Store(rand.Uint32())
	return d
}

// Dial walks through the range, from where the last dial has ended, to the first
// port that is free.
func (d *systemCalls) Dial(network, address string) (net.Conn, error) {
	remote, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	family, kind := unix.AF_INET6, unix.SOCK_DGRAM
	if remote.Addr().Is4() {
		family = unix.AF_INET
	}
	if isTCP(network) {
		kind = unix.SOCK_STREAM
	}
	to := sys.NewSockaddr(family, remote, 0)
	ports := uint32(d.high) - uint32(d.low) + 1
	fd := -1
	for range ports {
		if fd < 0 {
			if fd, err = unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0); err != nil {
				return nil, os.NewSyscallError("socket", err)
			}
		}
		port := d.low + uint16(d.next.Add(1)%ports)
		from := sys.NewSockaddr(family, netip.AddrPortFrom(d.source, port), 0)
		bound, err := connectFrom(fd, isTCP(network), &from, &to)
		if err == nil {
			return &bareConn{fd, network, remote}, nil
		}
		if bound || !portTaken(err) {
			unix.Close(fd)
			fd = -1
		}
		if !portTaken(err) {
			return nil, err
		}
	}
	if fd >= 0 {
		unix.Close(fd)
	}
	return nil, errNoPort
}

// connectFrom reports whether the socket is bound, and so cannot be bound to
// another port.
func connectFrom(fd int, tcp bool, from, to *sys.Sockaddr) (bound bool, err error) {
	if tcp {
		if err := sys.SetInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return false, os.NewSyscallError("setsockopt", err)
		}
		if err := sys.Bind(fd, from); err != nil {
			return false, os.NewSyscallError("bind", err)
		}
		return true, os.NewSyscallError("connect", sys.ConnectTCP(fd, to))
	}
	if err := sys.Bind(fd, from); err != nil {
		return false, os.NewSyscallError("bind", err)
	}
	if err := sys.ConnectUDP(fd, to); err != nil {
		return true, os.NewSyscallError("connect", err)
	}
	return true, os.NewSyscallError("setsockopt", sys.SetInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
}

// A bareConn is a blocking socket. It has no deadlines, and is not safe for
// concurrent use with Close.
type bareConn struct {
	fd      int
	network string
	remote  netip.AddrPort
}

func (c *bareConn) Read(b []byte) (int, error) {
	n, err := unix.Read(c.fd, b)
	if err != nil {
		return 0, os.NewSyscallError("read", err)
	}
	if n == 0 && len(b) > 0 && isTCP(c.network) {
		return 0, io.EOF
	}
	return n, nil
}

func (c *bareConn) Write(b []byte) (int, error) {
	n, err := unix.Write(c.fd, b)
	if err != nil {
		return 0, os.NewSyscallError("write", err)
	}
	if n < len(b) {
		return n, io.ErrShortWrite
	}
	return n, nil
}

func (c *bareConn) Close() error {
	err := unix.Close(c.fd)
	c.fd = -1
	return os.NewSyscallError("close", err)
}

func (c *bareConn) SetLinger(sec int) error {
	l := unix.Linger{Onoff: 1, Linger: int32(sec)}
	if sec < 0 {
		l = unix.Linger{}
	}
	return os.NewSyscallError("setsockopt", unix.SetsockoptLinger(c.fd, unix.SOL_SOCKET, unix.SO_LINGER, &l))
}

func (c *bareConn) LocalAddr() net.Addr {
	local, err := sys.LocalAddr(c.fd)
	if err != nil {
		return nil // as net.Conn does
	}
	return localAddr(c.network, local.Addr(), local.Port())
}

func (c *bareConn) RemoteAddr() net.Addr {
	return localAddr(c.network, c.remote.Addr(), c.remote.Port())
}

var errNoDeadline = fmt.Errorf("deadline of a blocking socket: %w", errors.ErrUnsupported)

func (c *bareConn) SetDeadline(time.Time) error      { return errNoDeadline }
func (c *bareConn) SetReadDeadline(time.Time) error  { return errNoDeadline }
func (c *bareConn) SetWriteDeadline(time.Time) error { return errNoDeadline }
