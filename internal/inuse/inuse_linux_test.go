package inuse

import (
	"cmp"
	"errors"
	"net/netip"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/netns"
	"github.com/seed22601231/connectx/portpick"
)

func TestMain(m *testing.M) { os.Exit(netns.Main(m.Run)) }

// enter gives the test a namespace with these ephemeral ports, two of them
// reserved.
func enter(t testing.TB, low, high uint16) *portpick.Ports {
	t.Helper()
	netns.Need(t)
	if err := netns.Enter(); err != nil {
		t.Fatal(err)
	}
	if err := netns.SetPortRange(low, high); err != nil {
		t.Fatal(err)
	}
	if err := netns.SetReservedPorts(strconv.Itoa(int(high)-1) + "-" + strconv.Itoa(int(high))); err != nil {
		t.Fatal(err)
	}
	sysctl, err := portpick.OpenSysctl()
	if err != nil {
		t.Fatal(err)
	}
	defer sysctl.Close()
	ports, err := sysctl.Ports(nil)
	if err != nil {
		t.Fatal(err)
	}
	return ports
}

// A plan is how a test makes a socket.
type plan struct {
	local  netip.AddrPort // bound to it, if valid
	remote netip.AddrPort // connected to it, if valid
	reuse  bool           // SO_REUSEADDR
	only6  bool           // IPV6_V6ONLY
	dual   bool           // an IPv6 socket, whatever the addresses
	listen bool
}

// open makes a socket of the test's, in the thread's namespace.
func open(t testing.TB, protocol string, p plan) int {
	t.Helper()
	kind := unix.SOCK_DGRAM
	if protocol == "tcp" {
		kind = unix.SOCK_STREAM
	}
	family := unix.AF_INET
	if p.dual || p.local.Addr().Is6() || p.remote.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(os.NewSyscallError("socket", err))
	}
	t.Cleanup(func() { unix.Close(fd) })
	if p.reuse {
		check(t, "SO_REUSEADDR", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
	}
	if p.only6 {
		check(t, "IPV6_V6ONLY", unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY, 1))
	}
	if p.local.IsValid() {
		check(t, "bind", unix.Bind(fd, sockaddr(family, p.local)))
	}
	if p.listen {
		check(t, "listen", unix.Listen(fd, 4096))
	}
	if p.remote.IsValid() {
		if err := unix.Connect(fd, sockaddr(family, p.remote)); err != unix.EINPROGRESS {
			check(t, "connect", err)
		}
	}
	return fd
}

func check(t testing.TB, call string, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(os.NewSyscallError(call, err))
	}
}

func sockaddr(family int, ap netip.AddrPort) unix.Sockaddr {
	if family == unix.AF_INET {
		return &unix.SockaddrInet4{Addr: ap.Addr().As4(), Port: int(ap.Port())}
	}
	return &unix.SockaddrInet6{Addr: ap.Addr().As16(), Port: int(ap.Port())}
}

func localOf(t testing.TB, fd int) netip.AddrPort {
	t.Helper()
	sa, err := unix.Getsockname(fd)
	check(t, "getsockname", err)
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	t.Fatalf("%T", sa)
	return netip.AddrPort{}
}

// timeWait makes a connection and closes it, this end first. It returns the local
// address of what is left. The listener must have no other connections waiting.
func timeWait(t testing.TB, listener int, p plan) netip.AddrPort {
	t.Helper()
	fd := open(t, "tcp", p)
	local := localOf(t, fd)
	peer, _, err := unix.Accept(listener)
	check(t, "accept", err)
	check(t, "shutdown", unix.Shutdown(fd, unix.SHUT_WR))
	check(t, "shutdown", unix.Shutdown(peer, unix.SHUT_WR))
	check(t, "close", unix.Close(peer))
	return local
}

// countAll counts for each of the sources.
func countAll(protocol string, sources []netip.Addr, destination netip.AddrPort, ports *portpick.Ports) ([]Counts, error) {
	s, err := Take(protocol, ports)
	if err != nil {
		return nil, err
	}
	counts := make([]Counts, len(sources))
	for i, source := range sources {
		if counts[i], err = s.Count(source, destination); err != nil {
			return nil, err
		}
	}
	return counts, nil
}

var at = netip.MustParseAddrPort

