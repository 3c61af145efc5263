//go:build linux

package connectx_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/netns"
)

// Where the only port left is the destination's own, on its own address, a dial
// fails, and is not connected to itself.
func TestNoSelfConnectFromTheLastPort(t *testing.T) {
	const low, high, last = 40000, 40003, 40002
	own := connectx.PortRange{Low: low, High: high}
	for _, network := range []string{"tcp", "udp"} {
		for _, tt := range []struct {
			name   string
			system [2]uint16
			d      connectx.Dialer
		}{
			{"of the system's range", [2]uint16{low, high}, connectx.Dialer{}},
			{"of the system's range, from an address", [2]uint16{low, high}, connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr(network, "127.0.0.1", 0)}}},
			{"of PortRange", [2]uint16{low, high + 100}, connectx.Dialer{PortRange: own}},
			{"of PortRange outside", [2]uint16{42000, 42003}, connectx.Dialer{PortRange: own}},
			{"of PortRange outside, from an address", [2]uint16{42000, 42003}, connectx.Dialer{PortRange: own, Dialer: net.Dialer{LocalAddr: localAddr(network, "127.0.0.1", 0)}}},
		} {
			t.Run(network+" "+tt.name, func(t *testing.T) {
				ownNamespace(t, tt.system[0], tt.system[1])
				for port := uint16(low); port <= high; port++ {
					if port != last {
						holdAlone(t, network, fmt.Sprintf("127.0.0.1:%d", port))
					}
				}
				conn, err := tt.d.Dial(network, fmt.Sprintf("127.0.0.1:%d", last))
				if err == nil {
					conn.Close()
					t.Fatalf("connected from %v to %v", conn.LocalAddr(), conn.RemoteAddr())
				}
				checkExhausted(t, err)
			})
		}
	}
}

// holdAlone keeps a port that nobody can share, until the test ends.
func holdAlone(t *testing.T, network, address string) {
	t.Helper()
	if network == "udp" {
		conn, err := net.ListenPacket(network, address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return
	}
	listener, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
}

// A TCP dial from a port that a socket listens on says that it is not shared.
func TestTCPPortOfAListener(t *testing.T) {
	ownNamespace(t, 40000, 40009)
	holdAlone(t, "tcp", "127.2.0.1:40005")
	d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr("tcp", "127.2.0.1", 40005)}}
	conn, err := d.Dial("tcp", echo(t, "tcp", "127.1.0.1"))
	if !errors.Is(err, unix.EADDRINUSE) {
		t.Fatalf("dial: %v, %v", conn, err)
	}
}

// A dial that goes on to the next port does not take a 4-tuple that exists,
// although what was in the way on the first was of another kind.
func TestContentionForOnePortDoesNotOvershadowTheNext(t *testing.T) {
	ownNamespace(t, 40000, 40001)
	address := echo(t, "udp", "127.1.0.1")
	plain := net.Dialer{LocalAddr: localAddr("udp", "127.2.0.1", 40000)}
	first, err := plain.Dial("udp", echo(t, "udp", "127.1.0.2"))
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	second := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr("udp", "127.2.0.1", 40001)}}
	conn, err := second.Dial("udp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr("udp", "127.2.0.1", 0)}}
	for range 10 {
		conn, err := d.Dial("udp", address)
		if err == nil {
			t.Fatalf("a second connection on %v", conn.LocalAddr())
		}
		checkExhausted(t, err)
	}
}

// Where a hook has bound the socket, no port is locked and nothing is drained. Even
// so what strangers have sent meanwhile is not read, and what the peer has sent is.
func TestStrangersOfASocketThatAHookHasBound(t *testing.T) {
	ownNamespace(t, 40000, 40019)
	listen := func(host string) net.PacketConn {
		conn, err := net.ListenPacket("udp", host+":7")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	peer, stranger := listen("127.1.0.1"), listen("127.1.0.2")
	local := &net.UDPAddr{IP: net.IPv4(127, 2, 0, 1), Port: 40005}
	d := connectx.Dialer{Dialer: net.Dialer{Control: onSocket(func(fd int) error {
		if err := unix.Bind(fd, sockaddr("127.2.0.1", 40005)); err != nil {
			return err
		}
		for _, sender := range []struct {
			net.PacketConn
			message string
		}{{stranger, "a stranger"}, {stranger, "a stranger"}, {peer, "the peer"}} {
			if _, err := sender.WriteTo([]byte(sender.message), local); err != nil {
				return err
			}
		}
		return nil
	})}}
	conn, err := d.Dial("udp", peer.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	b := make([]byte, 16)
	if n, err := conn.Read(b); string(b[:n]) != "the peer" {
		t.Errorf("read %q, %v, want what the peer has sent", b[:n], err)
	}
}

// What is known of a full range is known of one destination only, and not for long.
func TestFullRangeIsForgotten(t *testing.T) {
	// What is remembered of the large range, for a few milliseconds, and for
	// maxRemember after that, must be over by then.
	const over = 200 * time.Millisecond
	for _, network := range []string{"tcp", "udp"} {
		t.Run(network, func(t *testing.T) {
			ownNamespace(t, largeLow, largeHigh)
			a, b := echo(t, network, "127.1.0.1"), echo(t, network, "127.1.0.2")
			d := &connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr(network, "127.2.0.1", 0)}}
			toA, toB := fillUp(t, d, network, a), fillUp(t, d, network, b)
			for i := range 4 {
				hangUp(toB[i])
				time.Sleep(over)
				_, err := d.Dial(network, a)
				checkExhausted(t, err)
				conn, err := d.Dial(network, b)
				if err != nil {
					t.Fatalf("the one free port towards %s: %v", b, err)
				}
				toB[i] = conn
				_, err = d.Dial(network, a)
				checkExhausted(t, err)
				hangUp(toA[i])
				time.Sleep(over)
				if conn, err = d.Dial(network, a); err != nil {
					t.Fatalf("the one free port towards %s, a while later: %v", a, err)
				}
				toA[i] = conn
			}
		})
	}
}

