//go:build linux

package connectx_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/netns"
)

// ownSources gives the namespace source addresses of both families, and returns
// those of each.
func ownSources(t testing.TB, n int) (v4, v6 []netip.Addr) {
	t.Helper()
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	for i := range n {
		v4 = append(v4, netip.AddrFrom4([4]byte{10, 7, byte(i >> 8), byte(i)}))
		v6 = append(v6, netip.MustParseAddr(fmt.Sprintf("fd07::%x", i+1)))
	}
	for _, addr := range slices.Concat(v4, v6) {
		if err := netns.AddAddress(lo, netip.PrefixFrom(addr, addr.BitLen()).String()); err != nil {
			t.Fatal(err)
		}
	}
	return v4, v6
}

// Each source address has the whole range towards a destination, and all are
// used to the last port.
func TestSourceAddrsAddUp(t *testing.T) {
	const low, high, perSource = 40000, 40099, 100
	for _, family := range families {
		for _, protocol := range []string{"tcp", "udp"} {
			t.Run(protocol+" over "+family.name, func(t *testing.T) {
				ownNamespace(t, low, high)
				v4, v6 := ownSources(t, 5)
				sources := v4
				if family.suffix == "6" {
					sources = v6
				}
				network := protocol + family.suffix
				address := echo(t, network, family.hosts[0])
				// Those of the other family are in the way of nothing.
				d := connectx.Dialer{SourceAddrs: slices.Concat(v4, v6)}
				held := make(map[netip.Addr]map[uint16]bool)
				for i := range perSource * len(sources) {
					conn, err := d.Dial(network, address)
					if err != nil {
						t.Fatalf("connection %d: %v", i, err)
					}
					defer hangUp(conn)
					checkEcho(t, conn)
					local := netip.MustParseAddrPort(conn.LocalAddr().String())
					if held[local.Addr()] == nil {
						held[local.Addr()] = make(map[uint16]bool)
					}
					held[local.Addr()][local.Port()] = true
				}
				for _, source := range sources {
					if n := len(held[source]); n != perSource {
						t.Errorf("%d different ports of %v, want %d", n, source, perSource)
					}
				}
				if len(held) != len(sources) {
					t.Errorf("connections from %d addresses, want %d", len(held), len(sources))
				}

				_, err := d.Dial(network, address)
				var exhausted *connectx.PortsExhaustedError
				if !errors.Is(err, connectx.ErrPortsExhausted) || !errors.As(err, &exhausted) {
					t.Fatalf("one more connection: %v, want ErrPortsExhausted", err)
				}
				t.Log(err)
				for _, source := range sources {
					if !strings.Contains(err.Error(), source.String()) {
						t.Errorf("the error does not name %v: %v", source, err)
					}
				}
				for _, part := range []string{"40000-40099", address, "use more source addresses"} {
					if !strings.Contains(err.Error(), part) {
						t.Errorf("the error does not say %q: %v", part, err)
					}
				}
				want := &connectx.PortsExhaustedError{
					Network: protocol, Sources: sources, Destination: netip.MustParseAddrPort(address),
					Ports: connectx.PortRange{Low: low, High: high}, Tried: perSource * len(sources),
				}
				if diff := cmp.Diff(want, exhausted, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
					cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }), ignoreUnexported); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}

				// Another destination has them all again.
				conn, err := d.Dial(network, echo(t, network, family.hosts[1]))
				if err != nil {
					t.Fatal(err)
				}
				checkEcho(t, conn)
				hangUp(conn)
			})
		}
	}
}

var ignoreUnexported = cmp.FilterPath(func(p cmp.Path) bool {
	field, ok := p.Last().(cmp.StructField)
	return ok && field.Name() == "errno"
}, cmp.Ignore())

