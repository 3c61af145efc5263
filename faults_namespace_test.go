//go:build linux && (amd64 || arm64)

package connectx_test

import (
	"context"
	"net"
	"strings"
	"syscall"
	"testing"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/netns"
)

// A namespace that nobody is in any more lives on in its sockets: connections
// that were made in it go on, and dials are made in the new one.
func TestConnectionsOutliveTheirNamespace(t *testing.T) {
	ownNamespace(t, 40000, 40009)
	var conns []net.Conn
	for _, network := range []string{"tcp", "udp"} {
		d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr(network, "127.2.0.1", 40005)}}
		for _, host := range []string{"127.1.0.1", "127.1.0.2"} {
			conn, err := d.Dial(network, echo(t, network, host))
			if err != nil {
				t.Fatal(err)
			}
			defer hangUp(conn)
			conns = append(conns, conn)
		}
	}
	if err := netns.Enter(); err != nil {
		t.Fatal(err)
	}
	if err := netns.SetPortRange(50000, 50009); err != nil {
		t.Fatal(err)
	}
	for _, network := range []string{"tcp", "udp"} {
		conn, err := connectx.Dial(network, echo(t, network, "127.1.0.1"))
		if err != nil {
			t.Fatal(err)
		}
		defer hangUp(conn)
		checkEcho(t, conn)
		if port := portOf(conn.LocalAddr()); port < 50000 || port > 50009 {
			t.Errorf("%s: port %d is not of the new namespace", network, port)
		}
	}
	for _, conn := range conns {
		checkEcho(t, conn)
	}
}

// A hook that leaves the namespace of its socket leaves the dial without answers:
// netlink would speak of another namespace.
func TestHookThatLeavesTheNamespace(t *testing.T) {
	ownNamespace(t, 40000, 40009)
	udp, tcp := echo(t, "udp", "127.1.0.1"), echo(t, "tcp", "127.1.0.1")
	leave := func(string, string, syscall.RawConn) error { return netns.Enter() }
	d := connectx.Dialer{Dialer: net.Dialer{Control: leave}}
	reason := ""
	ctx := connectx.WithTrace(context.Background(), &connectx.Trace{Fallback: func(err error) { reason = err.Error() }})
	conn, err := d.DialContext(ctx, "udp", udp)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	checkEcho(t, conn)
	if !strings.Contains(reason, "not in the calling thread's network namespace") {
		t.Errorf("the reason of the fallback is %q", reason)
	}
	if reusesAddress(conn) {
		t.Error("the port is shared")
	}

	// The goroutine is in the namespace that the hook has entered.
	if _, err := d.Dial("tcp", tcp); err == nil {
		t.Error("there is a server in a new namespace")
	}
}
