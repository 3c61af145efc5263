//go:build linux

package connectx_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/netns"
)

// The port range of the benchmarks is the one that Linux starts with. Their
// servers are on ports below it.
const (
	benchLow, benchHigh = 32768, 60999
	benchPort           = 1000
)

var benchAddresses = sync.OnceValue(func() error { return netns.LoopbackUp(loopbackAddresses...) })

// benchNamespace prepares the network namespace of the process.
//
// Benchmarks do not have one of their own, as tests do: a goroutine that is
// locked to its thread takes microseconds longer to come back from a wait,
// which net.Dialer would have to pay for.
func benchNamespace(b *testing.B) {
	b.Helper()
	netns.Need(b)
	if err := benchAddresses(); err != nil {
		b.Fatal(err)
	}
	if err := netns.SetPortRange(benchLow, benchHigh); err != nil {
		b.Fatal(err)
	}
}

// benchServers is on how many ports of a host there are servers, which benchmarks
// take in turn. Where a TCP connection follows another one on the same 4-tuple
// at once, the server may be at work on the old one when the SYN comes, and the
// dial waits for a second until it is sent again.
const benchServers = 64

// silentSinks starts servers, in the calling thread's namespace, that cost no
// time of their own: UDP sockets to which nothing is sent, and TCP listeners
// that wait for data before they accept. What the kernel does for the other end
// of a TCP connection remains, and is done by the processor that dials.
func silentSinks(network, host string) (addresses []string, closers []io.Closer, err error) {
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if e := c.Control(func(fd uintptr) {
			// The kernel forgets a client that resets the connection before
			// it has sent anything; the listener never hears of it.
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 60)
		}); e != nil {
			return e
		}
		return err
	}}
	for i := range benchServers {
		address := net.JoinHostPort(host, fmt.Sprint(benchPort+i))
		addresses = append(addresses, address)
		var c io.Closer
		if strings.HasPrefix(network, "udp") {
			c, err = net.ListenPacket(network, address)
		} else {
			c, err = config.Listen(context.Background(), network, address)
		}
		if err != nil {
			return nil, closers, err
		}
		closers = append(closers, c)
	}
	return addresses, closers, nil
}

// sinks is silentSinks for as long as the benchmark runs.
func sinks(b *testing.B, network, host string) []string {
	b.Helper()
	addresses, closers, err := silentSinks(network, host)
	closeAfter(b, closers)
	if err != nil {
		b.Fatal(err)
	}
	return addresses
}

func closeAfter(b *testing.B, closers []io.Closer) {
	b.Cleanup(func() {
		for _, c := range closers {
			c.Close()
		}
	})
}

// busySinks starts TCP servers that accept and read, with a goroutine for each
// connection.
func busySinks(b *testing.B, host string) []string {
	b.Helper()
	addresses, closers, err := startBusySinks(host)
	closeAfter(b, closers)
	if err != nil {
		b.Fatal(err)
	}
	return addresses
}

// apartSinks is busySinks in a process of their own.
func apartSinks(b *testing.B, host string) (addresses []string) {
	b.Helper()
	lines := startChild(b, "busy sinks", "HOST="+host)
	for len(addresses) < benchServers && lines.Scan() {
		addresses = append(addresses, lines.Text())
	}
	if len(addresses) < benchServers {
		b.Fatalf("%d of %d servers: %v", len(addresses), benchServers, lines.Err())
	}
	return addresses
}

func init() {
	children["busy sinks"] = func() int {
		addresses, _, err := startBusySinks(os.Getenv("HOST"))
		if err != nil {
			return failChild("%v", err)
		}
		fmt.Println(strings.Join(addresses, "\n"))
		io.Copy(io.Discard, os.Stdin)
		return 0
	}
}

func startBusySinks(host string) (addresses []string, closers []io.Closer, err error) {
	for i := range benchServers {
		listener, err := net.Listen("tcp", net.JoinHostPort(host, fmt.Sprint(benchPort+i)))
		if err != nil {
			return nil, closers, err
		}
		closers = append(closers, listener)
		addresses = append(addresses, listener.Addr().String())
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				go func() {
					io.Copy(io.Discard, conn)
					conn.Close()
				}()
			}
		}()
	}
	return addresses, closers, nil
}

// A benchRow is a row of the contract.
type benchRow struct {
	name   string
	source bool
	port   uint16
}

var benchRows = []benchRow{
	{"destination", false, 0},
	{"source", true, 0},
	{"source+port", true, 40005},
	{"port", false, 40006},
}

