package lookup

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestUDPFindsTheSocketThatWouldReceive(t *testing.T) {
	const lo = 1 // the loopback interface is the first of every namespace
	c := openConn(t)
	ports := freePorts(t, 3)
	p, q, r := ports[0], ports[1], ports[2]
	at := func(address string, port uint16) netip.AddrPort {
		return netip.AddrPortFrom(netip.MustParseAddr(address), port)
	}

	const nobody = -1
	type question struct {
		name          string
		local, remote netip.AddrPort
		ifindex       uint32
		want          int // index of the socket
	}
	tests := []struct {
		name      string
		sockets   []spec
		questions []question
	}{
		{
			"a connected socket is found on exactly its 4-tuple",
			[]spec{{bind: at("127.0.0.1", p), connect: at("127.0.0.2", q)}},
			[]question{
				{"its 4-tuple", at("127.0.0.1", p), at("127.0.0.2", q), 0, 0},
				{"its 4-tuple on its interface", at("127.0.0.1", p), at("127.0.0.2", q), lo, 0},
				{"its 4-tuple, IPv4-mapped", at("::ffff:127.0.0.1", p), at("::ffff:127.0.0.2", q), 0, 0},
				{"its 4-tuple, half of it IPv4-mapped", at("::ffff:127.0.0.1", p), at("127.0.0.2", q), 0, 0},
				{"another remote port", at("127.0.0.1", p), at("127.0.0.2", r), 0, nobody},
				{"another remote address", at("127.0.0.1", p), at("127.0.0.3", q), 0, nobody},
				{"another local port", at("127.0.0.1", r), at("127.0.0.2", q), 0, nobody},
				{"another local address", at("127.0.0.3", p), at("127.0.0.2", q), 0, nobody},
				{"the 4-tuple the other way round", at("127.0.0.2", q), at("127.0.0.1", p), 0, nobody},
				{"the ports the other way round", at("127.0.0.1", q), at("127.0.0.2", p), 0, nobody},
				{"the addresses the other way round", at("127.0.0.2", p), at("127.0.0.1", q), 0, nobody},
				{"the same numbers in IPv6", at("::1", p), at("::1", q), 0, nobody},
			},
		},
		{
			// In the question to the kernel source and destination are
			// swapped. Only one of these two sockets shows which way.
			"a socket and its peer are told apart",
			[]spec{
				{bind: at("127.0.0.1", p), connect: at("127.0.0.2", q)},
				{bind: at("127.0.0.2", q), connect: at("127.0.0.1", p)},
			},
			[]question{
				{"one way", at("127.0.0.1", p), at("127.0.0.2", q), 0, 0},
				{"the other way", at("127.0.0.2", q), at("127.0.0.1", p), 0, 1},
			},
		},
		{
			"sockets that share a port are told apart by their peers",
			[]spec{
				{bind: at("127.0.0.1", p), connect: at("127.0.0.2", q), share: true},
				{bind: at("127.0.0.1", p), connect: at("127.0.0.2", r), share: true},
				{bind: at("127.0.0.1", p), connect: at("127.0.0.3", q), share: true},
				{bind: at("127.0.0.3", p), connect: at("127.0.0.2", q), share: true},
			},
			[]question{
				{"the first", at("127.0.0.1", p), at("127.0.0.2", q), 0, 0},
				{"another remote port", at("127.0.0.1", p), at("127.0.0.2", r), 0, 1},
				{"another remote address", at("127.0.0.1", p), at("127.0.0.3", q), 0, 2},
				{"another local address", at("127.0.0.3", p), at("127.0.0.2", q), 0, 3},
				{"no peer of any", at("127.0.0.1", p), at("127.0.0.3", r), 0, nobody},
			},
		},
		{
			"an unconnected socket is found for every peer",
			[]spec{{bind: at("127.0.0.1", p)}},
			[]question{
				{"some peer", at("127.0.0.1", p), at("127.0.0.2", q), 0, 0},
				{"another peer", at("127.0.0.1", p), at("192.0.2.1", 1), 0, 0},
				{"itself", at("127.0.0.1", p), at("127.0.0.1", p), 0, 0},
				{"another local address", at("127.0.0.2", p), at("127.0.0.2", q), 0, nobody},
				{"another local port", at("127.0.0.1", q), at("127.0.0.2", q), 0, nobody},
			},
		},
		{
			"a socket on the wildcard address is found for every local one",
			[]spec{{bind: at("0.0.0.0", p)}},
			[]question{
				{"some address", at("127.0.0.1", p), at("127.0.0.2", q), 0, 0},
				{"another address", at("127.0.0.9", p), at("127.0.0.2", q), 0, 0},
				{"another port", at("127.0.0.1", q), at("127.0.0.2", q), 0, nobody},
				{"IPv6", at("::1", p), at("::1", q), 0, nobody},
			},
		},
		{
			"a specific address comes before the wildcard",
			[]spec{
				{bind: at("127.0.0.1", p), share: true},
				{bind: at("0.0.0.0", p), share: true},
			},
			[]question{
				{"the specific address", at("127.0.0.1", p), at("127.0.0.2", q), 0, 0},
				{"another address", at("127.0.0.3", p), at("127.0.0.2", q), 0, 1},
			},
		},
		{
			"a connected socket comes before an unconnected one that is newer",
			[]spec{
				{bind: at("127.0.0.1", p), connect: at("127.0.0.2", q), share: true},
				{bind: at("127.0.0.1", p), share: true},
			},
			[]question{
				{"the peer", at("127.0.0.1", p), at("127.0.0.2", q), 0, 0},
				{"somebody else", at("127.0.0.1", p), at("127.0.0.2", r), 0, 1},
			},
		},
		{
			"of unconnected sockets, the one that was bound last is found",
			[]spec{
				{bind: at("127.0.0.1", p), share: true},
				{bind: at("127.0.0.1", p), share: true},
				{bind: at("127.0.0.1", p), share: true},
			},
			[]question{{"any peer", at("127.0.0.1", p), at("127.0.0.2", q), 0, 2}},
		},
		{
			"a connected IPv6 socket is found on exactly its 4-tuple",
			[]spec{{bind: at("::1", p), connect: at("::1", q)}},
			[]question{
				{"its 4-tuple", at("::1", p), at("::1", q), 0, 0},
				{"another remote port", at("::1", p), at("::1", r), 0, nobody},
				{"another remote address", at("::1", p), at("2001:db8::1", q), 0, nobody},
				{"the other way round", at("::1", q), at("::1", p), 0, nobody},
				{"the same numbers in IPv4", at("127.0.0.1", p), at("127.0.0.1", q), 0, nobody},
			},
		},
		{
			"a dual-stack wildcard socket is found in both families",
			[]spec{{bind: at("::", p)}},
			[]question{
				{"IPv6", at("::1", p), at("::1", q), 0, 0},
				{"IPv4", at("127.0.0.1", p), at("127.0.0.2", q), 0, 0},
				{"IPv4-mapped", at("::ffff:127.0.0.1", p), at("::ffff:127.0.0.2", q), 0, 0},
			},
		},
		{
			"an IPv6-only wildcard socket is not found in IPv4",
			[]spec{{bind: at("::", p), v6only: true}},
			[]question{
				{"IPv6", at("::1", p), at("::1", q), 0, 0},
				{"IPv4", at("127.0.0.1", p), at("127.0.0.2", q), 0, nobody},
			},
		},
		{
			"an IPv6 socket that is connected over IPv4 is an IPv4 answer",
			[]spec{{family: unix.AF_INET6, bind: at("::ffff:127.0.0.1", p), connect: at("::ffff:127.0.0.2", q)}},
			[]question{
				{"its 4-tuple", at("127.0.0.1", p), at("127.0.0.2", q), 0, 0},
				{"its 4-tuple, IPv4-mapped", at("::ffff:127.0.0.1", p), at("::ffff:127.0.0.2", q), 0, 0},
				{"another peer", at("127.0.0.1", p), at("127.0.0.2", r), 0, nobody},
			},
		},
		{
			"a socket that is bound to a device is found on that device only",
			[]spec{{bind: at("127.0.0.1", p), connect: at("127.0.0.2", q), device: lo}},
			[]question{
				{"the device", at("127.0.0.1", p), at("127.0.0.2", q), lo, 0},
				{"no device", at("127.0.0.1", p), at("127.0.0.2", q), 0, nobody},
				{"another device", at("127.0.0.1", p), at("127.0.0.2", q), 999999, nobody},
			},
		},
		{
			"on its device a bound socket comes before one that is newer",
			[]spec{
				{bind: at("127.0.0.1", p), device: lo, share: true},
				{bind: at("127.0.0.1", p), share: true},
			},
			[]question{
				{"the device", at("127.0.0.1", p), at("127.0.0.2", q), lo, 0},
				{"no device", at("127.0.0.1", p), at("127.0.0.2", q), 0, 1},
			},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, s := range tt.sockets {
				if s.bind.Addr().Is6() {
					needIPv6(t)
				}
			}
			var fds []int
			var sockets []Socket
			for _, s := range tt.sockets {
				fd, socket := openSocket(t, s)
				fds, sockets = append(fds, fd), append(sockets, socket)
			}
			for _, q := range tt.questions {
				got, err := c.UDP(q.local, q.remote, q.ifindex)
				if q.want == nobody {
					if err != ErrNotFound || got != (Socket{}) {
						t.Errorf("%s: %+v, %v; want ErrNotFound", q.name, got, err)
					}
					continue
				}
				if err != nil {
					t.Errorf("%s: %v", q.name, err)
					continue
				}
				want := sockets[q.want]
				if diff := cmp.Diff(want, got, comparable); diff != "" {
					t.Errorf("%s (-want +got):\n%s", q.name, diff)
				}
				if connected := tt.sockets[q.want].connect.IsValid(); got.Connected() != connected {
					t.Errorf("%s: Connected() = %v", q.name, got.Connected())
				}
			}

			// Who was found is no longer there once it is closed.
			for _, fd := range fds {
				check(t, unix.Close(fd))
			}
			for _, q := range tt.questions {
				if got, err := c.UDP(q.local, q.remote, q.ifindex); err != ErrNotFound {
					t.Errorf("%s, with all sockets closed: %+v, %v", q.name, got, err)
				}
			}
		})
	}
}

