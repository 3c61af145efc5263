//go:build linux

package connectx_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/netns"
)

var (
	_ net.Conn       = (*connectx.PacketConn)(nil)
	_ net.PacketConn = (*connectx.PacketConn)(nil)

	// What quic-go calls an OOBCapablePacketConn.
	_ interface {
		net.PacketConn
		SyscallConn() (syscall.RawConn, error)
		SetReadBuffer(int) error
		ReadMsgUDP(b, oob []byte) (n, oobn, flags int, addr *net.UDPAddr, err error)
		WriteMsgUDP(b, oob []byte, addr *net.UDPAddr) (n, oobn int, err error)
	} = (*connectx.PacketConn)(nil)
)

// Where the peer of a PacketConn may live. The zone is of an interface that
// packetNamespace adds, with the index 77.
var packetHosts = []struct{ name, host string }{
	{"IPv4", "127.1.0.1"},
	{"IPv6", "fd00::1"},
	{"link-local IPv6", "fe80::1%zone0"},
}

func packetNamespace(t testing.TB, host string) {
	t.Helper()
	ownNamespace(t, 40000, 40019)
	if !strings.Contains(host, "%") {
		return
	}
	pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "zone0", Index: 77}, PeerName: "zone1"}
	if err := netlink.LinkAdd(pair); err != nil {
		t.Skipf("needs a veth interface: %v", err)
	}
	for _, name := range []string{"zone0", "zone1"} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkSetUp(link); err != nil {
			t.Fatal(err)
		}
		if name == "zone1" {
			break
		}
		for _, address := range []string{"fe80::1/64", "fe80::2/64"} {
			if err := netns.AddAddress(link, address); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func dialPacket(t testing.TB, address string) *connectx.PacketConn {
	t.Helper()
	var d connectx.Dialer
	conn, err := d.DialPacket(t.Context(), "udp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(time.Minute)) // better than to hang
	return conn
}

// listenUDP returns a plain socket that answers nothing.
func listenUDP(t testing.TB, address string) *net.UDPConn {
	t.Helper()
	conn, err := net.ListenPacket("udp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(time.Minute))
	return conn.(*net.UDPConn)
}

// A udpConn is what the methods under test have in common with *net.UDPConn.
type udpConn interface {
	net.Conn
	ReadFrom(b []byte) (int, net.Addr, error)
	ReadFromUDP(b []byte) (int, *net.UDPAddr, error)
	ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error)
	ReadMsgUDP(b, oob []byte) (n, oobn, flags int, addr *net.UDPAddr, err error)
	ReadMsgUDPAddrPort(b, oob []byte) (n, oobn, flags int, addr netip.AddrPort, err error)
	WriteTo(b []byte, addr net.Addr) (int, error)
	WriteToUDP(b []byte, addr *net.UDPAddr) (int, error)
	WriteToUDPAddrPort(b []byte, addr netip.AddrPort) (int, error)
	WriteMsgUDP(b, oob []byte, addr *net.UDPAddr) (n, oobn int, err error)
	WriteMsgUDPAddrPort(b, oob []byte, addr netip.AddrPort) (n, oobn int, err error)
}

// packetReads are the reading methods. They report the source, except for Read.
var packetReads = []struct {
	name string
	read func(c udpConn, b []byte) (int, fmt.Stringer, error)
}{
	{"Read", func(c udpConn, b []byte) (int, fmt.Stringer, error) {
		n, err := c.Read(b)
		return n, c.RemoteAddr(), err
	}},
	{"ReadFrom", func(c udpConn, b []byte) (int, fmt.Stringer, error) { return c.ReadFrom(b) }},
	{"ReadFromUDP", func(c udpConn, b []byte) (int, fmt.Stringer, error) { return c.ReadFromUDP(b) }},
	{"ReadFromUDPAddrPort", func(c udpConn, b []byte) (int, fmt.Stringer, error) { return c.ReadFromUDPAddrPort(b) }},
	{"ReadMsgUDP", func(c udpConn, b []byte) (int, fmt.Stringer, error) {
		n, _, _, addr, err := c.ReadMsgUDP(b, nil)
		return n, addr, err
	}},
	{"ReadMsgUDPAddrPort", func(c udpConn, b []byte) (int, fmt.Stringer, error) {
		n, _, _, addr, err := c.ReadMsgUDPAddrPort(b, nil)
		return n, addr, err
	}},
}

// packetWrites are the writing methods that take an address.
var packetWrites = []struct {
	name  string
	write func(c udpConn, b []byte, addr *net.UDPAddr) (int, error)
}{
	{"WriteTo", func(c udpConn, b []byte, addr *net.UDPAddr) (int, error) { return c.WriteTo(b, addr) }},
	{"WriteToUDP", func(c udpConn, b []byte, addr *net.UDPAddr) (int, error) { return c.WriteToUDP(b, addr) }},
	{"WriteToUDPAddrPort", func(c udpConn, b []byte, addr *net.UDPAddr) (int, error) {
		return c.WriteToUDPAddrPort(b, addr.AddrPort())
	}},
	{"WriteMsgUDP", func(c udpConn, b []byte, addr *net.UDPAddr) (int, error) {
		n, _, err := c.WriteMsgUDP(b, nil, addr)
		return n, err
	}},
	{"WriteMsgUDPAddrPort", func(c udpConn, b []byte, addr *net.UDPAddr) (int, error) {
		n, _, err := c.WriteMsgUDPAddrPort(b, nil, addr.AddrPort())
		return n, err
	}},
}

func TestPacketConnEveryMethodTalksToThePeer(t *testing.T) {
	for _, host := range packetHosts {
		t.Run(host.name, func(t *testing.T) {
			packetNamespace(t, host.host)
			address := echo(t, "udp", host.host)
			conn := dialPacket(t, address)
			if got := conn.RemoteAddr().String(); got != address {
				t.Fatalf("RemoteAddr is %s, want %s", got, address)
			}
			if port := portOf(conn.LocalAddr()); port < 40000 || port > 40019 {
				t.Errorf("LocalAddr is %v, outside of the port range", conn.LocalAddr())
			}
			checkEcho(t, conn)
			peer := conn.RemoteAddr().(*net.UDPAddr)
			for _, w := range packetWrites {
				for _, r := range packetReads {
					want := []byte(w.name + " and " + r.name)
					if n, err := w.write(conn, want, peer); n != len(want) || err != nil {
						t.Fatalf("%s: %d, %v", w.name, n, err)
					}
					b := make([]byte, 100)
					n, source, err := r.read(conn, b)
					if err != nil || !bytes.Equal(b[:n], want) || source.String() != address {
						t.Errorf("%s: %q from %v, %v; want %q from %s", r.name, b[:n], source, err, want, address)
					}
				}
			}
		})
	}
}

func TestPacketConnsShareThePorts(t *testing.T) {
	ownNamespace(t, 40000, 40003)
	for _, host := range []string{"127.1.0.1", "127.1.0.2"} {
		address := echo(t, "udp", host)
		for range 4 {
			checkEcho(t, dialPacket(t, address))
		}
		var d connectx.Dialer
		conn, err := d.DialPacket(t.Context(), "udp", address)
		if conn != nil || !errors.Is(err, connectx.ErrPortsExhausted) {
			t.Errorf("fifth connection to %s: %v, %v", address, conn, err)
		}
	}
}

func TestPacketConnFormsOfThePeerAddress(t *testing.T) {
	mapped := netip.MustParseAddr("::ffff:127.1.0.1")
	linkLocal := net.ParseIP("fe80::1")
	tests := []struct {
		name, host string
		addr       *net.UDPAddr
		rename     string // what the interface is called by then
	}{
		{"IPv4 in 4 bytes", "127.1.0.1", &net.UDPAddr{IP: net.IPv4(127, 1, 0, 1).To4(), Port: echoPort}, ""},
		{"IPv4-mapped in 16 bytes", "127.1.0.1", &net.UDPAddr{IP: net.IPv4(127, 1, 0, 1), Port: echoPort}, ""},
		{"IPv4-mapped with a zone that means nothing", "127.1.0.1", net.UDPAddrFromAddrPort(netip.AddrPortFrom(mapped.WithZone("lo"), echoPort)), ""},
		{"IPv4-mapped when dialled", "::ffff:127.1.0.1", &net.UDPAddr{IP: net.IPv4(127, 1, 0, 1).To4(), Port: echoPort}, ""},
		{"IPv6", "fd00::1", &net.UDPAddr{IP: net.ParseIP("fd00::1"), Port: echoPort}, ""},
		{"IPv6 with a zone that means nothing", "fd00::1", &net.UDPAddr{IP: net.ParseIP("fd00::1"), Port: echoPort, Zone: "lo"}, ""},
		{"link-local with the name of the zone", "fe80::1%zone0", &net.UDPAddr{IP: linkLocal, Port: echoPort, Zone: "zone0"}, ""},
		{"link-local with the index of the zone", "fe80::1%zone0", &net.UDPAddr{IP: linkLocal, Port: echoPort, Zone: "77"}, ""},
		{"link-local dialled with the index of the zone", "fe80::1%77", &net.UDPAddr{IP: linkLocal, Port: echoPort, Zone: "77"}, ""},
		{"link-local with the new name of the interface", "fe80::1%zone0", &net.UDPAddr{IP: linkLocal, Port: echoPort, Zone: "renamed0"}, "renamed0"},
		{"link-local with the old name of the interface", "fe80::1%zone0", &net.UDPAddr{IP: linkLocal, Port: echoPort, Zone: "zone0"}, "renamed0"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			packetNamespace(t, test.host)
			conn := dialPacket(t, echo(t, "udp", test.host))
			if test.rename != "" {
				link, err := netlink.LinkByName("zone0")
				if err != nil {
					t.Fatal(err)
				}
				if err := netlink.LinkSetName(link, test.rename); err != nil {
					t.Skipf("needs to rename an interface that is up: %v", err)
				}
			}
			for _, w := range packetWrites {
				if _, err := w.write(conn, []byte(w.name), test.addr); err != nil {
					t.Fatalf("%s: %v", w.name, err)
				}
				b := make([]byte, 100)
				if n, err := conn.Read(b); err != nil || string(b[:n]) != w.name {
					t.Errorf("%s: %q, %v", w.name, b[:n], err)
				}
			}
		})
	}
}

// As on a connected *net.UDPConn, no address stands for the peer.
func TestPacketConnMessagesNeedNoAddress(t *testing.T) {
	ownNamespace(t, 40000, 40019)
	server := listenUDP(t, "127.1.0.1:7")
	conn := dialPacket(t, "127.1.0.1:7")
	if _, _, err := conn.WriteMsgUDP([]byte("nil"), nil, nil); err != nil {
		t.Fatal(err)
	}
	if _, _, err := conn.WriteMsgUDPAddrPort([]byte("zero"), nil, netip.AddrPort{}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"nil", "zero"} {
		checkNextDatagram(t, server, want)
	}
}

func checkNextDatagram(t testing.TB, conn *net.UDPConn, want string) {
	t.Helper()
	b := make([]byte, 2048)
	n, err := conn.Read(b)
	if err != nil || string(b[:n]) != want {
		t.Errorf("%v got %q, %v, want %q", conn.LocalAddr(), b[:n], err, want)
	}
}

// Whatever is not the peer is refused by name, and nobody gets a datagram.
func TestPacketConnRefusesOtherAddresses(t *testing.T) {
	others := []struct{ name, peer, other string }{
		{"another IPv4 address", "127.1.0.1:7", "127.1.0.2:7"},
		{"another port", "127.1.0.1:7", "127.1.0.1:8"},
		{"an IPv6 address that ends like the peer's IPv4 address", "127.1.0.1:7", "[::7f01:1]:7"},
		{"another IPv6 address", "[fd00::1]:7", "[fd00::2]:7"},
		{"an IPv4 address for an IPv6 peer", "[fd00::1]:7", "127.1.0.1:7"},
		{"another link-local address", "[fe80::1%zone0]:7", "[fe80::2%zone0]:7"},
		{"the link-local address in another zone", "[fe80::1%zone0]:7", "[fe80::1%zone1]:7"},
		{"the link-local address in a zone that does not exist", "[fe80::1%zone0]:7", "[fe80::1%zone9]:7"},
		{"the link-local address without a zone", "[fe80::1%zone0]:7", "[fe80::1]:7"},
	}
	for _, test := range others {
		t.Run(test.name, func(t *testing.T) {
			packetNamespace(t, test.peer)
			peer := listenUDP(t, test.peer)
			conn := dialPacket(t, test.peer)
			addr := net.UDPAddrFromAddrPort(netip.MustParseAddrPort(test.other))

			// Where there can be a socket on the other address, it must not
			// get anything before what is sent to it afterwards.
			other, err := net.ListenPacket("udp", test.other)
			if err == nil {
				defer other.Close()
				other.SetDeadline(time.Now().Add(time.Minute))
			}
			for _, w := range packetWrites {
				n, err := w.write(conn, []byte("stray"), addr)
				if n != 0 || !errors.Is(err, net.ErrWriteToConnected) {
					t.Fatalf("%s: %d, %v", w.name, n, err)
				}
				want := fmt.Sprintf("write udp %v->%s: the socket sends to %s only", conn.LocalAddr(), test.other, test.peer)
				if diff := cmp.Diff(want, err.Error()); diff != "" {
					t.Errorf("%s (-want +got):\n%s", w.name, diff)
				}
				var op *net.OpError
				if !errors.As(err, &op) || op.Timeout() || op.Addr.String() != test.other || op.Source != conn.LocalAddr() {
					t.Errorf("%s: %#v", w.name, err)
				}
			}
			if _, err := conn.Write([]byte("end")); err != nil {
				t.Fatal(err)
			}
			checkNextDatagram(t, peer, "end")
			if other != nil {
				if _, err := listenUDP(t, net.JoinHostPort(netip.MustParseAddrPort(test.other).Addr().String(), "0")).WriteTo([]byte("end"), addr); err != nil {
					t.Fatal(err)
				}
				checkNextDatagram(t, other.(*net.UDPConn), "end")
			}
		})
	}

	t.Run("what is no UDP address", func(t *testing.T) {
		ownNamespace(t, 40000, 40019)
		conn := dialPacket(t, "127.1.0.1:7")
		local, only := conn.LocalAddr().String(), ": the socket sends to 127.1.0.1:7 only"
		tests := []struct {
			name  string
			write func() (int, error)
			err   error
			want  string
		}{
			{"WriteTo nil", func() (int, error) { return conn.WriteTo(nil, nil) }, unix.EINVAL, local + only},
			{"WriteTo a nil *net.UDPAddr", func() (int, error) { return conn.WriteTo(nil, (*net.UDPAddr)(nil)) }, net.ErrWriteToConnected, local + only},
			{"WriteToUDP nil", func() (int, error) { return conn.WriteToUDP(nil, nil) }, net.ErrWriteToConnected, local + only},
			{"WriteTo a TCP address", func() (int, error) {
				return conn.WriteTo(nil, &net.TCPAddr{IP: net.IPv4(127, 1, 0, 1), Port: 8})
			}, unix.EINVAL, local + "->127.1.0.1:8" + only},
			{"WriteToUDP an address without IP", func() (int, error) { return conn.WriteToUDP(nil, &net.UDPAddr{Port: 7}) }, net.ErrWriteToConnected, local + "->:7" + only},
			{"WriteToUDP a port that is the peer's in its low bits", func() (int, error) {
				return conn.WriteToUDP(nil, &net.UDPAddr{IP: net.IPv4(127, 1, 0, 1), Port: 0x10007})
			}, net.ErrWriteToConnected, local + "->127.1.0.1:65543" + only},
			{"WriteToUDPAddrPort the zero value", func() (int, error) { return conn.WriteToUDPAddrPort(nil, netip.AddrPort{}) }, net.ErrWriteToConnected, local + "->:0" + only},
		}
		for _, test := range tests {
			n, err := test.write()
			if n != 0 || !errors.Is(err, test.err) {
				t.Fatalf("%s: %d, %v", test.name, n, err)
			}
			if diff := cmp.Diff("write udp "+test.want, err.Error()); diff != "" {
				t.Errorf("%s (-want +got):\n%s", test.name, diff)
			}
		}
	})
}

func TestPacketConnDeadlines(t *testing.T) {
	ownNamespace(t, 40000, 40019)
	conn := dialPacket(t, echo(t, "udp", "127.1.0.1"))
	peer := conn.RemoteAddr().(*net.UDPAddr)
	past := time.Unix(1, 0)
	b := make([]byte, 100)

	checkReads := func(what string) {
		t.Helper()
		for _, r := range packetReads {
			if n, _, err := r.read(conn, b); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s: %s: %d, %v", what, r.name, n, err)
			}
		}
	}
	checkWrites := func(what string) {
		t.Helper()
		for _, w := range packetWrites {
			if n, err := w.write(conn, b, peer); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s: %s: %d, %v", what, w.name, n, err)
			}
		}
	}
	conn.SetReadDeadline(past)
	checkReads("SetReadDeadline")
	if _, err := conn.WriteTo(b, peer); err != nil {
		t.Errorf("write with a read deadline: %v", err)
	}
	conn.SetReadDeadline(time.Time{})
	if n, err := conn.Read(b); n != len(b) || err != nil {
		t.Errorf("read without deadline: %d, %v", n, err)
	}
	conn.SetWriteDeadline(past)
	checkWrites("SetWriteDeadline")
	conn.SetDeadline(past)
	checkReads("SetDeadline")
	checkWrites("SetDeadline")
	conn.SetDeadline(time.Time{})
	checkEcho(t, conn)

	conn.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	checkReads("a deadline in the future")
}

