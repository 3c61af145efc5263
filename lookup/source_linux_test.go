package lookup

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/netns"
	"github.com/seed22601231/connectx/internal/sys"
)

// connectedSource is what Source should answer: the address that the kernel
// gives a socket which connects.
func connectedSource(destination netip.AddrPort, opts RouteOptions) (netip.Addr, error) {
	s := spec{
		family:  familyOf(destination.Addr().Unmap()),
		device:  opts.Interface,
		mark:    opts.Mark,
		connect: netip.AddrPortFrom(destination.Addr().Unmap(), destination.Port()),
		scope:   opts.Interface,
	}
	if opts.SourcePort != 0 {
		any := netip.IPv4Unspecified()
		if s.family == unix.AF_INET6 {
			any = netip.IPv6Unspecified()
		}
		s.bind = netip.AddrPortFrom(any, opts.SourcePort)
	}
	fd, err := s.open()
	if err != nil {
		return netip.Addr{}, err
	}
	defer unix.Close(fd)
	local, err := sys.LocalAddr(fd)
	return local.Addr(), err
}

// A probe is a question that is asked again and again, always of the same Conn.
type probe struct {
	name        string
	destination netip.AddrPort
	opts        RouteOptions
	conn        *Conn
	last        string // answer
}

// remember sees to it that the Conn keeps the answer. It would not do so for a
// second after the last change, and a link that was brought up has something to
// say of itself now and then for a while.
func (p *probe) remember(t *testing.T) {
	t.Helper()
	for range 1000 {
		p.conn.changed = time.Time{}
		if _, err := p.conn.Source(p.destination, p.opts); err != nil {
			return // an error is not kept
		}
		if kept := p.conn.cached(p.destination, p.opts); kept.destination == p.destination && kept.opts == p.opts {
			return
		}
	}
	t.Fatalf("%s: the answer is not kept", p.name)
}

// ask asks the Conn, a new one, and the kernel, which have to agree, and
// returns the answer as text: the address, or what went wrong.
func (p *probe) ask(t *testing.T) string {
	t.Helper()
	got, err := p.conn.Source(p.destination, p.opts)

	fresh, openErr := Open()
	check(t, openErr)
	defer fresh.Close()
	freshGot, freshErr := fresh.Source(p.destination, p.opts)
	if got != freshGot || fmt.Sprint(err) != fmt.Sprint(freshErr) {
		t.Errorf("%s: %+v, %v, but a new Conn says %+v, %v", p.name, got, err, freshGot, freshErr)
	}

	truth, truthErr := connectedSource(p.destination, p.opts)
	var errno unix.Errno
	switch {
	case err == nil:
		if truth != got.Source || truthErr != nil {
			t.Errorf("%s: %v, but a socket gets %v, %v", p.name, got.Source, truth, truthErr)
		}
		if got.Interface == 0 {
			t.Errorf("%s: %v without an interface", p.name, got.Source)
		}
		return got.Source.String()
	case err == ErrNoSource:
		// What connect says when it finds no address.
		if !errors.Is(truthErr, unix.EADDRNOTAVAIL) {
			t.Errorf("%s: %v, but a socket gets %v, %v", p.name, err, truth, truthErr)
		}
		return "no source"
	case errors.As(truthErr, &errno):
		if !errors.Is(err, errno) {
			t.Errorf("%s: %v, but a socket gets %v", p.name, err, truthErr)
		}
		return errno.Error()
	default:
		t.Errorf("%s: %v, but a socket gets %v, %v", p.name, err, truth, truthErr)
		return err.Error()
	}
}

// A step is a change, and the answers that the probes should give after it.
type step struct {
	name   string
	change func() error
	want   []string
}

// follow makes the changes one by one. After each, the very next answer has to
// be the new one.
func follow(t *testing.T, probes []*probe, steps []step) {
	t.Helper()
	for _, p := range probes {
		p.conn = openConn(t)
	}
	for _, s := range steps {
		for _, p := range probes {
			p.remember(t)
		}
		if err := s.change(); err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
		differs := false
		got := make([]string, len(probes))
		for i, p := range probes {
			got[i] = p.ask(t)
			differs = differs || got[i] != p.last
			p.last = got[i]
		}
		if diff := cmp.Diff(s.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", s.name, diff)
		}
		if !differs {
			t.Errorf("%s: this changes no answer, so the step tests nothing", s.name)
		}
	}
}

func prefix(t testing.TB, s string) *net.IPNet {
	t.Helper()
	_, n, err := net.ParseCIDR(s)
	check(t, err)
	return n
}

// via is a route over an interface.
func via(t testing.TB, destination string, l netlink.Link, source string) *netlink.Route {
	t.Helper()
	return &netlink.Route{Dst: prefix(t, destination), LinkIndex: l.Attrs().Index, Src: net.ParseIP(source)}
}

func inTable(r *netlink.Route, table int) *netlink.Route {
	r.Table = table
	return r
}

func markRule(family int, mark uint32, table int) *netlink.Rule {
	r := netlink.NewRule()
	r.Family, r.Mark, r.Table, r.Priority = family, mark, table, 100
	return r
}

