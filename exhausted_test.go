//go:build linux

package connectx_test

import (
	"errors"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
)

// A range so large that a search of all of it is worth remembering.
const (
	largeLow  = 40000
	largeHigh = 42047
)

// fillUp dials until there is no port left.
func fillUp(t *testing.T, d dialer, network, address string) (conns []net.Conn) {
	t.Helper()
	t.Cleanup(func() {
		for _, conn := range conns {
			hangUp(conn)
		}
	})
	for {
		conn, err := d.Dial(network, address)
		if errors.Is(err, connectx.ErrPortsExhausted) {
			return conns
		}
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
}

func checkExhausted(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, connectx.ErrPortsExhausted) {
		t.Fatalf("%v, want ErrPortsExhausted", err)
	}
	var op *net.OpError
	if !errors.As(err, &op) || op.Source == nil || op.Addr == nil || op.Timeout() {
		t.Errorf("%#v: %v", op, err)
	}
}

// That a range is full is found out once, and not held against anybody else.
func TestFullRangeIsRememberedBriefly(t *testing.T) {
	for _, network := range []string{"tcp", "udp"} {
		for _, source := range []string{"", "127.2.0.1"} {
			t.Run(network+" from "+source, func(t *testing.T) {
				ownNamespace(t, largeLow, largeHigh)
				a, b := echo(t, network, "127.1.0.1"), echo(t, network, "127.1.0.2")
				dialFrom := func(source, address string) (net.Conn, error) {
					var d connectx.Dialer
					if source != "" {
						d.LocalAddr = localAddr(network, source, 0)
					}
					return d.Dial(network, address)
				}
				d := &connectx.Dialer{}
				if source != "" {
					d.LocalAddr = localAddr(network, source, 0)
				}
				conns := fillUp(t, d, network, a)
				if len(conns) != largeHigh-largeLow+1 {
					t.Fatalf("%d connections", len(conns))
				}
				// What the last dial has found out is forgotten.
				hangUp(conns[0])
				waitForPort(t, &conns[0], func() (net.Conn, error) { return d.Dial(network, a) })

				start := time.Now()
				_, err := d.Dial(network, a)
				first := time.Since(start)
				checkExhausted(t, err)
				want := err.Error()
				var following []time.Duration
				for range 200 {
					start := time.Now()
					_, err := d.Dial(network, a)
					following = append(following, time.Since(start))
					checkExhausted(t, err)
					if err.Error() != want {
						t.Fatalf("the error was %q and is %q", want, err)
					}
				}
				slices.Sort(following)
				// A search that takes no time is repeated.
				if median := following[len(following)/2]; first > 4*time.Millisecond && median > first/4 {
					t.Errorf("the first dial took %v, and half of the others more than %v", first, median)
				}

				for _, other := range [][2]string{{source, b}, {"127.2.0.2", a}} {
					conn, err := dialFrom(other[0], other[1])
					if err != nil {
						t.Errorf("from %q to %s: %v", other[0], other[1], err)
						continue
					}
					checkEcho(t, conn)
					hangUp(conn)
				}

				for i := range 5 {
					hangUp(conns[i])
					waitForPort(t, &conns[i], func() (net.Conn, error) { return d.Dial(network, a) })
					_, err := d.Dial(network, a)
					checkExhausted(t, err)
				}
			})
		}
	}
}

// waitForPort dials until the one port that is free is found.
func waitForPort(t *testing.T, conn *net.Conn, dial func() (net.Conn, error)) {
	t.Helper()
	for start := time.Now(); ; {
		found, err := dial()
		if err == nil {
			*conn = found
			checkEcho(t, found)
			return
		}
		if !errors.Is(err, connectx.ErrPortsExhausted) {
			t.Fatal(err)
		}
		if time.Since(start) > 10*time.Second {
			t.Fatal("the port that was freed is not found")
		}
	}
}