// dialer returns the dialer of the given name for the row.
func (row benchRow) dialer(b *testing.B, name, network, source string, addresses []string) dialer {
	b.Helper()
	if !row.source {
		source = ""
	}
	if name == "floor" {
		return newFloor(b, row, network, source, addresses)
	}
	var inner net.Dialer
	if row.source || row.port != 0 {
		inner.LocalAddr = localAddr(network, source, row.port)
	}
	if name == "net" {
		return &inner
	}
	return &connectx.Dialer{Dialer: inner}
}

// openAndClose opens and closes one connection at a time.
func openAndClose(b *testing.B, d dialer, network string, addresses []string) {
	b.Helper()
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		conn, err := d.Dial(network, addresses[i%len(addresses)])
		if err != nil {
			b.Fatal(err)
		}
		hangUp(conn)
	}
}

// Opens and closes one connection on loopback, by protocol, family, contract row
// and dialer. The servers take no time.
func BenchmarkDial(b *testing.B) {
	for _, network := range []string{"tcp", "udp"} {
		for _, family := range families {
			for _, row := range benchRows {
				for _, name := range []string{"net", "floor", "connectx"} {
					b.Run(strings.Join([]string{network, family.name, row.name, "dialer=" + name}, "/"), func(b *testing.B) {
						benchNamespace(b)
						addresses := sinks(b, network, family.hosts[0])
						openAndClose(b, row.dialer(b, name, network, family.source, addresses), network, addresses)
					})
				}
			}
		}
	}
}

// The same with the dialers in turn, a few connections each, so that whatever else
// the machine is doing affects them alike: their medians can be compared even
// where one run differs from the next. Loopback is as in BenchmarkDial. At busy
// servers of the process that dials, net.Dialer waits: its goroutine sleeps
// during the handshake, and is woken after theirs. The servers across a pair of
// veth interfaces are in another network namespace.
func BenchmarkDialInTurn(b *testing.B) {
	benchNamespace(b)
	for _, network := range []string{"tcp", "udp"} {
		for _, family := range families {
			b.Run("loopback/"+network+"/"+family.name, func(b *testing.B) {
				inTurn(b, network, family.source, sinks(b, network, family.hosts[0]))
			})
		}
	}
	b.Run("busy/tcp/IPv4", func(b *testing.B) {
		inTurn(b, "tcp", "127.2.0.1", busySinks(b, "127.1.0.1"))
	})
	b.Run("apart/tcp/IPv4", func(b *testing.B) {
		inTurn(b, "tcp", "127.2.0.1", apartSinks(b, "127.1.0.1"))
	})
	for _, network := range []string{"tcp", "udp"} {
		b.Run("veth/"+network+"/IPv4", func(b *testing.B) {
			inTurn(b, network, vethHere, vethSinks(b, func() ([]string, []io.Closer, error) {
				return silentSinks(network, vethThere)
			}))
		})
	}
	b.Run("vethbusy/tcp/IPv4", func(b *testing.B) {
		inTurn(b, "tcp", vethHere, vethSinks(b, func() ([]string, []io.Closer, error) {
			return startBusySinks(vethThere)
		}))
	})
}

func inTurn(b *testing.B, network, source string, addresses []string) {
	if network == "udp" {
		settle(b, &connectx.Dialer{}, network, addresses)
	}
	for _, row := range benchRows {
		b.Run(row.name, func(b *testing.B) {
			var all []named
			for _, name := range []string{"net", "floor", "connectx"} {
				all = append(all, named{name, row.dialer(b, name, network, source, addresses)})
			}
			compareInTurn(b, network, addresses, all)
		})
	}
}

type named struct {
	name string
	dialer
}

// compareInTurn reports the median of each dialer.
func compareInTurn(b *testing.B, network string, addresses []string, dialers []named) {
	took := make([]latencies, len(dialers))
	for n := 0; b.Loop(); n++ {
		i := n / 16 % len(dialers)
		start := time.Now()
		if err := dialAndHangUp(dialers[i], network, addresses[n%len(addresses)]); err != nil {
			b.Fatal(err)
		}
		took[i] = append(took[i], time.Since(start))
	}
	b.ReportMetric(0, "ns/op") // that of all of them, which says nothing
	for i, d := range dialers {
		b.ReportMetric(float64(took[i].percentile(0.5)), d.name+"-p50-ns")
	}
}