func portRule(family int, port uint16, table int) *netlink.Rule {
	r := netlink.NewRule()
	r.Family, r.Table, r.Priority = family, table, 101
	r.Sport = netlink.NewRulePortRange(port, port)
	return r
}

func all(changes ...error) error { return errors.Join(changes...) }

func TestSourceForThisSystem(t *testing.T) {
	for _, tt := range []struct{ destination, want string }{
		{"127.0.0.1:53", "127.0.0.1"},
		{"127.0.0.2:53", "127.0.0.1"},
		{"127.0.0.1:0", "127.0.0.1"},
		{"[::ffff:127.0.0.1]:53", "127.0.0.1"},
		{"[::1]:53", "::1"},
		{"0.0.0.0:53", "127.0.0.1"}, // connect takes both to mean this system
		{"[::]:53", "::1"},
	} {
		t.Run(tt.destination, func(t *testing.T) {
			destination := netip.MustParseAddrPort(tt.destination)
			if !destination.Addr().Unmap().Is4() {
				needIPv6(t)
			}
			p := probe{name: tt.destination, destination: destination, conn: openConn(t)}
			for range 2 { // asked for, and kept
				if got := p.ask(t); got != tt.want {
					t.Errorf("%s, want %s", got, tt.want)
				}
			}
			route, err := p.conn.Source(destination, RouteOptions{})
			check(t, err)
			if route.Interface != 1 {
				t.Errorf("over interface %d, want 1", route.Interface)
			}
		})
	}
}

func TestSourceFollowsEveryChangeAtOnce(t *testing.T) {
	enter(t)
	v0, v1 := veths(t)
	for _, a := range []string{"10.1.0.1/24", "10.1.0.2/24"} {
		check(t, netlink.AddrAdd(v0, address(t, a)))
	}
	check(t, netlink.AddrAdd(v1, address(t, "10.2.0.1/24")))
	check(t, netlink.RouteAdd(inTable(via(t, "192.0.2.0/24", v1, "10.2.0.1"), 100)))
	// Otherwise the kernel also reports every route that a nexthop is part of.
	check(t, os.WriteFile("/proc/sys/net/ipv4/nexthop_compat_mode", []byte("0\n"), 0))

	destination := netip.MustParseAddrPort("192.0.2.9:53")
	probes := []*probe{
		{name: "without options", destination: destination},
		{name: "with a mark", destination: destination, opts: RouteOptions{Mark: 7}},
		{name: "with a source port", destination: destination, opts: RouteOptions{SourcePort: 4000}},
		{name: "over v1", destination: destination, opts: RouteOptions{Interface: index(v1)}},
	}
	unreachable := unix.ENETUNREACH.Error()
	mark, port := markRule(unix.AF_INET, 7, 100), portRule(unix.AF_INET, 4000, 100)
	follow(t, probes, []step{
		{"a route", func() error { return netlink.RouteAdd(via(t, "192.0.2.0/24", v0, "10.1.0.1")) },
			[]string{"10.1.0.1", "10.1.0.1", "10.1.0.1", "10.2.0.1"}},
		{"another preferred source", func() error { return netlink.RouteReplace(via(t, "192.0.2.0/24", v0, "10.1.0.2")) },
			[]string{"10.1.0.2", "10.1.0.2", "10.1.0.2", "10.2.0.1"}},
		{"a route that is more specific", func() error { return netlink.RouteAdd(via(t, "192.0.2.9/32", v1, "")) },
			[]string{"10.2.0.1", "10.2.0.1", "10.2.0.1", "10.2.0.1"}},
		{"without that route", func() error { return netlink.RouteDel(via(t, "192.0.2.9/32", v1, "")) },
			[]string{"10.1.0.2", "10.1.0.2", "10.1.0.2", "10.2.0.1"}},
		{"a rule for the mark", func() error { return netlink.RuleAdd(mark) },
			[]string{"10.1.0.2", "10.2.0.1", "10.1.0.2", "10.2.0.1"}},
		{"a rule for the source port", func() error { return netlink.RuleAdd(port) },
			[]string{"10.1.0.2", "10.2.0.1", "10.2.0.1", "10.2.0.1"}},
		{"a route in the table of the rules", func() error { return netlink.RouteReplace(inTable(via(t, "192.0.2.0/24", v0, "10.1.0.1"), 100)) },
			[]string{"10.1.0.2", "10.1.0.1", "10.1.0.1", "10.2.0.1"}},
		{"without the rules", func() error { return all(netlink.RuleDel(mark), netlink.RuleDel(port)) },
			[]string{"10.1.0.2", "10.1.0.2", "10.1.0.2", "10.2.0.1"}},
		{"another address on v1", func() error {
			return all(netlink.AddrDel(v1, address(t, "10.2.0.1/24")), netlink.AddrAdd(v1, address(t, "10.2.0.2/24")))
		}, []string{"10.1.0.2", "10.1.0.2", "10.1.0.2", "10.2.0.2"}},
		{"without the preferred source's address, and so without the route", func() error { return netlink.AddrDel(v0, address(t, "10.1.0.2/24")) },
			[]string{unreachable, unreachable, unreachable, "10.2.0.2"}},
		{"a route again", func() error { return netlink.RouteAdd(via(t, "192.0.2.0/24", v0, "")) },
			[]string{"10.1.0.1", "10.1.0.1", "10.1.0.1", "10.2.0.2"}},
		{"v0 down", func() error { return netlink.LinkSetDown(v0) },
			[]string{unreachable, unreachable, unreachable, "10.2.0.2"}},
		{"v0 up, and a route again", func() error {
			return all(netlink.LinkSetUp(v0), netlink.RouteAdd(via(t, "192.0.2.0/24", v0, "")))
		}, []string{"10.1.0.1", "10.1.0.1", "10.1.0.1", "10.2.0.2"}},
		{"a route over a nexthop object", func() error {
			return all(
				netlink.RouteDel(via(t, "192.0.2.0/24", v0, "")),
				setNexthop(1, v1, unix.NLM_F_CREATE),
				addNexthopRoute("192.0.2.0/24", 1))
		}, []string{"10.2.0.2", "10.2.0.2", "10.2.0.2", "10.2.0.2"}},
		{"the nexthop object over another interface", func() error { return setNexthop(1, v0, unix.NLM_F_REPLACE) },
			[]string{"10.1.0.1", "10.1.0.1", "10.1.0.1", "10.2.0.2"}},
		{"without the interfaces", func() error { return netlink.LinkDel(v0) },
			[]string{unreachable, unreachable, unreachable, unix.ENODEV.Error()}},
	})
}

