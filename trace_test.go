//go:build linux

package connectx_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/seed22601231/connectx"
)

// recordTrace returns a context whose dials write down what they do.
func recordTrace(ctx context.Context, events *[]string) context.Context {
	note := func(what string) func(connectx.TraceTry) {
		return func(try connectx.TraceTry) {
			*events = append(*events, fmt.Sprintf("%s %s %v %v %v", what, try.Network, try.Source, try.Ports, try.Destination))
		}
	}
	return connectx.WithTrace(ctx, &connectx.Trace{
		SourceChosen: func(source netip.Addr, destination netip.AddrPort) {
			*events = append(*events, fmt.Sprintf("source %v %v", source, destination))
		},
		Try: note("try"), Conflict: note("conflict"), Contention: note("contention"),
	})
}

// The hooks tell, in order, what a dial does.
func TestTrace(t *testing.T) {
	for _, tt := range []struct {
		name, network string
		prepare       func(t *testing.T, network string) // one socket on port 40001
		d             connectx.Dialer
		want          []string
	}{
		{
			name: "a free port", network: "udp",
			d: connectx.Dialer{
				SourceAddrs: []netip.Addr{netip.MustParseAddr("127.2.0.1")},
				PortRange:   connectx.PortRange{Low: 40001, High: 40001},
			},
			want: []string{
				"source 127.2.0.1 127.1.0.1:7",
				"try udp4 127.2.0.1 40001-40001 127.1.0.1:7",
			},
		},
		{
			name: "a source from the routing table", network: "udp",
			d: connectx.Dialer{PortRange: connectx.PortRange{Low: 40001, High: 40001}},
			want: []string{
				"source 127.0.0.1 127.1.0.1:7",
				"try udp4 127.0.0.1 40001-40001 127.1.0.1:7",
			},
		},
		{
			name: "a source that the kernel chooses", network: "tcp",
			d:    connectx.Dialer{PortRange: connectx.PortRange{Low: 40001, High: 40001}},
			want: []string{"try tcp4 invalid IP 40001-40001 127.1.0.1:7"},
		},
		{
			name: "a conflict", network: "tcp",
			prepare: func(t *testing.T, network string) {
				d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr(network, "127.2.0.1", 40001)}}
				conn, err := d.Dial(network, "127.1.0.1:7")
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { hangUp(conn) })
			},
			d: connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr("tcp", "127.2.0.1", 40001)}},
			want: []string{
				"source 127.2.0.1 127.1.0.1:7",
				"try tcp4 127.2.0.1 40001-40001 127.1.0.1:7",
				"conflict tcp4 127.2.0.1 40001-40001 127.1.0.1:7",
			},
		},
		{
			name: "contention", network: "tcp",
			prepare: func(t *testing.T, network string) {
				d := net.Dialer{LocalAddr: localAddr(network, "127.2.0.1", 40001)}
				conn, err := d.Dial(network, "127.1.0.1:7")
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { hangUp(conn) })
			},
			d: connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr("tcp", "127.2.0.1", 40001)}},
			want: []string{
				"source 127.2.0.1 127.1.0.1:7",
				"try tcp4 127.2.0.1 40001-40001 127.1.0.1:7",
				"contention tcp4 127.2.0.1 40001-40001 127.1.0.1:7",
			},
		},
		{
			name: "the next source address when the first is full", network: "udp",
			prepare: func(t *testing.T, network string) {
				d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr(network, "127.2.0.1", 40001)}}
				conn, err := d.Dial(network, "127.1.0.1:7")
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { hangUp(conn) })
			},
			d: connectx.Dialer{
				// Whichever of the two is the first.
				SourceAddrs: []netip.Addr{netip.MustParseAddr("127.2.0.1"), netip.MustParseAddr("127.2.0.1")},
				PortRange:   connectx.PortRange{Low: 40001, High: 40001},
			},
			want: []string{
				"source 127.2.0.1 127.1.0.1:7",
				"try udp4 127.2.0.1 40001-40001 127.1.0.1:7",
				"conflict udp4 127.2.0.1 40001-40001 127.1.0.1:7",
				"source 127.2.0.1 127.1.0.1:7",
				"try udp4 127.2.0.1 40001-40001 127.1.0.1:7",
				"conflict udp4 127.2.0.1 40001-40001 127.1.0.1:7",
			},
		},
	} {
		t.Run(tt.network+", "+tt.name, func(t *testing.T) {
			ownNamespace(t, 40000, 40009)
			address := echo(t, tt.network, "127.1.0.1")
			if tt.prepare != nil {
				tt.prepare(t, tt.network)
			}
			var events []string
			conn, err := tt.d.DialContext(recordTrace(t.Context(), &events), tt.network, address)
			if err == nil {
				checkEcho(t, conn)
				hangUp(conn)
			}
			if diff := cmp.Diff(tt.want, events); diff != "" {
				t.Errorf("%v (-want +got):\n%s", err, diff)
			}
		})
	}
}

// A hook may take its time: no port is locked while it runs, so another dial
// from the same port to another destination succeeds meanwhile.
func TestTraceHooksDoNotHoldTheLock(t *testing.T) {
	ownNamespace(t, 40000, 40009)
	a, b := echo(t, "udp", "127.1.0.1"), echo(t, "udp", "127.1.0.2")
	d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr("udp", "127.2.0.1", 40001)}}
	first, err := d.Dial("udp", a)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	called := 0
	other := func(connectx.TraceTry) {
		called++
		conn, err := d.Dial("udp", b)
		if err != nil {
			t.Errorf("from within a hook: %v", err)
			return
		}
		checkEcho(t, conn)
		conn.Close()
	}
	ctx := connectx.WithTrace(t.Context(), &connectx.Trace{Try: other, Conflict: other})
	if conn, err := d.DialContext(ctx, "udp", a); err == nil {
		t.Errorf("a second connection on %v", conn.LocalAddr())
	}
	picked := connectx.Dialer{
		Dialer:    net.Dialer{LocalAddr: localAddr("udp", "127.2.0.1", 0)},
		PortRange: connectx.PortRange{Low: 40001, High: 40001},
	}
	if conn, err := picked.DialContext(ctx, "udp", a); err == nil {
		t.Errorf("a second connection on %v", conn.LocalAddr())
	}
	if called != 4 {
		t.Errorf("the hooks were called %d times, want 4", called)
	}
}
