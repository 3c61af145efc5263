package main

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/netns"
)

// A stage is the network in which the demo takes place.
type stage struct {
	low, high uint16 // the ephemeral port range

	// perSocket says that the range is that of the demo's own sockets only.
	perSocket bool

	destinations int
	columns      []column
}

// A column of the table: the connections over one protocol and family.
type column struct {
	title        string
	network      string // as package net calls it
	source       netip.Addr
	destinations []netip.Addr
	unavailable  bool
}

func (c *column) tcp() bool { return c.network == "tcp4" || c.network == "tcp6" }

func (c *column) family() string {
	if c.source.Is4() {
		return "IPv4"
	}
	return "IPv6"
}

func (s *stage) ports() int { return int(s.high) - int(s.low) + 1 }

// possible is how many 4-tuples there are in each column.
func (s *stage) possible() int { return s.ports() * s.destinations }

func (s *stage) String() string {
	how := "In a network namespace with the ephemeral port range %d-%d"
	if s.perSocket {
		how = "Without a network namespace: net.Dialer has IP_LOCAL_PORT_RANGE %d-%d set\non its sockets, and connectx.Dialer is told every source port"
	}
	return fmt.Sprintf(how+".\n%d ports × %d destinations = %d connections.",
		s.low, s.high, s.ports(), s.destinations, s.possible())
}

// namespaceStage sets up the namespace that this process is alone in.
//
// All of 10.64.0.0/24 and fd64::/64 is on this host, and is reached from the
// same source address. With destinations that are addresses of lo each would be
// its own source, and there would be no ports to run out of.
func namespaceStage(o demoOptions) (*stage, error) {
	const low = 32768
	high := uint16(low + o.ports - 1)
	if err := netns.SetPortRange(low, high); err != nil {
		return nil, fmt.Errorf("set the ephemeral port range: %w", err)
	}
	source4, source6 := netip.MustParseAddr("10.64.1.1"), netip.MustParseAddr("fd64:1::1")
	if err := addNetwork(source4, netip.MustParsePrefix("10.64.0.0/24")); err != nil {
		return nil, err
	}
	// An error means a system without IPv6, which newStage finds out.
	_ = addNetwork(source6, netip.MustParsePrefix("fd64::/64"))
	return newStage(low, high, o.destinations,
		source4, consecutive(netip.MustParseAddr("10.64.0.1"), o.destinations),
		source6, consecutive(netip.MustParseAddr("fd64::1"), o.destinations)), nil
}

// addNetwork gives lo an address, and makes it the source towards a network
// that is local to this host as well.
func addNetwork(source netip.Addr, network netip.Prefix) error {
	if err := netns.LoopbackUp(netip.PrefixFrom(source, source.BitLen()).String()); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	err = netlink.RouteReplace(&netlink.Route{
		Table:     unix.RT_TABLE_LOCAL,
		Type:      unix.RTN_LOCAL,
		Scope:     netlink.SCOPE_HOST,
		LinkIndex: lo.Attrs().Index,
		Dst: &net.IPNet{
			IP:   network.Addr().AsSlice(),
			Mask: net.CIDRMask(network.Bits(), network.Addr().BitLen()),
		},
		Src: source.AsSlice(),
	})
	if err != nil {
		return fmt.Errorf("route %v from %v: %w", network, source, err)
	}
	return nil
}

// hostStage uses the addresses that every host has. All of 127.0.0.0/8 is one
// host's own; of IPv6 there is only ::1, and destinations differ by their port.
func hostStage(o demoOptions) (*stage, error) {
	low, high, err := freeWindow(o.ports)
	if err != nil {
		return nil, err
	}
	loopback6 := netip.IPv6Loopback()
	st := newStage(low, high, o.destinations,
		netip.MustParseAddr("127.0.2.1"), consecutive(netip.MustParseAddr("127.0.1.1"), o.destinations),
		loopback6, slices.Repeat([]netip.Addr{loopback6}, o.destinations))
	st.perSocket = true
	return st, nil
}

func newStage(low, high uint16, destinations int, source4 netip.Addr, destinations4 []netip.Addr, source6 netip.Addr, destinations6 []netip.Addr) *stage {
	no4, no6 := !canBind(source4), !canBind(source6)
	return &stage{low: low, high: high, destinations: destinations, columns: []column{
		{"TCP/IPv4", "tcp4", source4, destinations4, no4},
		{"TCP/IPv6", "tcp6", source6, destinations6, no6},
		{"UDP/IPv4", "udp4", source4, destinations4, no4},
		{"UDP/IPv6", "udp6", source6, destinations6, no6},
	}}
}

func consecutive(first netip.Addr, n int) []netip.Addr {
	addrs := make([]netip.Addr, n)
	for i := range addrs {
		addrs[i] = first
		first = first.Next()
	}
	return addrs
}

func canBind(a netip.Addr) bool {
	conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, 0)))
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// freeWindow returns as many consecutive ports of the system's ephemeral range,
// none of them held by another program. A socket cannot widen the range, only
// narrow it.
func freeWindow(ports int) (low, high uint16, err error) {
	const file = "/proc/sys/net/ipv4/ip_local_port_range"
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, 0, err
	}
	var first, last int
	if _, err := fmt.Sscan(string(b), &first, &last); err != nil {
		return 0, 0, fmt.Errorf("%s: %w", file, err)
	}
	first = max(first, lastServerPort+1)
	choices := last - ports + 1 - first + 1
	if choices < 1 {
		return 0, 0, fmt.Errorf("-ports %d: the system's ephemeral port range ends at %d", ports, last)
	}
	const tries = 50
	for range tries {
		low := first + rand.IntN(choices)
		if windowIsFree(low, low+ports-1) {
			return uint16(low), uint16(low + ports - 1), nil
		}
	}
	return 0, 0, fmt.Errorf("-ports %d: found no window of the ephemeral port range with all ports free", ports)
}

func windowIsFree(low, high int) bool {
	for port := low; port <= high; port++ {
		address := ":" + strconv.Itoa(port)
		udp, err := net.ListenPacket("udp", address)
		if err != nil {
			return false
		}
		udp.Close()
		tcp, err := net.Listen("tcp", address)
		if err != nil {
			return false
		}
		tcp.Close()
	}
	return true
}