func TestSockets(t *testing.T) {
	enter(t, 40000, 40099)
	const syncookies = "/proc/sys/net/ipv4/tcp_syncookies"
	check(t, syncookies, os.WriteFile(syncookies, []byte("0"), 0))
	var want []Socket
	for _, host := range []string{"127.0.0.1", "[::1]"} {
		server, full := at(host+":1000"), at(host+":1001")
		listener := open(t, "tcp", plan{local: server, listen: true})
		left := timeWait(t, listener, plan{remote: server})
		client := localOf(t, open(t, "tcp", plan{remote: server}))
		want = append(want,
			Socket{server, netip.AddrPort{}, Listen},
			Socket{left, server, TimeWait},
			Socket{client, server, Established},
			Socket{server, client, Established})

		// A queue of one, with one in it, leaves the next connection alone.
		queue := open(t, "tcp", plan{local: full, listen: true})
		check(t, "listen", unix.Listen(queue, 0))
		first := localOf(t, open(t, "tcp", plan{remote: full}))
		second := localOf(t, open(t, "tcp", plan{remote: full}))
		want = append(want,
			Socket{full, netip.AddrPort{}, Listen},
			Socket{first, full, Established},
			Socket{full, first, Established},
			Socket{second, full, unix.BPF_TCP_SYN_SENT})
	}
	mapped := localOf(t, open(t, "tcp", plan{remote: at("127.0.0.1:1000"), dual: true}))
	want = append(want,
		Socket{mapped, at("127.0.0.1:1000"), Established},
		Socket{at("127.0.0.1:1000"), mapped, Established})
	checkSockets(t, "tcp", want)

	want = nil
	for _, host := range []string{"127.0.0.1", "[::1]"} {
		want = append(want,
			Socket{localOf(t, open(t, "udp", plan{remote: at(host + ":1000")})), at(host + ":1000"), Established},
			Socket{localOf(t, open(t, "udp", plan{local: at(host + ":1000")})), netip.AddrPort{}, Close})
	}
	want = append(want,
		Socket{localOf(t, open(t, "udp", plan{remote: at("127.0.0.1:1000"), dual: true})), at("127.0.0.1:1000"), Established},
		Socket{localOf(t, open(t, "udp", plan{local: at("[::]:2000")})), netip.AddrPort{}, Close})
	checkSockets(t, "udp", want)
}

func checkSockets(t *testing.T, protocol string, want []Socket) {
	t.Helper()
	got, err := Sockets(protocol)
	if err != nil {
		t.Fatal(err)
	}
	byAddress := func(a, b Socket) int {
		return cmp.Or(a.Local.Compare(b.Local), a.Remote.Compare(b.Remote))
	}
	slices.SortFunc(got, byAddress)
	slices.SortFunc(want, byAddress)
	if diff := gocmp.Diff(want, got, gocmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Errorf("%s sockets (-want +got):\n%s", protocol, diff)
	}
}

// What the kernel lets be shared, each kind of socket on a port of its own.
func TestHeld(t *testing.T) {
	const low = 40000
	elsewhere := at("127.0.0.9:1000")
	tests := []struct {
		name     string
		plan     plan
		tcp, udp bool // held
	}{
		{"connected by connect alone", plan{remote: elsewhere}, false, true},
		{"connected by connect alone, with SO_REUSEADDR", plan{remote: elsewhere, reuse: true}, false, false},
		{"bound and connected", plan{local: at("127.0.0.1:0"), remote: elsewhere}, true, true},
		{"bound and connected, with SO_REUSEADDR", plan{local: at("127.0.0.1:40060"), remote: elsewhere, reuse: true}, false, false},
		{"bound and connected from an IPv6 socket", plan{local: at("[::ffff:127.0.0.1]:0"), remote: elsewhere, dual: true}, true, true},
		{"bound", plan{local: at("127.0.0.1:0")}, true, true},
		{"bound, with SO_REUSEADDR", plan{local: at("127.0.0.1:40061"), reuse: true}, false, true},
		{"bound to all addresses", plan{local: at("0.0.0.0:0")}, true, true},
		{"bound to all addresses of both families", plan{local: at("[::]:0")}, true, true},
		{"bound to all addresses of both families, with SO_REUSEADDR", plan{local: at("[::]:40063"), reuse: true}, false, true},
		{"bound to all IPv6 addresses", plan{local: at("[::]:0"), only6: true}, false, false},
		{"bound to another address", plan{local: at("127.0.0.2:0")}, false, false},
		{"listening, with SO_REUSEADDR", plan{local: at("127.0.0.1:0"), reuse: true, listen: true}, true, true},
	}
	for _, protocol := range []string{"tcp", "udp"} {
		for _, tt := range tests {
			t.Run(protocol+" "+tt.name, func(t *testing.T) {
				if protocol == "udp" && tt.plan.listen {
					t.Skip("UDP does not listen")
				}
				ports := enter(t, low, low+99)
				if protocol == "tcp" {
					open(t, "tcp", plan{local: elsewhere, listen: true})
				}
				port := localOf(t, open(t, protocol, tt.plan)).Port()
				s, err := Take(protocol, ports)
				if err != nil {
					t.Fatal(err)
				}
				got, err := s.heldFor(netip.MustParseAddr("127.0.0.1"))
				if err != nil {
					t.Fatal(err)
				}
				want := new(portSet)
				if protocol == "tcp" && tt.tcp || protocol == "udp" && tt.udp {
					want.add(port)
				}
				for port := range all(ports) {
					if got.has(port) != want.has(port) {
						t.Errorf("port %d is held: %t", port, got.has(port))
					}
				}
			})
		}
	}
}

