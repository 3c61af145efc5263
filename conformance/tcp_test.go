//go:build linux

package conformance

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// listenWithoutQueue listens with a backlog of 0 and accepts nothing: the
// kernel takes one connection and drops the SYNs of all others.
func listenWithoutQueue(t *testing.T, host string, port int) {
	t.Helper()
	addr := netip.MustParseAddr(host)
	family, sa := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Port: port, Addr: addr.As16()})
	if addr.Is4() {
		family, sa = unix.AF_INET, &unix.SockaddrInet4{Port: port, Addr: addr.As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, sa); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
}

// The options that a connection ends up with.
func TestSocketOptions(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	options := []struct {
		name          string
		level, option int
	}{
		{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE},
		{"TCP_KEEPIDLE", unix.SOL_TCP, unix.TCP_KEEPIDLE},
		{"TCP_KEEPINTVL", unix.SOL_TCP, unix.TCP_KEEPINTVL},
		{"TCP_KEEPCNT", unix.SOL_TCP, unix.TCP_KEEPCNT},
		{"TCP_NODELAY", unix.SOL_TCP, unix.TCP_NODELAY},
		{"SO_PROTOCOL", unix.SOL_SOCKET, unix.SO_PROTOCOL},
		{"SO_BROADCAST", unix.SOL_SOCKET, unix.SO_BROADCAST},
		{"SO_REUSEPORT", unix.SOL_SOCKET, unix.SO_REUSEPORT},
		{"SO_LINGER", unix.SOL_SOCKET, unix.SO_LINGER},
		{"SO_ERROR", unix.SOL_SOCKET, unix.SO_ERROR},
	}
	multipath := net.Dialer{}
	multipath.SetMultipathTCP(true)
	tests := []struct {
		name   string
		dialer net.Dialer
	}{
		{"zero Dialer", net.Dialer{}},
		{"KeepAlive", net.Dialer{KeepAlive: 42 * time.Second}},
		{"negative KeepAlive", net.Dialer{KeepAlive: -1}},
		{"KeepAliveConfig", net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 41 * time.Second, Interval: 7 * time.Second, Count: 3}}},
		{"source IP", net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}},
		{"multipath TCP", multipath},
	}
	for _, test := range tests {
		results := make([]map[string]int, len(dialers))
		for i, dialer := range dialers {
			conn, err := dialer.of(test.dialer)(context.Background(), "tcp", listener.Addr().String())
			if err != nil {
				t.Fatalf("%s: %s: %v", test.name, dialer.name, err)
			}
			raw, err := conn.(syscall.Conn).SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			results[i] = make(map[string]int)
			raw.Control(func(fd uintptr) {
				for _, option := range options {
					results[i][option.name], _ = unix.GetsockoptInt(int(fd), option.level, option.option)
				}
				flags, _ := unix.FcntlInt(fd, unix.F_GETFD, 0)
				results[i]["FD_CLOEXEC"] = flags & unix.FD_CLOEXEC
				flags, _ = unix.FcntlInt(fd, unix.F_GETFL, 0)
				results[i]["O_NONBLOCK"] = flags & unix.O_NONBLOCK
			})
			if multi, err := conn.(*net.TCPConn).MultipathTCP(); err == nil {
				results[i]["MultipathTCP "+fmt.Sprint(multi)] = 1
			}
			conn.Close()
		}
		for i := range results[1:] {
			if diff := cmp.Diff(results[0], results[i+1]); diff != "" {
				t.Errorf("%s: %s -, %s +\n%s", test.name, dialers[0].name, dialers[i+1].name, diff)
			}
		}
	}
}
