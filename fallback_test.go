//go:build linux

package connectx_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/seccomp"
)

func init() {
	children["no netlink"] = func() int {
		return fallback(noNetlink, "operation not permitted")
	}
	children["netlink does not answer"] = func() int {
		// Requests are sent with MSG_DONTWAIT, and then are not.
		return fallback(seccomp.Fail(unix.SYS_SENDTO, 3, unix.MSG_DONTWAIT, 0), "recv")
	}
	children["udp_diag is missing"] = func() int {
		// To the kernel without udp_diag, every socket is ENOENT.
		return fallback(seccomp.Fail(unix.SYS_SENDTO, 3, unix.MSG_DONTWAIT, unix.ENOENT), "no such file")
	}
	for name, refusals := range tcpWithout {
		children[name] = func() int {
			if err := refuse(refusals...); err != nil {
				return failChild("%v", err)
			}
			return wholeRangeTwice("tcp")
		}
	}
}

var (
	noPortRange     = seccomp.Fail(unix.SYS_SETSOCKOPT, 2, unix.IP_LOCAL_PORT_RANGE, unix.ENOPROTOOPT)
	noAddressNoPort = seccomp.Fail(unix.SYS_SETSOCKOPT, 2, unix.IP_BIND_ADDRESS_NO_PORT, unix.ENOPROTOOPT)
	noNetlink       = seccomp.Fail(unix.SYS_SOCKET, 0, unix.AF_NETLINK, unix.EPERM)
)

// tcpWithout is what a kernel, or a sandbox, may not have.
var tcpWithout = map[string][]seccomp.Rule{
	"no IP_LOCAL_PORT_RANGE":                             {noPortRange},
	"no IP_BIND_ADDRESS_NO_PORT":                         {noAddressNoPort},
	"no IP_LOCAL_PORT_RANGE nor IP_BIND_ADDRESS_NO_PORT": {noPortRange, noAddressNoPort},
	"no IP_BIND_ADDRESS_NO_PORT nor netlink":             {noAddressNoPort, noNetlink},
	"none of them":                                       {noPortRange, noAddressNoPort, noNetlink},
}

// Without the kernel's answers, UDP dials are limited but never overshadowed.
func TestUDPWhenTheKernelDoesNotAnswer(t *testing.T) {
	for _, name := range []string{"no netlink", "netlink does not answer", "udp_diag is missing"} {
		t.Run(name, func(t *testing.T) {
			ownNamespace(t, 40000, 40019)
			destinations := echo(t, "udp", "127.1.0.1") + " " + echo(t, "udp", "127.1.0.2")
			if out := runChild(t, name, "DESTINATIONS="+destinations); out != "ok" {
				t.Errorf("got %q", out)
			}
		})
	}
}

// fallback is a program that the kernel refuses something.
func fallback(r seccomp.Rule, why string) int {
	if err := refuse(r); err != nil {
		return failChild("%v", err)
	}
	a, b, _ := strings.Cut(os.Getenv("DESTINATIONS"), " ")

	// An explicit port works, and is not shared.
	d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr("udp", "127.2.0.1", 40003)}}
	first, err := d.Dial("udp", a)
	if err != nil {
		return failChild("explicit port: %v", err)
	}
	defer first.Close()
	if err := ping(first, 1); err != nil {
		return failChild("explicit port: %v", err)
	}
	for _, destination := range []string{a, b} {
		_, err := d.Dial("udp", destination)
		if !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), "cannot be shared") || !strings.Contains(err.Error(), why) {
			return failChild("explicit port a second time: %v", err)
		}
	}

	// Picked ports are all different, over all destinations together.
	for _, source := range []net.Addr{nil, localAddr("udp", "127.2.0.2", 0)} {
		d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: source}}
		seen := make(map[string]bool)
		var conns []net.Conn
		for i := 0; ; i++ {
			conn, err := d.Dial("udp", []string{a, b}[i%2])
			if err != nil {
				want := unix.EAGAIN // as net.Dialer has it
				if source != nil {
					want = unix.EADDRINUSE
				}
				if !errors.Is(err, want) {
					return failChild("at the end of the range: %v", err)
				}
				break
			}
			if err := ping(conn, uint64(i)); err != nil {
				return failChild("picked port: %v", err)
			}
			if seen[conn.LocalAddr().String()] {
				return failChild("%v was picked twice", conn.LocalAddr())
			}
			seen[conn.LocalAddr().String()] = true
			conns = append(conns, conn)
		}
		if len(conns) < 19 || len(conns) > 20 {
			return failChild("%d picked ports of 20", len(conns))
		}
		for _, conn := range conns {
			conn.Close()
		}
	}
	fmt.Print("ok")
	return 0
}

// A kernel without IP_LOCAL_PORT_RANGE searches by itself, and one without
// IP_BIND_ADDRESS_NO_PORT is told the port.
func TestTCPWithoutOptions(t *testing.T) {
	for name := range tcpWithout {
		t.Run(name, func(t *testing.T) {
			ownNamespace(t, 40000, 40019)
			destinations := echo(t, "tcp", "127.1.0.1") + " " + echo(t, "tcp", "127.1.0.2")
			if out := runChild(t, name, "DESTINATIONS="+destinations); out != "ok" {
				t.Errorf("got %q", out)
			}
		})
	}
}

func wholeRangeTwice(network string) int {
	a, b, _ := strings.Cut(os.Getenv("DESTINATIONS"), " ")
	for _, d := range []connectx.Dialer{
		{},
		{Dialer: net.Dialer{LocalAddr: localAddr(network, "127.2.0.1", 0)}},
		{SourceAddrs: []netip.Addr{netip.MustParseAddr("127.2.0.2")}},
		{SourceAddrs: []netip.Addr{netip.MustParseAddr("127.2.0.3"), netip.MustParseAddr("127.2.0.4")}},
		{PortRange: connectx.PortRange{Low: 40000, High: 40019}, Dialer: net.Dialer{LocalAddr: localAddr(network, "127.2.0.5", 0)}},
	} {
		for _, destination := range []string{a, b} {
			for i := range 20 * max(1, len(d.SourceAddrs)) {
				conn, err := d.Dial(network, destination)
				if err != nil {
					return failChild("dial %d: %v", i, err)
				}
				defer hangUp(conn)
				if err := ping(conn, uint64(i)); err != nil {
					return failChild("%v", err)
				}
			}
			if _, err := d.Dial(network, destination); !errors.Is(err, connectx.ErrPortsExhausted) {
				return failChild("dial beyond the range: %v", err)
			}
		}
	}
	fmt.Print("ok")
	return 0
}
