//go:build linux

package main

import (
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/netns"
	"github.com/seed22601231/connectx/measure/internal/echo"
)

// The ports: the ephemeral range begins at firstPort, and the range outside of
// it that PortRange is also used with at firstOutside.
const (
	firstPort    = 40000
	firstOutside = 41000
)

// A family is 0 for IPv4 and 1 for IPv6.
type family int

func (f family) suffix() string { return [...]string{"4", "6"}[f] }

// sources are the source addresses of each family. The first one is what the
// routing table chooses.
var sources = [2][2]netip.Addr{
	{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.2")},
	{netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00::2")},
}

// freshSource has no connections before the end.
var freshSource = [2]netip.Addr{netip.MustParseAddr("127.0.0.9"), netip.MustParseAddr("fd00::9")}

// destinationNet6 is local as a whole, as 127.0.0.0/8 is.
const destinationNet6 = "fd01::/64"

// destination is the nth address of the servers, which answer on all of them.
func destination(f family, n int) netip.AddrPort {
	n++ // not .0
	a := netip.AddrFrom4([4]byte{127, 1, byte(n >> 8), byte(n)})
	if f == 1 {
		a16 := netip.MustParsePrefix(destinationNet6).Addr().As16()
		a16[14], a16[15] = byte(n>>8), byte(n)
		a = netip.AddrFrom16(a16)
	}
	return netip.AddrPortFrom(a, echo.Port)
}

// setUpNetwork prepares the calling thread's namespace.
func setUpNetwork(l layout) error {
	var addresses []string
	for _, a := range []netip.Addr{sources[1][0], sources[1][1], freshSource[1]} {
		addresses = append(addresses, a.String()+"/128")
	}
	if err := netns.LoopbackUp(addresses...); err != nil {
		return err
	}
	if err := routeDestinations(); err != nil {
		return err
	}
	if err := netns.SetPortRange(l.whole().Low, l.whole().High); err != nil {
		return fmt.Errorf("set the ephemeral port range: %w", err)
	}
	// The kernel's default, 2, would let connect on the loopback interface have
	// 4-tuples in TIME_WAIT again after a second.
	if err := os.WriteFile("/proc/sys/net/ipv4/tcp_tw_reuse", []byte("0"), 0); err != nil {
		return fmt.Errorf("set tcp_tw_reuse: %w", err)
	}
	return nil
}

func routeDestinations() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	_, dst, err := net.ParseCIDR(destinationNet6)
	if err != nil {
		return err
	}
	err = netlink.RouteAdd(&netlink.Route{
		LinkIndex: lo.Attrs().Index, Dst: dst, Src: sources[1][0].AsSlice(), Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL,
	})
	if err != nil {
		return fmt.Errorf("make %s local: %w", destinationNet6, err)
	}
	return nil
}

// A layout says which ports and destinations there are.
type layout struct {
	Ports     int // in the ephemeral range
	Processes int // that dial
	Each      int // goroutines in each of them
}

// sharedDestinations are dialled by all, the others by one goroutine each.
const sharedDestinations = 2

func (l layout) destinations() int { return sharedDestinations + l.Processes*l.Each }

// own is the number of the destination that one goroutine has for itself.
func (l layout) own(process, goroutine int) int {
	return sharedDestinations + process*l.Each + goroutine
}

// whole is the ephemeral range.
func (l layout) whole() connectx.PortRange { return rangeOf(firstPort, l.Ports) }

// inside is the middle of the ephemeral range.
func (l layout) inside() connectx.PortRange { return rangeOf(firstPort+l.Ports/4, l.Ports/2) }

// outside is not part of the ephemeral range.
func (l layout) outside() connectx.PortRange { return rangeOf(firstOutside, l.Ports/2) }

// plain is the part of the ephemeral range that neighbours use which do not share
// their ports. On all others, an explicit port can always be had.
func (l layout) plain() connectx.PortRange { return rangeOf(firstPort, l.Ports/3) }

// listenPort is the port of the listeners on the wildcard address.
func (l layout) listenPort() uint16 { return l.whole().High }

// groupPort is the port of the listener on a multicast group. Its socket is in
// nobody's way: it is bound to the address of the group.
func (l layout) groupPort() uint16 { return l.whole().High - 1 }

// rows is how many ports there are altogether.
func (l layout) rows() int { return l.Ports + l.Ports/2 }

// port is the ith of all ports.
func (l layout) port(i int) uint16 {
	if i < l.Ports {
		return firstPort + uint16(i)
	}
	return firstOutside + uint16(i-l.Ports)
}

// index is the inverse of port, or -1.
func (l layout) index(port uint16) int {
	switch {
	case l.whole().Contains(port):
		return int(port) - firstPort
	case l.outside().Contains(port):
		return int(port) - firstOutside + l.Ports
	}
	return -1
}

func rangeOf(first, n int) connectx.PortRange {
	return connectx.PortRange{Low: uint16(first), High: uint16(first + n - 1)}
}