func TestPacketConnCloseEndsReads(t *testing.T) {
	for _, r := range packetReads {
		t.Run(r.name, func(t *testing.T) {
			ownNamespace(t, 40000, 40019)
			conn := dialPacket(t, echo(t, "udp", "127.1.0.1"))
			done := make(chan error, 1)
			go packetBlockedRead(r.read, conn, done)
			waitFor(t, "the reader waits", func() bool {
				b := make([]byte, 1<<20)
				for _, stack := range strings.Split(string(b[:runtime.Stack(b, true)]), "\n\n") {
					if strings.Contains(stack, "packetBlockedRead(") && strings.Contains(stack, "[IO wait") {
						return true
					}
				}
				return false
			})
			if err := conn.Close(); err != nil {
				t.Fatal(err)
			}
			if err := <-done; !errors.Is(err, net.ErrClosed) {
				t.Errorf("the reader got %v", err)
			}
			for _, w := range packetWrites {
				if _, err := w.write(conn, nil, conn.RemoteAddr().(*net.UDPAddr)); !errors.Is(err, net.ErrClosed) {
					t.Errorf("%s afterwards: %v", w.name, err)
				}
			}
			if err := conn.Close(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("second Close: %v", err)
			}
		})
	}
}

// packetBlockedRead has a name by which to find it among all goroutines.
//
//go:noinline
func packetBlockedRead(read func(c udpConn, b []byte) (int, fmt.Stringer, error), conn udpConn, done chan<- error) {
	_, _, err := read(conn, make([]byte, 100))
	done <- err
}

