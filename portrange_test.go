//go:build linux

package connectx_test

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/netns"
)

func init() {
	for name, f := range map[string]func() int{"slice": useSlice, "hold slice": holdSlice} {
		children[name] = f
		children[name+", no IP_LOCAL_PORT_RANGE"] = func() int {
			if err := refuse(noPortRange); err != nil {
				return failChild("%v", err)
			}
			return f()
		}
	}
}

// Every port of PortRange is used towards every destination, and no other.
func TestPortRange(t *testing.T) {
	const systemLow, systemHigh = 40000, 40099
	for _, tt := range []struct {
		name      string
		ports     connectx.PortRange
		reserved  string
		available int
	}{
		{"within the system's range", connectx.PortRange{Low: 40050, High: 40069}, "", 20},
		{"the system's range", connectx.PortRange{Low: systemLow, High: systemHigh}, "", 100},
		{"reserved ports within it", connectx.PortRange{Low: 40050, High: 40069}, "40000-40051,40060", 17},
		{"a single port", connectx.PortRange{Low: 40051, High: 40051}, "", 1},
		{"outside", connectx.PortRange{Low: 20000, High: 20019}, "", 20},
		{"reserved ports outside", connectx.PortRange{Low: 20000, High: 20019}, "20005-20014", 10},
		{"across the edge", connectx.PortRange{Low: 40090, High: 40109}, "", 20},
		{"around the system's range", connectx.PortRange{Low: 39990, High: 40109}, "", 120},
		{"the destination's own port", connectx.PortRange{Low: 1, High: 20}, "", 20},
	} {
		for _, family := range families {
			for _, protocol := range []string{"tcp", "udp"} {
				for _, source := range []string{"", family.source} {
					t.Run(fmt.Sprintf("%s over %s from %q, %s", protocol, family.name, source, tt.name), func(t *testing.T) {
						available := tt.available
						if family.suffix == "6" && source == "" && tt.ports.Contains(echoPort) {
							available-- // the socket would talk to itself
						}
						ownNamespace(t, systemLow, systemHigh)
						if err := netns.SetReservedPorts(tt.reserved); err != nil {
							t.Fatal(err)
						}
						network := protocol + family.suffix
						d := connectx.Dialer{PortRange: tt.ports}
						if source != "" {
							d.LocalAddr = localAddr(network, source, 0)
						}
						for _, host := range family.hosts[:2] {
							address := echo(t, network, host)
							conns := fillUp(t, &d, network, address)
							checkPorts(t, conns, tt.ports, available)
							_, err := d.Dial(network, address)
							checkExhausted(t, err)
							var exhausted *connectx.PortsExhaustedError
							if errors.As(err, &exhausted) && (exhausted.Ports != tt.ports || exhausted.Tried < available) {
								t.Errorf("%+v", exhausted)
							}
						}
					})
				}
			}
		}
	}
}

// checkPorts checks that each connection has a port of its own, and works.
func checkPorts(t *testing.T, conns []net.Conn, ports connectx.PortRange, want int) {
	t.Helper()
	used := make(map[uint16]bool)
	for _, conn := range conns {
		port := portOf(conn.LocalAddr())
		if !ports.Contains(port) {
			t.Errorf("port %d is not in %v", port, ports)
		}
		used[port] = true
		checkEcho(t, conn)
	}
	if len(used) != want || len(conns) != want {
		t.Errorf("%d connections from %d ports, want %d", len(conns), len(used), want)
	}
}

// Two processes that share an address keep to their slices of its ports. They
// fill them and free some, as fast as they can.
func TestSlicesOfOneAddress(t *testing.T) {
	for _, tt := range []struct {
		name, child string
		low         [2]uint16
	}{
		{"within the system's range", "slice", [2]uint16{40000, 40050}},
		{"without IP_LOCAL_PORT_RANGE", "slice, no IP_LOCAL_PORT_RANGE", [2]uint16{40000, 40050}},
		{"outside the system's range", "slice", [2]uint16{20000, 20050}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			ownNamespace(t, 40000, 40099)
			destinations := echo(t, "tcp", "127.1.0.1") + " " + echo(t, "udp", "127.1.0.1")
			done := make([]func() string, len(tt.low))
			for i, low := range tt.low {
				cmd := child(t, tt.child, "DESTINATIONS="+destinations, fmt.Sprintf("SLICE=%d %d", low, low+49))
				var out strings.Builder
				cmd.Stdout = &out
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				done[i] = func() string {
					if err := cmd.Wait(); err != nil {
						t.Errorf("%v: %s", err, out.String())
					}
					return out.String()
				}
			}
			for i, wait := range done {
				if out := wait(); !strings.HasPrefix(out, "ok") {
					t.Errorf("process %d: %q", i, out)
				} else {
					t.Log(out)
				}
			}
		})
	}
}

// sliceTime is how long the processes with a slice dial.
const sliceTime = 10 * time.Second

