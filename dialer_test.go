//go:build linux

package connectx_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/netns"
)

func TestMain(m *testing.M) {
	if run, ok := children[os.Getenv(childEnv)]; ok {
		os.Exit(run())
	}
	os.Exit(netns.Main(m.Run))
}

// The addresses on lo of the namespace that a test has to itself. Those of
// 127.0.0.0/8 are there from the start.
var loopbackAddresses = []string{
	"fd00::1/128", "fd00::2/128", "fd00::3/128", "fd00::11/128", "fd00::12/128",
}

// ownNamespace moves the test to a new network namespace with the given port
// range. The test must dial from its own goroutine.
func ownNamespace(t testing.TB, low, high uint16) {
	t.Helper()
	netns.Need(t)
	if err := netns.Enter(); err != nil {
		t.Fatal(err)
	}
	if err := netns.LoopbackUp(loopbackAddresses...); err != nil {
		t.Fatal(err)
	}
	if err := netns.SetPortRange(low, high); err != nil {
		t.Fatal(err)
	}
}

// A family is what differs between the tests over IPv4 and over IPv6.
type family struct {
	name            string
	hosts           [3]string // destinations
	source, source2 string
	suffix          string
}

var families = []family{
	{name: "IPv4", hosts: [3]string{"127.1.0.1", "127.1.0.2", "127.1.0.3"}, source: "127.2.0.1", source2: "127.2.0.2", suffix: "4"},
	{name: "IPv6", hosts: [3]string{"fd00::1", "fd00::2", "fd00::3"}, source: "fd00::11", source2: "fd00::12", suffix: "6"},
}

const echoPort = 7 // outside of every range that a test sets

// echo starts an echo server on host and returns its address.
func echo(t testing.TB, network, host string) string {
	t.Helper()
	address := net.JoinHostPort(host, fmt.Sprint(echoPort))
	if strings.HasPrefix(network, "udp") {
		conn, err := net.ListenPacket(network, address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		go func() {
			b := make([]byte, 2048)
			for {
				n, from, err := conn.ReadFrom(b)
				if err != nil {
					return
				}
				conn.WriteTo(b[:n], from)
			}
		}()
		return address
	}
	listener, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	serveEcho(t, listener)
	return address
}

// serveEcho answers on the connections of a TCP listener, as long as the test
// runs.
func serveEcho(t testing.TB, listener net.Listener) {
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				io.Copy(conn, conn)
			}()
		}
	}()
}

// checkEcho sends random bytes and wants them back.
func checkEcho(t testing.TB, conn net.Conn) {
	t.Helper()
	var want, got [16]byte
	rand.Read(want[:])
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	defer conn.SetDeadline(time.Time{})
	if _, err := conn.Write(want[:]); err != nil {
		t.Fatalf("%v->%v: %v", conn.LocalAddr(), conn.RemoteAddr(), err)
	}
	if _, err := io.ReadFull(conn, got[:]); err != nil {
		t.Fatalf("%v->%v: %v", conn.LocalAddr(), conn.RemoteAddr(), err)
	}
	if !bytes.Equal(got[:], want[:]) {
		t.Fatalf("%v->%v: sent %x, got %x", conn.LocalAddr(), conn.RemoteAddr(), want, got)
	}
}

// hangUp closes a connection without leaving TIME_WAIT behind.
func hangUp(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		tcp.SetLinger(0)
	}
	conn.Close()
}

func localAddr(network, host string, port uint16) net.Addr {
	var ip net.IP
	if host != "" {
		ip = net.ParseIP(host)
	}
	if strings.HasPrefix(network, "tcp") {
		return &net.TCPAddr{IP: ip, Port: int(port)}
	}
	return &net.UDPAddr{IP: ip, Port: int(port)}
}

func portOf(addr net.Addr) uint16 {
	return netip.MustParseAddrPort(addr.String()).Port()
}