// Source addresses are used evenly, and in no order that an observer could tell.
func TestSourceAddrsAreUsedEvenly(t *testing.T) {
	ownNamespace(t, 32768, 60999)
	const n, dials = 16, 16 * 100
	v4, v6 := ownSources(t, n)
	address := echo(t, "udp", "127.1.0.1")
	d := connectx.Dialer{SourceAddrs: slices.Concat(v6, v4)}
	used := make(map[netip.Addr]int)
	follows := make(map[[2]netip.Addr]int)
	var last netip.Addr
	for range dials {
		conn, err := d.Dial("udp", address)
		if err != nil {
			t.Fatal(err)
		}
		source := netip.MustParseAddrPort(conn.LocalAddr().String()).Addr()
		conn.Close()
		used[source]++
		follows[[2]netip.Addr{last, source}]++
		last = source
	}
	// Chi-square with 15 degrees of freedom: above 60 once in two million
	// times, and with 255: above 400 even less often.
	var chi float64
	for _, source := range v4 {
		diff := float64(used[source]) - dials/n
		chi += diff * diff / (dials / n)
	}
	if chi > 60 || len(used) != n {
		t.Errorf("%d addresses used, chi-square is %.1f: %v", len(used), chi, used)
	}
	chi = 0
	for _, first := range v4 {
		for _, second := range v4 {
			expected := float64(dials) / (n * n)
			diff := float64(follows[[2]netip.Addr{first, second}]) - expected
			chi += diff * diff / expected
		}
	}
	if chi > 400 {
		t.Errorf("chi-square of pairs is %.1f", chi)
	}
}

// In a storm of dials on full source addresses, none that is free is missed.
func TestOneFreeSourceAddrIsFound(t *testing.T) {
	for _, network := range []string{"tcp", "udp"} {
		t.Run(network, func(t *testing.T) {
			ownNamespace(t, 40000, 40511) // enough ports to remember that they are taken
			v4, _ := ownSources(t, 3)
			address := echo(t, network, "127.1.0.1")
			for _, source := range v4[1:] {
				d := connectx.Dialer{SourceAddrs: []netip.Addr{source}}
				fillUp(t, &d, network, address)
			}
			d := connectx.Dialer{SourceAddrs: v4}
			for range 100 {
				conn, err := d.Dial(network, address)
				if err != nil {
					t.Fatal(err)
				}
				defer hangUp(conn)
				if got := netip.MustParseAddrPort(conn.LocalAddr().String()).Addr(); got != v4[0] {
					t.Fatalf("from %v, want %v", got, v4[0])
				}
			}
		})
	}
}

// A dial that goes on to the next source address does not take a 4-tuple that
// exists, although what was in the way on the first was of another kind.
func TestSourceAddrsDoNotOvershadow(t *testing.T) {
	const low, high = 40000, 40004
	ownNamespace(t, low, high)
	address, other := echo(t, "udp", "127.1.0.1"), echo(t, "udp", "127.1.0.2")
	for port := uint16(low); port <= high; port++ {
		plain := net.Dialer{LocalAddr: localAddr("udp", "127.2.0.1", port)}
		conn, err := plain.Dial("udp", other)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	second := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr("udp", "127.2.0.2", 0)}}
	fillUp(t, &second, "udp", address)
	d := connectx.Dialer{SourceAddrs: []netip.Addr{netip.MustParseAddr("127.2.0.1"), netip.MustParseAddr("127.2.0.2")}}
	for range 10 {
		conn, err := d.Dial("udp", address)
		if err == nil {
			t.Fatalf("a second connection on %v", conn.LocalAddr())
		}
		if !errors.Is(err, connectx.ErrPortsExhausted) {
			t.Fatal(err)
		}
	}
}

