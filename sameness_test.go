//go:build linux

package connectx_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http/httptrace"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
)

// A dialer is what net.Dialer and connectx.Dialer have in common.
type dialer interface {
	Dial(network, address string) (net.Conn, error)
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
	DialTCP(ctx context.Context, network string, laddr, raddr netip.AddrPort) (*net.TCPConn, error)
	DialUDP(ctx context.Context, network string, laddr, raddr netip.AddrPort) (*net.UDPConn, error)
}

var (
	_ dialer = (*net.Dialer)(nil)
	_ dialer = (*connectx.Dialer)(nil)
)

// A verdict is all that a caller can tell of how a dial has ended.
type verdict struct {
	Conn, Local, Remote string // type and addresses, the picked port as 0
	Error               string
	Op, Net             string
	Source, Addr        string
	Timeout, Temporary  bool
	Is                  []string
}

func verdictOf(conn net.Conn, err error) verdict {
	if err == nil {
		// What a read has to say that fails at once.
		conn.SetReadDeadline(time.Unix(1, 0))
		_, readErr := conn.Read(make([]byte, 1))
		defer conn.Close()
		v := verdict{Error: pickedPort.ReplaceAllString(readErr.Error(), ":0"), Local: withoutPickedPort(conn.LocalAddr()), Remote: conn.RemoteAddr().String()}
		switch conn.(type) {
		case *net.TCPConn:
			v.Conn = "TCP"
		case *net.UDPConn:
			v.Conn = "UDP"
		}
		return v
	}
	v := verdict{Error: err.Error(), Timeout: os.IsTimeout(err)}
	var op *net.OpError
	if errors.As(err, &op) {
		v.Op, v.Net, v.Temporary = op.Op, op.Net, op.Temporary()
		v.Timeout = v.Timeout || op.Timeout()
		if op.Source != nil {
			v.Source = op.Source.Network() + " " + op.Source.String()
		}
		if op.Addr != nil {
			v.Addr = op.Addr.Network() + " " + op.Addr.String()
		}
	}
	for _, target := range []error{
		context.Canceled, context.DeadlineExceeded, os.ErrDeadlineExceeded, os.ErrPermission, net.ErrClosed,
		unix.ECONNREFUSED, unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EADDRNOTAVAIL, unix.EADDRINUSE, unix.EACCES,
		unix.EINVAL, unix.EAGAIN, connectx.ErrPortsExhausted,
	} {
		if errors.Is(err, target) {
			v.Is = append(v.Is, target.Error())
		}
	}
	return v
}

var pickedPort = regexp.MustCompile(`:400[01][0-9]\b`)

func withoutPickedPort(addr net.Addr) string {
	ap := netip.MustParseAddrPort(addr.String())
	if ap.Port() >= 40000 && ap.Port() <= 40019 {
		ap = netip.AddrPortFrom(ap.Addr(), 0)
	}
	return ap.String()
}

var errHook = errors.New("the hook says no")