// One of those who all dial at once gets a port that becomes free.
func TestStormOnAFullRange(t *testing.T) {
	for _, network := range []string{"tcp", "udp"} {
		t.Run(network, func(t *testing.T) {
			ownNamespace(t, largeLow, largeHigh)
			address := echo(t, network, "127.1.0.1")
			d := &connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr(network, "127.2.0.1", 0)}}
			conns := fillUp(t, d, network, address)
			here, err := os.Open("/proc/thread-self/ns/net")
			if err != nil {
				t.Fatal(err)
			}
			defer here.Close()
			for round := range 5 {
				freed := portOf(conns[round].LocalAddr())
				hangUp(conns[round])
				found := make(chan net.Conn, 8)
				var done atomic.Bool
				var storm sync.WaitGroup
				for range cap(found) {
					storm.Go(func() {
						runtime.LockOSThread() // a thread that ends with the goroutine
						if err := unix.Setns(int(here.Fd()), unix.CLONE_NEWNET); err != nil {
							t.Error(err)
							return
						}
						for start := time.Now(); !done.Load() && time.Since(start) < 10*time.Second; {
							conn, err := d.Dial(network, address)
							if err == nil {
								done.Store(true)
								found <- conn
							} else if !errors.Is(err, connectx.ErrPortsExhausted) {
								t.Error(err)
								return
							}
						}
					})
				}
				storm.Wait()
				if len(found) != 1 {
					t.Fatalf("%d connections from one port that was free", len(found))
				}
				conns[round] = <-found
				if port := portOf(conns[round].LocalAddr()); port != freed {
					t.Errorf("port %d was free, port %d was found", freed, port)
				}
				checkEcho(t, conns[round])
			}
		})
	}
}

// The last free ports are found, whoever has the others, and no more than those.
func TestLastPortsAreFound(t *testing.T) {
	plain := func(local net.Addr) dialer { return &net.Dialer{LocalAddr: local} }
	ours := func(local net.Addr) dialer { return &connectx.Dialer{Dialer: net.Dialer{LocalAddr: local}} }
	for _, tt := range []struct {
		name           string
		takenBy        func(local net.Addr) dialer
		elsewhere      bool // where those are connected
		sharedWithOurs bool // all ports, with connections elsewhere
	}{
		{name: "by us", takenBy: ours},
		{name: "by us, and all ports are shared", takenBy: ours, sharedWithOurs: true},
		{name: "by plain sockets", takenBy: plain},
		{name: "by plain sockets that are connected elsewhere", takenBy: plain, elsewhere: true},
	} {
		for _, network := range []string{"tcp", "udp"} {
			t.Run(network+" "+tt.name, func(t *testing.T) {
				ownNamespace(t, largeLow, largeHigh)
				a, b := echo(t, network, "127.1.0.1"), echo(t, network, "127.1.0.2")
				open := func(d dialer, address string) net.Conn {
					conn, err := d.Dial(network, address)
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() { hangUp(conn) })
					return conn
				}
				free := []uint16{largeLow + 800, largeLow + 1001, largeHigh}
				for port := largeLow; port <= largeHigh; port++ {
					local := localAddr(network, "127.2.0.1", uint16(port))
					if tt.sharedWithOurs {
						open(ours(local), b)
					}
					if slices.Contains(free, uint16(port)) {
						continue
					}
					if tt.elsewhere {
						open(tt.takenBy(local), b)
					} else {
						open(tt.takenBy(local), a)
					}
				}
				d := ours(localAddr(network, "127.2.0.1", 0))
				var found []uint16
				for range free {
					conn := open(d, a)
					checkEcho(t, conn)
					found = append(found, portOf(conn.LocalAddr()))
				}
				slices.Sort(found)
				if diff := cmp.Diff(free, found); diff != "" {
					t.Errorf("(-free +found):\n%s", diff)
				}
				_, err := d.Dial(network, a)
				checkExhausted(t, err)
			})
		}
	}
}
