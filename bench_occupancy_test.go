//go:build linux

package connectx_test

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/holders"
	"github.com/seed22601231/connectx/internal/sys"
)

func init() {
	holders.Main() // before a holder gets to run tests
	children["churn"] = churn
}

const benchPorts = benchHigh - benchLow + 1

var occupancies = []int{0, 5, 50, 75, 90, 95, 99}

// benchDialer returns the dialer of the given name, with nothing chosen.
func benchDialer(name string) dialer {
	if name == "net" {
		return &net.Dialer{}
	}
	return &connectx.Dialer{}
}

// A fullDestination is a destination whose ports can all be taken.
type fullDestination struct {
	*holders.Holders
	network string
	remote  netip.AddrPort
	source  netip.Addr // that connect would choose
}

func newFullDestination(b *testing.B, network string) *fullDestination {
	b.Helper()
	benchNamespace(b)
	h, err := holders.Start(2) // each may have 20,000 descriptors, where that is the limit
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := h.Close(); err != nil {
			b.Error(err)
		}
	})
	d := &fullDestination{h, network, netip.MustParseAddrPort("127.1.0.1:1000"), sourceTo(b, "127.1.0.1:1000")}
	if err := h.Sink(network, d.remote); err != nil {
		b.Fatal(err)
	}
	return d
}

// fill dials until held more connections are there, and has others hold them. It
// returns how long each dial took.
func (d *fullDestination) fill(b *testing.B, by dialer, held int) latencies {
	b.Helper()
	took := make(latencies, 0, held)
	conns := make([]syscall.Conn, 0, 250)
	for i := range held {
		conn, t, err := timedDial(by, d.network, d.remote.String())
		if err != nil {
			b.Fatalf("dial %d: %v", i, err)
		}
		took = append(took, t)
		conns = append(conns, conn.(syscall.Conn))
		if len(conns) == cap(conns) || i == held-1 {
			if err := d.Keep(conns...); err != nil {
				b.Fatal(err)
			}
			conns = conns[:0]
		}
	}
	return took
}

// sourceTo is the source address that the kernel chooses.
func sourceTo(b *testing.B, address string) netip.Addr {
	b.Helper()
	conn, err := net.Dial("udp", address)
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	return conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap()
}

func timedDial(by dialer, network, address string) (net.Conn, time.Duration, error) {
	start := time.Now()
	conn, err := by.Dial(network, address)
	return conn, time.Since(start), err
}

// latencies are what single dials took.
type latencies []time.Duration

// percentile returns the time that p of 1 of the dials took at most.
func (l latencies) percentile(p float64) time.Duration {
	if len(l) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(l))
	return sorted[min(int(p*float64(len(l))), len(l)-1)]
}

func (l latencies) report(b *testing.B) {
	b.ReportMetric(float64(l.percentile(0.5)), "p50-ns")
	b.ReportMetric(float64(l.percentile(0.99)), "p99-ns")
}

// dialOnly opens and closes one connection at a time, and reports how long the
// dials took: ns/op is their mean.
func dialOnly(b *testing.B, by dialer, network, address string) {
	b.Helper()
	var took latencies
	var sum time.Duration
	for b.Loop() {
		conn, t, err := timedDial(by, network, address)
		if err != nil {
			b.Fatal(err)
		}
		hangUp(conn)
		took = append(took, t)
		sum += t
	}
	took.report(b)
	b.ReportMetric(float64(sum)/float64(len(took)), "ns/op")
}

// Dials to one destination, some of whose ports are taken: by connections of the
// same dialer in order, or by sockets of another program at random.
func BenchmarkOccupancy(b *testing.B) {
	for _, network := range []string{"tcp", "udp"} {
		for _, name := range []string{"net", "connectx"} {
			b.Run(network+"/fill=own/dialer="+name, func(b *testing.B) {
				to, by, held := newFullDestination(b, network), benchDialer(name), 0
				for _, percent := range occupancies {
					b.Run(fmt.Sprintf("percent=%d", percent), func(b *testing.B) {
						want := benchPorts * percent / 100
						to.fill(b, by, want-held)
						held = want
						dialOnly(b, by, network, to.remote.String())
					})
				}
			})
		}
		b.Run(network+"/fill=other", func(b *testing.B) {
			to, held := newFullDestination(b, network), 0
			order := shuffledPorts()
			for _, percent := range occupancies {
				b.Run(fmt.Sprintf("percent=%d", percent), func(b *testing.B) {
					want := benchPorts * percent / 100
					if err := to.Take(network, to.source, to.remote, order[held:want]); err != nil {
						b.Fatal(err)
					}
					held = want
					for _, name := range []string{"net", "connectx"} {
						b.Run("dialer="+name, func(b *testing.B) {
							dialOnly(b, benchDialer(name), network, to.remote.String())
						})
					}
				})
			}
		})
	}
}

func shuffledPorts() []uint16 {
	ports := make([]uint16, benchPorts)
	for i, at := range rand.Perm(benchPorts) {
		ports[i] = benchLow + uint16(at)
	}
	return ports
}