// Dials that end the same way with both dialers, to the last letter.
func TestSameAsNetDialer(t *testing.T) {
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	late, cancelLate := context.WithDeadline(context.Background(), time.Now().Add(-time.Second))
	defer cancelLate()
	bg := context.Background()

	dialContext := func(ctx context.Context, network, address string) func(dialer) (net.Conn, error) {
		return func(d dialer) (net.Conn, error) { return d.DialContext(ctx, network, address) }
	}
	dial := func(network, address string) func(dialer) (net.Conn, error) { return dialContext(bg, network, address) }
	typed := func(network, laddr, raddr string) func(dialer) (net.Conn, error) {
		parse := func(s string) netip.AddrPort {
			if s == "" {
				return netip.AddrPort{}
			}
			return netip.MustParseAddrPort(s)
		}
		return func(d dialer) (net.Conn, error) {
			if strings.HasPrefix(network, "tcp") {
				c, err := d.DialTCP(bg, network, parse(laddr), parse(raddr))
				if err != nil {
					return nil, err
				}
				return c, nil
			}
			c, err := d.DialUDP(bg, network, parse(laddr), parse(raddr))
			if err != nil {
				return nil, err
			}
			return c, nil
		}
	}
	tcp := func(s string) net.Addr { return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(s)) }
	udp := func(s string) net.Addr { return net.UDPAddrFromAddrPort(netip.MustParseAddrPort(s)) }
	from := func(addr net.Addr) net.Dialer { return net.Dialer{LocalAddr: addr} }

	tests := []struct {
		name   string
		dialer net.Dialer
		dial   func(dialer) (net.Conn, error)
	}{
		{"TCP over IPv4", net.Dialer{}, dial("tcp", "127.1.0.1:7")},
		{"TCP over IPv6", net.Dialer{}, dial("tcp", "[fd00::1]:7")},
		{"UDP over IPv4", net.Dialer{}, dial("udp", "127.1.0.1:7")},
		{"UDP over IPv6", net.Dialer{}, dial("udp", "[fd00::1]:7")},
		{"tcp4", net.Dialer{}, dial("tcp4", "127.1.0.1:7")},
		{"udp6", net.Dialer{}, dial("udp6", "[fd00::1]:7")},
		{"IPv4-mapped destination", net.Dialer{}, dial("tcp", "[::ffff:127.1.0.1]:7")},
		{"UDP to an IPv4-mapped destination", net.Dialer{}, dial("udp", "[::ffff:127.1.0.1]:7")},
		{"this host by an empty name", net.Dialer{}, dial("tcp", ":7")},
		{"UDP to this host by an empty name", net.Dialer{}, dial("udp", ":7")},
		{"this host by 0.0.0.0", net.Dialer{}, dial("tcp", "0.0.0.0:7")},
		{"UDP to this host by 0.0.0.0", net.Dialer{}, dial("udp", "0.0.0.0:7")},
		{"this host by ::", net.Dialer{}, dial("tcp", "[::]:7")},
		{"UDP to this host by ::", net.Dialer{}, dial("udp", "[::]:7")},
		{"UDP to this host from a source", from(udp("127.2.0.1:0")), dial("udp", "0.0.0.0:7")},
		{"TCP refused", net.Dialer{}, dial("tcp", "127.1.0.1:9")},
		{"TCP refused over IPv6", net.Dialer{}, dial("tcp", "[fd00::1]:9")},
		{"TCP refused from a source", from(tcp("127.2.0.1:0")), dial("tcp", "127.1.0.1:9")},
		{"TCP refused from a source and port", from(tcp("127.2.0.1:30003")), dial("tcp", "127.1.0.1:9")},
		{"TCP refused from a port", from(&net.TCPAddr{Port: 30004}), dial("tcp", "127.1.0.1:9")},
		{"unreachable", net.Dialer{}, dial("tcp", "192.0.2.1:9")},
		{"UDP unreachable", net.Dialer{}, dial("udp", "192.0.2.1:9")},
		{"UDP unreachable over IPv6", net.Dialer{}, dial("udp", "[2001:db8::1]:9")},
		{"TCP unreachable over IPv6", net.Dialer{}, dial("tcp", "[2001:db8::1]:9")},
		{"UDP unreachable from a port", from(&net.UDPAddr{Port: 40004}), dial("udp", "192.0.2.1:9")},
		{"TCP unreachable from a loopback source", from(tcp("127.2.0.1:0")), dial("tcp", "192.0.2.1:9")},
		{"UDP unreachable from a loopback source", from(udp("127.2.0.1:0")), dial("udp", "192.0.2.1:9")},
		{"unknown network", net.Dialer{}, dial("tcp5", "127.1.0.1:7")},
		{"empty address", net.Dialer{}, dial("tcp", "")},
		{"missing port", net.Dialer{}, dial("udp", "127.1.0.1")},
		{"bad port", net.Dialer{}, dial("tcp", "127.1.0.1:65536")},
		{"unknown service", net.Dialer{}, dial("tcp", "127.1.0.1:no-such-service")},
		{"too many colons", net.Dialer{}, dial("tcp", "fd00::1:7")},
		{"IPv6 destination on tcp4", net.Dialer{}, dial("tcp4", "[fd00::1]:7")},
		{"IPv4 destination on udp6", net.Dialer{}, dial("udp6", "127.1.0.1:7")},
		{"mismatched local address type", from(udp("127.2.0.1:0")), dial("tcp", "127.1.0.1:7")},
		{"mismatched local address type for UDP", from(tcp("127.2.0.1:0")), dial("udp", "127.1.0.1:7")},
		{"local address of no IP network", from(&net.UnixAddr{Name: "x", Net: "unix"}), dial("udp", "127.1.0.1:7")},
		{"IPv6 source to an IPv4 destination", from(tcp("[fd00::11]:0")), dial("tcp", "127.1.0.1:7")},
		{"IPv4 source to an IPv6 destination", from(udp("127.2.0.1:0")), dial("udp", "[fd00::1]:7")},
		{"IPv4 source on tcp6", from(tcp("127.2.0.1:0")), dial("tcp6", "[fd00::1]:7")},
		{"IPv4 source to this host", from(tcp("127.2.0.1:0")), dial("tcp", ":7")},
		{"source that is not here", from(tcp("192.0.2.9:0")), dial("tcp", "127.1.0.1:7")},
		{"UDP source that is not here", from(udp("192.0.2.9:0")), dial("udp", "127.1.0.1:7")},
		{"UDP source and port that are not here", from(udp("192.0.2.9:40001")), dial("udp", "127.1.0.1:7")},
		{"UDP source", from(udp("127.2.0.1:0")), dial("udp", "127.1.0.1:7")},
		{"TCP source over IPv6", from(tcp("[fd00::11]:0")), dial("tcp", "[fd00::1]:7")},
		{"nil *net.TCPAddr as the source", from((*net.TCPAddr)(nil)), dial("tcp", "127.1.0.1:9")},
		{"nil *net.UDPAddr as the source", from((*net.UDPAddr)(nil)), dial("udp", "127.1.0.1:7")},
		{"cancelled before", net.Dialer{}, dialContext(cancelled, "tcp", "127.1.0.1:7")},
		{"UDP cancelled before", net.Dialer{}, dialContext(cancelled, "udp", "127.1.0.1:7")},
		{"deadline passed", net.Dialer{}, dialContext(late, "tcp", "127.1.0.1:7")},
		{"UDP with a deadline in the past", net.Dialer{Deadline: time.Now().Add(-time.Second)}, dial("udp", "127.1.0.1:7")},
		{"timeout of a nanosecond", net.Dialer{Timeout: 1}, dial("tcp", "127.1.0.1:7")},
		{"negative timeout", net.Dialer{Timeout: -1}, dial("udp", "127.1.0.1:7")},
		{"hook with an error", net.Dialer{Control: func(string, string, syscall.RawConn) error { return errHook }}, dial("tcp", "127.1.0.1:7")},
		{"hook with an error and a source", net.Dialer{LocalAddr: udp("127.2.0.1:0"), Control: func(string, string, syscall.RawConn) error { return errHook }}, dial("udp", "127.1.0.1:7")},
		{"multicast destination", net.Dialer{}, dial("udp", "239.1.2.3:7")},
		{"broadcast destination", net.Dialer{}, dial("udp", "255.255.255.255:7")},
		{"multipath TCP", multipath(), dial("tcp", "127.1.0.1:7")},
		{"multipath TCP refused", multipath(), dial("tcp", "127.1.0.1:9")},

		{"DialTCP", net.Dialer{}, typed("tcp", "", "127.1.0.1:7")},
		{"DialTCP refused", net.Dialer{}, typed("tcp", "", "127.1.0.1:9")},
		{"DialTCP refused from a source", net.Dialer{}, typed("tcp", "127.2.0.1:0", "127.1.0.1:9")},
		{"DialTCP without a destination", net.Dialer{}, typed("tcp", "127.2.0.1:0", "")},
		{"DialTCP on a UDP network", net.Dialer{}, typed("tcp5", "", "127.1.0.1:7")},
		{"DialTCP on tcp4 to IPv6", net.Dialer{}, typed("tcp4", "", "[fd00::1]:7")},
		{"DialTCP on tcp6 to IPv4", net.Dialer{}, typed("tcp6", "", "127.1.0.1:7")},
		{"DialTCP from IPv4 to IPv6", net.Dialer{}, typed("tcp", "127.2.0.1:0", "[fd00::1]:7")},
		{"DialUDP", net.Dialer{}, typed("udp", "", "[fd00::1]:7")},
		{"DialUDP from a source", net.Dialer{}, typed("udp", "[fd00::11]:0", "[fd00::1]:7")},
		{"DialUDP unreachable", net.Dialer{}, typed("udp", "", "192.0.2.1:7")},
		{"DialUDP from a source that is not here", net.Dialer{}, typed("udp", "192.0.2.9:0", "127.1.0.1:7")},
		{"DialUDP from IPv6 to IPv4", net.Dialer{}, typed("udp", "[fd00::11]:0", "127.1.0.1:7")},
	}
	ownNamespace(t, 40000, 40019)
	for _, network := range []string{"tcp", "udp"} {
		for _, host := range []string{"0.0.0.0", "::"} {
			echo(t, map[string]string{"0.0.0.0": network + "4", "::": network + "6"}[host], host)
		}
	}
	for _, test := range tests {
		inner := test.dialer
		want := verdictOf(test.dial(&inner))
		got := verdictOf(test.dial(&connectx.Dialer{Dialer: test.dialer}))
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: net.Dialer -, connectx.Dialer +\n%s", test.name, diff)
		}
	}
	t.Logf("%d rows", len(tests))
}

