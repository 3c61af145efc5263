//go:build linux

package connectx_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/netns"
)

// The ephemeral range of the namespaces here, small enough to be exhausted at
// once.
const (
	techniqueLow   = 40000
	techniquePorts = 20
)

// A techniqueObservation is what the kernel does with one technique.
type techniqueObservation struct {
	first      int    // connections to one destination, of at most one more than there are ports
	full       string // the error that ended them
	second     int    // connections to another destination after that, of at most one per port
	shared     bool   // some of both have one source address and port between them
	overshadow bool   // UDP: a connection has taken another one's datagrams
	held       string // the error while sockets that do not share have all ports
}

// techniqueRows is the article's table, and this package's contract.
var techniqueRows = []struct {
	network   string
	technique technique
	want      techniqueObservation
}{
	{"tcp", techniqueCalls(techniqueConnect), techniqueObservation{
		first: 20, full: "EADDRNOTAVAIL", second: 20, shared: true,
		held: "EADDRNOTAVAIL",
	}},
	{"tcp", techniqueCalls(techniqueBindIP, techniqueConnect), techniqueObservation{
		first: 20, full: "EADDRINUSE", second: 0, shared: false,
		held: "EADDRINUSE",
	}},
	{"tcp", techniqueCalls(techniqueNoPort, techniqueBindIP, techniqueConnect), techniqueObservation{
		first: 20, full: "EADDRNOTAVAIL", second: 20, shared: true,
		held: "EADDRNOTAVAIL",
	}},
	{"tcp", techniqueCalls(techniqueReuse, techniqueBind, techniqueConnect), techniqueObservation{
		first: 20, full: "EADDRNOTAVAIL", second: 20, shared: true,
		held: "EADDRINUSE",
	}},
	{"tcp", techniqueDialer("connectx.Dialer", techniqueNoSource), techniqueObservation{
		first: 20, full: "ErrPortsExhausted, EADDRNOTAVAIL", second: 20, shared: true,
		held: "ErrPortsExhausted, EADDRNOTAVAIL",
	}},
	{"tcp", techniqueDialer("connectx.Dialer, source IP", techniqueSourceIP), techniqueObservation{
		first: 20, full: "ErrPortsExhausted, EADDRNOTAVAIL", second: 20, shared: true,
		held: "ErrPortsExhausted, EADDRNOTAVAIL",
	}},
	{"tcp", techniqueDialer("connectx.Dialer, source IP and port", techniqueSource), techniqueObservation{
		first: 20, full: "EADDRNOTAVAIL", second: 20, shared: true,
		held: "EADDRINUSE",
	}},

	{"udp", techniqueCalls(techniqueConnect), techniqueObservation{
		first: 20, full: "EAGAIN", second: 0, shared: false, overshadow: false,
		held: "EAGAIN",
	}},
	// Here the kernel is not as the article has it, which says EAGAIN: sockets
	// with the flag never exhaust the range among themselves. connect picks a
	// random port (inet_autobind, udp_lib_get_port) and passes over those only
	// that a socket without the flag has (udp_lib_lport_inuse skips a socket if
	// both have sk_reuse). EAGAIN is left for when such sockets have all ports.
	{"udp", techniqueCalls(techniqueReuse, techniqueConnect), techniqueObservation{
		first: 21, full: "none", second: 20, shared: true, overshadow: true,
		held: "EAGAIN",
	}},
	{"udp", techniqueCalls(techniqueReuse, techniqueBind, techniqueConnect), techniqueObservation{
		first: 21, full: "none", second: 20, shared: true, overshadow: true,
		held: "EADDRINUSE",
	}},
	{"udp", techniqueDialer("connectx.Dialer", techniqueNoSource), techniqueObservation{
		first: 20, full: "ErrPortsExhausted, EAGAIN", second: 20, shared: true, overshadow: false,
		held: "ErrPortsExhausted, EAGAIN",
	}},
	{"udp", techniqueDialer("connectx.Dialer, source IP", techniqueSourceIP), techniqueObservation{
		first: 20, full: "ErrPortsExhausted, EAGAIN", second: 20, shared: true, overshadow: false,
		held: "ErrPortsExhausted, EAGAIN",
	}},
	{"udp", techniqueDialer("connectx.Dialer, source IP and port", techniqueSource), techniqueObservation{
		first: 20, full: "EADDRINUSE", second: 20, shared: true, overshadow: false,
		held: "EADDRINUSE",
	}},
}

