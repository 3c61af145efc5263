package connectx

import (
	"context"
	"net"
	"net/netip"
	"strconv"
	"syscall"
)

var (
	_ net.Conn       = (*PacketConn)(nil)
	_ net.PacketConn = (*PacketConn)(nil)
)

// A PacketConn is a connected UDP socket for code that wants a [net.PacketConn]
// and names the destination in each write, as QUIC libraries do. It can be the
// Conn of quic-go's Transport, which then uses GSO, ECN, DF and batched reads as
// with a [*net.UDPConn].
//
// A *net.UDPConn that is connected refuses to write to an address, even its
// peer's. PacketConn's WriteTo and its kin accept that one address, and fail
// with an error that wraps [net.ErrWriteToConnected] for any other; nothing is
// sent then. The IPv4 and the IPv4-mapped IPv6 form of the peer's address are
// the same, and so are the name and the index of the interface in the zone of a
// link-local one.
//
// Everything else is the UDPConn's. Since the socket is connected, the kernel
// delivers only what the peer has sent, and reports errors that the peer's host
// answers with (ECONNREFUSED for a port that is not open) to the next read or
// write.
type PacketConn struct {
	*net.UDPConn

	network string // as dialled

	// The peer. Only a link-local address has a zone, and then its index.
	addr  netip.Addr
	port  int
	zone  string
	index int
}

// DialPacket connects to the address on the network "udp", "udp4" or "udp6" as
// [Dialer.DialContext] does. Other networks fail with a
// [net.UnknownNetworkError].
func (d *Dialer) DialPacket(ctx context.Context, network, address string) (*PacketConn, error) {
	if protocolOf(network) != "udp" {
		return nil, &net.OpError{Op: "dial", Net: network, Err: net.UnknownNetworkError(network)}
	}
	conn, err := d.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	c := &PacketConn{UDPConn: conn.(*net.UDPConn), network: network}
	peer := c.RemoteAddr().(*net.UDPAddr)
	addr, _ := netip.AddrFromSlice(peer.IP)
	c.addr, c.port, c.zone = addr.Unmap(), peer.Port, peer.Zone
	if c.zone != "" {
		c.index = zoneIndex(c.zone)
	}
	return c, nil
}

// WriteTo sends b as one datagram to addr, which must be the peer's
// [*net.UDPAddr]. See [net.PacketConn].
func (c *PacketConn) WriteTo(b []byte, addr net.Addr) (int, error) {
	if a, ok := addr.(*net.UDPAddr); ok {
		return c.WriteToUDP(b, a)
	}
	return 0, c.refuse(addr, syscall.EINVAL)
}

// WriteToUDP acts like [PacketConn.WriteTo].
func (c *PacketConn) WriteToUDP(b []byte, addr *net.UDPAddr) (int, error) {
	if !c.isPeerUDP(addr) {
		return 0, c.refuseUDP(addr)
	}
	return c.Write(b)
}

// WriteToUDPAddrPort acts like [PacketConn.WriteTo] with a [netip.AddrPort].
func (c *PacketConn) WriteToUDPAddrPort(b []byte, addr netip.AddrPort) (int, error) {
	if !c.isPeerAddrPort(addr) {
		return 0, c.refuseUDP(net.UDPAddrFromAddrPort(addr))
	}
	return c.Write(b)
}

// WriteMsgUDP sends b as one datagram, or as several with UDP_SEGMENT in the
// control messages oob, to addr, which must be the peer's, or nil. See
// [net.UDPConn.WriteMsgUDP].
func (c *PacketConn) WriteMsgUDP(b, oob []byte, addr *net.UDPAddr) (n, oobn int, err error) {
	if addr != nil && !c.isPeerUDP(addr) {
		return 0, 0, c.refuseUDP(addr)
	}
	n, oobn, err = c.UDPConn.WriteMsgUDP(b, oob, nil)
	return n, oobn, c.withPeer(err)
}

// WriteMsgUDPAddrPort acts like [PacketConn.WriteMsgUDP] with a
// [netip.AddrPort], whose zero value stands for the peer.
func (c *PacketConn) WriteMsgUDPAddrPort(b, oob []byte, addr netip.AddrPort) (n, oobn int, err error) {
	if addr.IsValid() && !c.isPeerAddrPort(addr) {
		return 0, 0, c.refuseUDP(net.UDPAddrFromAddrPort(addr))
	}
	n, oobn, err = c.UDPConn.WriteMsgUDPAddrPort(b, oob, netip.AddrPort{})
	return n, oobn, c.withPeer(err)
}

func (c *PacketConn) isPeerUDP(addr *net.UDPAddr) bool {
	if addr == nil {
		return false
	}
	ip, _ := netip.AddrFromSlice(addr.IP)
	return c.isPeer(ip, addr.Zone, addr.Port)
}

func (c *PacketConn) isPeerAddrPort(addr netip.AddrPort) bool {
	return c.isPeer(addr.Addr().WithZone(""), addr.Addr().Zone(), int(addr.Port()))
}

// isPeer ignores the zone where the peer has none, as the kernel does for
// addresses that are not link-local.
func (c *PacketConn) isPeer(ip netip.Addr, zone string, port int) bool {
	return ip.Unmap() == c.addr && port == c.port && (c.zone == "" || c.inZone(zone))
}

// inZone looks the zone up only if it is neither the one that the socket was
// connected in nor its index. That one may have been renamed since, and reads
// report the new name.
func (c *PacketConn) inZone(zone string) bool {
	if zone == c.zone {
		return true
	}
	index := zoneIndex(zone)
	return index != 0 && index == c.index
}

// zoneIndex is the index of the interface that a zone names, or is; otherwise 0.
func zoneIndex(zone string) int {
	if index, err := strconv.Atoi(zone); err == nil {
		return index
	}
	if i, err := net.InterfaceByName(zone); err == nil {
		return i.Index
	}
	return 0
}

// refuseUDP keeps a nil addr out of the net.Addr.
func (c *PacketConn) refuseUDP(addr *net.UDPAddr) error {
	if addr == nil {
		return c.refuse(nil, net.ErrWriteToConnected)
	}
	return c.refuse(addr, net.ErrWriteToConnected)
}

func (c *PacketConn) refuse(addr net.Addr, err error) error {
	return &net.OpError{
		Op: "write", Net: c.network, Source: c.LocalAddr(), Addr: addr,
		Err: &notPeerError{c.RemoteAddr(), err},
	}
}

// withPeer names the peer in the error of a write that net.UDPConn was given no
// address for.
func (c *PacketConn) withPeer(err error) error {
	if op, ok := err.(*net.OpError); ok {
		op.Addr = c.RemoteAddr()
	}
	return err
}

// notPeerError says where the socket can send to. It stands for the error that
// net.UDPConn has for the same address.
type notPeerError struct {
	peer net.Addr
	err  error
}

func (e *notPeerError) Error() string { return "the socket sends to " + e.peer.String() + " only" }

func (e *notPeerError) Unwrap() error { return e.err }
