//go:build linux

package connectx_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
)

// descriptors lists what is open, without what the list itself takes.
func descriptors(t testing.TB) map[string]string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	open := make(map[string]string)
	for _, entry := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + entry.Name()); err == nil {
			open[entry.Name()] = target
		}
	}
	return open
}

// waitFor waits for a condition that holds soon, since others work on it.
func waitFor(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !condition(); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not after 10 s", what)
		}
	}
}

// A dial that fails, in whatever way, leaves nothing behind: no descriptor, no
// goroutine, no locked port.
func TestFailedDialsLeaveNothingBehind(t *testing.T) {
	const low, high = 40000, 40009
	ownNamespace(t, low, high)
	udpServer, tcpServer := echo(t, "udp", "127.1.0.1"), echo(t, "tcp", "127.1.0.1")
	full := "127.1.0.2"
	for _, network := range []string{"tcp", "udp"} {
		address := echo(t, network, full)
		for range high - low + 1 {
			d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr(network, "127.2.0.1", 0)}}
			conn, err := d.Dial(network, address)
			if err != nil {
				t.Fatal(err)
			}
			defer hangUp(conn)
			checkEcho(t, conn)
		}
	}
	// A neighbour that never shares, on another address.
	exclusive, err := net.ListenPacket("udp", "127.2.0.2:40005")
	if err != nil {
		t.Fatal(err)
	}
	defer exclusive.Close()
	exclusiveTCP, err := net.Listen("tcp", "127.2.0.2:40005")
	if err != nil {
		t.Fatal(err)
	}
	defer exclusiveTCP.Close()

	errHook := errors.New("enough sockets")
	// failOnCall fails, or does something else, on the n-th socket.
	onCall := func(n int, f func() error) func(network, address string, c syscall.RawConn) error {
		calls := 0
		return func(string, string, syscall.RawConn) error {
			if calls++; calls == n {
				return f()
			}
			return nil
		}
	}
	background := func() (context.Context, context.CancelFunc) { return context.Background(), func() {} }
	cancelled := func() (context.Context, context.CancelFunc) {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		return ctx, cancel
	}
	soon := func() (context.Context, context.CancelFunc) {
		return context.WithTimeout(context.Background(), 5*time.Millisecond)
	}
	from := func(network, host string, port uint16) net.Dialer {
		return net.Dialer{LocalAddr: localAddr(network, host, port)}
	}
	type test struct {
		name             string
		ctx              func() (context.Context, context.CancelFunc)
		dialer           func() net.Dialer
		network, address string
		want             error
	}
	fixed := func(d net.Dialer) func() net.Dialer { return func() net.Dialer { return d } }
	tests := []test{
		{"TCP refused", background, fixed(net.Dialer{}), "tcp", "127.1.0.1:9", unix.ECONNREFUSED},
		{"TCP range full", background, fixed(from("tcp", "127.2.0.1", 0)), "tcp", full + ":7", connectx.ErrPortsExhausted},
		{"UDP range full", background, fixed(from("udp", "127.2.0.1", 0)), "udp", full + ":7", connectx.ErrPortsExhausted},
		{"TCP 4-tuple in use", background, fixed(from("tcp", "127.2.0.1", 40005)), "tcp", full + ":7", unix.EADDRNOTAVAIL},
		{"UDP 4-tuple in use", background, fixed(from("udp", "127.2.0.1", 40005)), "udp", full + ":7", unix.EADDRINUSE},
		{"TCP port of a socket that does not share", background, fixed(from("tcp", "127.2.0.2", 40005)), "tcp", tcpServer, unix.EADDRINUSE},
		{"UDP port of a socket that does not share", background, fixed(from("udp", "127.2.0.2", 40005)), "udp", udpServer, unix.EADDRINUSE},
		{"UDP deadline while waiting for the port", soon, fixed(from("udp", "127.2.0.2", 40005)), "udp", udpServer, context.DeadlineExceeded},
		{"UDP unreachable", background, fixed(from("udp", "127.2.0.1", 0)), "udp", "192.0.2.1:9", unix.ENETUNREACH},
		{"UDP source that is not here", background, fixed(from("udp", "192.0.2.1", 0)), "udp", udpServer, unix.EADDRNOTAVAIL},
		{"TCP source that is not here", background, fixed(from("tcp", "192.0.2.1", 0)), "tcp", tcpServer, unix.EADDRNOTAVAIL},
		{"UDP cancelled before", cancelled, fixed(net.Dialer{}), "udp", udpServer, context.Canceled},
		{"TCP cancelled before", cancelled, fixed(net.Dialer{}), "tcp", tcpServer, context.Canceled},
	}
	// The hook of a UDP dial to a full range runs once on each socket. The
	// context ends, or the hook fails, on any of them.
	for n := 1; n <= 3; n++ {
		tests = append(tests, test{
			fmt.Sprintf("hook fails on socket %d", n), background,
			func() net.Dialer {
				d := from("udp", "127.2.0.1", 0)
				d.Control = onCall(n, func() error { return errHook })
				return d
			}, "udp", full + ":7", errHook,
		})
	}
	for _, network := range []string{"tcp", "udp"} {
		tests = append(tests, test{
			network + " cancelled in the hook",
			func() (context.Context, context.CancelFunc) {
				ctx, cancel := context.WithCancel(context.Background())
				return context.WithValue(ctx, cancelKey{}, cancel), cancel
			},
			func() net.Dialer {
				d := from(network, "127.2.0.1", 0)
				d.ControlContext = func(ctx context.Context, _, _ string, _ syscall.RawConn) error {
					ctx.Value(cancelKey{}).(context.CancelFunc)()
					return nil
				}
				return d
			}, network, full + ":7", context.Canceled,
		})
	}

	for _, test := range tests {
		dial := func() {
			ctx, cancel := test.ctx()
			defer cancel()
			d := connectx.Dialer{Dialer: test.dialer()}
			conn, err := d.DialContext(ctx, test.network, test.address)
			if test.want == errHook && err != nil && errors.Is(err, connectx.ErrPortsExhausted) {
				return // the dial needed fewer sockets
			}
			if !errors.Is(err, test.want) {
				t.Errorf("%s: %v, %v", test.name, conn, err)
			}
		}
		dial() // the first one may open what is kept
		goroutines, open := runtime.NumGoroutine(), len(descriptors(t))
		for range 10 {
			dial()
		}
		waitFor(t, test.name+": goroutines and descriptors as before", func() bool {
			return runtime.NumGoroutine() <= goroutines && len(descriptors(t)) <= open
		})
	}

	// No port is locked: another socket that shares can have each of them.
	for port := uint16(low); port <= high; port++ {
		var d connectx.Dialer
		conn, err := d.DialUDP(context.Background(), "udp", netip.AddrPortFrom(netip.MustParseAddr("127.2.0.1"), port), netip.MustParseAddrPort(udpServer))
		if err != nil {
			t.Errorf("port %d afterwards: %v", port, err)
			continue
		}
		checkEcho(t, conn)
		conn.Close()
	}
}

type cancelKey struct{}

// The descriptors that dials share are closed when there are no more dials.
func TestIdleNamespaceHoldsNoDescriptors(t *testing.T) {
	if testing.Short() {
		t.Skip("takes as long as a namespace is kept: 10 s")
	}
	ownNamespace(t, 40000, 40009)
	before := descriptors(t)
	conn, err := connectx.Dial("udp", "127.1.0.1:9")
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	added := make(map[string]bool)
	for fd, target := range descriptors(t) {
		if before[fd] != target {
			added[target] = true
		}
	}
	if len(added) == 0 {
		t.Fatal("a dial keeps no descriptor open: nothing to see here")
	}
	deadline := time.Now().Add(30 * time.Second)
	for len(added) > 0 {
		if time.Now().After(deadline) {
			t.Fatalf("still open after 30 s: %v", added)
		}
		time.Sleep(100 * time.Millisecond) // only so as not to spin for 10 s
		now := make(map[string]bool)
		for _, target := range descriptors(t) {
			now[target] = true
		}
		for target := range added {
			if !now[target] {
				delete(added, target)
			}
		}
	}

	// And the next dial works as the first one did.
	conn, err = connectx.Dial("udp", "127.1.0.1:9")
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}
