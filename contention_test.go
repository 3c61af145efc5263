//go:build linux

package connectx_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
)

func init() {
	children["contend"] = contend
	children["compete"] = compete
	children["fill"] = fill
	children["held up"] = heldUp
}

// runTogether runs children side by side and returns what each has printed.
func runTogether(t *testing.T, name string, environments [][]string) []string {
	t.Helper()
	reports := make([]string, len(environments))
	var wg sync.WaitGroup
	defer wg.Wait()
	for i, env := range environments {
		cmd := child(t, name, env...)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			b, _ := io.ReadAll(out)
			reports[i] = string(b)
			if err := cmd.Wait(); err != nil {
				reports[i] += err.Error()
			}
		})
	}
	return reports
}

// destinations starts four echo servers.
func destinations(t *testing.T, family family) []string {
	t.Helper()
	hosts := []string{"127.1.0.1", "127.1.0.2", "127.1.0.3", "127.1.0.4"}
	if family.suffix == "6" {
		hosts = []string{"fd00::1", "fd00::2", "fd00::3", "fd00::12"}
	}
	for i, host := range hosts {
		hosts[i] = echo(t, "udp", host)
	}
	return hosts
}

// Four processes dial from one source port, each to a destination of its own.
// There is no conflict anywhere, so no dial may fail.
func TestContentionForOnePortNeverFails(t *testing.T) {
	for _, family := range families {
		t.Run(family.name, func(t *testing.T) {
			ownNamespace(t, 40000, 40019)
			const dials = 2000
			var environments [][]string
			for _, destination := range destinations(t, family) {
				environments = append(environments, []string{
					"SOURCE=" + net.JoinHostPort(family.source, "40005"), "DESTINATION=" + destination, "DIALS=" + strconv.Itoa(dials),
				})
			}
			failures := 0
			for i, report := range runTogether(t, "contend", environments) {
				var n int
				if _, err := fmt.Sscanf(report, "%d failures", &n); err != nil || n > 0 {
					t.Errorf("process %d: %s", i, report)
				}
				failures += n
			}
			t.Logf("%d spurious failures in %d dials", failures, dials*len(environments))
		})
	}
}

// Four processes take all ports of a small range again and again, each to a
// destination of its own. Although the ports are locked now and then, none of
// them is ever told that there are no more.
func TestContentionForAllPortsNeverExhausts(t *testing.T) {
	ownNamespace(t, 40000, 40003)
	var environments [][]string
	for _, destination := range destinations(t, families[0]) {
		environments = append(environments, []string{"DESTINATION=" + destination})
	}
	for i, report := range runTogether(t, "fill", environments) {
		if report != "ok" {
			t.Errorf("process %d: %s", i, report)
		}
	}
}

// fill takes all four ports, many times.
func fill() int {
	d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr("udp", "127.2.0.1", 0)}}
	for round := range 500 {
		var conns [4]net.Conn
		for i := range conns {
			conn, err := d.Dial("udp", os.Getenv("DESTINATION"))
			if err != nil {
				return failChild("round %d, port %d: %v", round, i, err)
			}
			conns[i] = conn
		}
		for i, conn := range conns {
			if round%16 == 0 {
				if err := ping(conn, uint64(4*round+i)); err != nil {
					return failChild("round %d: %v", round, err)
				}
			}
			conn.Close()
		}
	}
	fmt.Print("ok")
	return 0
}

// contend dials again and again from an explicit port, and now and then makes
// sure that the connection is its own.
func contend() int {
	source, destination := netip.MustParseAddrPort(os.Getenv("SOURCE")), netip.MustParseAddrPort(os.Getenv("DESTINATION"))
	dials, err := strconv.Atoi(os.Getenv("DIALS"))
	if err != nil {
		return failChild("DIALS: %v", err)
	}
	failures := 0
	var first error
	for i := range dials {
		var d connectx.Dialer
		conn, err := d.DialUDP(context.Background(), "udp", source, destination)
		if err != nil {
			failures++
			first = cmpError(first, err)
			continue
		}
		if i%16 == 0 {
			if err := ping(conn, uint64(i)); err != nil {
				failures++
				first = cmpError(first, err)
			}
		}
		conn.Close()
	}
	fmt.Printf("%d failures", failures)
	if first != nil {
		fmt.Printf(", the first: %v", first)
	}
	return 0
}

