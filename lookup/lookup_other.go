//go:build !linux

package lookup

import (
	"errors"
	"net/netip"
)

// A Conn asks the kernel on behalf of one network namespace. It exists on
// Linux only.
type Conn struct{}

// Open fails with [errors.ErrUnsupported].
func Open() (*Conn, error) { return nil, errors.ErrUnsupported }

// Close does nothing.
func (c *Conn) Close() error { return nil }

// UDP fails with [errors.ErrUnsupported].
func (c *Conn) UDP(local, remote netip.AddrPort, ifindex uint32) (Socket, error) {
	return Socket{}, errors.ErrUnsupported
}

// TCP fails with [errors.ErrUnsupported].
func (c *Conn) TCP(local, remote netip.AddrPort, ifindex uint32) (Socket, error) {
	return Socket{}, errors.ErrUnsupported
}

// UDPPorts fails with [errors.ErrUnsupported].
func (c *Conn) UDPPorts(local netip.Addr, ports []uint16, remote netip.AddrPort, ifindex uint32) ([]Socket, error) {
	return nil, errors.ErrUnsupported
}

// TCPPorts fails with [errors.ErrUnsupported].
func (c *Conn) TCPPorts(local netip.Addr, ports []uint16, remote netip.AddrPort, ifindex uint32) ([]Socket, error) {
	return nil, errors.ErrUnsupported
}

// Source fails with [errors.ErrUnsupported].
func (c *Conn) Source(destination netip.AddrPort, opts RouteOptions) (Route, error) {
	return Route{}, errors.ErrUnsupported
}

// Forget does nothing.
func (c *Conn) Forget() {}