func TestPacketConnDescriptor(t *testing.T) {
	ownNamespace(t, 40000, 40019)
	conn := dialPacket(t, echo(t, "udp", "127.1.0.1"))
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	option := func(option int) int {
		t.Helper()
		value := -1
		if ctlErr := raw.Control(func(fd uintptr) { value, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, option) }); ctlErr != nil || err != nil {
			t.Fatal(ctlErr, err)
		}
		return value
	}
	if got := option(unix.SO_TYPE); got != unix.SOCK_DGRAM {
		t.Errorf("SO_TYPE is %d", got)
	}
	// The kernel doubles the value.
	if err := conn.SetReadBuffer(20000); err != nil || option(unix.SO_RCVBUF) != 40000 {
		t.Errorf("SetReadBuffer(20000): %v, SO_RCVBUF is %d", err, option(unix.SO_RCVBUF))
	}
	if err := conn.SetWriteBuffer(30000); err != nil || option(unix.SO_SNDBUF) != 60000 {
		t.Errorf("SetWriteBuffer(30000): %v, SO_SNDBUF is %d", err, option(unix.SO_SNDBUF))
	}

	// recvmsg on the descriptor itself, as x/net's batched reads do it.
	if _, err := conn.WriteTo([]byte("raw"), conn.RemoteAddr()); err != nil {
		t.Fatal(err)
	}
	var n int
	var from unix.Sockaddr
	b := make([]byte, 100)
	if readErr := raw.Read(func(fd uintptr) bool {
		n, _, _, from, err = unix.Recvmsg(int(fd), b, nil, 0)
		return err != unix.EAGAIN
	}); readErr != nil || err != nil || string(b[:n]) != "raw" {
		t.Errorf("recvmsg: %q, %v, %v", b[:n], readErr, err)
	}
	if diff := cmp.Diff(&unix.SockaddrInet4{Port: echoPort, Addr: [4]byte{127, 1, 0, 1}}, from, cmp.Comparer(func(a, b unix.SockaddrInet4) bool {
		return a.Port == b.Port && a.Addr == b.Addr
	})); diff != "" {
		t.Errorf("recvmsg's source (-want +got):\n%s", diff)
	}

	file, err := conn.File()
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	again, err := net.FileConn(file)
	file.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	checkEcho(t, again)
}