// From linux/nexthop.h and linux/rtnetlink.h.
const (
	nhaID   = 1
	nhaOIF  = 5
	rtaNHID = 30
)

// setNexthop makes or replaces a nexthop object, which the netlink package
// cannot do.
func setNexthop(id uint32, l netlink.Link, flags int) error {
	req := nl.NewNetlinkRequest(unix.RTM_NEWNEXTHOP, flags|unix.NLM_F_ACK)
	req.AddData(rawBytes{unix.AF_INET, unix.RT_SCOPE_UNIVERSE, unix.RTPROT_STATIC, 0, 0, 0, 0, 0}) // struct nhmsg
	req.AddData(nl.NewRtAttr(nhaID, nl.Uint32Attr(id)))
	req.AddData(nl.NewRtAttr(nhaOIF, nl.Uint32Attr(index(l))))
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

func addNexthopRoute(destination string, id uint32) error {
	p := netip.MustParsePrefix(destination)
	req := nl.NewNetlinkRequest(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_ACK)
	msg := nl.NewRtMsg()
	msg.Family, msg.Dst_len = unix.AF_INET, uint8(p.Bits())
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.RTA_DST, p.Addr().AsSlice()))
	req.AddData(nl.NewRtAttr(rtaNHID, nl.Uint32Attr(id)))
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// rawBytes is a part of a netlink request that is written out.
type rawBytes []byte

func (b rawBytes) Len() int          { return len(b) }
func (b rawBytes) Serialize() []byte { return b }

func TestSourceFollowsEveryChangeOfIPv6AtOnce(t *testing.T) {
	enter(t)
	needIPv6(t)
	v0, v1 := veths(t)
	check(t, netlink.AddrAdd(v0, address(t, "2001:db8:1::1/64")))
	check(t, netlink.AddrAdd(v1, address(t, "2001:db8:2::1/64")))
	check(t, netlink.RouteAdd(inTable(via(t, "2001:db8:9::/64", v1, "2001:db8:2::1"), 100)))

	destination := netip.MustParseAddrPort("[2001:db8:9::9]:53")
	probes := []*probe{
		{name: "without options", destination: destination},
		{name: "with a mark", destination: destination, opts: RouteOptions{Mark: 7}},
		{name: "with a source port", destination: destination, opts: RouteOptions{SourcePort: 4000}},
		{name: "over v1", destination: destination, opts: RouteOptions{Interface: index(v1)}},
	}
	unreachable := unix.ENETUNREACH.Error()
	mark, port := markRule(unix.AF_INET6, 7, 100), portRule(unix.AF_INET6, 4000, 100)
	const one, two, three = "2001:db8:1::1", "2001:db8:2::1", "2001:db8:1::3"
	follow(t, probes, []step{
		{"a route", func() error { return netlink.RouteAdd(via(t, "2001:db8:9::/64", v0, "")) },
			[]string{one, one, one, unreachable}},
		{"a preferred source", func() error { return netlink.RouteReplace(via(t, "2001:db8:9::/64", v0, two)) },
			[]string{two, two, two, unreachable}},
		{"no preferred source", func() error { return netlink.RouteReplace(via(t, "2001:db8:9::/64", v0, "")) },
			[]string{one, one, one, unreachable}},
		{"a rule for the mark", func() error { return netlink.RuleAdd(mark) },
			[]string{one, two, one, unreachable}},
		{"a rule for the source port", func() error { return netlink.RuleAdd(port) },
			[]string{one, two, two, unreachable}},
		{"without the rules", func() error { return all(netlink.RuleDel(mark), netlink.RuleDel(port)) },
			[]string{one, one, one, unreachable}},
		{"a route over v1, less preferred", func() error {
			r := via(t, "2001:db8:9::/64", v1, "")
			r.Priority = 5000
			return netlink.RouteAdd(r)
		}, []string{one, one, one, two}},
		{"an address that has more in common with the destination", func() error {
			return netlink.AddrAdd(v0, address(t, "2001:db8:9:1::3/64"))
		}, []string{"2001:db8:9:1::3", "2001:db8:9:1::3", "2001:db8:9:1::3", two}},
		{"that address is deprecated", func() error {
			a := address(t, "2001:db8:9:1::3/64")
			a.ValidLft, a.PreferedLft = 1000, 0
			return netlink.AddrReplace(v0, a)
		}, []string{one, one, one, two}},
		{"without another address on v0", func() error { return netlink.AddrDel(v0, address(t, "2001:db8:1::1/64")) },
			[]string{two, two, two, two}},
		{"another address", func() error { return netlink.AddrAdd(v0, address(t, three+"/64")) },
			[]string{three, three, three, two}},
		{"v0 down", func() error { return netlink.LinkSetDown(v0) },
			[]string{two, two, two, two}},
		{"without the interfaces", func() error { return netlink.LinkDel(v0) },
			[]string{unreachable, unreachable, unreachable, unreachable}},
	})
}

