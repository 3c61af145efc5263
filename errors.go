package connectx

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
)

// ErrPortsExhausted says that every port of the range is taken towards this
// destination from this source address, or from each of several. Test for it
// with [errors.Is]; the error is a [*PortsExhaustedError], which has the details.
//
// Connections to other destinations are not affected. More source addresses,
// or a wider net.ipv4.ip_local_port_range, give more connections to this one.
var ErrPortsExhausted = errors.New("ephemeral ports exhausted")

// A PortsExhaustedError is [ErrPortsExhausted] with the circumstances. Find it
// with [errors.As]. It also wraps what the kernel says in that case: EADDRNOTAVAIL
// for TCP, EAGAIN for UDP. It is not a timeout.
//
// What a port is taken by is what the search for a free one came upon. It was not
// necessarily this dial's: that a range is full is remembered for some
// milliseconds. See also [PortsExhaustedError.Usage].
type PortsExhaustedError struct {
	Network     string       // "tcp" or "udp"
	Sources     []netip.Addr // each was tried; empty if it is not known
	Destination netip.AddrPort
	Ports       PortRange

	Reserved int // ports of the range that are reserved, and never used
	Tried    int // ports that were looked at, from all sources together
	TimeWait int // of those, ports with a connection to Destination in TIME_WAIT
	Held     int // of those, ports that a socket has which does not share them

	// errno is deliberately not an os.SyscallError: net.Dialer would dial
	// twice more if it saw EADDRNOTAVAIL, and would call EAGAIN a timeout.
	errno syscall.Errno
}

// Error names the range, the sources (the first few of many) and the destination,
// and says what to do about it.
func (e *PortsExhaustedError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%v: all of %v", ErrPortsExhausted, e.Ports)
	if e.Reserved > 0 {
		fmt.Fprintf(&b, " without %d reserved", e.Reserved)
	}
	if len(e.Sources) > 0 {
		b.WriteString(" from " + addrList(e.Sources))
	}
	fmt.Fprintf(&b, " to %v are taken (%s): %v", e.Destination, e.advice(), e.errno)
	return b.String()
}

// addrList names the first few addresses.
func addrList(addrs []netip.Addr) string {
	const named = 8
	var list []string
	for _, a := range addrs[:min(len(addrs), named)] {
		list = append(list, a.String())
	}
	s := strings.Join(list, ", ")
	if more := len(addrs) - named; more > 0 {
		s += fmt.Sprintf(" and %d more", more)
	}
	return s
}

// advice is what the ports are taken by, as far as that is out of the ordinary,
// and what an operator can do about most of them.
func (e *PortsExhaustedError) advice() string {
	var b strings.Builder
	if e.TimeWait > 0 {
		fmt.Fprintf(&b, "%d in TIME_WAIT; ", e.TimeWait)
	}
	if e.Held > 0 {
		fmt.Fprintf(&b, "%d held by sockets that do not share them; ", e.Held)
	}
	switch {
	case e.TimeWait > e.Tried/2:
		b.WriteString("keep connections open for longer, or set net.ipv4.tcp_tw_reuse=1")
	case e.Held > e.Tried/2:
		b.WriteString("have those use connectx as well, or use another range")
	default:
		b.WriteString("use more source addresses, or a wider range")
	}
	return b.String()
}

// Unwrap returns ErrPortsExhausted and the errno.
func (e *PortsExhaustedError) Unwrap() []error { return []error{ErrPortsExhausted, e.errno} }

func (e *PortsExhaustedError) source() netip.AddrPort {
	if len(e.Sources) != 1 {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(e.Sources[0], 0)
}

// and adds what became of another source address to what became of those
// before, which is nil if it is the first.
func (e *PortsExhaustedError) and(another *PortsExhaustedError) *PortsExhaustedError {
	if e == nil {
		return another
	}
	e.Sources = append(e.Sources, another.Sources...)
	e.Tried += another.Tried
	e.TimeWait += another.TimeWait
	e.Held += another.Held
	return e
}

// A sourcer is an error that knows the source address of the dial, where the
// caller did not give one.
type sourcer interface {
	error
	source() netip.AddrPort
}

// fieldError says what is wrong with a field of a Dialer.
type fieldError struct {
	field, value, problem string
	err                   error // or nil
}

func (e *fieldError) Error() string {
	s := fmt.Sprintf("%s %s: %s", e.field, e.value, e.problem)
	if e.err != nil {
		s += ": " + e.err.Error()
	}
	return s
}

func (e *fieldError) Unwrap() error { return e.err }

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
		// address is that no destination address goes with it, where withFamily
		// has narrowed the network.
		from, _ := localAddrPort(network, local)
		narrowed := network == protocolOf(network) && from.Addr().IsValid() && !isWildcard(from.Addr())
		if a, ok := op.Err.(*net.AddrError); ok && narrowed && a.Err == errNoSuitableAddress {
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

// Package net's texts.
const (
	errNoSuitableAddress = "no suitable address found"
	errMismatchedType    = "mismatched local address type"
)

func netAddr(network string, ap netip.AddrPort) net.Addr {
	if protocolOf(network) == "tcp" {
		return net.TCPAddrFromAddrPort(ap)
	}
	return net.UDPAddrFromAddrPort(ap)
}