// The errors of writes name the peer, also where net.UDPConn is not told of it.
func TestPacketConnErrorsOfThePeerHost(t *testing.T) {
	ownNamespace(t, 40000, 40019)
	for _, w := range packetWrites {
		conn := dialPacket(t, "127.1.0.1:9")
		peer := conn.RemoteAddr().(*net.UDPAddr)
		if _, err := conn.Write(nil); err != nil {
			t.Fatal(err)
		}
		// The answer to a datagram fails the write after it. A busy kernel
		// may put the answer off.
		var err error
		waitFor(t, w.name+" fails", func() bool {
			_, err = w.write(conn, nil, peer)
			return err != nil
		})
		call := "write"
		if strings.HasPrefix(w.name, "WriteMsg") {
			call = "sendmsg"
		}
		want := fmt.Sprintf("write udp %v->127.1.0.1:9: %s: connection refused", conn.LocalAddr(), call)
		if diff := cmp.Diff(want, err.Error()); diff != "" || !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s (-want +got):\n%s", w.name, diff)
		}
	}
	for _, r := range packetReads {
		conn := dialPacket(t, "127.1.0.1:9")
		if _, err := conn.WriteTo(nil, conn.RemoteAddr()); err != nil {
			t.Fatal(err)
		}
		if _, _, err := r.read(conn, make([]byte, 100)); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s: %v", r.name, err)
		}
	}
}