func TestSourceForALinkLocalDestination(t *testing.T) {
	enter(t)
	needIPv6(t)
	v0, v1 := veths(t)
	check(t, netlink.AddrAdd(v0, address(t, "fe80::1:1/64")))
	check(t, netlink.AddrAdd(v1, address(t, "fe80::1:2/64")))
	for _, l := range []netlink.Link{v0, v1} {
		// The one that the kernel has given the interface is not usable yet,
		// and must not become so in the middle of the test.
		list, err := netlink.AddrList(l, unix.AF_INET6)
		check(t, err)
		for _, a := range list {
			if a.Flags&unix.IFA_F_PERMANENT != 0 && !strings.HasPrefix(a.IP.String(), "fe80::1:") {
				check(t, netlink.AddrDel(l, &a))
			}
		}
	}
	c := openConn(t)
	for _, tt := range []struct {
		destination string
		over        netlink.Link
		want        string
	}{
		{"[fe80::9]:53", v0, "fe80::1:1"},
		{"[fe80::9]:53", v1, "fe80::1:2"},
		{"[fe80::9%v0]:53", v1, "fe80::1:2"}, // the zone is not looked at
		{"[fe80::9%v1]:53", v0, "fe80::1:1"},
		{"[fe80::1:2]:53", v0, "fe80::1:1"},
	} {
		opts := RouteOptions{Interface: index(tt.over)}
		p := probe{name: tt.destination, destination: netip.MustParseAddrPort(tt.destination), opts: opts, conn: c}
		for range 2 {
			if got := p.ask(t); got != tt.want {
				t.Errorf("%s over %s: %s, want %s", tt.destination, tt.over.Attrs().Name, got, tt.want)
			}
		}
		if route, _ := c.Source(p.destination, opts); route.Interface != opts.Interface {
			t.Errorf("%s: over interface %d, want %d", tt.destination, route.Interface, opts.Interface)
		}
	}
}

func TestSourceWhereThereIsNone(t *testing.T) {
	enter(t)
	v0, _ := veths(t)
	check(t, netlink.AddrAdd(v0, address(t, "10.1.0.1/24")))
	for destination, kind := range map[string]int{
		"198.51.100.0/24": unix.RTN_UNREACHABLE, "198.51.101.0/24": unix.RTN_BLACKHOLE, "198.51.102.0/24": unix.RTN_PROHIBIT,
	} {
		check(t, netlink.RouteAdd(&netlink.Route{Dst: prefix(t, destination), Type: kind}))
	}
	tests := []struct {
		name, destination string
		opts              RouteOptions
		want              error
	}{
		{"no route", "192.0.2.1:53", RouteOptions{}, unix.ENETUNREACH},
		{"no interface", "10.1.0.9:53", RouteOptions{Interface: 999999}, unix.ENODEV},
		{"an unreachable route", "198.51.100.1:53", RouteOptions{}, unix.EHOSTUNREACH},
		{"a blackhole", "198.51.101.1:53", RouteOptions{}, unix.EINVAL},
		{"a prohibited route", "198.51.102.1:53", RouteOptions{}, unix.EACCES},
	}
	for _, tt := range tests {
		p := probe{name: tt.name, destination: netip.MustParseAddrPort(tt.destination), opts: tt.opts, conn: openConn(t)}
		for range 2 {
			if got := p.ask(t); got != tt.want.Error() {
				t.Errorf("%s: %s, want %v", tt.name, got, tt.want)
			}
		}
		_, err := p.conn.Source(p.destination, p.opts)
		if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.destination) {
			t.Errorf("%s: %v, want %v and the destination", tt.name, err, tt.want)
		}
	}

	needIPv6(t)
	p := probe{name: "IPv6", destination: netip.MustParseAddrPort("[2001:db8:3::1]:53"), conn: openConn(t)}
	if got, want := p.ask(t), unix.ENETUNREACH.Error(); got != want {
		t.Errorf("IPv6 without a route: %s, want %s", got, want)
	}
	// Now a route, but no address: not even that of loopback.
	check(t, netlink.RouteAdd(via(t, "2001:db8:3::/64", v0, "")))
	list, err := netlink.AddrList(nil, unix.AF_INET6)
	check(t, err)
	for _, a := range list {
		l, err := netlink.LinkByIndex(a.LinkIndex)
		check(t, err)
		check(t, netlink.AddrDel(l, &a))
	}
	for range 2 {
		if got := p.ask(t); got != "no source" {
			t.Errorf("IPv6 without an address: %s", got)
		}
	}
	check(t, netlink.AddrAdd(v0, address(t, "2001:db8:1::1/64")))
	if got, want := p.ask(t), "2001:db8:1::1"; got != want {
		t.Errorf("IPv6 with an address: %s, want %s", got, want)
	}
}