// Where most source addresses are full, a dial does not search all of their ports.
func TestFullSourceAddrsAreNotSearchedOverAndOver(t *testing.T) {
	const n = 6
	for _, network := range []string{"tcp", "udp"} {
		t.Run(network, func(t *testing.T) {
			ownNamespace(t, 40000, 40511)
			v4, _ := ownSources(t, n)
			address := echo(t, network, "127.1.0.1")
			for _, source := range v4[1:] {
				d := connectx.Dialer{SourceAddrs: []netip.Addr{source}}
				fillUp(t, &d, network, address)
			}
			d := connectx.Dialer{SourceAddrs: v4}
			before := connectx.ReadStats()
			const dials = 200
			for range dials {
				conn, err := d.Dial(network, address)
				if err != nil {
					t.Fatal(err)
				}
				defer hangUp(conn)
			}
			diff := statsDiff(before, connectx.ReadStats())
			// Two or three are usual. To search a full range takes 512, so that
			// without the first, brief round there are 40 and more.
			if tries := (diff.TCP.Tries + diff.UDP.Tries) / dials; tries > 20 {
				t.Errorf("%d tries per dial", tries)
			}
		})
	}
}

// All ways to dial use SourceAddrs.
func TestSourceAddrsEverywhere(t *testing.T) {
	ownNamespace(t, 40000, 40019)
	v4, v6 := ownSources(t, 1)
	mapped := netip.AddrFrom16(v4[0].As16())
	for _, family := range families {
		source := v4[0]
		if family.suffix == "6" {
			source = v6[0]
		}
		d := connectx.Dialer{SourceAddrs: []netip.Addr{v6[0], mapped}}
		tcp, udp := echo(t, "tcp"+family.suffix, family.hosts[0]), echo(t, "udp"+family.suffix, family.hosts[0])
		host := netip.MustParseAddr(family.hosts[0])
		ctx := t.Context()
		for _, tt := range []struct {
			name string
			dial func() (net.Conn, error)
		}{
			{"Dial tcp", func() (net.Conn, error) { return d.Dial("tcp", tcp) }},
			{"Dial udp", func() (net.Conn, error) { return d.Dial("udp", udp) }},
			{"DialContext with family", func() (net.Conn, error) { return d.DialContext(ctx, "tcp"+family.suffix, tcp) }},
			{"DialTCP", func() (net.Conn, error) {
				return d.DialTCP(ctx, "tcp", netip.AddrPort{}, netip.MustParseAddrPort(tcp))
			}},
			{"DialUDP", func() (net.Conn, error) {
				return d.DialUDP(ctx, "udp", netip.AddrPort{}, netip.MustParseAddrPort(udp))
			}},
			{"DialPacket", func() (net.Conn, error) { return d.DialPacket(ctx, "udp", udp) }},
			{"NetDialer tcp", func() (net.Conn, error) { return d.NetDialer().DialContext(ctx, "tcp", tcp) }},
			{"NetDialer udp", func() (net.Conn, error) { return d.NetDialer().DialContext(ctx, "udp", udp) }},
			{"raw IP", func() (net.Conn, error) { return d.Dial("ip"+family.suffix+":253", family.hosts[0]) }},
			{"raw IP of any family", func() (net.Conn, error) { return d.Dial("ip:253", family.hosts[0]) }},
			{"raw IP NetDialer", func() (net.Conn, error) { return d.NetDialer().Dial("ip:253", family.hosts[0]) }},
			{"DialIP", func() (net.Conn, error) { return d.DialIP(ctx, "ip:253", netip.Addr{}, host) }},
		} {
			conn, err := tt.dial()
			if err != nil {
				t.Errorf("%s over %s: %v", tt.name, family.name, err)
				continue
			}
			defer conn.Close()
			local := conn.LocalAddr().String()
			if ap, err := netip.ParseAddrPort(local); err == nil {
				local = ap.Addr().String()
			}
			if local != source.String() {
				t.Errorf("%s over %s comes from %s, want %v", tt.name, family.name, local, source)
			}
		}
	}

	// This host, of either family, and a name.
	for _, address := range []string{":7", "[::]:7", "localhost:7"} {
		d := connectx.Dialer{SourceAddrs: v4}
		conn, err := d.Dial("udp", address)
		if err != nil {
			t.Errorf("to %s: %v", address, err)
			continue
		}
		if got := netip.MustParseAddrPort(conn.LocalAddr().String()).Addr(); got != v4[0] {
			t.Errorf("to %s from %v, want %v", address, got, v4[0])
		}
		conn.Close()
	}
}