// A control is a control message.
func control(level, kind int32, data []byte) []byte {
	b := make([]byte, unix.CmsgSpace(len(data)))
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	h.Level, h.Type = level, kind
	h.SetLen(unix.CmsgLen(len(data)))
	copy(b[unix.CmsgLen(0):], data)
	return b
}

func TestPacketConnECN(t *testing.T) {
	const ect0 = 2
	word := binary.NativeEndian.AppendUint32(nil, ect0)
	tests := []struct {
		name, address string
		enable        func(fd int) error
		mark, want    []byte // oob
	}{
		{
			"IPv4", "127.1.0.1:7",
			func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_RECVTOS, 1) },
			control(unix.SOL_IP, unix.IP_TOS, word), control(unix.SOL_IP, unix.IP_TOS, []byte{ect0}),
		},
		{
			"IPv6", "[fd00::1]:7",
			func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_RECVTCLASS, 1) },
			control(unix.SOL_IPV6, unix.IPV6_TCLASS, word), control(unix.SOL_IPV6, unix.IPV6_TCLASS, word),
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			ownNamespace(t, 40000, 40019)
			server, conn := listenUDP(t, test.address), dialPacket(t, test.address)
			for _, c := range []syscall.Conn{server, conn} {
				raw, err := c.SyscallConn()
				if err != nil {
					t.Fatal(err)
				}
				if err := onSocket(test.enable)("", "", raw); err != nil {
					t.Fatal(err)
				}
			}
			peer, local := conn.RemoteAddr().(*net.UDPAddr), conn.LocalAddr().(*net.UDPAddr)
			check := func(name string, oobn int, err error, r udpConn) {
				t.Helper()
				if oobn != len(test.mark) || err != nil {
					t.Fatalf("%s: oobn %d of %d, %v", name, oobn, len(test.mark), err)
				}
				b, oob := make([]byte, 100), make([]byte, 100)
				n, oobn, _, _, err := r.ReadMsgUDP(b, oob)
				if err != nil || string(b[:n]) != name {
					t.Fatalf("%s: got %q, %v", name, b[:n], err)
				}
				if diff := cmp.Diff(test.want, oob[:oobn]); diff != "" {
					t.Errorf("%s: control messages (-want +got):\n%s", name, diff)
				}
			}
			_, oobn, err := conn.WriteMsgUDP([]byte("a"), test.mark, peer)
			check("a", oobn, err, server)
			_, oobn, err = conn.WriteMsgUDPAddrPort([]byte("b"), test.mark, peer.AddrPort())
			check("b", oobn, err, server)
			_, oobn, err = server.WriteMsgUDP([]byte("c"), test.mark, local)
			check("c", oobn, err, conn)
		})
	}
}