// The contract: every destination has the whole port range, whatever the caller
// chooses.
func TestEveryDestinationHasTheWholeRange(t *testing.T) {
	const low, high = 40000, 40019
	rows := []struct {
		name     string
		source   bool
		explicit bool // each port of the range in turn
	}{
		{"destination only", false, false},
		{"source IP", true, false},
		{"source IP and port", true, true},
		{"port only", false, true},
	}
	for _, protocol := range []string{"tcp", "udp"} {
		for _, family := range families {
			for _, row := range rows {
				t.Run(protocol+" over "+family.name+" with "+row.name, func(t *testing.T) {
					ownNamespace(t, low, high)
					network := protocol + family.suffix
					a, b := echo(t, network, family.hosts[0]), echo(t, network, family.hosts[1])
					source := ""
					if row.source {
						source = family.source
					}
					dial := func(i int, source, address string) (net.Conn, error) {
						var d connectx.Dialer
						if row.explicit {
							d.LocalAddr = localAddr(network, source, uint16(low+i))
						} else if source != "" {
							d.LocalAddr = localAddr(network, source, 0)
						}
						return d.DialContext(t.Context(), protocol, address)
					}

					var conns []net.Conn
					defer func() {
						for _, conn := range conns {
							hangUp(conn)
						}
					}()
					for _, address := range []string{a, b} {
						seen := make(map[uint16]bool)
						for i := range high - low + 1 {
							conn, err := dial(i, source, address)
							if err != nil {
								t.Fatalf("dial %d to %s: %v", i, address, err)
							}
							conns = append(conns, conn)
							port := portOf(conn.LocalAddr())
							if port < low || port > high || seen[port] {
								t.Fatalf("dial %d to %s has port %d, seen before: %t", i, address, port, seen[port])
							}
							seen[port] = true
						}
					}
					for _, conn := range conns {
						checkEcho(t, conn)
					}

					_, err := dial(0, source, a)
					checkTaken(t, err, protocol, row.explicit, a)
					checkEcho(t, conns[0])

					// Another source address has a range of its own.
					if row.source {
						conn, err := dial(0, family.source2, a)
						if err != nil {
							t.Fatalf("from another source address: %v", err)
						}
						checkEcho(t, conn)
						hangUp(conn)
					}

					// Closing one makes room for one.
					freed := portOf(conns[7].LocalAddr())
					hangUp(conns[7])
					if conns[7], err = dial(int(freed-low), source, a); err != nil {
						t.Fatalf("after closing one: %v", err)
					}
					checkEcho(t, conns[7])
					_, err = dial(0, source, a)
					checkTaken(t, err, protocol, row.explicit, a)
				})
			}
		}
	}
}

// checkTaken checks the error of a dial for which there was no port.
func checkTaken(t *testing.T, err error, protocol string, explicit bool, address string) {
	t.Helper()
	if err == nil {
		t.Fatal("a dial beyond the range succeeded")
	}
	var op *net.OpError
	if !errors.As(err, &op) {
		t.Fatalf("%T is not a *net.OpError: %v", err, err)
	}
	if op.Op != "dial" || op.Net != protocol || op.Source == nil || op.Addr == nil || op.Addr.String() != address {
		t.Errorf("Op %q, Net %q, Source %v, Addr %v: %v", op.Op, op.Net, op.Source, op.Addr, err)
	}
	if op.Timeout() || os.IsTimeout(err) {
		t.Errorf("counts as a timeout: %v", err)
	}
	if got := errors.Is(err, connectx.ErrPortsExhausted); got == explicit {
		t.Errorf("errors.Is(err, ErrPortsExhausted) = %t: %v", got, err)
	}
	want := map[string]map[bool]syscall.Errno{
		"tcp": {false: unix.EADDRNOTAVAIL, true: unix.EADDRNOTAVAIL},
		"udp": {false: unix.EAGAIN, true: unix.EADDRINUSE},
	}[protocol][explicit]
	if !errors.Is(err, want) {
		t.Errorf("is not %s: %v", unix.ErrnoName(want), err)
	}
	text := "all of 40000-40019 from "
	if explicit {
		text = "4-tuple is in use"
	}
	if !strings.Contains(err.Error(), text) || !strings.Contains(err.Error(), address) {
		t.Errorf("error does not say %q and %q: %v", text, address, err)
	}
}

// Ports that explicit dials to one destination have bound are still there for
// picked ones to another, and the other way round.
func TestPickedAndExplicitPortsShare(t *testing.T) {
	const low, high = 40000, 40019
	for _, protocol := range []string{"tcp", "udp"} {
		for _, family := range families {
			for _, source := range []string{"", family.source} {
				for _, explicitFirst := range []bool{true, false} {
					name := fmt.Sprintf("%s over %s from %q with explicit ports first %t", protocol, family.name, source, explicitFirst)
					t.Run(name, func(t *testing.T) {
						ownNamespace(t, low, high)
						for i, host := range family.hosts[:2] {
							address := echo(t, protocol, host)
							for port := uint16(low); port <= high; port++ {
								var d connectx.Dialer
								if (i == 0) == explicitFirst {
									d.LocalAddr = localAddr(protocol, source, port)
								} else if source != "" {
									d.LocalAddr = localAddr(protocol, source, 0)
								}
								conn, err := d.DialContext(t.Context(), protocol, address)
								if err != nil {
									t.Fatalf("dial %d to %s: %v", port-low, address, err)
								}
								defer hangUp(conn)
								checkEcho(t, conn)
							}
						}
					})
				}
			}
		}
	}
}

