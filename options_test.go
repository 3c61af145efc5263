//go:build linux

package connectx_test

import (
	"errors"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
)

// onSocket returns a Control hook that does something to the descriptor.
func onSocket(f func(fd int) error) func(network, address string, c syscall.RawConn) error {
	return func(network, address string, c syscall.RawConn) error {
		var err error
		if ctlErr := c.Control(func(fd uintptr) { err = f(int(fd)) }); ctlErr != nil {
			return ctlErr
		}
		return err
	}
}

// setSocketOption returns a Control hook that sets a socket option to a number.
func setSocketOption(level, option, value int) func(network, address string, c syscall.RawConn) error {
	return onSocket(func(fd int) error { return unix.SetsockoptInt(fd, level, option, value) })
}

// twoUplinks gives the namespace two ways out, each with a source address of
// its own; the first is the default, the second that of mark 7.
func twoUplinks(t *testing.T) (second netlink.Link) {
	t.Helper()
	links := []netlink.Link{
		addLink(t, "uplink1", "10.1.0.1/24", "fd01::1/64"),
		addLink(t, "uplink2", "10.2.0.1/24", "fd02::1/64"),
	}
	for i, link := range links {
		for _, dst := range []string{"0.0.0.0/0", "::/0"} {
			_, all, err := net.ParseCIDR(dst)
			if err != nil {
				t.Fatal(err)
			}
			route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: all, Priority: 100 * (i + 1)}
			if err := netlink.RouteAdd(route); err != nil {
				t.Fatal(err)
			}
			if i == 0 {
				continue
			}
			route = &netlink.Route{LinkIndex: link.Attrs().Index, Dst: all, Table: 77}
			if err := netlink.RouteAdd(route); err != nil {
				t.Fatal(err)
			}
			rule := netlink.NewRule()
			rule.Mark, rule.Table, rule.Family = 7, 77, unix.AF_INET
			if dst == "::/0" {
				rule.Family = unix.AF_INET6
			}
			if err := netlink.RuleAdd(rule); err != nil {
				t.Fatal(err)
			}
		}
	}
	return links[1]
}

// The source address follows the options that the caller's hook sets, as it
// does with net.Dialer.
func TestOptionsThatRoutingDependsOn(t *testing.T) {
	ownNamespace(t, 40000, 40019)
	second := twoUplinks(t)
	index := second.Attrs().Index
	networkOrder := int(int32(uint32(index)<<24 | uint32(index)>>24&0xff)) // of a small number

	tests := []struct {
		name    string
		control func(network, address string, c syscall.RawConn) error
		local   string
		v4, v6  string
	}{
		{"no option", setSocketOption(unix.SOL_SOCKET, unix.SO_PRIORITY, 1), "", "10.1.0.1", "fd01::1"},
		{"SO_MARK", setSocketOption(unix.SOL_SOCKET, unix.SO_MARK, 7), "", "10.2.0.1", "fd02::1"},
		{"SO_MARK with a source port", setSocketOption(unix.SOL_SOCKET, unix.SO_MARK, 7), ":40007", "10.2.0.1", "fd02::1"},
		{"SO_BINDTODEVICE", onSocket(func(fd int) error { return unix.BindToDevice(fd, "uplink2") }), "", "10.2.0.1", "fd02::1"},
		{"SO_BINDTODEVICE with a source port", onSocket(func(fd int) error { return unix.BindToDevice(fd, "uplink2") }), ":40008", "10.2.0.1", "fd02::1"},
		{"IP_UNICAST_IF", onSocket(func(fd int) error {
			if err := unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_UNICAST_IF, networkOrder); err == nil {
				return nil
			}
			return unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_UNICAST_IF, networkOrder)
		}), "", "10.2.0.1", "fd02::1"},
		// Over IPv4 the kernel does not connect from an address that is not
		// here unless the socket is transparent.
		{"IPV6_FREEBIND", setSocketOption(unix.SOL_IPV6, unix.IPV6_FREEBIND, 1), "foreign", "", "fd99::9"},
		{"IP_TRANSPARENT", onSocket(func(fd int) error {
			_ = unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
			return unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1)
		}), "foreign", "10.9.9.9", "fd99::9"},
	}
	for _, test := range tests {
		for _, address := range []string{"192.0.2.1:9", "[2001:db8::1]:9"} {
			want := test.v4
			if address[0] == '[' {
				want = test.v6
			}
			if want == "" {
				continue
			}
			inner := net.Dialer{Control: test.control}
			switch test.local {
			case "foreign":
				inner.LocalAddr = localAddr("udp", want, 0)
			case "":
			default:
				inner.LocalAddr = &net.UDPAddr{Port: int(netip.MustParseAddrPort("0.0.0.0" + test.local).Port())}
			}
			for _, d := range []dialer{&inner, &connectx.Dialer{Dialer: inner}} {
				conn, err := d.Dial("udp", address)
				if err != nil {
					t.Errorf("%s: %T to %s: %v", test.name, d, address, err)
					continue
				}
				if got := netip.MustParseAddrPort(conn.LocalAddr().String()).Addr(); got != netip.MustParseAddr(want) {
					t.Errorf("%s: %T to %s has source %v, want %s", test.name, d, address, got, want)
				}
				conn.Close()
			}
		}
	}
}