// A source port below ip_unprivileged_port_start, without the privilege.
func TestPrivilegedPortIsRefusedAsByNetDialer(t *testing.T) {
	ownNamespace(t, 40000, 40019)
	address := echo(t, "tcp", "127.1.0.1")
	// The privilege is the thread's, and the thread ends with the test.
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		t.Fatal(err)
	}
	data[0].Effective &^= 1 << unix.CAP_NET_BIND_SERVICE
	if err := unix.Capset(&header, &data[0]); err != nil {
		t.Fatal(err)
	}
	for _, network := range []string{"tcp", "udp"} {
		inner := net.Dialer{LocalAddr: localAddr(network, "", 80)}
		want := verdictOf(inner.Dial(network, address))
		got := verdictOf((&connectx.Dialer{Dialer: inner}).Dial(network, address))
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: net.Dialer -, connectx.Dialer +\n%s", network, diff)
		}
		if !strings.Contains(got.Error, "permission denied") {
			t.Errorf("%s: %s", network, got.Error)
		}
	}
}

// "This host" is the one of the source's family. (With net.Dialer it depends on
// how it is written.)
func TestThisHostFromAnIPv6Source(t *testing.T) {
	ownNamespace(t, 40000, 40019)
	for _, network := range []string{"tcp", "udp"} {
		echo(t, network, "::1")
		for _, address := range []string{":7", "[::]:7", "0.0.0.0:7"} {
			d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr(network, "fd00::11", 0)}}
			conn, err := d.Dial(network, address)
			if err != nil {
				t.Errorf("%s to %s: %v", network, address, err)
				continue
			}
			checkEcho(t, conn)
			hangUp(conn)
		}
	}
}