func TestDialTCPAndDialUDPReturnPlainConns(t *testing.T) {
	for _, family := range families {
		t.Run(family.name, func(t *testing.T) {
			ownNamespace(t, 40000, 40019)
			var d connectx.Dialer
			local := netip.AddrPortFrom(netip.MustParseAddr(family.source), 40003)

			tcp, err := d.DialTCP(t.Context(), "tcp", local, netip.MustParseAddrPort(echo(t, "tcp", family.hosts[0])))
			if err != nil {
				t.Fatal(err)
			}
			defer hangUp(tcp)
			checkEcho(t, tcp)
			if got := tcp.LocalAddr().String(); got != local.String() {
				t.Errorf("TCP source %s, want %v", got, local)
			}

			udp, err := d.DialUDP(t.Context(), "udp", local, netip.MustParseAddrPort(echo(t, "udp", family.hosts[0])))
			if err != nil {
				t.Fatal(err)
			}
			defer udp.Close()
			checkEcho(t, udp)
			if got := udp.LocalAddr().String(); got != local.String() {
				t.Errorf("UDP source %s, want %v", got, local)
			}
		})
	}
}

func TestZeroAndPartialLocalAddresses(t *testing.T) {
	ownNamespace(t, 40000, 40019)
	a := netip.MustParseAddrPort(echo(t, "udp", "127.1.0.1"))
	tests := []struct {
		name  string
		laddr netip.AddrPort
		port  uint16 // 0: any of the range
	}{
		{"the zero AddrPort chooses nothing", netip.AddrPort{}, 0},
		{"an invalid address with a port chooses the port", netip.AddrPortFrom(netip.Addr{}, 40007), 40007},
		{"the unspecified address with a port chooses the port", netip.MustParseAddrPort("0.0.0.0:40008"), 40008},
		{"the IPv6 unspecified address with a port chooses the port", netip.MustParseAddrPort("[::]:40009"), 40009},
		{"an IPv4-mapped address is IPv4", netip.MustParseAddrPort("[::ffff:127.0.0.1]:40010"), 40010},
	}
	for _, test := range tests {
		var d connectx.Dialer
		conn, err := d.DialUDP(t.Context(), "udp", test.laddr, a)
		if err != nil {
			t.Errorf("%s: %v", test.name, err)
			continue
		}
		checkEcho(t, conn)
		if port := portOf(conn.LocalAddr()); test.port != 0 && port != test.port || port < 40000 || port > 40019 {
			t.Errorf("%s: source port %d", test.name, port)
		}
		conn.Close()
	}
}

func TestReservedPortsAreSkipped(t *testing.T) {
	for _, network := range []string{"tcp", "udp"} {
		t.Run(network, func(t *testing.T) {
			ownNamespace(t, 40000, 40019)
			if err := netns.SetReservedPorts("40002,40005-40008,40019"); err != nil {
				t.Fatal(err)
			}
			address := echo(t, network, "127.1.0.1")
			for i := range 14 {
				conn, err := connectx.Dial(network, address)
				if err != nil {
					t.Fatalf("dial %d: %v", i, err)
				}
				defer hangUp(conn)
				switch port := portOf(conn.LocalAddr()); port {
				case 40002, 40005, 40006, 40007, 40008, 40019:
					t.Errorf("dial %d has the reserved port %d", i, port)
				}
			}
			if _, err := connectx.Dial(network, address); !errors.Is(err, connectx.ErrPortsExhausted) {
				t.Errorf("after all ports that are not reserved: %v", err)
			}
		})
	}
}