// With UDP_SEGMENT, one write is several datagrams.
func TestPacketConnSegments(t *testing.T) {
	const size = 1000
	oob := control(unix.SOL_UDP, unix.UDP_SEGMENT, binary.NativeEndian.AppendUint16(nil, size))
	var want [][]byte
	for i, size := range []int{size, size, size, 123} {
		want = append(want, bytes.Repeat([]byte{byte(i)}, size))
	}
	all := slices.Concat(want...)
	for _, host := range packetHosts {
		t.Run(host.name, func(t *testing.T) {
			packetNamespace(t, host.host)
			server := listenUDP(t, net.JoinHostPort(host.host, "7"))
			conn := dialPacket(t, server.LocalAddr().String())
			peer := conn.RemoteAddr().(*net.UDPAddr)
			writes := map[string]func() (n, oobn int, err error){
				"WriteMsgUDP":         func() (int, int, error) { return conn.WriteMsgUDP(all, oob, peer) },
				"WriteMsgUDPAddrPort": func() (int, int, error) { return conn.WriteMsgUDPAddrPort(all, oob, peer.AddrPort()) },
			}
			for name, write := range writes {
				n, oobn, err := write()
				if n != len(all) || oobn != len(oob) || err != nil {
					t.Fatalf("%s: %d of %d, oobn %d of %d, %v", name, n, len(all), oobn, len(oob), err)
				}
				var got [][]byte
				for range want {
					b := make([]byte, 10000)
					n, err := server.Read(b)
					if err != nil {
						t.Fatalf("%s: after %d datagrams: %v", name, len(got), err)
					}
					got = append(got, b[:n])
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("%s: datagrams (-want +got):\n%s", name, diff)
				}
			}
		})
	}
}