// useSlice holds up to all connections that a slice has ports for. Each dial that
// fails before is an error, and each that succeeds after.
func useSlice() int {
	var d connectx.Dialer
	if _, err := fmt.Sscan(os.Getenv("SLICE"), &d.PortRange.Low, &d.PortRange.High); err != nil {
		return failChild("%v", err)
	}
	tcp, udp, _ := strings.Cut(os.Getenv("DESTINATIONS"), " ")
	ports := int(d.PortRange.High-d.PortRange.Low) + 1
	counts := make(map[string]int)
	for deadline := time.Now().Add(sliceTime); time.Now().Before(deadline); {
		for network, address := range map[string]string{"tcp": tcp, "udp": udp} {
			d.LocalAddr = localAddr(network, "127.2.0.1", 0)
			var held []net.Conn
			for len(held) < ports {
				conn, err := d.Dial(network, address)
				if err != nil {
					return failChild("%s: %d of %d ports in use: %v", network, len(held), ports, err)
				}
				counts[network]++
				if port := portOf(conn.LocalAddr()); !d.PortRange.Contains(port) {
					return failChild("%s: port %d is not in %v", network, port, d.PortRange)
				}
				if err := ping(conn, uint64(counts[network])); err != nil {
					return failChild("%s: %v", network, err)
				}
				held = append(held, conn)
				if len(held) == ports {
					if conn, err := d.Dial(network, address); !errors.Is(err, connectx.ErrPortsExhausted) {
						return failChild("%s: all %d ports in use: %v, %v", network, ports, conn, err)
					}
				}
				if rand.IntN(8) == 0 {
					i := rand.IntN(len(held))
					hangUp(held[i])
					held = slices.Delete(held, i, i+1)
				}
			}
			for _, conn := range held {
				hangUp(conn)
			}
		}
	}
	fmt.Print("ok ", counts)
	return 0
}

// With IP_LOCAL_PORT_RANGE, plain programs can connect elsewhere from the ports
// that are in use. Without it these are bound explicitly, and then the kernel
// leaves them out of its choice.
func TestWhatPortRangeTakesFromPlainConnect(t *testing.T) {
	for _, tt := range []struct {
		child string
		want  int
	}{
		{"hold slice", 20},
		{"hold slice, no IP_LOCAL_PORT_RANGE", 10},
	} {
		t.Run(tt.child, func(t *testing.T) {
			ownNamespace(t, 40000, 40019)
			lines := startChild(t, tt.child, "SLICE=40000 40009", "DESTINATIONS="+echo(t, "tcp", "127.1.0.1"))
			if !lines.Scan() || lines.Text() != "10 connections" {
				t.Fatalf("got %q, %v", lines.Text(), lines.Err())
			}
			address := echo(t, "tcp", "127.1.0.2")
			connected := 0
			for {
				conn, err := net.Dial("tcp", address)
				if errors.Is(err, unix.EADDRNOTAVAIL) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				defer hangUp(conn)
				connected++
			}
			if connected != tt.want {
				t.Errorf("%d plain connections, want %d", connected, tt.want)
			}
		})
	}
}

// holdSlice holds all connections that a slice has ports for, until standard
// input ends.
func holdSlice() int {
	var d connectx.Dialer
	if _, err := fmt.Sscan(os.Getenv("SLICE"), &d.PortRange.Low, &d.PortRange.High); err != nil {
		return failChild("%v", err)
	}
	for held := 0; ; held++ {
		conn, err := d.Dial("tcp", os.Getenv("DESTINATIONS"))
		if errors.Is(err, connectx.ErrPortsExhausted) {
			fmt.Println(held, "connections")
			io.Copy(io.Discard, os.Stdin)
			return 0
		}
		if err != nil {
			return failChild("%v", err)
		}
		defer hangUp(conn)
	}
}

// The system's range may change between two dials; PortRange does not.
func TestPortRangeWhenTheSystemsChanges(t *testing.T) {
	for _, network := range []string{"tcp", "udp"} {
		for _, source := range []string{"", "127.2.0.1"} {
			t.Run(network+" from "+source, func(t *testing.T) {
				ownNamespace(t, 40000, 42999)
				address := echo(t, network, "127.1.0.1")
				d := connectx.Dialer{PortRange: connectx.PortRange{Low: 41000, High: 42999}}
				if source != "" {
					d.LocalAddr = localAddr(network, source, 0)
				}
				for i := range 200 {
					if err := netns.SetPortRange(40000, []uint16{42999, 40999}[i/2%2]); err != nil {
						t.Fatal(err)
					}
					conn, err := d.Dial(network, address)
					if err != nil {
						t.Fatal(err)
					}
					defer hangUp(conn)
					if port := portOf(conn.LocalAddr()); !d.PortRange.Contains(port) {
						t.Fatalf("dial %d: port %d is not in %v", i, port, d.PortRange)
					}
					checkEcho(t, conn)
				}
			})
		}
	}
}