func multipath() net.Dialer {
	var d net.Dialer
	d.SetMultipathTCP(true)
	return d
}

// The caller's hooks see what they see with net.Dialer, once on each socket, and
// before the socket is bound.
func TestControlHooksAreCalledAsByNetDialer(t *testing.T) {
	ownNamespace(t, 40000, 40019)
	type call struct{ Hook, Network, Address, Bound string }
	for _, network := range []string{"tcp", "udp"} {
		for _, host := range []string{"127.1.0.1", "fd00::1"} {
			address := echo(t, network, host)
			for _, both := range []bool{false, true} {
				var calls []call
				record := func(hook, network, address string, c syscall.RawConn) error {
					return c.Control(func(fd uintptr) {
						sa, err := unix.Getsockname(int(fd))
						bound := "?"
						switch sa := sa.(type) {
						case *unix.SockaddrInet4:
							bound = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)).String()
						case *unix.SockaddrInet6:
							bound = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port)).String()
						default:
							t.Error(err)
						}
						calls = append(calls, call{hook, network, address, bound})
					})
				}
				inner := net.Dialer{
					LocalAddr: localAddr(network, map[string]string{"127.1.0.1": "127.2.0.1", "fd00::1": "fd00::11"}[host], 0),
					Control: func(network, address string, c syscall.RawConn) error {
						return record("Control", network, address, c)
					},
				}
				if both {
					inner.ControlContext = func(ctx context.Context, network, address string, c syscall.RawConn) error {
						return record("ControlContext", network, address, c)
					}
				}
				var got [2][]call
				for i, d := range []dialer{&inner, &connectx.Dialer{Dialer: inner}} {
					calls = nil
					conn, err := d.Dial(network, address)
					if err != nil {
						t.Fatal(err)
					}
					hangUp(conn)
					got[i] = calls
				}
				if diff := cmp.Diff(got[0], got[1]); diff != "" {
					t.Errorf("%s to %s: net.Dialer -, connectx.Dialer +\n%s", network, address, diff)
				}
			}
		}
	}
}

