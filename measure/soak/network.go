//go:build linux

package main

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/netns"
	"github.com/seed22601231/connectx/measure/internal/echo"
)

// firstPort begins the ephemeral range. Outside of it are the ports from which
// net.Dialer dials for comparison.
const (
	firstPort      = 40000
	firstReference = 50000
)

// A protocol is 0 for UDP and 1 for TCP.
type protocol int

const (
	udp protocol = iota
	tcp
	protocols
)

func (p protocol) String() string { return [...]string{"udp", "tcp"}[p] }

// A family is 0 for IPv4 and 1 for IPv6.
type family int

const families = 2

// The source addresses of each family, by what they are for.
const (
	mainSource      = iota // what the routing table chooses
	fleetingSource         // is removed and added again
	brokenSource           // of threads whose system calls fail
	referenceSource        // of net.Dialer
	allSources
)

// sources is how many source addresses the connections have that are held.
const sources = 2

func sourceAddr(f family, n int) netip.Addr {
	if f == 1 {
		return netip.AddrFrom16([16]byte{0: 0xfd, 15: byte(n + 1)})
	}
	return netip.AddrFrom4([4]byte{10, 7, 0, byte(n + 1)})
}

// The networks of destinations, which are local as a whole. The routing table has
// a source address for each of them.
const (
	mainNet = iota
	brokenNet
	nets
)

var sourceOfNet = [nets]int{mainNet: mainSource, brokenNet: brokenSource}

// destination is the nth address of a network of destinations.
func destination(f family, network, n int) netip.AddrPort {
	a := netip.AddrFrom4([4]byte{10, byte(8 + network), 0, byte(n + 1)})
	if f == 1 {
		a = netip.AddrFrom16([16]byte{0: 0xfd, 1: byte(1 + network), 15: byte(n + 1)})
	}
	return netip.AddrPortFrom(a, echo.Port)
}

// setUpNetwork prepares the calling thread's namespace.
func setUpNetwork(o options) error {
	var addresses []string
	for f := range family(families) {
		for n := range allSources {
			addresses = append(addresses, prefixOf(sourceAddr(f, n)))
		}
	}
	if err := netns.LoopbackUp(addresses...); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	for f := range family(families) {
		for n := range nets {
			bits := [...]int{24, 64}[f]
			prefix, err := destination(f, n, 0).Addr().Prefix(bits)
			if err != nil {
				return err
			}
			if err := netlink.RouteAdd(localRoute(lo, prefix, sourceAddr(f, sourceOfNet[n]))); err != nil {
				return fmt.Errorf("make %s local: %w", prefix, err)
			}
		}
	}
	if err := netns.SetPortRange(firstPort, firstPort+uint16(o.ports)-1); err != nil {
		return fmt.Errorf("set the ephemeral port range: %w", err)
	}
	return nil
}

// prefixOf is the address alone, as a prefix.
func prefixOf(a netip.Addr) string { return netip.PrefixFrom(a, a.BitLen()).String() }

func localRoute(lo netlink.Link, prefix netip.Prefix, source netip.Addr) *netlink.Route {
	return &netlink.Route{
		LinkIndex: lo.Attrs().Index, Src: source.AsSlice(), Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST,
		Dst: &net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen())},
	}
}