// The last port there is, which is the destination's own, is not taken for more
// than it is.
func TestPortRangeUpToTheLastPort(t *testing.T) {
	ownNamespace(t, 60000, 65535)
	listener, err := net.Listen("tcp", "127.1.0.1:65535")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	d := connectx.Dialer{PortRange: connectx.PortRange{Low: 65530, High: 65535}}
	ctx := connectx.WithTrace(t.Context(), &connectx.Trace{Try: func(try connectx.TraceTry) {
		if !d.PortRange.Contains(try.Ports.Low) || !d.PortRange.Contains(try.Ports.High) {
			t.Errorf("tries %v", try.Ports)
		}
	}})
	for i := range 7 {
		conn, err := d.DialContext(ctx, "tcp", listener.Addr().String())
		if i == 6 {
			checkExhausted(t, err)
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		defer hangUp(conn)
	}
}

// Ports that are reserved no longer are found at once.
func TestPortRangeWhenReservedPortsChange(t *testing.T) {
	for _, ports := range []connectx.PortRange{{Low: 20000, High: 20003}, {Low: 40000, High: 40003}} {
		for _, network := range []string{"tcp", "udp"} {
			t.Run(fmt.Sprintf("%s, %v", network, ports), func(t *testing.T) {
				ownNamespace(t, 40000, 40019)
				address := echo(t, network, "127.1.0.1")
				d := connectx.Dialer{PortRange: ports}
				if err := netns.SetReservedPorts(ports.String()); err != nil {
					t.Fatal(err)
				}
				_, err := d.Dial(network, address)
				checkExhausted(t, err)
				if err := netns.SetReservedPorts(""); err != nil {
					t.Fatal(err)
				}
				conn, err := d.Dial(network, address)
				if err != nil {
					t.Fatal(err)
				}
				hangUp(conn)
			})
		}
	}
}

// Two ranges share nothing but the destination: that one is full is not held
// against the other.
func TestTwoPortRangesInOneProcess(t *testing.T) {
	for _, network := range []string{"tcp", "udp"} {
		t.Run(network, func(t *testing.T) {
			ownNamespace(t, 40000, 42047)
			address := echo(t, network, "127.1.0.1")
			full := connectx.Dialer{PortRange: connectx.PortRange{Low: 40000, High: 41023}}
			free := connectx.Dialer{PortRange: connectx.PortRange{Low: 41024, High: 42047}}
			conns := fillUp(t, &free, network, address)
			checkPorts(t, conns, free.PortRange, 1024)
			hangUp(conns[700])
			waitForPort(t, &conns[700], func() (net.Conn, error) { return free.Dial(network, address) })
			hangUp(conns[700])
			fillUp(t, &full, network, address)
			conn, err := free.Dial(network, address)
			if err != nil {
				t.Fatal(err)
			}
			conns[700] = conn
			_, err = full.Dial(network, address)
			checkExhausted(t, err)
		})
	}
}

// A connection with MPTCP stays one, however many ports are tried.
func TestPortRangeWithMPTCP(t *testing.T) {
	ownNamespace(t, 40000, 40019)
	var config net.ListenConfig
	config.SetMultipathTCP(true)
	listener, err := config.Listen(t.Context(), "tcp", "127.1.0.1:7")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	address := listener.Addr().String()
	plain := net.Dialer{}
	plain.SetMultipathTCP(true)
	conn, err := plain.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if is, err := conn.(*net.TCPConn).MultipathTCP(); err != nil || !is {
		t.Skipf("the kernel does not do MPTCP: %v", err)
	}
	for port := uint16(20000); port < 20003; port++ {
		d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr("tcp", "127.2.0.1", port)}}
		conn, err := d.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer hangUp(conn)
	}
	d := connectx.Dialer{
		Dialer:    net.Dialer{LocalAddr: localAddr("tcp", "127.2.0.1", 0)},
		PortRange: connectx.PortRange{Low: 20000, High: 20003},
	}
	d.SetMultipathTCP(true)
	conn, err = d.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if is, err := conn.(*net.TCPConn).MultipathTCP(); err != nil || !is || portOf(conn.LocalAddr()) != 20003 {
		t.Errorf("MPTCP is %t on %v, %v", is, conn.LocalAddr(), err)
	}
}

func TestPortRangeContains(t *testing.T) {
	got := make(map[string][]bool)
	for name, r := range map[string]connectx.PortRange{"zero": {}, "one": {Low: 5, High: 5}, "two": {Low: 5, High: 6}} {
		for _, port := range []uint16{0, 4, 5, 6, 7} {
			got[name] = append(got[name], r.Contains(port))
		}
	}
	want := map[string][]bool{
		"zero": {false, false, false, false, false},
		"one":  {false, false, true, false, false},
		"two":  {false, false, true, true, false},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// An explicit port of LocalAddr is used if it is in PortRange.
func TestPortRangeWithAnExplicitPort(t *testing.T) {
	ownNamespace(t, 40000, 40019)
	for _, network := range []string{"tcp", "udp"} {
		address := echo(t, network, "127.1.0.1")
		d := connectx.Dialer{PortRange: connectx.PortRange{Low: 20000, High: 20009}}
		d.LocalAddr = localAddr(network, "127.2.0.1", 20005)
		conn, err := d.Dial(network, address)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := conn.LocalAddr().String(), netip.MustParseAddrPort("127.2.0.1:20005").String(); got != want {
			t.Errorf("from %s, want %s", got, want)
		}
		checkEcho(t, conn)
		conn.Close()
	}
}