// A technique is a way to connect. It makes of the source what it can: some
// leave the choice of the port, or of all of it, to the kernel or the Dialer.
type technique struct {
	name string
	dial func(network string, source, destination netip.AddrPort) (net.Conn, error)
}

// A techniqueCall is a system call of a technique, on a new socket.
type techniqueCall struct {
	name string
	do   func(fd int, source, destination netip.AddrPort) error
}

var (
	techniqueConnect = techniqueCall{"connect(dst)", func(fd int, _, destination netip.AddrPort) error {
		return os.NewSyscallError("connect", unix.Connect(fd, techniqueSockaddr(destination)))
	}}
	techniqueBindIP = techniqueCall{"bind(src, 0)", func(fd int, source, _ netip.AddrPort) error {
		return os.NewSyscallError("bind", unix.Bind(fd, techniqueSockaddr(netip.AddrPortFrom(source.Addr(), 0))))
	}}
	techniqueBind = techniqueCall{"bind(src, port)", func(fd int, source, _ netip.AddrPort) error {
		return os.NewSyscallError("bind", unix.Bind(fd, techniqueSockaddr(source)))
	}}
	techniqueNoPort = techniqueCall{"IP_BIND_ADDRESS_NO_PORT", func(fd int, _, _ netip.AddrPort) error {
		return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1))
	}}
	techniqueReuse = techniqueCall{"SO_REUSEADDR", func(fd int, _, _ netip.AddrPort) error {
		return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
	}}
)

// techniqueCalls is the technique that consists of these system calls.
func techniqueCalls(calls ...techniqueCall) technique {
	names := make([]string, len(calls))
	for i, call := range calls {
		names[i] = call.name
	}
	dial := func(network string, source, destination netip.AddrPort) (net.Conn, error) {
		socket, err := techniqueSocket(network, source)
		if err != nil {
			return nil, err
		}
		defer socket.Close()
		for _, call := range calls {
			if err := call.do(int(socket.Fd()), source, destination); err != nil {
				return nil, err
			}
		}
		return net.FileConn(socket)
	}
	return technique{strings.Join(names, " + "), dial}
}

// techniqueSocket makes a socket of the network, in the family of the address.
func techniqueSocket(network string, source netip.AddrPort) (*os.File, error) {
	family, kind := unix.AF_INET6, unix.SOCK_DGRAM
	if source.Addr().Is4() {
		family = unix.AF_INET
	}
	if strings.HasPrefix(network, "tcp") {
		kind = unix.SOCK_STREAM
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	return os.NewFile(uintptr(fd), network), nil
}

func techniqueSockaddr(addr netip.AddrPort) unix.Sockaddr {
	if addr.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16()}
}

// techniqueDialer is a connectx.Dialer that is given a part of the source.
func techniqueDialer(name string, part func(source netip.AddrPort) netip.AddrPort) technique {
	dial := func(network string, source, destination netip.AddrPort) (net.Conn, error) {
		var d connectx.Dialer
		if local := part(source); local.IsValid() {
			d.LocalAddr = net.UDPAddrFromAddrPort(local)
			if strings.HasPrefix(network, "tcp") {
				d.LocalAddr = net.TCPAddrFromAddrPort(local)
			}
		}
		return d.Dial(network, destination.String())
	}
	return technique{name, dial}
}

func techniqueNoSource(netip.AddrPort) netip.AddrPort { return netip.AddrPort{} }

func techniqueSourceIP(source netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(source.Addr(), 0)
}

func techniqueSource(source netip.AddrPort) netip.AddrPort { return source }

// TestTechniques tries all techniques on the running kernel, and prints what it
// does with them.
func TestTechniques(t *testing.T) {
	netns.Need(t)
	var kernel unix.Utsname
	if err := unix.Uname(&kernel); err != nil {
		t.Fatal(os.NewSyscallError("uname", err))
	}
	var table strings.Builder
	fmt.Fprintf(&table, "%s %s, %d ephemeral ports:\n",
		unix.ByteSliceToString(kernel.Sysname[:]), unix.ByteSliceToString(kernel.Release[:]), techniquePorts)
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\ttechnique\tconnections\terrno at port exhaustion\tto another destination\tsource 2-tuple shared\trisk of overshadowing\terrno where others hold the port")
	for _, row := range techniqueRows {
		for _, family := range []string{"4", "6"} {
			network := row.network + family
			t.Run(network+"/"+row.technique.name, func(t *testing.T) {
				got := techniqueObserve(t, network, row.technique)
				if got != row.want {
					t.Errorf("the kernel does\n%+v, want\n%+v", got, row.want)
				}
				overshadow := "-"
				if row.network == "udp" {
					overshadow = techniqueYesNo(got.overshadow)
				}
				fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%d\t%s\t%s\t%s\n", network, row.technique.name,
					got.first, got.full, got.second, techniqueYesNo(got.shared), overshadow, got.held)
			})
		}
	}
	w.Flush()
	t.Log(table.String())
}

func techniqueYesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// techniqueObserve leaves the calling goroutine in another network namespace.
func techniqueObserve(t *testing.T, network string, technique technique) techniqueObservation {
	o := techniqueObservation{held: techniqueHeld(t, network, technique)}

	source, destinations := techniqueNamespace(t, network)
	a := techniqueListen(t, network, destinations[0])
	b := techniqueListen(t, network, destinations[1])

	toA, err := techniqueDials(t, network, technique, source, a, techniquePorts+1)
	o.first, o.full = len(toA), techniqueErrno(err)
	toB, _ := techniqueDials(t, network, technique, source, b, techniquePorts)
	o.second = len(toB)

	// All of them are open still.
	held := make(map[string]bool)
	for _, conn := range toA {
		held[conn.LocalAddr().String()] = true
	}
	for _, conn := range toB {
		o.shared = o.shared || held[conn.LocalAddr().String()]
	}
	if a.udp != nil {
		o.overshadow = techniqueOvershadow(t, a, toA)
	}
	return o
}

// techniqueHeld is the error of the technique while the ports of the source
// address are bound by sockets that do not share them.
func techniqueHeld(t *testing.T, network string, technique technique) string {
	source, destinations := techniqueNamespace(t, network)
	destination := techniqueListen(t, network, destinations[0])
	for port := uint16(techniqueLow); port < techniqueLow+techniquePorts; port++ {
		local := netip.AddrPortFrom(source, port)
		socket, err := techniqueSocket(network, local)
		if err != nil {
			t.Fatal(err)
		}
		defer socket.Close()
		if err := techniqueBind.do(int(socket.Fd()), local, netip.AddrPort{}); err != nil {
			t.Fatal(err)
		}
	}
	_, err := techniqueDials(t, network, technique, source, destination, 1)
	return techniqueErrno(err)
}

// techniqueErrno says what errors.As and errors.Is find.
func techniqueErrno(err error) string {
	var errno syscall.Errno
	switch {
	case err == nil:
		return "none"
	case !errors.As(err, &errno):
		return err.Error()
	case errors.Is(err, connectx.ErrPortsExhausted):
		return "ErrPortsExhausted, " + unix.ErrnoName(errno)
	}
	return unix.ErrnoName(errno)
}

// techniqueNamespace moves the calling goroutine to a new namespace with a small
// port range. The two destinations in it have the same route: one source
// address goes with both.
func techniqueNamespace(t *testing.T, network string) (source netip.Addr, destinations [2]netip.AddrPort) {
	t.Helper()
	if err := netns.Enter(); err != nil {
		t.Fatal(err)
	}
	if err := netns.SetPortRange(techniqueLow, techniqueLow+techniquePorts-1); err != nil {
		t.Fatal(err)
	}
	if strings.HasSuffix(network, "4") {
		return netip.MustParseAddr("127.0.0.1"), [2]netip.AddrPort{
			netip.MustParseAddrPort("127.1.0.1:7000"),
			netip.MustParseAddrPort("127.1.0.2:7000"),
		}
	}
	// IPv6 has no such thing as 127.0.0.0/8, and to an address of this host's
	// own it prefers that one for the source as well. This route makes fd00::/64
	// behave as 127.0.0.0/8 does.
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if addrs, err := netlink.AddrList(lo, netlink.FAMILY_V6); err != nil || len(addrs) == 0 {
		t.Skipf("no IPv6 here: %v", err)
	}
	prefix := &net.IPNet{IP: net.ParseIP("fd00::"), Mask: net.CIDRMask(64, 128)}
	route := netlink.Route{LinkIndex: lo.Attrs().Index, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Dst: prefix, Src: net.IPv6loopback}
	if err := netlink.RouteAdd(&route); err != nil {
		t.Fatalf("add a route to %v: %v", prefix, err)
	}
	return netip.IPv6Loopback(), [2]netip.AddrPort{
		netip.MustParseAddrPort("[fd00::1]:7000"),
		netip.MustParseAddrPort("[fd00::2]:7000"),
	}
}

