package connectx

import (
	"context"
	"net"
	"net/netip"
)

// PortUsage is what the ports of a range are, for connections from one source
// address to one destination. Established, TimeWait, Held and Free together are
// all ports of the range but the reserved ones.
type PortUsage struct {
	Network     string // "tcp" or "udp"
	Source      netip.Addr
	Destination netip.AddrPort
	Ports       PortRange

	Established int // have a connection to Destination, in any TCP state but TIME_WAIT
	TimeWait    int // have one in TIME_WAIT
	Held        int // have neither, but a socket that does not share the port
	Reserved    int // are in net.ipv4.ip_local_reserved_ports, and never used
	Free        int
}

// Usage counts the ports of the ephemeral range that connections from source to
// destination could have, on "tcp", "udp" or the like. With an invalid source it
// is the one that the routing table chooses.
//
// It looks at the network namespace of the calling thread. It is for reports, not
// for each dial: it dumps all sockets of the protocol, some microseconds each, and
// finds out who shares their port by trying, as a dial would but without sending
// anything. For TCP that takes some 150 ms for the default range, for UDP 7 µs
// for each port on which there are connections. Without IP_LOCAL_PORT_RANGE or
// IP_BIND_ADDRESS_NO_PORT it does not find all TCP ports that are held, and counts
// the rest as free.
//
// An address that is not on this machine is the error EADDRNOTAVAIL. Link-local
// addresses are not supported, nor are other systems than Linux: the error is
// [errors.ErrUnsupported].
func Usage(ctx context.Context, network string, source netip.Addr, destination netip.AddrPort) (PortUsage, error) {
	protocol := protocolOf(network)
	if protocol == "" {
		return PortUsage{}, net.UnknownNetworkError(network)
	}
	if !destination.IsValid() || !sameFamily(network, netip.AddrPortFrom(source, 0), destination) {
		return PortUsage{}, &net.AddrError{Err: errNoSuitableAddress, Addr: source.String() + " to " + destination.String()}
	}
	usages, err := usage(ctx, protocol, []netip.Addr{source}, destination, PortRange{})
	if err != nil {
		return PortUsage{}, err
	}
	return usages[0], nil
}

// Usage counts again what the ports are taken by, from each of the sources. The
// errors are those of the function [Usage], and so is the cost, for UDP once for
// each source.
func (e *PortsExhaustedError) Usage(ctx context.Context) ([]PortUsage, error) {
	sources := e.Sources
	if len(sources) == 0 {
		sources = []netip.Addr{{}}
	}
	return usage(ctx, e.Network, sources, e.Destination, e.Ports)
}