// Fills one destination from the first port to the last.
func BenchmarkFill(b *testing.B) {
	for _, network := range []string{"tcp", "udp"} {
		b.Run(network+"/dialer=connectx", func(b *testing.B) {
			to := newFullDestination(b, network)
			const percent = benchPorts / 100
			var first, last latencies
			for b.Loop() {
				took := to.fill(b, &connectx.Dialer{}, benchPorts)
				first, last = append(first, took[:percent]...), append(last, took[benchPorts-percent:]...)
				if _, err := connectx.Dial(network, to.remote.String()); !errors.Is(err, connectx.ErrPortsExhausted) {
					b.Fatalf("one connection more than there are ports: %v", err)
				}
				if err := to.Release(); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(0, "ns/op") // that of all
			b.ReportMetric(float64(first.percentile(0.5)), "first-p50-ns")
			b.ReportMetric(float64(last.percentile(0.5)), "last-p50-ns")
		})
	}
}

const (
	churners = 2 // each holds half of the ports, and must have descriptors for them

	// churnPause × churners is the time between two changes: 1,000 of them a
	// second. It takes a few percent of one processor.
	churnPause = 2 * time.Millisecond
)

// UDP dials to one destination while other processes hold a part of its ports,
// and close one of their sockets and open another, at random, all the time.
func BenchmarkChurn(b *testing.B) {
	for _, percent := range []int{0, 95, 99} {
		b.Run(fmt.Sprintf("udp/percent=%d", percent), func(b *testing.B) {
			to := newFullDestination(b, "udp")
			if percent > 0 {
				for i := range churners {
					startChurner(b, fmt.Sprintf("%d %d %v %v", i, percent, to.source, to.remote))
				}
			}
			for _, name := range []string{"net", "connectx"} {
				b.Run("dialer="+name, func(b *testing.B) {
					dialOnly(b, benchDialer(name), "udp", to.remote.String())
				})
			}
		})
	}
}

const churnEnv = "CONNECTX_TEST_CHURN"

func startChurner(b *testing.B, what string) {
	b.Helper()
	if lines := startChild(b, "churn", churnEnv+"="+what, "GOMAXPROCS=1"); !lines.Scan() || lines.Text() != "full" {
		b.Fatalf("churn: %q, %v", lines.Text(), lines.Err())
	}
}

// A churnSocket is a plain UDP socket.
type churnSocket struct {
	port uint16
	fd   int
}

// churn holds a percentage of every second pair of ports, and goes on changing
// which, until its standard input ends.
func churn() int {
	var number, percent int
	var source netip.Addr
	var destination netip.AddrPort
	var texts [2]string
	_, err := fmt.Sscan(os.Getenv(churnEnv), &number, &percent, &texts[0], &texts[1])
	if err == nil {
		source, err = netip.ParseAddr(texts[0])
	}
	if err == nil {
		destination, err = netip.ParseAddrPort(texts[1])
	}
	if err != nil {
		return failChild("%s: %v", churnEnv, err)
	}
	var free []uint16
	for _, port := range shuffledPorts() {
		if int(port-benchLow)/2%churners == number {
			free = append(free, port)
		}
	}
	var held []churnSocket
	open := func() error {
		at := rand.IntN(len(free))
		fd, err := openPlain("udp", netip.AddrPortFrom(source, free[at]), destination)
		if err != nil {
			return err
		}
		held = append(held, churnSocket{free[at], fd})
		free[at] = free[len(free)-1]
		free = free[:len(free)-1]
		return nil
	}
	for want := len(free) * percent / 100; len(held) < want; {
		if err := open(); err != nil {
			return failChild("%v", err)
		}
	}
	fmt.Println("full")
	over := make(chan struct{})
	go func() {
		io.Copy(io.Discard, os.Stdin)
		close(over)
	}()
	for {
		select {
		case <-over:
			return 0
		case <-time.After(churnPause):
		}
		// The port may be that of a dial which is being measured.
		for {
			err := open()
			if err == nil {
				break
			}
			if !errors.Is(err, unix.EADDRINUSE) {
				return failChild("%v", err)
			}
		}
		at := rand.IntN(len(held) - 1)
		unix.Close(held[at].fd)
		free = append(free, held[at].port)
		held[at] = held[len(held)-1]
		held = held[:len(held)-1]
	}
}

// openPlain opens a socket as a program does that knows nothing of sharing
// ports. TCP is told the port as connect would choose it, so that it stays
// available to other destinations, and leaves no TIME_WAIT.
func openPlain(network string, local, remote netip.AddrPort) (fd int, err error) {
	kind := unix.SOCK_DGRAM
	if network == "tcp" {
		kind = unix.SOCK_STREAM
	}
	fd, err = unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
			fd = -1
		}
	}()
	if network == "tcp" {
		port := uint32(local.Port())
		if err := sys.SetInt(fd, unix.SOL_IP, unix.IP_LOCAL_PORT_RANGE, int32(port<<16|port)); err != nil {
			return fd, os.NewSyscallError("setsockopt", err)
		}
		if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
			return fd, os.NewSyscallError("setsockopt", err)
		}
	} else {
		sa := sys.NewSockaddr(unix.AF_INET, local, 0)
		if err := sys.Bind(fd, &sa); err != nil {
			return fd, os.NewSyscallError("bind", err)
		}
	}
	sa := sys.NewSockaddr(unix.AF_INET, remote, 0)
	return fd, os.NewSyscallError("connect", sys.ConnectTCP(fd, &sa))
}
