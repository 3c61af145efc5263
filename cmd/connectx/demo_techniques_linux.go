package main

import (
	"context"
	"math/rand/v2"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
)

// A technique is a row of the table: a way of dialling.
type technique struct {
	name string

	// ours says that the technique is connectx, which has to hold a connection
	// on every 4-tuple.
	ours bool

	udpOnly bool

	// dial opens the nth connection, from 0, to a destination.
	dial func(ctx context.Context, c *column, to netip.AddrPort, n int) (net.Conn, error)
}

// dialTries is how often each technique dials a destination, unless it fails
// before: once more than there are ports.
func (s *stage) dialTries() int { return s.ports() + 1 }

func (s *stage) techniques() []technique {
	none := netip.Addr{}
	return []technique{
		{name: "net.Dialer", dial: s.netDial},
		{name: "bind-before-connect", dial: s.bindBeforeConnect},
		{name: "connectx.Dialer", ours: true, dial: func(ctx context.Context, c *column, to netip.AddrPort, n int) (net.Conn, error) {
			return s.connectxDial(ctx, c, none, to, n)
		}},
		{name: "connectx.Dialer + source", ours: true, dial: func(ctx context.Context, c *column, to netip.AddrPort, n int) (net.Conn, error) {
			return s.connectxDial(ctx, c, c.source, to, n)
		}},
		{name: "SO_REUSEADDR, no lock", udpOnly: true, dial: s.reuseAddrDial},
	}
}

// netDial leaves source address and port to connect.
func (s *stage) netDial(ctx context.Context, c *column, to netip.AddrPort, _ int) (net.Conn, error) {
	d := net.Dialer{Control: s.narrow}
	return d.DialContext(ctx, c.network, to.String())
}

// bindBeforeConnect chooses the source address, so that bind has to choose a
// port without knowing the destination.
func (s *stage) bindBeforeConnect(ctx context.Context, c *column, to netip.AddrPort, _ int) (net.Conn, error) {
	d := net.Dialer{Control: s.narrow, LocalAddr: c.netAddr(netip.AddrPortFrom(c.source, 0))}
	return d.DialContext(ctx, c.network, to.String())
}

// connectxDial uses connectx.Dialer, from any source if that is the zero Addr.
//
// connectx goes by the system's port range. Where the demo's is another one, it
// is told the ports, and is to share each of them between the destinations.
func (s *stage) connectxDial(ctx context.Context, c *column, source netip.Addr, to netip.AddrPort, n int) (net.Conn, error) {
	var port uint16
	if s.perSocket {
		port = s.low + uint16(n%s.ports())
	}
	var d connectx.Dialer
	if source.IsValid() || port != 0 {
		d.LocalAddr = c.netAddr(netip.AddrPortFrom(source, port))
	}
	return d.DialContext(ctx, c.network, to.String())
}

// reuseAddrDial shares ports as connectx does, without making sure that nobody
// else has the 4-tuple.
func (s *stage) reuseAddrDial(ctx context.Context, c *column, to netip.AddrPort, _ int) (net.Conn, error) {
	port := s.low + uint16(rand.IntN(s.ports()))
	d := net.Dialer{
		LocalAddr: c.netAddr(netip.AddrPortFrom(c.source, port)),
		Control: func(_, _ string, conn syscall.RawConn) error {
			return setsockopt(conn, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		},
	}
	return d.DialContext(ctx, c.network, to.String())
}

// narrow is a Control hook that limits the ports the kernel chooses from, where
// the system's range is a wider one.
func (s *stage) narrow(_, _ string, c syscall.RawConn) error {
	if !s.perSocket {
		return nil
	}
	ports := int32(uint32(s.high)<<16 | uint32(s.low))
	return setsockopt(c, unix.SOL_IP, unix.IP_LOCAL_PORT_RANGE, int(ports))
}

func (c *column) netAddr(a netip.AddrPort) net.Addr {
	if c.tcp() {
		return net.TCPAddrFromAddrPort(a)
	}
	return net.UDPAddrFromAddrPort(a)
}