// What the fields of the egress policy cost: each in turn with a Dialer that has
// one source address in LocalAddr.
func BenchmarkEgressInTurn(b *testing.B) {
	benchNamespace(b)
	var hundreds []netip.Addr
	for i := range 256 {
		hundreds = append(hundreds, netip.AddrFrom4([4]byte{127, 2, 1, byte(i)}), netip.MustParseAddr(fmt.Sprintf("fd00::2:%x", i)))
	}
	one := []netip.Addr{netip.MustParseAddr("127.2.0.1")}
	for _, network := range []string{"tcp", "udp"} {
		b.Run(network, func(b *testing.B) {
			compareInTurn(b, network, sinks(b, network, "127.1.0.1"), []named{
				{"local", &connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr(network, "127.2.0.1", 0)}}},
				{"source", &connectx.Dialer{SourceAddrs: one}},
				{"sources", &connectx.Dialer{SourceAddrs: hundreds}},
				{"ports", &connectx.Dialer{SourceAddrs: one, PortRange: connectx.PortRange{Low: 40000, High: 44095}}},
				{"outside", &connectx.Dialer{SourceAddrs: one, PortRange: connectx.PortRange{Low: 10000, High: 14095}}},
			})
		})
	}
}

// settle dials until the interfaces have nothing new to say of themselves, which
// takes a second, and a second more. Before that, no answer about a route is kept.
func settle(b *testing.B, d dialer, network string, addresses []string) {
	b.Helper()
	start := time.Now()
	for n := 0; time.Since(start) < 2500*time.Millisecond; n++ {
		if err := dialAndHangUp(d, network, addresses[n%len(addresses)]); err != nil {
			b.Fatal(err)
		}
	}
}

const vethHere, vethThere = "10.20.0.1", "10.20.0.2"

// vethSinks has servers started in a network namespace of their own, which it
// joins with this one.
func vethSinks(b *testing.B, start func() ([]string, []io.Closer, error)) []string {
	b.Helper()
	type result struct {
		addresses []string
		closers   []io.Closer
		err       error
	}
	entered, joined, listening := make(chan int), make(chan error), make(chan result)
	go func() {
		// The thread, and what it is locked for, ends with the goroutine; the
		// sockets keep the namespace.
		if err := netns.Enter(); err != nil {
			listening <- result{err: err}
			return
		}
		fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			listening <- result{err: err}
			return
		}
		defer unix.Close(fd)
		entered <- fd
		if <-joined != nil {
			return
		}
		var r result
		if r.err = linkUp("veth1", vethThere+"/24"); r.err == nil {
			r.addresses, r.closers, r.err = start()
		}
		listening <- r
	}()
	var peer int
	select {
	case peer = <-entered:
	case r := <-listening:
		b.Fatal(r.err)
	}
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "veth0"}, PeerName: "veth1", PeerNamespace: netlink.NsFd(peer)}
	err := netlink.LinkAdd(veth)
	if err == nil {
		b.Cleanup(func() { netlink.LinkDel(veth) })
		err = linkUp("veth0", vethHere+"/24")
	}
	joined <- err
	if err != nil {
		b.Fatal(err)
	}
	r := <-listening
	closeAfter(b, r.closers)
	if r.err != nil {
		b.Fatal(r.err)
	}
	return r.addresses
}

// linkUp brings up an interface of the calling thread's namespace and gives it
// an address, but no link-local one: the kernel would announce that over the next
// seconds, and after each announcement no route is kept for one.
func linkUp(name, address string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetIP6AddrGenMode(link, nl.IN6_ADDR_GEN_MODE_NONE); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return err
	}
	return netns.AddAddress(link, address)
}

// Opens and closes a UDP connection whose source port others are on, as it is
// once there are more connections than ports: the lock and the lookups in full.
func BenchmarkDialSharedPort(b *testing.B) {
	for _, family := range families {
		b.Run(family.name, func(b *testing.B) {
			benchNamespace(b)
			var first connectx.Dialer
			first.LocalAddr = localAddr("udp", "", 40007)
			other, err := first.Dial("udp", net.JoinHostPort(family.hosts[1], "9"))
			if err != nil {
				b.Fatal(err)
			}
			defer other.Close()
			d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: other.LocalAddr()}}
			b.ReportAllocs()
			for b.Loop() {
				conn, err := d.Dial("udp", net.JoinHostPort(family.hosts[0], "9"))
				if err != nil {
					b.Fatal(err)
				}
				conn.Close()
			}
		})
	}
}