// A techniquePeer is a destination. For TCP it is a listener that accepts
// nothing: the kernel completes the handshakes.
type techniquePeer struct {
	addr netip.AddrPort
	udp  *net.UDPConn // nil for TCP
}

func techniqueListen(t *testing.T, network string, addr netip.AddrPort) techniquePeer {
	t.Helper()
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		// Needed to bind to an IPv6 address that only a route makes local.
		var err error
		if controlErr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1)
		}); controlErr != nil {
			return controlErr
		}
		return os.NewSyscallError("setsockopt", err)
	}}
	if strings.HasPrefix(network, "tcp") {
		listener, err := config.Listen(t.Context(), network, addr.String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { listener.Close() })
		return techniquePeer{addr: addr}
	}
	conn, err := config.ListenPacket(t.Context(), network, addr.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return techniquePeer{addr, conn.(*net.UDPConn)}
}

// techniqueDials connects to the peer, up to the given number of times or to
// the first error. A source port, for a technique that needs one, is each of
// the range in turn. When a UDP connection is new, its 4-tuple hears from its peer.
func techniqueDials(t *testing.T, network string, technique technique, source netip.Addr, peer techniquePeer, limit int) ([]net.Conn, error) {
	t.Helper()
	var conns []net.Conn
	for i := range limit {
		local := netip.AddrPortFrom(source, techniqueLow+uint16(i%techniquePorts))
		conn, err := technique.dial(network, local, peer.addr)
		if err != nil {
			return conns, err
		}
		t.Cleanup(func() { conn.Close() })
		conns = append(conns, conn)
		if got := techniqueAddrPort(conn.LocalAddr()); got.Addr() != source {
			t.Fatalf("connected from %v, want %v", got, source)
		}
		if got := techniqueAddrPort(conn.RemoteAddr()); got != peer.addr {
			t.Fatalf("connected to %v, want %v", got, peer.addr)
		}
		if peer.udp != nil {
			var on []net.Conn
			for _, other := range conns {
				if other.LocalAddr().String() == conn.LocalAddr().String() {
					on = append(on, other)
				}
			}
			techniqueHears(t, peer, on, "the first datagram")
		}
	}
	return conns, nil
}

// techniqueHears sends a datagram to a 4-tuple, and fails the test unless one of
// the connections on it receives it. Which of several that is depends on the
// kernel: the newest since Linux 6.13, which has a hash table of 4-tuples; before,
// it may be one that has received something on the same processor.
func techniqueHears(t *testing.T, peer techniquePeer, conns []net.Conn, text string) {
	t.Helper()
	for _, conn := range conns {
		if err := conn.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := peer.udp.WriteToUDPAddrPort([]byte(text), techniqueAddrPort(conns[0].LocalAddr())); err != nil {
		t.Fatal(err)
	}
	received := make([]string, len(conns))
	var readers sync.WaitGroup
	for i, conn := range conns {
		readers.Go(func() {
			b := make([]byte, 100)
			n, err := conn.Read(b)
			if err != nil {
				return
			}
			received[i] = string(b[:n])
			for _, other := range conns {
				other.SetReadDeadline(time.Now())
			}
		})
	}
	readers.Wait()
	if got := strings.Join(received, ""); got != text {
		t.Fatalf("the %d connections on %v->%v received %q, want %q by one of them", len(conns), conns[0].LocalAddr(), conns[0].RemoteAddr(), received, text)
	}
}

// techniqueOvershadow sends a datagram to every 4-tuple of these connections to
// one peer. It reports whether there are several on one 4-tuple, of which one
// receives it and the others do not.
func techniqueOvershadow(t *testing.T, peer techniquePeer, conns []net.Conn) bool {
	t.Helper()
	on := make(map[string][]net.Conn)
	for _, conn := range conns {
		on[conn.LocalAddr().String()] = append(on[conn.LocalAddr().String()], conn)
	}
	for _, conns := range on {
		techniqueHears(t, peer, conns, "the second datagram")
	}
	return len(on) < len(conns)
}

func techniqueAddrPort(addr net.Addr) netip.AddrPort {
	if tcp, ok := addr.(*net.TCPAddr); ok {
		return tcp.AddrPort()
	}
	return addr.(*net.UDPAddr).AddrPort()
}
