//go:build linux

package connectx_test

import (
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
)

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