// Ports with an odd offset are left to programs that need one of their own.
func TestPlainSocketsStillFindAPort(t *testing.T) {
	const ports, destinations = 1000, 20
	ownNamespace(t, 40000, 40000+ports-1)
	for i := range 5000 {
		conn, err := connectx.Dial("udp", fmt.Sprintf("127.1.0.%d:7", 1+i%destinations))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	plain := 0
	for {
		conn, err := net.Dial("udp", "127.9.0.1:7")
		if err != nil {
			if !errors.Is(err, unix.EAGAIN) {
				t.Fatal(err)
			}
			break
		}
		defer conn.Close()
		plain++
	}
	t.Logf("%d plain sockets beside 5,000 shared ones over %d destinations in %d ports", plain, destinations, ports)
	if plain < 450 {
		t.Errorf("%d plain sockets found a port, want at least 450", plain)
	}
}

func TestPortRangeChangesAreFollowed(t *testing.T) {
	for _, network := range []string{"tcp", "udp"} {
		t.Run(network, func(t *testing.T) {
			ownNamespace(t, 40000, 40003)
			address := echo(t, network, "127.1.0.1")
			for range 4 {
				conn, err := connectx.Dial(network, address)
				if err != nil {
					t.Fatal(err)
				}
				defer hangUp(conn)
			}
			if err := netns.SetPortRange(40000, 40004); err != nil {
				t.Fatal(err)
			}
			conn, err := connectx.Dial(network, address)
			if err != nil {
				t.Fatalf("after the range has become larger: %v", err)
			}
			defer hangUp(conn)
			if port := portOf(conn.LocalAddr()); port != 40004 {
				t.Errorf("port %d, want the new one", port)
			}
		})
	}
}

func TestLinkLocalDestinationWithAZone(t *testing.T) {
	for _, network := range []string{"tcp", "udp"} {
		t.Run(network, func(t *testing.T) {
			ownNamespace(t, 40000, 40003)
			addLink(t, "link0", "fe80::1/64")
			address := echo(t, network, "fe80::1%link0")
			for i := range 4 {
				var d connectx.Dialer
				if i%2 == 1 {
					d.LocalAddr = localAddr(network, "", uint16(40000+i))
					if i == 3 {
						d.LocalAddr = localAddrZone(network, "fe80::1", "link0", 40000+i)
					}
				}
				conn, err := d.Dial(network, address)
				if errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EADDRNOTAVAIL) {
					continue // the port was picked before
				}
				if err != nil {
					t.Fatalf("dial %d: %v", i, err)
				}
				defer hangUp(conn)
				checkEcho(t, conn)
			}
			for {
				conn, err := connectx.Dial(network, address)
				if errors.Is(err, connectx.ErrPortsExhausted) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				defer hangUp(conn)
				checkEcho(t, conn)
			}
		})
	}
}

func localAddrZone(network, host, zone string, port int) net.Addr {
	if network == "tcp" {
		return &net.TCPAddr{IP: net.ParseIP(host), Zone: zone, Port: port}
	}
	return &net.UDPAddr{IP: net.ParseIP(host), Zone: zone, Port: port}
}

// addLink adds an interface that leads nowhere: a cable with both ends in
// this namespace.
func addLink(t testing.TB, name string, addresses ...string) netlink.Link {
	t.Helper()
	link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name + "-end"}
	if err := netlink.LinkAdd(link); err != nil {
		t.Fatal(err)
	}
	end, err := netlink.LinkByName(link.PeerName)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(end); err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		t.Fatal(err)
	}
	for _, address := range addresses {
		if err := netns.AddAddress(link, address); err != nil {
			t.Fatal(err)
		}
	}
	return link
}

// Two namespaces in one process, at the same time, each with its own range.
func TestNamespacesInOneProcessKeepApart(t *testing.T) {
	netns.Need(t)
	type result struct {
		held int
		err  error
	}
	sizes := []int{10, 25}
	results := make([]chan result, len(sizes))
	opened := make(chan struct{}, len(sizes))
	start := make(chan struct{})
	for i, size := range sizes {
		results[i] = make(chan result, 1)
		go func() {
			// The goroutine stays in the namespace, and its thread ends with it.
			var r result
			defer func() { results[i] <- r }()
			err := netns.Enter()
			if err == nil {
				err = netns.SetPortRange(40000, uint16(40000+size-1))
			}
			opened <- struct{}{}
			<-start
			if r.err = err; err != nil {
				return
			}
			for {
				conn, err := connectx.Dial("udp", "127.1.0.1:7")
				if err != nil {
					r.err = err
					return
				}
				defer conn.Close()
				r.held++
			}
		}()
	}
	for range sizes {
		<-opened
	}
	close(start)
	for i, size := range sizes {
		r := <-results[i]
		if r.held != size || !errors.Is(r.err, connectx.ErrPortsExhausted) {
			t.Errorf("namespace with %d ports: %d connections, then %v", size, r.held, r.err)
		}
	}
}

