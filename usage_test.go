//go:build linux

package connectx_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/netns"
)

var compareAddrs = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
}

// What the ports are taken by is counted for a healthy destination, and is what
// the error says of one that is full.
func TestUsage(t *testing.T) {
	const low, high = 40000, 40099
	for _, family := range families {
		for _, protocol := range []string{"tcp", "udp"} {
			t.Run(protocol+" over "+family.name, func(t *testing.T) {
				ownNamespace(t, low, high)
				if err := netns.SetReservedPorts("40010-40014"); err != nil {
					t.Fatal(err)
				}
				network := protocol + family.suffix
				keepTimeWait(t)
				address, other := echo(t, network, family.hosts[0]), echo(t, network, family.hosts[1])
				source := netip.MustParseAddr(family.source)
				destination := netip.MustParseAddrPort(address)
				dialFrom := func(port uint16, address string) net.Conn {
					d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr(network, family.source, port)}}
					conn, err := d.Dial(network, address)
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() { hangUp(conn) })
					return conn
				}
				want := connectx.PortUsage{
					Network: protocol, Source: source, Destination: destination,
					Ports:       connectx.PortRange{Low: low, High: high},
					Established: 7, Held: 3, Reserved: 5,
				}
				for i := range 7 {
					dialFrom(uint16(low+i), address)
				}
				for i := range 4 {
					dialFrom(uint16(low+20+i), other) // shared: in nobody's way
				}
				for i := range 3 {
					local := localAddr(network, family.source, uint16(low+30+i))
					plain := net.Dialer{LocalAddr: local}
					conn, err := plain.Dial(network, other)
					if err != nil {
						t.Fatal(err)
					}
					defer hangUp(conn)
				}
				if protocol == "tcp" {
					for i := range 6 {
						conn := dialFrom(uint16(low+40+i), address)
						conn.(*net.TCPConn).CloseWrite()
						waitForEnd(t, conn)
						conn.Close()
					}
					want.TimeWait = 6
				}
				want.Free = high - low + 1 - want.Established - want.TimeWait - want.Held - want.Reserved

				got, err := connectx.Usage(t.Context(), network, source, destination)
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(want, got, compareAddrs); diff != "" {
					t.Fatalf("(-want +got):\n%s", diff)
				}

				// As many dials as are said to be free succeed, and no more.
				d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr(network, family.source, 0)}}
				if n := len(fillUp(t, &d, network, address)); n != want.Free {
					t.Errorf("%d connections, want %d", n, want.Free)
				}
				_, err = d.Dial(network, address)
				var exhausted *connectx.PortsExhaustedError
				if !errors.As(err, &exhausted) {
					t.Fatal(err)
				}
				t.Log(err)
				if exhausted.TimeWait != want.TimeWait || exhausted.Held != want.Held || exhausted.Reserved != want.Reserved || exhausted.Tried != high-low+1-want.Reserved {
					t.Errorf("%+v", exhausted)
				}
				want.Established, want.Free = want.Established+want.Free, 0
				all, err := exhausted.Usage(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff([]connectx.PortUsage{want}, all, compareAddrs); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
			})
		}
	}
}

// keepTimeWait has the kernel keep 4-tuples in TIME_WAIT on loopback, too.
func keepTimeWait(t *testing.T) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/net/ipv4/tcp_tw_reuse", []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
}

// The error says what most ports are taken by, and what to do about it.
func TestExhaustedErrorGivesAdvice(t *testing.T) {
	const low, high = 40000, 40009
	for _, tt := range []struct {
		name, network  string
		timeWait, held int
		want           string
	}{
		{"TCP in TIME_WAIT", "tcp", 8, 0, "(8 in TIME_WAIT; keep connections open for longer, or set net.ipv4.tcp_tw_reuse=1)"},
		{"a few in TIME_WAIT", "tcp", 2, 1, "(2 in TIME_WAIT; 1 held by sockets that do not share them; use more source addresses, or a wider range)"},
		{"TCP held by others", "tcp", 1, 7, "(1 in TIME_WAIT; 7 held by sockets that do not share them; have those use connectx as well, or use another range)"},
		{"UDP held by others", "udp", 0, 10, "(10 held by sockets that do not share them; have those use connectx as well, or use another range)"},
		{"just connections", "udp", 0, 0, "(use more source addresses, or a wider range)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ownNamespace(t, low, high)
			keepTimeWait(t)
			address, other := echo(t, tt.network, "127.1.0.1"), echo(t, tt.network, "127.1.0.2")
			for i := range tt.held {
				plain := net.Dialer{LocalAddr: localAddr(tt.network, "127.2.0.1", uint16(low+i))}
				conn, err := plain.Dial(tt.network, other)
				if err != nil {
					t.Fatal(err)
				}
				defer hangUp(conn)
			}
			d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr(tt.network, "127.2.0.1", 0)}}
			for i, conn := range fillUp(t, &d, tt.network, address) {
				if i < tt.timeWait {
					conn.(*net.TCPConn).CloseWrite()
					waitForEnd(t, conn)
					conn.Close()
				}
			}
			_, err := d.Dial(tt.network, address)
			checkExhausted(t, err)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q in it", err, tt.want)
			}
		})
	}
}