func cmpError(first, err error) error {
	if first != nil {
		return first
	}
	return err
}

// ping sends a message that nobody else sends and wants it back, and nothing
// else before it.
func ping(conn net.Conn, n uint64) error {
	message := fmt.Sprintf("%d %d %s", os.Getpid(), n, conn.LocalAddr())
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.WriteString(conn, message); err != nil {
		return err
	}
	b := make([]byte, 2048)
	got, err := conn.Read(b)
	if err != nil {
		return err
	}
	if string(b[:got]) != message {
		return fmt.Errorf("sent %q, got %q", message, b[:got])
	}
	return nil
}

// Four processes dial one and the same 4-tuple: at any time one holds it.
func TestOneProcessAtATimeHoldsA4Tuple(t *testing.T) {
	ownNamespace(t, 40000, 40019)
	env := []string{"SOURCE=127.2.0.1:40005", "DESTINATION=" + echo(t, "udp", "127.1.0.1")}
	for i, report := range runTogether(t, "compete", [][]string{env, env, env, env}) {
		if report != "ok" {
			t.Errorf("process %d: %s", i, report)
		}
	}
}

// compete takes the 4-tuple 300 times. Whoever has it also takes a name that
// the kernel gives to one process at a time.
func compete() int {
	source, destination := netip.MustParseAddrPort(os.Getenv("SOURCE")), netip.MustParseAddrPort(os.Getenv("DESTINATION"))
	for held := 0; held < 300; {
		var d connectx.Dialer
		conn, err := d.DialUDP(context.Background(), "udp", source, destination)
		if errors.Is(err, unix.EADDRINUSE) {
			continue
		}
		if err != nil {
			return failChild("%v", err)
		}
		witness, err := net.Listen("unix", "@connectx/"+source.String())
		if err != nil {
			return failChild("two processes hold the 4-tuple: %v", err)
		}
		if err := ping(conn, uint64(held)); err != nil {
			return failChild("%v", err)
		}
		witness.Close()
		conn.Close()
		held++
	}
	fmt.Print("ok")
	return 0
}

// Goroutines of one process that dial from one port, to destinations of their
// own.
func TestContentionWithinAProcess(t *testing.T) {
	ownNamespace(t, 40000, 40019)
	// The dials come from goroutines, which are in the namespace of the
	// process: so is the destination.
	destination := make([]string, 4)
	var failures atomic.Int32
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range destination {
			destination[i] = echo(t, "udp", fmt.Sprintf("127.3.0.%d", i+1))
		}
		var wg sync.WaitGroup
		for _, destination := range destination {
			wg.Go(func() {
				for i := range 500 {
					d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr("udp", "127.2.0.1", 40005)}}
					conn, err := d.Dial("udp", destination)
					if err != nil {
						t.Error(err)
						failures.Add(1)
						return
					}
					if i%16 == 0 {
						if err := ping(conn, uint64(i)); err != nil {
							t.Error(err)
						}
					}
					conn.Close()
				}
			})
		}
		wg.Wait()
	}()
	<-done
}