func TestSourceRejectsAnInvalidDestination(t *testing.T) {
	c := openConn(t)
	for _, destination := range []netip.AddrPort{{}, netip.AddrPortFrom(netip.Addr{}, 53)} {
		if route, err := c.Source(destination, RouteOptions{}); err == nil || !strings.Contains(err.Error(), "not valid") {
			t.Errorf("%v: %+v, %v", destination, route, err)
		}
	}
}

// More destinations than answers can be kept, in an order that evicts some all
// the time.
func TestSourceForManyDestinations(t *testing.T) {
	enter(t)
	v0, _ := veths(t)
	sources := []string{"10.1.0.1", "10.1.0.2", "10.1.0.3"}
	for _, s := range sources {
		check(t, netlink.AddrAdd(v0, address(t, s+"/24")))
	}
	const destinations = 300
	random := rand.New(rand.NewPCG(1, 2))
	want := make([]string, destinations)
	to := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, byte(2 + i>>8), byte(i)}) }
	set := func(i int) {
		want[i] = sources[random.IntN(len(sources))]
		check(t, netlink.RouteReplace(via(t, to(i).String()+"/32", v0, want[i])))
	}
	for i := range destinations {
		set(i)
	}
	c := openConn(t)
	for round := range 4 {
		c.changed = time.Time{} // as if the last change were long ago
		for range 4 * destinations {
			i := random.IntN(destinations)
			port := uint16(53 + random.IntN(2))
			route, err := c.Source(netip.AddrPortFrom(to(i), port), RouteOptions{})
			check(t, err)
			if got := route.Source.String(); got != want[i] {
				t.Fatalf("round %d, %v: %s, want %s", round, to(i), got, want[i])
			}
		}
		for range destinations / 3 {
			set(random.IntN(destinations))
		}
	}
}

// The same destination with other options is another question, though both
// have the same place among the answers.
func TestSourceKeepsOptionsApart(t *testing.T) {
	enter(t)
	v0, v1 := veths(t)
	check(t, netlink.AddrAdd(v0, address(t, "10.1.0.1/24")))
	check(t, netlink.AddrAdd(v1, address(t, "10.2.0.1/24")))
	check(t, netlink.RouteAdd(via(t, "192.0.2.0/24", v0, "")))
	check(t, netlink.RouteAdd(inTable(via(t, "192.0.2.0/24", v1, ""), 100)))
	check(t, netlink.RuleAdd(markRule(unix.AF_INET, 7, 100)))
	check(t, netlink.RuleAdd(portRule(unix.AF_INET, 4000, 100)))
	check(t, netlink.RouteAdd(inTable(via(t, "192.0.2.9/32", v1, ""), 101)))
	byPort := netlink.NewRule()
	byPort.Family, byPort.Table, byPort.Priority, byPort.Dport = unix.AF_INET, 101, 90, netlink.NewRulePortRange(5353, 5353)
	byPort.IPProto = unix.IPPROTO_UDP
	check(t, netlink.RuleAdd(byPort))
	byPort = netlink.NewRule()
	byPort.Family, byPort.Table, byPort.Priority, byPort.Dport = unix.AF_INET, 101, 91, netlink.NewRulePortRange(53, 53)
	byPort.IPProto = unix.IPPROTO_TCP // nothing to us
	check(t, netlink.RuleAdd(byPort))

	c := openConn(t)
	for range 3 {
		for _, tt := range []struct {
			name, destination string
			opts              RouteOptions
			want              string
		}{
			{"without options", "192.0.2.9:53", RouteOptions{}, "10.1.0.1"},
			{"a mark with a rule", "192.0.2.9:53", RouteOptions{Mark: 7}, "10.2.0.1"},
			{"a mark without a rule", "192.0.2.9:53", RouteOptions{Mark: 8}, "10.1.0.1"},
			{"a source port with a rule", "192.0.2.9:53", RouteOptions{SourcePort: 4000}, "10.2.0.1"},
			{"a source port without a rule", "192.0.2.9:53", RouteOptions{SourcePort: 4001}, "10.1.0.1"},
			{"an interface", "192.0.2.9:53", RouteOptions{Interface: index(v1)}, "10.2.0.1"},
			{"another interface", "192.0.2.9:53", RouteOptions{Interface: index(v0)}, "10.1.0.1"},
			{"a destination port with a rule", "192.0.2.9:5353", RouteOptions{}, "10.2.0.1"},
		} {
			p := probe{name: tt.name, destination: netip.MustParseAddrPort(tt.destination), opts: tt.opts, conn: c}
			if got := p.ask(t); got != tt.want {
				t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
			}
		}
	}
}

