//go:build linux

package connectx_test

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
)

// The servers of the benchmarks are on ports below every port range in use.
const benchPort = 1000

// sinks starts servers that take connections, or datagrams, and say nothing, on
// several ports of a host.
//
// Benchmarks take them in turn. Where a TCP connection follows another one on
// the same 4-tuple at once, the server may be at work on the old one when the
// SYN comes, and the dial waits for a second until it is sent again.
func sinks(b *testing.B, network, host string) []string {
	b.Helper()
	addresses := make([]string, 64)
	for i := range addresses {
		addresses[i] = net.JoinHostPort(host, fmt.Sprint(benchPort+i))
		if strings.HasPrefix(network, "udp") {
			conn, err := net.ListenPacket(network, addresses[i])
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { conn.Close() })
			continue
		}
		listener, err := net.Listen(network, addresses[i])
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { listener.Close() })
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				go func() {
					io.Copy(io.Discard, conn)
					conn.Close()
				}()
			}
		}()
	}
	return addresses
}

// Opens and closes one connection, by protocol, family, contract row and
// dialer.
func BenchmarkDial(b *testing.B) {
	rows := []struct {
		name   string
		source bool
		port   uint16
	}{
		{"destination", false, 0},
		{"source", true, 0},
		{"source+port", true, 40005},
		{"port", false, 40006},
	}
	for _, network := range []string{"tcp", "udp"} {
		for _, family := range families {
			for _, row := range rows {
				for _, name := range []string{"net", "connectx"} {
					b.Run(strings.Join([]string{network, family.name, row.name, "dialer=" + name}, "/"), func(b *testing.B) {
						ownNamespace(b, 32768, 60999)
						addresses := sinks(b, network, family.hosts[0])
						var inner net.Dialer
						source := ""
						if row.source {
							source = family.source
						}
						if row.source || row.port != 0 {
							inner.LocalAddr = localAddr(network, source, row.port)
						}
						var d dialer = &inner
						if name == "connectx" {
							d = &connectx.Dialer{Dialer: inner}
						}
						b.ReportAllocs()
						for i := 0; b.Loop(); i++ {
							conn, err := d.Dial(network, addresses[i%len(addresses)])
							if err != nil {
								b.Fatal(err)
							}
							hangUp(conn)
						}
					})
				}
			}
		}
	}
}

// Opens and closes a UDP connection whose source port others are on, as it is
// once there are more connections than ports: the lock and the lookups in full.
func BenchmarkDialSharedPort(b *testing.B) {
	for _, family := range families {
		b.Run(family.name, func(b *testing.B) {
			ownNamespace(b, 40000, 40000)
			other, err := connectx.Dial("udp", net.JoinHostPort(family.hosts[1], "9"))
			if err != nil {
				b.Fatal(err)
			}
			defer other.Close()
			d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: other.LocalAddr()}}
			b.ReportAllocs()
			for b.Loop() {
				conn, err := d.Dial("udp", net.JoinHostPort(family.hosts[0], "9"))
				if err != nil {
					b.Fatal(err)
				}
				conn.Close()
			}
		})
	}
}

// How often a datagram that a stranger sends while a UDP connection is being
// opened can be read from it: a flood of them goes to the source port.
func BenchmarkStrangers(b *testing.B) {
	for _, name := range []string{"net", "connectx"} {
		b.Run("dialer="+name, func(b *testing.B) {
			ownNamespace(b, 40000, 40019)
			address := sinks(b, "udp", "127.1.0.1")[0]
			inner := net.Dialer{LocalAddr: localAddr("udp", "127.2.0.1", 40005)}
			var d dialer = &inner
			if name == "connectx" {
				d = &connectx.Dialer{Dialer: inner}
			}
			stranger, err := net.ListenPacket("udp", "127.4.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			defer stranger.Close()
			stop := make(chan struct{})
			var flood sync.WaitGroup
			var sent atomic.Int64
			defer flood.Wait()
			defer close(stop)
			to := net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.2.0.1:40005"))
			flood.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
						stranger.WriteTo([]byte("stranger"), to)
						sent.Add(1)
					}
				}
			})
			readable := 0
			sent.Store(0)
			for b.Loop() {
				conn, err := d.Dial("udp", address)
				if err != nil {
					b.Fatal(err)
				}
				// What is still under way arrives.
				for start := time.Now(); time.Since(start) < 50*time.Microsecond; {
					runtime.Gosched()
				}
				raw, err := conn.(syscall.Conn).SyscallConn()
				if err != nil {
					b.Fatal(err)
				}
				raw.Control(func(fd uintptr) {
					var datagram [16]byte
					if n, _, err := unix.Recvfrom(int(fd), datagram[:], unix.MSG_DONTWAIT); err == nil && n > 0 {
						readable++
					}
				})
				conn.Close()
			}
			b.ReportMetric(1e6*float64(readable)/float64(b.N), "read/Mdial")
			b.ReportMetric(float64(sent.Load())/b.Elapsed().Seconds(), "datagrams/s")
		})
	}
}

// What a filter on the peer's address would cost each UDP connection, if one
// were to keep strangers out instead (see dropStrangers).
func BenchmarkStrangersFilter(b *testing.B) {
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: ^uint32(1<<20-1) + 12}, // SKF_NET_OFF: the source address
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: 0x7f010001, Jf: 3},
		{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_ABS, K: 0}, // the source port
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: benchPort, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: ^uint32(0)},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(fd)
	for b.Loop() {
		if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &prog); err != nil {
			b.Fatal(err)
		}
	}
}