// A socket that never shares is found out soon, whatever it does with the port.
func TestPortOfASocketThatDoesNotShare(t *testing.T) {
	holders := []struct {
		name string
		hold func(t *testing.T) net.PacketConn
	}{
		{"unconnected", func(t *testing.T) net.PacketConn {
			conn, err := net.ListenPacket("udp", "127.2.0.1:40005")
			if err != nil {
				t.Fatal(err)
			}
			return conn
		}},
		{"unconnected on the wildcard address", func(t *testing.T) net.PacketConn {
			conn, err := net.ListenPacket("udp", ":40005")
			if err != nil {
				t.Fatal(err)
			}
			return conn
		}},
		{"unconnected with SO_REUSEADDR", func(t *testing.T) net.PacketConn {
			return listenShared(t, "127.2.0.1:40005")
		}},
		{"unconnected with SO_REUSEADDR on the wildcard address", func(t *testing.T) net.PacketConn {
			return listenShared(t, ":40005")
		}},
		{"connected elsewhere", func(t *testing.T) net.PacketConn {
			d := net.Dialer{LocalAddr: localAddr("udp", "127.2.0.1", 40005)}
			conn, err := d.Dial("udp", "127.9.9.9:9")
			if err != nil {
				t.Fatal(err)
			}
			return conn.(*net.UDPConn)
		}},
	}
	for _, holder := range holders {
		t.Run(holder.name, func(t *testing.T) {
			ownNamespace(t, 40000, 40009)
			holder := holder.hold(t)
			defer holder.Close()
			address := echo(t, "udp", "127.1.0.1")

			// The explicit port: EADDRINUSE within 50 ms, or as many times longer as
			// there is more to run than the processors can. The fastest of five dials
			// counts.
			fastest, limit := time.Hour, 50*time.Millisecond
			for range 5 {
				d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr("udp", "127.2.0.1", 40005)}}
				start := time.Now()
				conn, err := d.Dial("udp", address)
				if !errors.Is(err, unix.EADDRINUSE) {
					t.Fatalf("dial: %v, %v", conn, err)
				}
				if want := "does not share"; !strings.Contains(err.Error(), want) {
					t.Errorf("error does not say %q: %v", want, err)
				}
				fastest = min(fastest, time.Since(start))
				var info unix.Sysinfo_t
				if err := unix.Sysinfo(&info); err != nil {
					t.Fatal(err)
				}
				load := float64(info.Loads[0]) / (1 << 16) / float64(runtime.NumCPU())
				limit = max(limit, min(time.Duration(load*float64(50*time.Millisecond)), 500*time.Millisecond))
			}
			if fastest > limit {
				t.Errorf("EADDRINUSE took %v, want %v", fastest, limit)
			}

			// Picked ports go around it.
			for range 9 {
				d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr("udp", "127.2.0.1", 0)}}
				conn, err := d.Dial("udp", address)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				if portOf(conn.LocalAddr()) == 40005 {
					t.Fatal("the port was picked")
				}
			}
			d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr("udp", "127.2.0.1", 0)}}
			if _, err := d.Dial("udp", address); !errors.Is(err, connectx.ErrPortsExhausted) {
				t.Fatalf("dial beyond the range: %v", err)
			}
		})
	}
}

// listenShared binds an unconnected socket that has SO_REUSEADDR, as a
// multicast listener does.
func listenShared(t testing.TB, address string) net.PacketConn {
	t.Helper()
	config := net.ListenConfig{Control: setSocketOption(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)}
	conn, err := config.ListenPacket(context.Background(), "udp4", address)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// An unconnected socket that shares its port loses no datagram to dials which
// would like to have that port, not even for the time that a lookup takes.
func TestUnconnectedSocketIsNeverStolenFrom(t *testing.T) {
	ownNamespace(t, 40000, 40001)
	listener := listenShared(t, "127.2.0.1:40000")
	defer listener.Close()
	sender, err := net.Dial("udp", "127.2.0.1:40000")
	if err != nil {
		t.Fatal(err)
	}
	defer sender.Close()
	address := echo(t, "udp", "127.1.0.1")

	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 16)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			message := fmt.Sprint(i)
			if _, err := io.WriteString(sender, message); err != nil {
				t.Error(err)
				return
			}
			listener.SetReadDeadline(time.Now().Add(10 * time.Second))
			n, _, err := listener.ReadFrom(b)
			if err != nil || string(b[:n]) != message {
				t.Errorf("datagram %d was lost: got %q, %v", i, b[:n], err)
				return
			}
		}
	})
	// One port of two is the listener's, so every second dial looks at it
	// first; so do some with the explicit port.
	for i := range 400 {
		d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr("udp", "127.2.0.1", 0)}}
		conn, err := d.Dial("udp", address)
		if err != nil {
			t.Error(err)
			break
		}
		if i%100 == 0 {
			d.LocalAddr = localAddr("udp", "127.2.0.1", 40000)
			if conn, err := d.Dial("udp", address); !errors.Is(err, unix.EADDRINUSE) {
				t.Errorf("dial from the port of an unconnected socket: %v, %v", conn, err)
			}
		}
		conn.Close()
	}
	close(stop)
	wg.Wait()
}