// No method allocates more than that of *net.UDPConn: for writes, of one that
// is connected (and is given no address) and of one that is not.
func TestPacketConnAllocations(t *testing.T) {
	for _, host := range packetHosts {
		t.Run(host.name, func(t *testing.T) {
			packetNamespace(t, host.host)
			address := net.JoinHostPort(host.host, "7")
			server := listenUDP(t, address)
			conn := dialPacket(t, address)
			plain, err := net.Dial("udp", address)
			if err != nil {
				t.Fatal(err)
			}
			defer plain.Close()
			plain.SetDeadline(time.Now().Add(time.Minute))
			connected := plain.(*net.UDPConn)
			unconnected := listenUDP(t, net.JoinHostPort(host.host, "0"))

			peer := conn.RemoteAddr().(*net.UDPAddr)
			var anyPeer net.Addr = peer
			peerAddrPort := peer.AddrPort()
			b := make([]byte, 100)
			measure := func(f func() error) float64 {
				t.Helper()
				return testing.AllocsPerRun(200, func() {
					if err := f(); err != nil {
						t.Fatal(err)
					}
				})
			}
			// Nobody reads; what is too much is dropped on arrival.
			written := func(_ int, err error) error { return err }
			sent := func(_, _ int, err error) error { return err }
			writes := []struct {
				name                   string
				conn, connected, plain func() error
			}{
				{
					"Write",
					func() error { return written(conn.Write(b)) },
					func() error { return written(connected.Write(b)) },
					func() error { return written(connected.Write(b)) },
				}, {
					"WriteTo",
					func() error { return written(conn.WriteTo(b, anyPeer)) },
					func() error { return written(connected.Write(b)) },
					func() error { return written(unconnected.WriteTo(b, anyPeer)) },
				}, {
					"WriteToUDP",
					func() error { return written(conn.WriteToUDP(b, peer)) },
					func() error { return written(connected.Write(b)) },
					func() error { return written(unconnected.WriteToUDP(b, peer)) },
				}, {
					"WriteToUDPAddrPort",
					func() error { return written(conn.WriteToUDPAddrPort(b, peerAddrPort)) },
					func() error { return written(connected.Write(b)) },
					func() error { return written(unconnected.WriteToUDPAddrPort(b, peerAddrPort)) },
				}, {
					"WriteMsgUDP",
					func() error { return sent(conn.WriteMsgUDP(b, nil, peer)) },
					func() error { return sent(connected.WriteMsgUDP(b, nil, nil)) },
					func() error { return sent(unconnected.WriteMsgUDP(b, nil, peer)) },
				}, {
					"WriteMsgUDPAddrPort",
					func() error { return sent(conn.WriteMsgUDPAddrPort(b, nil, peerAddrPort)) },
					func() error { return sent(connected.WriteMsgUDPAddrPort(b, nil, netip.AddrPort{})) },
					func() error { return sent(unconnected.WriteMsgUDPAddrPort(b, nil, peerAddrPort)) },
				},
			}
			for _, w := range writes {
				got, connected, plain := measure(w.conn), measure(w.connected), measure(w.plain)
				t.Logf("%s: %v allocations; net.UDPConn connected %v, unconnected %v", w.name, got, connected, plain)
				if got > min(connected, plain) {
					t.Errorf("%s: %v allocations, net.UDPConn has %v and %v", w.name, got, connected, plain)
				}
			}

			local, connectedLocal := conn.LocalAddr().(*net.UDPAddr).AddrPort(), connected.LocalAddr().(*net.UDPAddr).AddrPort()
			reads := []struct {
				name        string
				conn, plain func() error
			}{
				{
					"Read",
					func() error { return written(conn.Read(b)) },
					func() error { return written(connected.Read(b)) },
				}, {
					"ReadFrom",
					func() error { _, _, err := conn.ReadFrom(b); return err },
					func() error { _, _, err := connected.ReadFrom(b); return err },
				}, {
					"ReadFromUDP",
					func() error { _, _, err := conn.ReadFromUDP(b); return err },
					func() error { _, _, err := connected.ReadFromUDP(b); return err },
				}, {
					"ReadFromUDPAddrPort",
					func() error { _, _, err := conn.ReadFromUDPAddrPort(b); return err },
					func() error { _, _, err := connected.ReadFromUDPAddrPort(b); return err },
				}, {
					"ReadMsgUDP",
					func() error { _, _, _, _, err := conn.ReadMsgUDP(b, nil); return err },
					func() error { _, _, _, _, err := connected.ReadMsgUDP(b, nil); return err },
				}, {
					"ReadMsgUDPAddrPort",
					func() error { _, _, _, _, err := conn.ReadMsgUDPAddrPort(b, nil); return err },
					func() error { _, _, _, _, err := connected.ReadMsgUDPAddrPort(b, nil); return err },
				},
			}
			after := func(to netip.AddrPort, read func() error) func() error {
				return func() error {
					if _, err := server.WriteToUDPAddrPort(b, to); err != nil {
						return err
					}
					return read()
				}
			}
			for _, r := range reads {
				got, plain := measure(after(local, r.conn)), measure(after(connectedLocal, r.plain))
				t.Logf("%s: %v allocations, net.UDPConn %v", r.name, got, plain)
				if got > plain {
					t.Errorf("%s: %v allocations, net.UDPConn has %v", r.name, got, plain)
				}
			}
		})
	}
}

