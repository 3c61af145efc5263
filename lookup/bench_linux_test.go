package lookup

import (
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/sys"
)

// BenchmarkUDP compares one lookup with what the netlink package offers, which
// asks for the whole table.
func BenchmarkUDP(b *testing.B) {
	for _, bb := range []struct {
		name    string
		sockets int
		share   bool
	}{
		{"1 socket", 1, false},
		{"5000 sockets", 5000, false},
		{"5000 sockets on one port", 5000, true},
	} {
		var fds []int
		var sockets []Socket
		port := freePorts(b, 1)[0]
		for i := range bb.sockets {
			s := spec{
				bind:    netip.MustParseAddrPort("127.0.0.1:0"),
				connect: netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 1, byte(i >> 8), byte(i)}), 9),
			}
			if bb.share {
				s.bind, s.share = netip.AddrPortFrom(s.bind.Addr(), port), true
			}
			fd, err := s.open()
			check(b, err)
			fds = append(fds, fd)
			local, err := sys.LocalAddr(fd)
			check(b, err)
			sockets = append(sockets, Socket{Local: local, Remote: s.connect})
		}
		c := openConn(b)
		b.Run(bb.name+"/lookup", func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				s := sockets[i%len(sockets)]
				if _, err := c.UDP(s.Local, s.Remote, 0); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(bb.name+"/lookup, not found", func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				s := sockets[i%len(sockets)]
				if _, err := c.UDP(s.Remote, s.Local, 0); err != ErrNotFound {
					b.Fatal(err)
				}
			}
		})
		h, err := netlink.NewHandle(unix.NETLINK_SOCK_DIAG)
		check(b, err)
		b.Run(bb.name+"/Handle.SocketDiagUDP", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				list, err := h.SocketDiagUDP(unix.AF_INET)
				if err != nil || len(list) < len(sockets) {
					b.Fatal(len(list), err)
				}
			}
		})
		h.Close()
		for _, fd := range fds {
			check(b, unix.Close(fd))
		}
	}
}

// BenchmarkSource compares a question for a route with the netlink package's.
func BenchmarkSource(b *testing.B) {
	destination := netip.MustParseAddrPort("127.0.0.1:53")
	ip := net.IP{127, 0, 0, 1}
	c := openConn(b)
	b.Run("kept", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := c.Source(destination, RouteOptions{}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("asked for", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			c.Forget()
			if _, err := c.Source(destination, RouteOptions{}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("Handle.RouteGet", func(b *testing.B) {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		check(b, err)
		defer h.Close()
		b.ReportAllocs()
		for b.Loop() {
			if _, err := h.RouteGet(ip); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("netlink.RouteGet", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := netlink.RouteGet(ip); err != nil {
				b.Fatal(err)
			}
		}
	})
}