// Datagrams that others send to the port while it is being taken are never
// read. They are sent between bind and connect, where the dial is held up.
func TestDatagramsOfStrangersAreNeverRead(t *testing.T) {
	for _, family := range families {
		for _, tt := range []struct {
			name              string
			shared, netDialer bool
		}{
			{"with the port in use by nobody else", false, false},
			{"with the port in use by others", true, false},
			{"through NetDialer", false, true}, // there is no look at the socket after the hook
		} {
			t.Run(family.name+" "+tt.name, func(t *testing.T) {
				ownNamespace(t, 40000, 40019)
				env := []string{"SOURCE=" + family.source, "STRANGER=" + family.source2, "DESTINATION=" + echo(t, "udp", family.hosts[0]), fmt.Sprintf("NETDIALER=%t", tt.netDialer)}
				if tt.shared {
					other := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr("udp", family.source, 40005)}}
					conn, err := other.Dial("udp", net.JoinHostPort(family.hosts[1], "7"))
					if err != nil {
						t.Fatal(err)
					}
					defer conn.Close()
				}
				// Holding up a Go program in a system call can bring it to a
				// standstill, and a signal can interrupt the call. Such a run
				// says nothing; a datagram that is read does, at once.
				for try := 1; ; try++ {
					cmd := child(t, "held up", env...)
					var out bytes.Buffer
					cmd.Stdout = &out
					if err := cmd.Start(); err != nil {
						t.Fatal(err)
					}
					standstill := time.AfterFunc(time.Second, func() { cmd.Process.Kill() })
					err := cmd.Wait()
					standstill.Stop()
					if out.String() == "ok" {
						return
					}
					if strings.Contains(out.String(), "got") || try == 20 {
						t.Fatalf("try %d: %s, %v", try, out.String(), err)
					}
				}
			})
		}
	}
}

// heldUp dials with a stranger at work before each connect.
func heldUp() int {
	runtime.LockOSThread()
	stranger, err := net.ListenPacket("udp", net.JoinHostPort(os.Getenv("STRANGER"), "0"))
	if err != nil {
		return failChild("%v", err)
	}
	raw, err := stranger.(*net.UDPConn).SyscallConn()
	if err != nil {
		return failChild("%v", err)
	}
	// What is sent on loopback is in the receiver's queue when sendto returns.
	to := sockaddr(os.Getenv("SOURCE"), 40005)
	var sent, failed atomic.Int32
	send := func(fd uintptr) {
		for range 3 {
			if err := unix.Sendto(int(fd), []byte("stranger"), 0, to); err != nil {
				failed.Add(1)
			}
			sent.Add(1)
		}
	}
	if err := beforeEach([]uint32{unix.SYS_CONNECT}, func([]byte) { raw.Control(send) }); err != nil {
		return failChild("%v", err)
	}
	d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr("udp", os.Getenv("SOURCE"), 40005)}}
	dial := d.Dial
	if os.Getenv("NETDIALER") == "true" {
		dial = d.NetDialer().Dial
	}
	conn, err := dial("udp", os.Getenv("DESTINATION"))
	if err != nil {
		return failChild("%v", err)
	}
	if sent.Load() < 3 || failed.Load() > 0 {
		return failChild("%d datagrams of the stranger were sent, %d of them failed", sent.Load(), failed.Load())
	}
	if err := ping(conn, 1); err != nil {
		fmt.Print(err)
		return 1
	}
	fmt.Print("ok")
	return 0
}

func sockaddr(host string, port int) unix.Sockaddr {
	addr := netip.MustParseAddr(host)
	if addr.Is4() {
		return &unix.SockaddrInet4{Port: port, Addr: addr.As4()}
	}
	return &unix.SockaddrInet6{Port: port, Addr: addr.As16()}
}
