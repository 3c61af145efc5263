//go:build linux

package connectx_test

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/netns"
)

func init() {
	children["dial without IPv6"] = dialWithoutIPv6
	children["whole range of TCP"] = func() int { return wholeRangeTwice("tcp") }
	children["whole range of UDP"] = func() int { return wholeRangeTwice("udp") }
}

// Where IPv6 is turned off, by sysctl here or for the whole kernel (ipv6.disable=1), all
// is as ever over IPv4, and IPv6 ends as with net.Dialer.
func TestWithoutIPv6(t *testing.T) {
	netns.Need(t)
	if err := netns.Enter(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	if err := netns.SetPortRange(40000, 40019); err != nil {
		t.Fatal(err)
	}
	for _, network := range []string{"tcp4", "udp4"} {
		echo(t, network, "127.1.0.1")
		echo(t, network, "127.1.0.2")
	}
	for _, name := range []string{"dial without IPv6", "whole range of TCP", "whole range of UDP"} {
		if out := runChild(t, name, "DESTINATIONS=127.1.0.1:7 127.1.0.2:7"); out != "ok" {
			t.Errorf("%s: %q", name, out)
		}
	}
}

// dialWithoutIPv6 is a process of its own: net.Dialer races to the addresses of
// localhost in goroutines.
func dialWithoutIPv6() int {
	for _, network := range []string{"tcp", "udp", "tcp4", "udp4", "tcp6", "udp6"} {
		for _, host := range []string{"127.1.0.1", "[::ffff:127.1.0.1]", "localhost", "[::1]", "[fd00::1]", "[fe80::1%lo]"} {
			for _, local := range []net.Addr{nil, localAddr(network, "127.2.0.1", 0), localAddr(network, "127.2.0.2", 40005), localAddr(network, "::1", 0)} {
				if host == "localhost" && local != nil {
					continue // the network is named as tcp4 or udp4, see the README
				}
				inner := net.Dialer{LocalAddr: local}
				dial := func(d dialer) verdict {
					conn, err := d.Dial(network, host+":7")
					if tcp, ok := conn.(*net.TCPConn); ok {
						tcp.SetLinger(0) // nothing in TIME_WAIT
					}
					return verdictOf(conn, err)
				}
				want, got := dial(&inner), dial(&connectx.Dialer{Dialer: inner})
				if diff := cmp.Diff(want, got); diff != "" {
					return failChild("%s to %s from %v: net.Dialer -, connectx +\n%s", network, host, local, diff)
				}
			}
		}
	}
	os.Stdout.WriteString("ok")
	return 0
}