// Before Linux 6.3, connect does not tell.
func TestHeldWhereConnectCannotBeConfined(t *testing.T) {
	ports := enter(t, 40000, 40099)
	server := at("127.0.0.9:1000")
	open(t, "tcp", plan{local: server, listen: true})
	want := map[uint16]bool{
		localOf(t, open(t, "tcp", plan{local: at("127.0.0.1:40080"), reuse: true})).Port(): true,
		localOf(t, open(t, "tcp", plan{local: at("127.0.0.1:0")})).Port():                  false,
		localOf(t, open(t, "tcp", plan{local: at("127.0.0.1:0"), listen: true})).Port():    false,
		localOf(t, open(t, "tcp", plan{remote: server})).Port():                            true,
		50000: true, // nobody is there
	}
	s, err := Take("tcp", ports)
	if err != nil {
		t.Fatal(err)
	}
	p, err := newProbe("tcp", netip.MustParseAddr("127.0.0.1"))
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	check(t, "close", unix.Close(p.conn))
	p.conn = -1 // no option can be set on it
	p.confined = p.confine(1)
	for port, want := range want {
		if got, err := s.shareableTCP(p, port); got != want || err != nil {
			t.Errorf("port %d is shareable: %t, %v", port, got, err)
		}
	}
}

func TestConnectable(t *testing.T) {
	server := at("127.0.0.9:1000")
	tests := []struct {
		name     string
		high     uint16
		timeWait bool
		want     int // of those that are not reserved, less those with a socket
	}{
		{"an even number of ports", 40021, false, 20 - 4 - 2 - 1},
		{"an even number of ports, those in TIME_WAIT as well", 40021, true, 20 - 4 - 1},
		{"an odd number of ports", 40020, false, 19 - 4 - 2 - 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ports := enter(t, 40000, tt.high)
			listener := open(t, "tcp", plan{local: server, listen: true})
			open(t, "tcp", plan{local: at("127.0.0.1:40000"), reuse: true})
			for range 2 {
				timeWait(t, listener, plan{remote: server})
			}
			for range 4 {
				open(t, "tcp", plan{remote: server})
			}
			s, err := Take("tcp", ports)
			if err != nil {
				t.Fatal(err)
			}
			got, err := s.Connectable(Flow{Source: netip.MustParseAddr("127.0.0.1"), Destination: server}, tt.timeWait)
			if got != tt.want || err != nil {
				t.Errorf("got %d, %v, want %d", got, err, tt.want)
			}
		})
	}
	t.Run("the first of an odd number of ports is free", func(t *testing.T) {
		ports := enter(t, 40000, 40004)
		s, err := Take("tcp", ports)
		if err != nil {
			t.Fatal(err)
		}
		got, err := s.Connectable(Flow{Source: netip.MustParseAddr("127.0.0.1"), Destination: server}, false)
		if want := 5 - 2 - 1; got != want || err != nil {
			t.Errorf("got %d, %v, want %d", got, err, want)
		}
	})
}

func TestHeldForAllAddressesOfAFamily(t *testing.T) {
	for _, protocol := range []string{"tcp", "udp"} {
		t.Run(protocol, func(t *testing.T) {
			ports := enter(t, 40000, 40099)
			open(t, protocol, plan{local: at("127.0.0.2:40001")})
			open(t, protocol, plan{local: at("[::1]:40002")})
			open(t, protocol, plan{local: at("[::]:40003")})
			s, err := Take(protocol, ports)
			if err != nil {
				t.Fatal(err)
			}
			for source, want := range map[string][]uint16{"0.0.0.0": {40001, 40003}, "::": {40002, 40003}} {
				held, err := s.heldFor(netip.MustParseAddr(source))
				if err != nil {
					t.Fatal(err)
				}
				var got []uint16
				for port := range all(ports) {
					if held.has(port) {
						got = append(got, port)
					}
				}
				if diff := gocmp.Diff(want, got); diff != "" {
					t.Errorf("held for %s (-want +got):\n%s", source, diff)
				}
			}
		})
	}
}

