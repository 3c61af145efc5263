package guard

import (
	"errors"
	"math/rand/v2"
	"net"
	"syscall"
	"testing"

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
		{"system-calls", func(b *testing.B) {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				b.Fatal(err)
			}
			if err := unix.Connect(fd, peer); err != nil {
				b.Fatal(err)
			}
			unix.Close(fd)
		}},
		{"system-calls-bound", func(b *testing.B) {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				b.Fatal(err)
			}
			if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: 5000}); err != nil {
				b.Fatal(err)
			}
			if err := unix.Connect(fd, peer); err != nil {
				b.Fatal(err)
			}
			unix.Close(fd)
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