// Where the kernel is asked for a port that nobody is on, it chooses from its own
// range if that no longer has PortRange in it. Such a port is not taken.
func TestPortRangeWhenTheSystemsChangesAndFewPortsAreFree(t *testing.T) {
	const low, high, free = 41000, 42999, 42001
	ownNamespace(t, 40000, high)
	address := echo(t, "udp", "127.1.0.1")
	for port := uint16(low); port <= high; port++ {
		if port == free {
			continue
		}
		d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr("udp", "127.2.0.1", port)}}
		conn, err := d.Dial("udp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr("udp", "127.2.0.1", 0)}}
	for range 5 {
		if err := netns.SetPortRange(40000, high); err != nil {
			t.Fatal(err)
		}
		// When all ports are taken, the system's range is read again.
		d.PortRange = connectx.PortRange{Low: low, High: low}
		_, err := d.Dial("udp", address)
		checkExhausted(t, err)
		if err := netns.SetPortRange(40000, 40999); err != nil {
			t.Fatal(err)
		}
		d.PortRange = connectx.PortRange{Low: low, High: high}
		conn, err := d.Dial("udp", address)
		if err != nil {
			t.Fatal(err)
		}
		if port := portOf(conn.LocalAddr()); port != free {
			t.Fatalf("port %d, want %d", port, free)
		}
		conn.Close()
	}
}

// A socket that takes another's place is like one that net.Dialer makes and the
// caller's hook has seen, and nothing is left of the other.
func TestSocketThatTakesAnothersPlace(t *testing.T) {
	hook := setSocketOption(unix.SOL_SOCKET, unix.SO_PRIORITY, 1)
	for _, family := range families {
		for _, network := range []string{"tcp", "udp"} {
			t.Run(network+" over "+family.name, func(t *testing.T) {
				ownNamespace(t, 40000, 40003)
				address := echo(t, network, family.hosts[0])
				full, other := netip.MustParseAddr(family.source), netip.MustParseAddr(family.source2)
				bound := net.Dialer{LocalAddr: localAddr(network, family.source2, 0), Control: hook}
				plain, err := bound.Dial(network, address)
				if err != nil {
					t.Fatal(err)
				}
				want := whatASocketIsLike(t, plain.(syscall.Conn))
				hangUp(plain)
				fillUp(t, &connectx.Dialer{SourceAddrs: []netip.Addr{full}}, network, address)

				before := len(descriptors(t))
				d := connectx.Dialer{Dialer: net.Dialer{Control: hook}, SourceAddrs: []netip.Addr{full, other}}
				for range 20 { // half of the dials begin with the one that is full
					conn, err := d.Dial(network, address)
					if err != nil {
						t.Fatal(err)
					}
					if diff := cmp.Diff(want, whatASocketIsLike(t, conn.(syscall.Conn))); diff != "" {
						t.Fatalf("(-net.Dialer +connectx, from %v):\n%s", conn.LocalAddr(), diff)
					}
					hangUp(conn)
				}
				// Of TCP, the server has connections of its own.
				if after := len(descriptors(t)); network == "udp" && after > before {
					t.Errorf("%d descriptors before, %d after", before, after)
				}
			})
		}
	}
}

// whatASocketIsLike is what package net and the hook have set on it.
func whatASocketIsLike(t *testing.T, conn syscall.Conn) map[string]int {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	found := make(map[string]int)
	err = raw.Control(func(fd uintptr) {
		for name, option := range map[string][2]int{
			"SO_BROADCAST": {unix.SOL_SOCKET, unix.SO_BROADCAST},
			"SO_KEEPALIVE": {unix.SOL_SOCKET, unix.SO_KEEPALIVE},
			"SO_PRIORITY":  {unix.SOL_SOCKET, unix.SO_PRIORITY},
			"SO_PROTOCOL":  {unix.SOL_SOCKET, unix.SO_PROTOCOL},
			"TCP_NODELAY":  {unix.SOL_TCP, unix.TCP_NODELAY},
			"IPV6_V6ONLY":  {unix.SOL_IPV6, unix.IPV6_V6ONLY},
		} {
			if value, err := unix.GetsockoptInt(int(fd), option[0], option[1]); err == nil {
				found[name] = value
			}
		}
		found["FD_CLOEXEC"], _ = unix.FcntlInt(fd, unix.F_GETFD, 0)
		found["status"], _ = unix.FcntlInt(fd, unix.F_GETFL, 0)
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}