// A hook that binds the socket itself keeps what it has bound.
func TestHookThatBinds(t *testing.T) {
	ownNamespace(t, 40000, 40019)
	for _, network := range []string{"tcp", "udp"} {
		address := echo(t, network, "127.1.0.1")
		d := connectx.Dialer{Dialer: net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
			var err error
			c.Control(func(fd uintptr) {
				err = unix.Bind(int(fd), &unix.SockaddrInet4{Port: 40011, Addr: [4]byte{127, 2, 0, 2}})
			})
			return err
		}}}
		conn, err := d.Dial(network, address)
		if err != nil {
			t.Fatal(err)
		}
		checkEcho(t, conn)
		if got := conn.LocalAddr().String(); got != "127.2.0.2:40011" {
			t.Errorf("%s: source %s", network, got)
		}
		hangUp(conn)
	}
}

func TestTraceIsThatOfNetDialer(t *testing.T) {
	ownNamespace(t, 40000, 40019)
	address := echo(t, "tcp", "127.1.0.1")
	var events [2][]string
	for i, d := range []dialer{&net.Dialer{}, &connectx.Dialer{}} {
		var mu sync.Mutex
		add := func(s ...string) {
			mu.Lock()
			defer mu.Unlock()
			events[i] = append(events[i], strings.Join(s, " "))
		}
		ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
			ConnectStart: func(network, addr string) { add("start", network, addr) },
			ConnectDone: func(network, addr string, err error) {
				text := "ok"
				if err != nil {
					text = err.Error()
				}
				add("done", network, addr, text)
			},
		})
		for _, address := range []string{address, "127.1.0.1:9"} {
			if conn, err := d.DialContext(ctx, "tcp", address); err == nil {
				hangUp(conn)
			}
		}
	}
	if diff := cmp.Diff(events[0], events[1]); diff != "" {
		t.Errorf("net.Dialer -, connectx.Dialer +\n%s", diff)
	}
	if !slices.Contains(events[1], "start tcp "+address) {
		t.Errorf("no start in %q", events[1])
	}
}

// A name with addresses of both families, of which one does not answer, leads to
// the other, as Happy Eyeballs has it.
func TestHappyEyeballs(t *testing.T) {
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	port := portOf(listener.Addr())
	d := connectx.Dialer{}
	conn, err := d.Dial("tcp", net.JoinHostPort("localhost", fmt.Sprint(port)))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got := netip.MustParseAddrPort(conn.RemoteAddr().String()).Addr(); got != netip.MustParseAddr("127.0.0.1") {
		t.Errorf("connected to %v", got)
	}
}
