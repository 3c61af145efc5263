package connectx

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"

	"github.com/seed22601231/connectx/internal/inuse"
	"github.com/seed22601231/connectx/lookup"
	"github.com/seed22601231/connectx/portpick"
)

// usage counts for each of the sources, in the network namespace of the calling
// thread. The zero PortRange is the system's.
func usage(ctx context.Context, protocol string, sources []netip.Addr, destination netip.AddrPort, own PortRange) ([]PortUsage, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ports, err := portsHere(own)
	if err != nil {
		return nil, err
	}
	destination = netip.AddrPortFrom(destination.Addr().Unmap(), destination.Port())
	if destination.Addr().IsLinkLocalUnicast() {
		return nil, errLinkLocal
	}
	snapshot, err := inuse.Take(protocol, ports)
	if err != nil {
		return nil, err
	}
	usages := make([]PortUsage, len(sources))
	for i, source := range sources {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if source = source.Unmap(); !source.IsValid() || source.IsUnspecified() {
			if source, err = sourceHere(destination); err != nil {
				return nil, err
			}
		}
		if source.IsLinkLocalUnicast() {
			return nil, errLinkLocal
		}
		counts, err := snapshot.Count(source, destination)
		if err != nil {
			return nil, fmt.Errorf("ports of %v: %w", source, err)
		}
		usages[i] = PortUsage{
			Network: protocol, Source: source, Destination: destination,
			Ports:       PortRange{ports.Low(), ports.High()},
			Established: counts.InUse, TimeWait: counts.TimeWait, Held: counts.Held,
			Reserved: counts.Reserved, Free: counts.Free,
		}
	}
	return usages, nil
}

// errLinkLocal is about addresses that there may be one of on each interface.
var errLinkLocal = fmt.Errorf("ports of link-local addresses: %w", errors.ErrUnsupported)

// portsHere are the ports of a range, in the calling thread's namespace.
func portsHere(own PortRange) (*portpick.Ports, error) {
	sysctl, err := portpick.OpenSysctl()
	if err != nil {
		return nil, err
	}
	defer sysctl.Close()
	ports, err := sysctl.Ports(nil)
	if err != nil || own == (PortRange{}) {
		return ports, err
	}
	return ports.Within(own.Low, own.High)
}

// sourceHere is the source address that the routing table chooses.
func sourceHere(destination netip.AddrPort) (netip.Addr, error) {
	conn, err := lookup.Open()
	if err != nil {
		return netip.Addr{}, err
	}
	defer conn.Close()
	route, err := conn.Source(destination, lookup.RouteOptions{})
	return route.Source, err
}