func TestCount(t *testing.T) {
	families := []struct{ name, source, other, destination, elsewhere string }{
		{"IPv4", "127.0.0.1", "127.0.0.2", "127.0.1.1:1000", "127.0.1.2:1000"},
		{"IPv6", "fd00::1", "fd00::2", "[fd00::3]:1000", "[fd00::4]:1000"},
	}
	for _, f := range families {
		source, other := netip.MustParseAddr(f.source), netip.MustParseAddr(f.other)
		destination, elsewhere := at(f.destination), at(f.elsewhere)
		from := func(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }
		for _, protocol := range []string{"tcp", "udp"} {
			t.Run(protocol+" "+f.name, func(t *testing.T) {
				ports := enter(t, 40000, 40099)
				check(t, "lo", netns.LoopbackUp("fd00::1/128", "fd00::2/128", "fd00::3/128", "fd00::4/128"))
				want := []Counts{{InUse: 20, Held: 10, Reserved: 2}, {InUse: 3, Held: 4, Reserved: 2}}
				if protocol == "tcp" {
					listener := open(t, "tcp", plan{local: destination, listen: true})
					open(t, "tcp", plan{local: elsewhere, listen: true})
					for port := range uint16(5) {
						timeWait(t, listener, plan{local: from(source, 40080+port), remote: destination, reuse: true})
					}
					want[0].TimeWait = 5
				}
				for port := range uint16(20) {
					open(t, protocol, plan{local: from(source, 40000+port), remote: destination, reuse: true})
				}
				for port := range uint16(3) {
					open(t, protocol, plan{local: from(other, 40000+port), remote: destination, reuse: true})
				}
				for port := range uint16(10) { // towards both, from different ports
					open(t, protocol, plan{local: from(source, 40010+port), remote: elsewhere, reuse: true})
				}
				for port := range uint16(6) {
					open(t, protocol, plan{local: from(source, 40030+port), remote: elsewhere})
				}
				for port := range uint16(4) {
					unspecified := netip.IPv6Unspecified()
					open(t, protocol, plan{local: from(unspecified, 40040+port)})
				}
				for i := range want {
					want[i].Free = 98 - want[i].InUse - want[i].TimeWait - want[i].Held
				}
				got, err := countAll(protocol, []netip.Addr{source, other}, destination, ports)
				if err != nil {
					t.Fatal(err)
				}
				if diff := gocmp.Diff(want, got); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
			})
		}
	}
}

func TestCountForAnAddressOfNobody(t *testing.T) {
	ports := enter(t, 40000, 40099)
	sources := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("192.0.2.1")}
	for _, protocol := range []string{"tcp", "udp"} {
		if _, err := countAll(protocol, sources, at("127.0.0.1:1000"), ports); !errors.Is(err, unix.EADDRNOTAVAIL) {
			t.Errorf("%s: got error %v, want %v", protocol, err, unix.EADDRNOTAVAIL)
		}
	}
}

func TestConnectableWithoutLoopback(t *testing.T) {
	netns.Need(t)
	runtime.LockOSThread() // which ends with the test
	check(t, "unshare", unix.Unshare(unix.CLONE_NEWNET))
	ports, err := portpick.NewPorts(portpick.DefaultLow, portpick.DefaultLow+99, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, any := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		s, err := Take("tcp", ports)
		if err != nil {
			t.Fatal(err)
		}
		f := Flow{Source: any}
		if f.Counts, err = s.Count(f.Source, f.Destination); err != nil {
			t.Fatal(err)
		}
		if got, err := s.Connectable(f, false); got != 100 || err != nil {
			t.Errorf("%v: got %d, %v, want 100", any, got, err)
		}
	}
}

func TestHeldWithoutFastOpen(t *testing.T) {
	ports := enter(t, 40000, 40099)
	const fastopen = "/proc/sys/net/ipv4/tcp_fastopen"
	check(t, fastopen, os.WriteFile(fastopen, []byte("0"), 0))
	server := at("127.0.0.9:1000")
	open(t, "tcp", plan{local: server, listen: true})
	open(t, "tcp", plan{remote: server})
	open(t, "tcp", plan{local: at("127.0.0.1:0"), remote: server})
	s, err := Take("tcp", ports)
	if err != nil {
		t.Fatal(err)
	}
	used, held, err := s.Used(true)
	if used != 2 || held != 1 || err != nil {
		t.Errorf("%d used, %d held, %v, want 2 and 1", used, held, err)
	}
}

