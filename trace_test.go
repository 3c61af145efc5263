//go:build linux

package connectx_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/seed22601231/connectx"
)

func init() { children["dial within a hook"] = dialWithinHook }

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
		holder        func(net.Dialer) dialer // of a connection from port 40001, or nil
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
			holder: func(d net.Dialer) dialer { return &connectx.Dialer{Dialer: d} },
			d:      connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr("tcp", "127.2.0.1", 40001)}},
			want: []string{
				"source 127.2.0.1 127.1.0.1:7",
				"try tcp4 127.2.0.1 40001-40001 127.1.0.1:7",
				"conflict tcp4 127.2.0.1 40001-40001 127.1.0.1:7",
			},
		},
		{
			name: "contention", network: "tcp",
			holder: func(d net.Dialer) dialer { return &d },
			d:      connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr("tcp", "127.2.0.1", 40001)}},
			want: []string{
				"source 127.2.0.1 127.1.0.1:7",
				"try tcp4 127.2.0.1 40001-40001 127.1.0.1:7",
				"contention tcp4 127.2.0.1 40001-40001 127.1.0.1:7",
			},
		},
		{
			name: "the next source address when the first is full", network: "udp",
			holder: func(d net.Dialer) dialer { return &connectx.Dialer{Dialer: d} },
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
			if tt.holder != nil {
				holder := tt.holder(net.Dialer{LocalAddr: localAddr(tt.network, "127.2.0.1", 40001)})
				conn, err := holder.Dial(tt.network, address)
				if err != nil {
					t.Fatal(err)
				}
				defer hangUp(conn)
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

// A hook may take its time: no port is locked while it runs. Many dial one and
// the same 4-tuple here, and each one that it is not granted dials from the same
// port to another destination, within the hook.
func TestTraceHooksDoNotHoldTheLock(t *testing.T) {
	ownNamespace(t, 40000, 40009)
	env := []string{"DESTINATIONS=" + echo(t, "udp", "127.1.0.1") + " " + echo(t, "udp", "127.1.0.2")}
	if out := runChild(t, "dial within a hook", env...); out != "ok" {
		t.Errorf("got %q", out)
	}
}

func dialWithinHook() int {
	a, b, _ := strings.Cut(os.Getenv("DESTINATIONS"), " ")
	var d connectx.Dialer
	d.LocalAddr = localAddr("udp", "127.2.0.1", 40001)
	var held sync.Mutex // the 4-tuple towards b
	var failure atomic.Pointer[error]
	within := func(connectx.TraceTry) {
		held.Lock()
		defer held.Unlock()
		conn, err := d.Dial("udp", b)
		if err != nil {
			failure.Store(&err)
			return
		}
		conn.Close()
	}
	ctx := connectx.WithTrace(context.Background(), &connectx.Trace{Conflict: within, Contention: within})
	var wg sync.WaitGroup
	picked := connectx.Dialer{PortRange: connectx.PortRange{Low: 40001, High: 40001}}
	picked.LocalAddr = localAddr("udp", "127.2.0.1", 0)
	for i := range 8 {
		wg.Go(func() {
			dialer := []*connectx.Dialer{&d, &picked}[i%2]
			for range 500 {
				if conn, err := dialer.DialContext(ctx, "udp", a); err == nil {
					conn.Close()
				}
			}
		})
	}
	wg.Wait()
	if err := failure.Load(); err != nil {
		return failChild("%v", *err)
	}
	fmt.Print("ok")
	return 0
}