// With the source given, the question is about the interface.
func TestSourceFromAGivenAddress(t *testing.T) {
	enter(t)
	v0, v1 := veths(t)
	for _, tt := range []struct {
		name                string
		family              int
		one, two            string // addresses of v0 and v1
		network             string
		destination, mapped string
	}{
		{"IPv4", unix.AF_INET, "10.1.0.1", "10.2.0.1", "192.0.2.0/24", "192.0.2.9:53", "[::ffff:192.0.2.9]:53"},
		{"IPv6", unix.AF_INET6, "2001:db8:1::1", "2001:db8:2::1", "2001:db8:9::/64", "[2001:db8:9::9]:53", "[2001:db8:9::9]:53"},
	} {
		if tt.family == unix.AF_INET6 {
			needIPv6(t)
		}
		one, two := netip.MustParseAddr(tt.one), netip.MustParseAddr(tt.two)
		host := one.BitLen()
		check(t, netlink.AddrAdd(v0, address(t, fmt.Sprintf("%v/%d", one, host))))
		check(t, netlink.AddrAdd(v1, address(t, fmt.Sprintf("%v/%d", two, host))))
		check(t, netlink.RouteAdd(via(t, tt.network, v0, "")))
		check(t, netlink.RouteAdd(inTable(via(t, tt.network, v1, ""), 100)))
		rule := netlink.NewRule()
		rule.Family, rule.Table, rule.Priority, rule.Src = tt.family, 100, 100, prefix(t, fmt.Sprintf("%v/%d", two, host))
		check(t, netlink.RuleAdd(rule))

		c := openConn(t)
		for range 2 { // asked for, and kept
			for _, destination := range []string{tt.destination, tt.mapped} {
				for source, want := range map[netip.Addr]Route{
					{}:                           {one, index(v0)},
					one:                          {one, index(v0)},
					two:                          {two, index(v1)},
					netip.AddrFrom16(two.As16()): {two, index(v1)},
				} {
					got, err := c.Source(netip.MustParseAddrPort(destination), RouteOptions{Source: source})
					if diff := cmp.Diff(want, got, comparable); diff != "" || err != nil {
						t.Errorf("%s from %v to %s: %v (-want +got):\n%s", tt.name, source, destination, err, diff)
					}
				}
			}
		}
		other := netip.MustParseAddr("127.0.0.1")
		if tt.family == unix.AF_INET {
			other = netip.IPv6Loopback()
		}
		if got, err := c.Source(netip.MustParseAddrPort(tt.destination), RouteOptions{Source: other}); err == nil ||
			!strings.Contains(err.Error(), "not of one family") {
			t.Errorf("%s from %v: %+v, %v", tt.name, other, got, err)
		}
	}
}

// drops is how many messages did not fit into the buffer of a socket.
func drops(t *testing.T, fd int) uint32 {
	t.Helper()
	const skMeminfoDrops = 8 // linux/sock_diag.h
	var info [9]uint32
	size := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		t.Skip("SO_MEMINFO:", errno)
	}
	return info[skMeminfoDrops]
}

// So many changes that the notification of the one that matters is lost.
func TestSourceAfterMoreChangesThanThereIsRoomFor(t *testing.T) {
	enter(t)
	v0, _ := veths(t)
	for _, a := range []string{"10.1.0.1/24", "10.1.0.2/24"} {
		check(t, netlink.AddrAdd(v0, address(t, a)))
	}
	check(t, netlink.RouteReplace(via(t, "192.0.2.0/24", v0, "10.1.0.1")))
	h, err := netlink.NewHandle()
	check(t, err)
	defer h.Close()

	p := probe{name: "flooded", destination: netip.MustParseAddrPort("192.0.2.9:53"), conn: openConn(t)}
	for round := range 3 {
		p.remember(t)
		before := drops(t, p.conn.route.fd)
		for i := 0; drops(t, p.conn.route.fd) == before; i++ {
			if i == 100000 {
				t.Fatal("the buffer does not fill")
			}
			check(t, h.RouteReplace(via(t, "198.51.100.0/24", v0, fmt.Sprintf("10.1.0.%d", 1+i%2))))
		}
		want := fmt.Sprintf("10.1.0.%d", 1+(round+1)%2)
		check(t, h.RouteReplace(via(t, "192.0.2.0/24", v0, want)))
		if got := p.ask(t); got != want {
			t.Errorf("round %d: %s, want %s", round, got, want)
		}
	}
}