// A port outside of the namespace's range is tried by bind, since connect does
// not take it.
func TestCountOfAnotherRange(t *testing.T) {
	enter(t, 40000, 40099)
	ports, err := portpick.NewPorts(40090, 40109, nil)
	if err != nil {
		t.Fatal(err)
	}
	source := netip.MustParseAddr("127.0.0.1")
	open(t, "tcp", plan{local: netip.AddrPortFrom(source, 40105)})
	open(t, "tcp", plan{local: netip.AddrPortFrom(source, 40106), reuse: true})
	got, err := countAll("tcp", []netip.Addr{source}, at("127.0.0.1:1000"), ports)
	if err != nil {
		t.Fatal(err)
	}
	if diff := gocmp.Diff([]Counts{{Held: 1, Free: 19}}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// To look must change nothing: no segment is sent, and no TIME_WAIT ends.
func TestLookingSendsNothing(t *testing.T) {
	ports := enter(t, 40000, 40099)
	server := at("127.0.0.1:1000")
	listener := open(t, "tcp", plan{local: server, listen: true})
	for range 50 {
		timeWait(t, listener, plan{remote: server})
	}
	sent := segmentsSent(t)
	got, err := countAll("tcp", []netip.Addr{server.Addr()}, server, ports)
	if err != nil {
		t.Fatal(err)
	}
	if diff := gocmp.Diff([]Counts{{TimeWait: 50, Reserved: 2, Free: 48}}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if now := segmentsSent(t); now != sent {
		t.Errorf("%d segments were sent", now-sent)
	}
	if diff := gocmp.Diff(50, countTimeWait(t)); diff != "" {
		t.Errorf("sockets in TIME_WAIT afterwards (-want +got):\n%s", diff)
	}
}

func countTimeWait(t *testing.T) int {
	t.Helper()
	sockets, err := Sockets("tcp")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, s := range sockets {
		if s.State == TimeWait {
			n++
		}
	}
	return n
}

// segmentsSent is TcpOutSegs of the thread's namespace.
func segmentsSent(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile("/proc/thread-self/net/snmp")
	if err != nil {
		t.Fatal(err)
	}
	// RtoAlgorithm RtoMin RtoMax MaxConn ActiveOpens PassiveOpens AttemptFails
	// EstabResets CurrEstab InSegs OutSegs
	m := regexp.MustCompile(`(?m)^Tcp:(?: -?\d+){10} (\d+)`).FindSubmatch(b)
	if m == nil {
		t.Fatalf("no TcpOutSegs in %s", b)
	}
	n, err := strconv.Atoi(string(m[1]))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// An unconnected UDP socket that would share its port keeps all its datagrams.
func TestLookingTakesNoDatagrams(t *testing.T) {
	ports := enter(t, 40000, 40003)
	source := netip.MustParseAddr("127.0.0.1")
	server := open(t, "udp", plan{local: netip.AddrPortFrom(source, 40000), reuse: true})
	client := open(t, "udp", plan{local: netip.AddrPortFrom(source, 40001), remote: netip.AddrPortFrom(source, 40000)})
	done := make(chan error)
	go func() {
		var err error
		b := make([]byte, 1)
		for i := range 20000 {
			if _, err = unix.Write(client, b); err != nil {
				break
			}
			// Before Linux 6.5 delivery on loopback is left to ksoftirqd while that
			// is running.
			_, err = unix.Poll([]unix.PollFd{{Fd: int32(server), Events: unix.POLLIN}}, 10_000)
			for err == unix.EINTR {
				_, err = unix.Poll([]unix.PollFd{{Fd: int32(server), Events: unix.POLLIN}}, 10_000)
			}
			if err != nil {
				break
			}
			if _, err = unix.Read(server, b); err != nil {
				err = errors.New("datagram " + strconv.Itoa(i) + " has gone elsewhere: " + err.Error())
				break
			}
		}
		done <- err
	}()
	for {
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
			return
		default:
			if _, err := countAll("udp", []netip.Addr{source}, at("127.0.0.9:1000"), ports); err != nil {
				t.Error(err)
			}
		}
	}
}

func BenchmarkCount(b *testing.B) {
	for _, protocol := range []string{"tcp", "udp"} {
		b.Run(protocol, func(b *testing.B) {
			ports := enter(b, portpick.DefaultLow, portpick.DefaultHigh)
			sources := []netip.Addr{netip.MustParseAddr("127.0.0.1")}
			for b.Loop() {
				if _, err := countAll(protocol, sources, at("127.0.0.9:1000"), ports); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
