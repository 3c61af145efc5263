package connectx

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"github.com/seed22601231/connectx/portpick"
)

// ErrPortsExhausted says that every port of the range is taken towards this
// destination from this source address. Test for it with [errors.Is]; the
// error also wraps what the kernel says in that case: EADDRNOTAVAIL for TCP,
// EAGAIN for UDP. It is not a timeout.
//
// Connections to other destinations are not affected. More source addresses,
// or a wider net.ipv4.ip_local_port_range, give more connections to this one.
var ErrPortsExhausted = errors.New("ephemeral ports exhausted")

// A sourcer is an error that knows the source address of the dial, where the
// caller did not give one.
type sourcer interface {
	error
	source() netip.AddrPort
}

// exhaustedError is ErrPortsExhausted with the circumstances. The errno in it
// is deliberately not an os.SyscallError: net.Dialer would dial twice more if
// it saw EADDRNOTAVAIL, and would call EAGAIN a timeout.
type exhaustedError struct {
	ports       *portpick.Ports
	sourceAddr  netip.Addr // invalid if not known
	destination netip.AddrPort
	errno       syscall.Errno
}

func (e *exhaustedError) Error() string {
	from := ""
	if e.sourceAddr.IsValid() {
		from = " from " + e.sourceAddr.String()
	}
	return fmt.Sprintf("%v: all of %v%s to %v are taken: %v", ErrPortsExhausted, e.ports, from, e.destination, e.errno)
}

func (e *exhaustedError) Unwrap() []error { return []error{ErrPortsExhausted, e.errno} }

func (e *exhaustedError) source() netip.AddrPort { return netip.AddrPortFrom(e.sourceAddr, 0) }

// inUseError says that an explicit source port cannot be had: the 4-tuple
// exists already, or somebody holds the port without sharing it.
type inUseError struct {
	reason      string
	local       netip.AddrPort
	destination netip.AddrPort
	err         error // an errno, as the kernel has it for this case
}

func (e *inUseError) Error() string {
	return fmt.Sprintf("%v->%v: %s: %v", e.local, e.destination, e.reason, e.err)
}

func (e *inUseError) Unwrap() error { return e.err }

func (e *inUseError) source() netip.AddrPort { return e.local }

// contextError is the end of a context in the words of package net, which maps
// context errors in the same way before it returns them.
type contextError struct{ err error }

func (e contextError) Error() string {
	if e.Timeout() {
		return "i/o timeout"
	}
	return "operation was canceled"
}

func (e contextError) Timeout() bool   { return errors.Is(e.err, context.DeadlineExceeded) }
func (e contextError) Temporary() bool { return e.Timeout() }
func (e contextError) Unwrap() error   { return e.err }

// completeError gives an error of the inner net.Dialer what it would contain
// had the inner dialer been told of the network and the local address.
func completeError(err error, network string, local net.Addr) error {
	op, ok := err.(*net.OpError)
	if !ok {
		return err
	}
	op.Net = network
	if op.Addr == nil {
		// No address was dialled. The one error here that names the local
		// address is that no destination address goes with it.
		if a, ok := op.Err.(*net.AddrError); ok && local != nil && a.Err == errNoSuitableAddress {
			a.Addr = local.String()
		}
		return err
	}
	op.Source = local
	if s, ok := op.Err.(sourcer); ok {
		if source := s.source(); source.Addr().IsValid() {
			op.Source = netAddr(network, source)
		}
	}
	return err
}

// errNoSuitableAddress is package net's text.
const errNoSuitableAddress = "no suitable address found"

func netAddr(network string, ap netip.AddrPort) net.Addr {
	if protocolOf(network) == "tcp" {
		return net.TCPAddrFromAddrPort(ap)
	}
	return net.UDPAddrFromAddrPort(ap)
}