// A 4-tuple is shared by nobody, whatever the sockets on it are bound to and
// whatever the caller's hook has set.
func TestOptionsDoNotDefeatTheLock(t *testing.T) {
	none := setSocketOption(unix.SOL_SOCKET, unix.SO_PRIORITY, 1)
	device := onSocket(func(fd int) error { return unix.BindToDevice(fd, "lo") })
	tests := []struct {
		name          string
		first, second func(network, address string, c syscall.RawConn) error
	}{
		{"no option", none, none},
		{"a socket bound to the device comes second", none, device},
		{"a socket bound to the device comes first", device, none},
		{"both are bound to the device", device, device},
		{"SO_REUSEPORT", setSocketOption(unix.SOL_SOCKET, unix.SO_REUSEPORT, 1), setSocketOption(unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)},
		{"SO_REUSEADDR", setSocketOption(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), setSocketOption(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)},
	}
	for _, test := range tests {
		for _, family := range families {
			for _, source := range []string{"", family.source} {
				t.Run(test.name+" over "+family.name+" from "+source, func(t *testing.T) {
					ownNamespace(t, 40000, 40019)
					address := echo(t, "udp", family.hosts[0])
					d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr("udp", source, 40005), Control: test.first}}
					first, err := d.Dial("udp", address)
					if err != nil {
						t.Fatal(err)
					}
					defer first.Close()
					d.Control = test.second
					if second, err := d.Dial("udp", address); !errors.Is(err, unix.EADDRINUSE) {
						t.Errorf("a second socket on the 4-tuple: %v, %v", second, err)
					}
					checkEcho(t, first)

					// To another destination the port is free to be shared.
					other, err := d.Dial("udp", echo(t, "udp", family.hosts[1]))
					if err != nil {
						t.Fatal(err)
					}
					defer other.Close()
					checkEcho(t, other)
					checkEcho(t, first)
				})
			}
		}
	}
}

// The kernel's lookup prefers a socket that has the number of the processor which
// looks. Two dials that hold the lock together would each find themselves.
func TestIncomingCPUDoesNotDefeatTheLock(t *testing.T) {
	ownNamespace(t, 40000, 40019)
	if runtime.NumCPU() < 2 {
		t.Skip("needs two processors")
	}
	done := make(chan struct{})
	go func() { // in the namespace of the process, where the goroutines are
		defer close(done)
		address := echo(t, "udp", "127.3.0.1")
		other := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr("udp", "127.2.0.1", 40005)}}
		conn, err := other.Dial("udp", echo(t, "udp", "127.3.0.2"))
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close() // the port is shared
		won := 0
		for range 1500 {
			var conns [2]net.Conn
			var wg sync.WaitGroup
			for cpu := range conns {
				wg.Go(func() {
					runtime.LockOSThread() // for good: the thread has one processor
					var set unix.CPUSet
					set.Set(cpu)
					_ = unix.SchedSetaffinity(0, &set) // not this test's if it has others
					d := connectx.Dialer{Dialer: net.Dialer{
						LocalAddr: localAddr("udp", "127.2.0.1", 40005),
						Control:   setSocketOption(unix.SOL_SOCKET, unix.SO_INCOMING_CPU, cpu),
					}}
					var err error
					if conns[cpu], err = d.Dial("udp", address); err != nil && !errors.Is(err, unix.EADDRINUSE) {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			switch {
			case conns[0] != nil && conns[1] != nil:
				t.Errorf("two sockets on %v->%s", conns[0].LocalAddr(), address)
			case conns[0] != nil || conns[1] != nil:
				won++
			}
			for _, conn := range conns {
				if conn != nil {
					conn.Close()
				}
			}
		}
		if won == 0 {
			t.Error("no dial has succeeded")
		}
	}()
	<-done
}