// What makes no sense fails with an error that says so.
func TestFieldsThatMakeNoSense(t *testing.T) {
	ownNamespace(t, 40000, 40019)
	here := netip.MustParseAddr("127.2.0.1")
	elsewhere, elsewhere6 := netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::7")
	for _, tt := range []struct {
		name    string
		dialer  func(network string) connectx.Dialer
		address string
		want    []string
		is      error
	}{
		{
			name: "LocalAddr and SourceAddrs",
			dialer: func(network string) connectx.Dialer {
				return connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr(network, "127.2.0.2", 0)}, SourceAddrs: []netip.Addr{here}}
			},
			want: []string{"LocalAddr 127.2.0.2", "SourceAddrs"},
		},
		{
			name: "a port in LocalAddr, and SourceAddrs",
			dialer: func(network string) connectx.Dialer {
				return connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr(network, "", 40003)}, SourceAddrs: []netip.Addr{here}}
			},
			want: []string{"LocalAddr", "40003", "SourceAddrs"},
		},
		{
			name:   "an address that is not on this machine",
			dialer: func(string) connectx.Dialer { return connectx.Dialer{SourceAddrs: []netip.Addr{elsewhere}} },
			want:   []string{"SourceAddrs 192.0.2.7", "not an address of this machine"},
			is:     unix.EADDRNOTAVAIL,
		},
		{
			name:    "an IPv6 address that is not on this machine",
			dialer:  func(string) connectx.Dialer { return connectx.Dialer{SourceAddrs: []netip.Addr{elsewhere6}} },
			address: "[fd00::1]:7",
			want:    []string{"SourceAddrs 2001:db8::7", "not an address of this machine"},
			is:      unix.EADDRNOTAVAIL,
		},
		{
			name:   "no address of the destination's family",
			dialer: func(string) connectx.Dialer { return connectx.Dialer{SourceAddrs: []netip.Addr{elsewhere6}} },
			want:   []string{"SourceAddrs 2001:db8::7", "none is of the same family as 127.1.0.1:7"},
		},
		{
			name:   "an invalid address",
			dialer: func(string) connectx.Dialer { return connectx.Dialer{SourceAddrs: []netip.Addr{{}}} },
			want:   []string{"SourceAddrs[0] invalid IP", "not an address to send from"},
		},
		{
			name: "the unspecified address",
			dialer: func(string) connectx.Dialer {
				return connectx.Dialer{SourceAddrs: []netip.Addr{netip.IPv4Unspecified()}}
			},
			want: []string{"SourceAddrs[0] 0.0.0.0", "not an address to send from"},
		},
		{
			name: "a range that runs backwards",
			dialer: func(string) connectx.Dialer {
				return connectx.Dialer{PortRange: connectx.PortRange{Low: 40010, High: 40009}}
			},
			want: []string{"PortRange 40010-40009", "low"},
		},
		{
			name:   "a range from port 0",
			dialer: func(string) connectx.Dialer { return connectx.Dialer{PortRange: connectx.PortRange{High: 40009}} },
			want:   []string{"PortRange 0-40009", "low"},
		},
		{
			name: "a hook that binds the socket to a port that is not in PortRange",
			dialer: func(string) connectx.Dialer {
				bind := onSocket(func(fd int) error {
					return unix.Bind(fd, &unix.SockaddrInet4{Port: 40010, Addr: [4]byte{127, 2, 0, 1}})
				})
				return connectx.Dialer{Dialer: net.Dialer{Control: bind}, PortRange: connectx.PortRange{Low: 40000, High: 40009}}
			},
			want: []string{"PortRange 40000-40009", "127.2.0.1:40010"},
		},
		{
			name: "a port of LocalAddr that is not in PortRange",
			dialer: func(network string) connectx.Dialer {
				return connectx.Dialer{
					Dialer:    net.Dialer{LocalAddr: localAddr(network, "127.2.0.1", 40010)},
					PortRange: connectx.PortRange{Low: 40000, High: 40009},
				}
			},
			want: []string{"LocalAddr 127.2.0.1:40010", "PortRange 40000-40009"},
		},
	} {
		for _, network := range []string{"tcp", "udp"} {
			address := tt.address
			if address == "" {
				address = "127.1.0.1:7"
			}
			d := tt.dialer(network)
			for _, dialer := range []interface {
				DialContext(ctx context.Context, network, address string) (net.Conn, error)
			}{&d, d.NetDialer()} {
				_, err := dialer.DialContext(t.Context(), network, address)
				var op *net.OpError
				if !errors.As(err, &op) || op.Op != "dial" || op.Timeout() {
					t.Errorf("%T, %s, %s: %v, want a *net.OpError", dialer, network, tt.name, err)
					continue
				}
				for _, part := range tt.want {
					if !strings.Contains(err.Error(), part) {
						t.Errorf("%T, %s, %s: %q is not in %q", dialer, network, tt.name, part, err)
					}
				}
				if tt.is != nil && !errors.Is(err, tt.is) {
					t.Errorf("%T, %s, %s: %v is not %v", dialer, network, tt.name, err, tt.is)
				}
			}
		}
	}
	ofIPv6 := connectx.Dialer{Dialer: net.Dialer{LocalAddr: &net.IPAddr{IP: net.IPv6loopback}}}
	for _, dialer := range []*net.Dialer{ofIPv6.NetDialer(), &ofIPv6.Dialer} {
		if _, err := dialer.Dial("ip4:253", "127.1.0.1"); err == nil || !strings.Contains(err.Error(), "no suitable address") {
			t.Errorf("raw IP from an address of another family: %v", err)
		}
	}
	d := connectx.Dialer{SourceAddrs: []netip.Addr{here}}
	if _, err := d.DialIP(t.Context(), "ip4:253", here, here); err == nil || !strings.Contains(err.Error(), "LocalAddr") || !strings.Contains(err.Error(), "SourceAddrs") {
		t.Errorf("DialIP with an address and SourceAddrs: %v", err)
	}
}