func TestUDPFollowsAConnect(t *testing.T) {
	c := openConn(t)
	p := freePorts(t, 2)
	local := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), p[0])
	remote := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.2"), p[1])
	other := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.3"), p[1])
	fd, want := openSocket(t, spec{bind: local})

	got, err := c.UDP(local, remote, 0)
	check(t, err)
	if diff := cmp.Diff(want, got, comparable); diff != "" {
		t.Errorf("before connect (-want +got):\n%s", diff)
	}

	check(t, unix.Connect(fd, &unix.SockaddrInet4{Addr: remote.Addr().As4(), Port: int(remote.Port())}))
	want.Remote = remote
	got, err = c.UDP(local, remote, 0)
	check(t, err)
	if diff := cmp.Diff(want, got, comparable); diff != "" {
		t.Errorf("after connect (-want +got):\n%s", diff)
	}
	if got, err := c.UDP(local, other, 0); err != ErrNotFound {
		t.Errorf("another peer after connect: %+v, %v", got, err)
	}
}

// A link-local socket belongs to an interface, whose name is not part of the
// question: the index is.
func TestUDPFindsALinkLocalSocketOnItsInterface(t *testing.T) {
	enter(t)
	needIPv6(t)
	v0, v1 := veths(t)
	check(t, netlink.AddrAdd(v0, address(t, "fe80::1/64")))
	check(t, netlink.AddrAdd(v1, address(t, "fe80::2/64")))
	local, remote := netip.MustParseAddrPort("[fe80::1]:40000"), netip.MustParseAddrPort("[fe80::2]:40001")
	_, want := openSocket(t, spec{bind: local, connect: remote, scope: index(v0)})
	want.Local = local

	c := openConn(t)
	for _, q := range []struct {
		name          string
		local, remote netip.AddrPort
		ifindex       uint32
		found         bool
	}{
		{"on its interface", local, remote, index(v0), true},
		{"with zones, which are not looked at", netip.MustParseAddrPort("[fe80::1%v0]:40000"), netip.MustParseAddrPort("[fe80::2%v1]:40001"), index(v0), true},
		{"on the other interface", local, remote, index(v1), false},
		{"on no interface", local, remote, 0, false},
		{"on its interface, from another peer", local, netip.MustParseAddrPort("[fe80::3]:40001"), index(v0), false},
	} {
		got, err := c.UDP(q.local, q.remote, q.ifindex)
		if !q.found {
			if err != ErrNotFound {
				t.Errorf("%s: %+v, %v; want ErrNotFound", q.name, got, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", q.name, err)
			continue
		}
		if diff := cmp.Diff(want, got, comparable); diff != "" {
			t.Errorf("%s (-want +got):\n%s", q.name, diff)
		}
	}
}

func TestUDPRejectsAddressesThatDoNotMatch(t *testing.T) {
	c := openConn(t)
	four, six := netip.MustParseAddrPort("127.0.0.1:9"), netip.MustParseAddrPort("[::1]:9")
	mapped := netip.MustParseAddrPort("[::ffff:127.0.0.1]:9")
	for _, tt := range []struct {
		name          string
		local, remote netip.AddrPort
	}{
		{"IPv4 and IPv6", four, six},
		{"IPv6 and IPv4", six, four},
		{"IPv4-mapped IPv6 and IPv6", mapped, six},
		{"no local address", netip.AddrPort{}, four},
		{"no remote address", six, netip.AddrPort{}},
		{"no address", netip.AddrPort{}, netip.AddrPort{}},
	} {
		_, err := c.UDP(tt.local, tt.remote, 0)
		if err == nil || err == ErrNotFound {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		for _, s := range []string{"not of one family", tt.local.String(), tt.remote.String()} {
			if !strings.Contains(err.Error(), s) {
				t.Errorf("%s: the error does not mention %q: %v", tt.name, s, err)
			}
		}
	}
	// The Conn can still be used.
	_, want := openSocket(t, spec{bind: netip.MustParseAddrPort("127.0.0.1:0")})
	got, err := c.UDP(want.Local, four, 0)
	check(t, err)
	if diff := cmp.Diff(want, got, comparable); diff != "" {
		t.Errorf("after that (-want +got):\n%s", diff)
	}
}

func TestUDPAnswersForTheNamespaceItWasOpenedIn(t *testing.T) {
	there := connElsewhere(t, func() error { return nil })
	here := openConn(t)
	_, want := openSocket(t, spec{bind: netip.MustParseAddrPort("127.0.0.1:0")})
	remote := netip.MustParseAddrPort("127.0.0.2:9")
	got, err := here.UDP(want.Local, remote, 0)
	check(t, err)
	if diff := cmp.Diff(want, got, comparable); diff != "" {
		t.Errorf("here (-want +got):\n%s", diff)
	}
	if got, err := there.UDP(want.Local, remote, 0); err != ErrNotFound {
		t.Errorf("the other namespace has this one's socket: %+v, %v", got, err)
	}
}

func TestUDPAllocatesNothing(t *testing.T) {
	c := openConn(t)
	for _, s := range []spec{
		{bind: netip.MustParseAddrPort("127.0.0.1:0"), connect: netip.MustParseAddrPort("127.0.0.2:9")},
		{bind: netip.MustParseAddrPort("[::1]:0"), connect: netip.MustParseAddrPort("[::1]:9")},
	} {
		fd, err := s.open()
		if err != nil {
			t.Log("skipped:", err)
			continue
		}
		unix.Close(fd)
		_, want := openSocket(t, s)
		allocs := testing.AllocsPerRun(1000, func() {
			if got, err := c.UDP(want.Local, want.Remote, 0); err != nil || got != want {
				t.Fatal(got, err)
			}
		})
		if allocs != 0 {
			t.Errorf("%v: %v allocations", s.bind, allocs)
		}
		allocs = testing.AllocsPerRun(1000, func() {
			if _, err := c.UDP(want.Remote, want.Local, 0); err != ErrNotFound {
				t.Fatal(err)
			}
		})
		if allocs != 0 {
			t.Errorf("%v, not found: %v allocations", s.bind, allocs)
		}
	}
}
