package guard

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
)

// BenchmarkConnect opens, connects and closes a UDP socket, with system calls alone
// and with dialers. One of these is what connectx.Dialer would be that leaves the
// lock and the lookup to a guard.
func BenchmarkConnect(b *testing.B) {
	serve(b, "127.2.0.1:5353", func([]byte) []byte { return nil })
	peer := &unix.SockaddrInet4{Addr: [4]byte{127, 2, 0, 1}, Port: 5353}
	var plain net.Dialer
	unlocked := func() *net.Dialer {
		return &net.Dialer{
			LocalAddr: &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 20000 + rand.IntN(10000)},
			Control: func(_, _ string, c syscall.RawConn) (err error) {
				return errors.Join(c.Control(func(fd uintptr) {
					err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
				}), err)
			},
		}
	}
	var dialer connectx.Dialer
	for _, way := range []struct {
		name string
		run  func(b *testing.B)
	}{
		{"system-calls", func(b *testing.B) { connectAndClose(b, nil, peer, nil) }},
		{"system-calls-bound", func(b *testing.B) {
			connectAndClose(b, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: 5000}, peer, nil)
		}},
		{"net.Dialer", func(b *testing.B) {
			conn, err := plain.Dial("udp4", "127.2.0.1:5353")
			if err != nil {
				b.Fatal(err)
			}
			conn.Close()
		}},
		{"net.Dialer+SO_REUSEADDR", func(b *testing.B) {
			conn, err := unlocked().Dial("udp4", "127.2.0.1:5353")
			if err != nil {
				b.Fatal(err)
			}
			conn.Close()
		}},
		{"connectx.Dialer", func(b *testing.B) {
			conn, err := dialer.Dial("udp4", "127.2.0.1:5353")
			if err != nil {
				b.Fatal(err)
			}
			conn.Close()
		}},
	} {
		for _, with := range []struct {
			name   string
			attach func(b *testing.B)
		}{
			{"none", func(b *testing.B) { needCgroup(b) }},
			{"deny", func(b *testing.B) { attach(b, Options{}) }},
			{"share", func(b *testing.B) { attach(b, Options{Share: true}) }},
		} {
			b.Run(way.name+"/guard="+with.name, func(b *testing.B) {
				with.attach(b)
				for range 1000 { // the first ones of a process are slow
					way.run(b)
				}
				for b.Loop() {
					way.run(b)
				}
			})
		}
	}
}

// BenchmarkOccupied is about plain system calls with a destination to which some of
// the ports are taken, up to all of them, where connect fails.
func BenchmarkOccupied(b *testing.B) {
	const low, high = 30000, 45999 // of which one process can hold all
	const peer = "127.2.0.1:5353"
	to := &unix.SockaddrInet4{Addr: [4]byte{127, 2, 0, 1}, Port: 5353}
	for _, guarded := range []bool{false, true} {
		for _, percent := range []int{0, 40, 60, 90, 99, 100} {
			name := fmt.Sprintf("taken=%d/guard=%s", percent, map[bool]string{false: "none", true: "share"}[guarded])
			b.Run(name, func(b *testing.B) {
				needCgroup(b)
				setPorts(b, nil, low, high, "")
				sync := func() {}
				if guarded {
					g := attach(b, Options{Share: true})
					sync = func() { mustSync(b, g) }
				}
				for range (high - low + 1) * percent / 100 {
					openPlain(b, v4).mustConnect(peer)
				}
				sync() // as the command does; it notes which source addresses they have
				var want error
				if percent == 100 {
					want = unix.EAGAIN
				}
				for b.Loop() {
					connectAndClose(b, nil, to, want)
				}
			})
		}
	}
}

// BenchmarkSync is about Sync, and the memory of the maps, with 15,000 sockets that
// are connected.
func BenchmarkSync(b *testing.B) {
	for _, share := range []bool{false, true} {
		b.Run(fmt.Sprintf("share=%t", share), func(b *testing.B) {
			g := attach(b, Options{Share: share})
			setPorts(b, nil, 30000, 44999, "")
			empty := memory(b, g)
			const sockets = 15000
			for n := range sockets {
				open(b, v4).bind(fmt.Sprintf("127.0.0.1:%d", 30000+n)).mustConnect("127.2.0.1:5353")
			}
			full := memory(b, g)
			for b.Loop() {
				mustSync(b, g)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/sockets, "ns/socket")
			b.ReportMetric(float64(full-empty)/sockets, "B/socket")
			b.ReportMetric(float64(empty)/defaultMax, "B/room")
		})
	}
}

// memory is what the kernel says that the maps take which grow with the sockets.
func memory(b *testing.B, g *Guard) uint64 {
	b.Helper()
	var bytes uint64
	for _, m := range []*ebpf.Map{g.objects.Reserved, g.objects.Holders, g.objects.Groups, g.objects.Over} {
		info, err := m.Info()
		if err != nil {
			b.Fatal(err)
		}
		n, ok := info.Memlock()
		if !ok {
			b.Skip("the kernel does not tell the size of maps")
		}
		bytes += n
	}
	return bytes
}

// connectAndClose is what a program does in C. The connect has to end with the
// error.
func connectAndClose(b *testing.B, local, peer unix.Sockaddr, want error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(fd)
	if local != nil {
		if err := unix.Bind(fd, local); err != nil {
			b.Fatal(err)
		}
	}
	if err := unix.Connect(fd, peer); err != want {
		b.Fatal(err)
	}
}