// waitForEnd reads until the peer has closed, too.
func waitForEnd(t *testing.T, conn net.Conn) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil || err.Error() != "EOF" {
		t.Fatalf("%d bytes, %v", n, err)
	}
}

func init() {
	children["usage"] = func() int {
		fmt.Println("ready")
		go func() {
			io.Copy(io.Discard, os.Stdin)
			os.Exit(0)
		}()
		for {
			if _, err := connectx.Usage(context.Background(), os.Getenv("NETWORK"), netip.MustParseAddr("127.2.0.1"), netip.MustParseAddrPort("127.1.0.1:7")); err != nil {
				return failChild("%v", err)
			}
		}
	}
}

// Nobody fails to get a port because somebody else counts them.
func TestUsageDisturbsNobody(t *testing.T) {
	const low, high = 40000, 40001
	for _, network := range []string{"tcp", "udp"} {
		t.Run(network, func(t *testing.T) {
			ownNamespace(t, low, high)
			address, other := echo(t, network, "127.1.0.1"), echo(t, network, "127.1.0.2")
			shared := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr(network, "127.2.0.1", low)}}
			conn, err := shared.Dial(network, other)
			if err != nil {
				t.Fatal(err)
			}
			defer hangUp(conn)
			lines := startChild(t, "usage", "NETWORK="+network)
			if !lines.Scan() {
				t.Fatal(lines.Err())
			}
			for i := range 5000 {
				d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr(network, "127.2.0.1", uint16(low+i%2))}}
				conn, err := d.Dial(network, address)
				if err != nil {
					t.Fatalf("dial %d: %v", i, err)
				}
				hangUp(conn)
			}
			if network == "udp" {
				return
			}
			for i := range 5000 {
				listener, err := net.Listen("tcp", fmt.Sprintf("127.2.0.1:%d", high))
				if err != nil {
					t.Fatalf("listener %d: %v", i, err)
				}
				listener.Close()
			}
		})
	}
}

func TestUsageErrors(t *testing.T) {
	ownNamespace(t, 40000, 40019)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	v4, v6 := netip.MustParseAddr("127.2.0.1"), netip.MustParseAddr("fd00::1")
	to4, to6 := netip.AddrPortFrom(v4, 7), netip.AddrPortFrom(v6, 7)
	var (
		unknown  net.UnknownNetworkError
		mismatch *net.AddrError
	)
	for _, tt := range []struct {
		name        string
		ctx         context.Context
		network     string
		source      netip.Addr
		destination netip.AddrPort
		is          error
		as          any
	}{
		{name: "another network", ctx: t.Context(), network: "unix", source: v4, destination: to4, as: &unknown},
		{name: "no destination", ctx: t.Context(), network: "tcp", source: v4, as: &mismatch},
		{name: "two families", ctx: t.Context(), network: "tcp", source: v4, destination: to6, as: &mismatch},
		{name: "a network of another family", ctx: t.Context(), network: "udp6", source: v4, destination: to4, as: &mismatch},
		{name: "an address that is not here", ctx: t.Context(), network: "udp", source: netip.MustParseAddr("192.0.2.1"), destination: to4, is: unix.EADDRNOTAVAIL},
		{name: "no route", ctx: t.Context(), network: "udp", destination: netip.MustParseAddrPort("192.0.2.1:7"), is: unix.ENETUNREACH},
		{name: "a link-local address", ctx: t.Context(), network: "udp", source: netip.MustParseAddr("fe80::1%lo"), destination: to6, is: errors.ErrUnsupported},
		{name: "an ended context", ctx: ended, network: "udp", source: v4, destination: to4, is: context.Canceled},
	} {
		got, err := connectx.Usage(tt.ctx, tt.network, tt.source, tt.destination)
		if err == nil || tt.is != nil && !errors.Is(err, tt.is) || tt.as != nil && !errors.As(err, tt.as) {
			t.Errorf("%s: %v", tt.name, err)
		}
		if got != (connectx.PortUsage{}) {
			t.Errorf("%s: %+v", tt.name, got)
		}
	}
	if got, err := connectx.Usage(t.Context(), "udp", netip.Addr{}, to6); err != nil || got.Source != v6 || got.Free != 20 {
		t.Errorf("a source from the routing table: %+v, %v", got, err)
	}
}