// Changes without end while questions are asked, with so little room that the
// kernel again and again cannot put down its reply.
func TestSourceWhileChangesFillTheBuffer(t *testing.T) {
	enter(t)
	v0, v1 := veths(t)
	check(t, netlink.AddrAdd(v0, address(t, "10.1.0.1/24")))
	check(t, netlink.RouteAdd(via(t, "192.0.2.0/24", v0, "10.1.0.1")))
	c := openConn(t)
	// The least there is: a single notification of a link takes all of it.
	check(t, unix.SetsockoptInt(c.route.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1))
	h, err := netlink.NewHandle()
	check(t, err)
	defer h.Close()

	var stop atomic.Bool
	stopped := make(chan error)
	go func() {
		for i := 0; !stop.Load(); i++ {
			if err := h.LinkSetMTU(v1, 1300+i%100); err != nil {
				stopped <- err
				return
			}
		}
		stopped <- nil
	}()
	destination := netip.MustParseAddrPort("192.0.2.9:53")
	for range 20000 {
		if got, err := c.Source(destination, RouteOptions{}); err != nil || got.Source.String() != "10.1.0.1" {
			t.Errorf("%+v, %v", got, err)
			break
		}
	}
	stop.Store(true)
	check(t, <-stopped)
}

// The kernel says that an address is gone before it has removed the routes
// which prefer it. An answer from in between must not be kept.
func TestSourceIsRightAfterAChangeThatItWasAskedDuring(t *testing.T) {
	enter(t)
	v0, _ := veths(t)
	check(t, netlink.AddrAdd(v0, address(t, "10.1.0.1/24")))
	c := openConn(t)
	h, err := netlink.NewHandle()
	check(t, err)
	defer h.Close()
	extra := address(t, "10.1.0.2/24")
	destination := netip.MustParseAddrPort("192.0.2.9:53")
	for round := range 300 {
		check(t, h.AddrAdd(v0, extra))
		check(t, h.RouteReplace(via(t, "192.0.2.0/24", v0, "10.1.0.2")))
		removed := make(chan error, 1)
		go func() { removed <- h.AddrDel(v0, extra) }()
		for done := false; !done; {
			select {
			case err := <-removed:
				check(t, err)
				done = true
			default:
				c.Source(destination, RouteOptions{})
			}
		}
		if got, err := c.Source(destination, RouteOptions{}); !errors.Is(err, unix.ENETUNREACH) {
			t.Fatalf("round %d: %+v, %v, with the route gone", round, got, err)
		}
	}
}

func TestAnswersAreKeptUntilAChangeAndAgainWhenItHasSettled(t *testing.T) {
	enter(t)
	// On the loopback interface nothing changes by itself.
	check(t, netns.LoopbackUp("10.1.0.1/32", "10.1.0.2/32"))
	lo, err := netlink.LinkByName("lo")
	check(t, err)
	check(t, netlink.RouteAdd(via(t, "192.0.2.0/24", lo, "10.1.0.1")))
	destination := netip.MustParseAddrPort("192.0.2.9:53")
	c := openConn(t)
	source := func() string {
		t.Helper()
		route, err := c.Source(destination, RouteOptions{})
		check(t, err)
		return route.Source.String()
	}
	// What is kept can be told from what is asked for if it is wrong.
	const wrong = "203.0.113.1"
	spoil := func() { c.cached(destination, RouteOptions{}).route.Source = netip.MustParseAddr(wrong) }

	source()
	spoil()
	if got := source(); got != wrong {
		t.Errorf("the first answer is not kept: %s", got)
	}
	c.Forget()
	if got := source(); got != "10.1.0.1" {
		t.Errorf("after Forget: %s", got)
	}
	spoil()
	if got := source(); got != wrong {
		t.Errorf("the answer after Forget is not kept: %s", got)
	}

	check(t, netlink.RouteReplace(via(t, "192.0.2.0/24", lo, "10.1.0.2")))
	for range 2 {
		if got := source(); got != "10.1.0.2" {
			t.Errorf("after a change: %s", got)
		}
		spoil()
	}
	c.changed = c.changed.Add(-settle)
	if got := source(); got != "10.1.0.2" {
		t.Errorf("once that has settled: %s", got)
	}
	spoil()
	if got := source(); got != wrong {
		t.Errorf("the answer is not kept once the change has settled: %s", got)
	}
}