// More namespaces than are kept in mind: each works, and what they hold open is
// bounded.
func TestManyNamespacesInOneProcess(t *testing.T) {
	netns.Need(t)
	before := len(descriptors(t))
	for i := range 80 {
		failed := make(chan error, 1)
		go func() { // its thread, and the namespace, end with it
			err := netns.Enter()
			for range 2 {
				if err != nil {
					break
				}
				var conn net.Conn
				if conn, err = connectx.Dial("udp", "127.1.0.1:7"); err == nil {
					conn.Close()
				}
			}
			failed <- err
		}()
		if err := <-failed; err != nil {
			t.Fatalf("namespace %d: %v", i, err)
		}
	}
	// 64 are kept, each with two netlink sockets and two sysctls.
	if open := len(descriptors(t)) - before; open > 64*4 {
		t.Errorf("%d descriptors are open", open)
	}
	conn, err := connectx.Dial("udp", "127.0.0.1:7")
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

// On networks without ports a dial is net.Dialer's, the LocalAddr included.
func TestDialReturnsWhatNetDialerReturnsForOtherNetworks(t *testing.T) {
	dir := t.TempDir()
	listener, err := net.Listen("unix", filepath.Join(dir, "listener"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	name := filepath.Join(dir, "dialer")
	for _, local := range []net.Addr{
		nil, &net.UnixAddr{Net: "unix", Name: name},
		&net.IPAddr{IP: net.IPv4(127, 0, 0, 1)}, (*net.TCPAddr)(nil), &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)},
	} {
		outcome := func(dial func(network, address string) (net.Conn, error)) string {
			conn, err := dial("unix", listener.Addr().String())
			if err != nil {
				return err.Error()
			}
			conn.Close()
			// A file that is named here was bound.
			return fmt.Sprintf("%T from %q, %v", conn, conn.LocalAddr(), os.Remove(name))
		}
		d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: local}}
		want := outcome(d.Dialer.Dial)
		for name, dial := range map[string]func(network, address string) (net.Conn, error){"Dialer": d.Dial, "NetDialer": d.NetDialer().Dial} {
			got := outcome(dial)
			if name == "NetDialer" && !strings.HasPrefix(got, "*") {
				// Of its hook, where the destination is known already.
				got = strings.Replace(got, " "+listener.Addr().String(), "", 1)
			}
			if got != want {
				t.Errorf("%s from a %T: %s, net.Dialer: %s", name, local, got, want)
			}
		}
	}
}

// A socket must never be connected to itself.
func TestNoSelfConnect(t *testing.T) {
	for _, network := range []string{"tcp", "udp"} {
		t.Run(network, func(t *testing.T) {
			ownNamespace(t, 40000, 40003)
			// The destination is a port of the range, on the address that the
			// routing table chooses as the source, and nobody listens there.
			for range 20 {
				conn, err := connectx.Dial(network, "127.0.0.1:40002")
				if network == "tcp" {
					if !errors.Is(err, unix.ECONNREFUSED) {
						t.Fatalf("dial: %v, %v", conn, err)
					}
					continue
				}
				if errors.Is(err, connectx.ErrPortsExhausted) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				if conn.LocalAddr().String() == conn.RemoteAddr().String() {
					t.Fatalf("connected to itself: %v", conn.LocalAddr())
				}
			}
		})
	}
}

// The unspecified address stands for two, and net.Dialer does not wait for the
// one that has lost the race: the race detector watches what that one still does.
func TestRaceForTheUnspecifiedAddress(t *testing.T) {
	netns.Need(t)
	listener, err := net.Listen("tcp", "[::]:0")
	if err != nil {
		t.Skip("needs IPv6:", err)
	}
	defer listener.Close()
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()
	address := fmt.Sprintf("[::]:%d", portOf(listener.Addr()))
	for range 20 {
		lost, won := make(chan struct{}), make(chan struct{})
		finished := make(chan struct{})
		var d connectx.Dialer
		d.FallbackDelay = 1
		d.ControlContext = func(_ context.Context, network, _ string, _ syscall.RawConn) error {
			if network == "tcp6" {
				<-lost
				return nil
			}
			close(lost)
			<-won
			close(finished)
			return nil
		}
		conn, err := d.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		close(won)
		<-finished
		// Dials that take what the first one has left.
		for range 10 {
			var other connectx.Dialer
			conn, err := other.Dial("tcp", fmt.Sprintf("[::1]:%d", portOf(listener.Addr())))
			if err != nil {
				t.Fatal(err)
			}
			hangUp(conn)
		}
		hangUp(conn)
	}
}