// An address that is not on this machine is one to dial from, if the caller's
// hook makes it so.
func TestSourceAddrsWithFreebind(t *testing.T) {
	ownNamespace(t, 40000, 40019)
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	// "Any IP": all of the prefix is delivered here, none of it assigned.
	_, prefix, err := net.ParseCIDR("2001:db8:7::/64")
	if err != nil {
		t.Fatal(err)
	}
	route := &netlink.Route{LinkIndex: lo.Attrs().Index, Dst: prefix, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL}
	if err := netlink.RouteAdd(route); err != nil {
		t.Fatal(err)
	}
	for _, network := range []string{"tcp", "udp"} {
		d := connectx.Dialer{
			Dialer: net.Dialer{Timeout: 10 * time.Second, Control: setSocketOption(unix.SOL_IPV6, unix.IPV6_FREEBIND, 1)},
		}
		for i := range 256 {
			d.SourceAddrs = append(d.SourceAddrs, netip.MustParseAddr(fmt.Sprintf("2001:db8:7::%x", i+1)))
		}
		address := echo(t, network, "fd00::1")
		used := make(map[netip.Addr]bool)
		for range 50 {
			conn, err := d.Dial(network, address)
			if err != nil {
				t.Fatal(err)
			}
			defer hangUp(conn)
			checkEcho(t, conn)
			source := netip.MustParseAddrPort(conn.LocalAddr().String()).Addr()
			if !slices.Contains(d.SourceAddrs, source) {
				t.Errorf("from %v", source)
			}
			used[source] = true
		}
		if len(used) < 25 {
			t.Errorf("%d addresses used by 50 dials", len(used))
		}
	}
}