// Between the moment when Source looks for notifications and its question, a
// change can be made. Its notification then comes before the answer.
func TestANotificationIsNotTakenForTheAnswer(t *testing.T) {
	enter(t)
	v0, _ := veths(t)
	for _, a := range []string{"10.1.0.1/24", "10.1.0.2/24"} {
		check(t, netlink.AddrAdd(v0, address(t, a)))
	}
	check(t, netlink.RouteAdd(via(t, "192.0.2.0/24", v0, "10.1.0.1")))
	destination := netip.MustParseAddrPort("192.0.2.9:53")

	// Notifications carry the sequence number of the request that made the
	// change. Here it is the one that the question is going to have.
	withNumber := func(seq uint32) error {
		req := nl.NewNetlinkRequest(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_ACK)
		req.Seq = seq
		msg := nl.NewRtMsg()
		msg.Family, msg.Dst_len = unix.AF_INET, 24
		req.AddData(msg)
		req.AddData(nl.NewRtAttr(unix.RTA_DST, []byte{198, 51, 100, 0}))
		req.AddData(nl.NewRtAttr(unix.RTA_PREFSRC, []byte{10, 1, 0, 2}))
		req.AddData(nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(index(v0))))
		s, err := nl.Subscribe(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer s.Close()
		if err := s.Send(req); err != nil {
			return err
		}
		messages, _, err := s.Receive()
		if err != nil {
			return err
		}
		if e := int32(binary.NativeEndian.Uint32(messages[0].Data)); e != 0 {
			return unix.Errno(-e)
		}
		return nil
	}
	for _, tt := range []struct {
		name   string
		change func(c *Conn) error
	}{
		{"one that is larger than the buffer", func(*Conn) error { return netlink.LinkSetMTU(v0, 1400) }},
		{"one with the number of the question", func(c *Conn) error { return withNumber(c.seq + 1) }},
		{"several", func(c *Conn) error {
			return all(netlink.LinkSetMTU(v0, 1300), netlink.AddrAdd(v0, address(t, "10.1.0.3/24")),
				netlink.RouteReplace(via(t, "198.51.100.0/24", v0, "10.1.0.3")))
		}},
	} {
		c := openConn(t)
		if err := tt.change(c); err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		got, err := c.askRoute(destination, RouteOptions{})
		if err != nil || got.Source.String() != "10.1.0.1" {
			t.Errorf("%s: %+v, %v", tt.name, got, err)
		}
		if c.changed.IsZero() {
			t.Errorf("%s went unnoticed", tt.name)
		}
	}
}

func TestSourceAnswersForTheNamespaceItWasOpenedIn(t *testing.T) {
	var link netlink.Link
	there := connElsewhere(t, func() error {
		if err := netns.LoopbackUp("10.9.0.1/32"); err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		link = lo
		return netlink.RouteAdd(&netlink.Route{
			Dst: &net.IPNet{IP: net.IP{192, 0, 2, 0}, Mask: net.CIDRMask(24, 32)}, LinkIndex: lo.Attrs().Index, Src: net.IP{10, 9, 0, 1},
		})
	})
	destination := netip.MustParseAddrPort("192.0.2.9:53")
	if _, err := openConn(t).Source(destination, RouteOptions{}); !errors.Is(err, unix.ENETUNREACH) {
		t.Errorf("here: %v", err)
	}
	for range 2 {
		got, err := there.Source(destination, RouteOptions{})
		want := Route{Source: netip.MustParseAddr("10.9.0.1"), Interface: index(link)}
		if diff := cmp.Diff(want, got, comparable); diff != "" || err != nil {
			t.Errorf("the other namespace, from here: %v (-want +got):\n%s", err, diff)
		}
	}
}

func TestSourceAllocatesNothing(t *testing.T) {
	c := openConn(t)
	for _, tt := range []struct {
		destination string
		opts        RouteOptions
	}{
		{"127.0.0.1:53", RouteOptions{}},
		{"127.0.0.1:53", RouteOptions{Interface: 1, SourcePort: 4000, Mark: 7}},
		{"[::1]:53", RouteOptions{}},
		{"[::1]:53", RouteOptions{Interface: 1, SourcePort: 4000, Mark: 7}},
	} {
		destination := netip.MustParseAddrPort(tt.destination)
		if destination.Addr().Is6() {
			needIPv6(t)
		}
		ask := func() {
			if got, err := c.Source(destination, tt.opts); err != nil || got.Source != destination.Addr() {
				t.Fatal(got, err)
			}
		}
		if n := testing.AllocsPerRun(1000, ask); n != 0 {
			t.Errorf("%s %+v, kept: %v allocations", tt.destination, tt.opts, n)
		}
		if n := testing.AllocsPerRun(1000, func() { c.Forget(); ask() }); n != 0 {
			t.Errorf("%s %+v, asked for: %v allocations", tt.destination, tt.opts, n)
		}
	}
}

// As many destinations as a program has in use at a time do not displace each
// other.
func TestAnswersForManyDestinationsAreKept(t *testing.T) {
	enter(t)
	check(t, netns.LoopbackUp())
	c := openConn(t)
	var destinations []netip.AddrPort
	for i := range 128 {
		destinations = append(destinations, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 1, 0, byte(i / 2)}), uint16(443+i%2)))
	}
	for range 2 {
		for _, destination := range destinations {
			c.changed = time.Time{}
			_, err := c.Source(destination, RouteOptions{})
			check(t, err)
		}
	}
	kept := 0
	for _, destination := range destinations {
		if c.cached(destination, RouteOptions{}).destination == destination {
			kept++
		}
	}
	if kept < 115 {
		t.Errorf("%d of %d answers are kept", kept, len(destinations))
	}
}