func TestDialPacketConnErrors(t *testing.T) {
	ownNamespace(t, 40000, 40019)
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	tests := []struct {
		name, network, address string
		ctx                    context.Context
		want                   string
	}{
		{"TCP", "tcp", "127.1.0.1:7", t.Context(), "dial tcp: unknown network tcp"},
		{"unixgram", "unixgram", "/nowhere", t.Context(), "dial unixgram: unknown network unixgram"},
		{"IP", "ip4:udp", "127.1.0.1", t.Context(), "dial ip4:udp: unknown network ip4:udp"},
		{"no network", "", "127.1.0.1:7", t.Context(), "dial: unknown network "},
		{"no port", "udp", "127.1.0.1", t.Context(), "dial udp: address 127.1.0.1: missing port in address"},
		{"IPv6 address on udp4", "udp4", "[fd00::1]:7", t.Context(), "dial udp4: address fd00::1: no suitable address found"},
		{"IPv4 address on udp6", "udp6", "127.1.0.1:7", t.Context(), "dial udp6: address 127.1.0.1: no suitable address found"},
		{"no route", "udp", "192.0.2.1:7", t.Context(), "dial udp 192.0.2.1:7: connect: network is unreachable"},
		{"cancelled", "udp", "127.1.0.1:7", cancelled, "dial udp 127.1.0.1:7: operation was canceled"},
	}
	for _, test := range tests {
		var d connectx.Dialer
		conn, err := d.DialPacket(test.ctx, test.network, test.address)
		if conn != nil || err == nil {
			t.Errorf("%s: %v, %v", test.name, conn, err)
			continue
		}
		if diff := cmp.Diff(test.want, err.Error()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.name, diff)
		}
		var op *net.OpError
		if !errors.As(err, &op) || op.Op != "dial" || op.Net != test.network {
			t.Errorf("%s: %#v", test.name, err)
		}
		var unknown net.UnknownNetworkError
		if got, want := errors.As(err, &unknown), strings.Contains(test.want, "unknown network"); got != want {
			t.Errorf("%s: is a net.UnknownNetworkError: %t", test.name, got)
		}
	}
}

func TestPacketConnManyWritersAndReaders(t *testing.T) {
	ownNamespace(t, 40000, 40019)
	conn := dialPacket(t, echo(t, "udp", "127.1.0.1"))
	peer := conn.RemoteAddr().(*net.UDPAddr)
	const each = 20 // all of them together fit into the receive buffers, of which the kernel keeps a quarter back
	var all sync.WaitGroup
	for _, w := range packetWrites {
		all.Go(func() {
			for range each {
				if _, err := w.write(conn, []byte("datagram"), peer); err != nil {
					t.Errorf("%s: %v", w.name, err)
					return
				}
			}
		})
	}
	for _, r := range packetReads[1:] {
		all.Go(func() {
			b := make([]byte, 100)
			for range each * len(packetWrites) / len(packetReads[1:]) {
				n, source, err := r.read(conn, b)
				if err != nil || string(b[:n]) != "datagram" || source.String() != peer.String() {
					t.Errorf("%s: %q from %v, %v", r.name, b[:n], source, err)
					return
				}
			}
		})
	}
	all.Wait()
}

func TestPacketConnLeavesNothingBehind(t *testing.T) {
	ownNamespace(t, 40000, 40003)
	address := echo(t, "udp", "127.1.0.1")
	use := func() {
		var d connectx.Dialer
		conn, err := d.DialPacket(t.Context(), "udp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		checkEcho(t, conn)
		if _, err := conn.WriteToUDPAddrPort(nil, netip.MustParseAddrPort("127.1.0.2:7")); err == nil {
			t.Error("another address was written to")
		}
	}
	use() // the first dial opens what is kept
	goroutines, open := runtime.NumGoroutine(), len(descriptors(t))
	for range 100 {
		use()
	}
	waitFor(t, "goroutines and descriptors as before", func() bool {
		return runtime.NumGoroutine() <= goroutines && len(descriptors(t)) <= open
	})
}
