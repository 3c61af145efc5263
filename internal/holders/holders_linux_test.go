package holders

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/netns"
)

func TestMain(m *testing.M) {
	Main()
	os.Exit(netns.Main(m.Run))
}

const low, ports = 40000, 200

var (
	source      = netip.MustParseAddr("127.0.0.1")
	destination = netip.MustParseAddrPort("127.1.0.1:1000")
	elsewhere   = netip.MustParseAddrPort("127.1.0.2:1000")
)

// begin starts two holders, and servers, in a namespace of the test's own.
func begin(t *testing.T, network string) *Holders {
	t.Helper()
	netns.Need(t)
	if err := netns.Enter(); err != nil {
		t.Fatal(err)
	}
	if err := netns.SetPortRange(low, low+ports-1); err != nil {
		t.Fatal(err)
	}
	before := descriptors(t)
	h, err := Start(2)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
		if now := descriptors(t); now > before {
			t.Errorf("%d descriptors are open, %d were before", now, before)
		}
	})
	if err := h.Sink(network, destination, elsewhere); err != nil {
		t.Fatal(err)
	}
	return h
}

func descriptors(t *testing.T) int {
	t.Helper()
	runtime.GC() // netpoller and all have been set up before the first count
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func dial(network string, to netip.AddrPort) (net.Conn, error) {
	return net.Dial(network, to.String())
}

// checkFull wants the destination to be full, or net.Dialer to have a
// connection.
func checkFull(t *testing.T, network string, want bool) {
	t.Helper()
	conn, err := dial(network, destination)
	if err == nil {
		if want {
			t.Errorf("connected from %v although all ports are taken", conn.LocalAddr())
		}
		hold(descriptorOf(t, conn))
		conn.Close()
		return
	}
	full := syscall.EAGAIN
	if network == "tcp" {
		full = syscall.EADDRNOTAVAIL
	}
	if !want || !errors.Is(err, full) {
		t.Errorf("got error %v, want %v: %t", err, full, want)
	}
}

func descriptorOf(t *testing.T, conn net.Conn) (fd int) {
	t.Helper()
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(f uintptr) { fd = int(f) })
	return fd
}

func TestTakeAndRelease(t *testing.T) {
	for _, network := range []string{"tcp", "udp"} {
		t.Run(network, func(t *testing.T) {
			h := begin(t, network)
			order := rand.Perm(ports)
			all := make([]uint16, ports)
			for i, n := range order {
				all[i] = low + uint16(n)
			}
			for round := range 3 {
				if err := h.Take(network, source, destination, all[:ports-1]); err != nil {
					t.Fatal(err)
				}
				checkFull(t, network, false)
				if err := h.Take(network, source, destination, all[ports-1:]); err != nil {
					t.Fatal(err)
				}
				checkFull(t, network, true)

				conn, err := dial(network, elsewhere)
				if network == "tcp" && err != nil {
					t.Errorf("the ports are not left to another destination: %v", err)
				}
				if err == nil {
					hold(descriptorOf(t, conn))
					conn.Close()
				}

				err = h.Take(network, source, destination, all[round:round+1])
				if port := fmt.Sprintf(":%d->", all[round]); err == nil || !strings.Contains(err.Error(), port) {
					t.Errorf("a port taken twice is the error %v, want one with %q", err, port)
				}
				if !errors.Is(err, unix.EADDRINUSE) && !errors.Is(err, unix.EADDRNOTAVAIL) {
					t.Errorf("a port taken twice is the error %v", err)
				}
				if err := h.Release(); err != nil {
					t.Fatal(err)
				}
				checkFull(t, network, false)
			}
		})
	}
}

func TestKeep(t *testing.T) {
	for _, network := range []string{"tcp", "udp"} {
		t.Run(network, func(t *testing.T) {
			h := begin(t, network)
			var conns []syscall.Conn
			for range ports {
				conn, err := dial(network, destination)
				if err != nil {
					t.Fatal(err)
				}
				conns = append(conns, conn.(syscall.Conn))
			}
			if err := h.Keep(conns[:7]...); err != nil {
				t.Fatal(err)
			}
			if err := h.Keep(conns[7:]...); err != nil {
				t.Fatal(err)
			}
			checkFull(t, network, true)
			if err := h.Keep(conns[0]); !errors.Is(err, net.ErrClosed) {
				t.Errorf("a connection kept twice is the error %v, want %v", err, net.ErrClosed)
			}
			if err := h.Release(); err != nil {
				t.Fatal(err)
			}
			checkFull(t, network, false)
		})
	}
}

func TestTakeWithoutServer(t *testing.T) {
	h := begin(t, "tcp")
	err := h.Take("tcp", source, netip.MustParseAddrPort("127.1.0.3:1000"), []uint16{low})
	if !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("got error %v, want %v", err, unix.ECONNREFUSED)
	}
}

// Holders have fewer descriptors than are handed to them.
func TestKeepMoreThanAHolderCan(t *testing.T) {
	h := begin(t, "udp")
	limit := unix.Rlimit{Cur: 50, Max: 50}
	for _, p := range h.processes {
		if err := unix.Prlimit(p.cmd.Process.Pid, unix.RLIMIT_NOFILE, &limit, nil); err != nil {
			t.Fatal(err)
		}
	}
	var conns []syscall.Conn
	for range ports {
		conn, err := dial("udp", destination)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conns = append(conns, conn.(syscall.Conn))
	}
	if err := h.Keep(conns...); !errors.Is(err, unix.EMFILE) {
		t.Errorf("got error %v, want %v", err, unix.EMFILE)
	}
	// They are here still, and nowhere else.
	for _, conn := range conns {
		if _, err := conn.SyscallConn(); err != nil {
			t.Fatal(err)
		}
		conn.(net.Conn).Close()
	}
	checkFull(t, "udp", false)
}

func TestHolderDies(t *testing.T) {
	netns.Need(t)
	h, err := Start(1)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.processes[0].cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := h.Keep(conn.(syscall.Conn)); err == nil {
		t.Error("a holder that has been killed keeps connections")
	}
	if err := h.Release(); err == nil {
		t.Error("a holder that has been killed releases connections")
	}
	if err := h.Close(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("closing reports %v, want that a holder was killed", err)
	}
	if err := h.Keep(conn.(syscall.Conn)); err == nil {
		t.Error("closed holders keep connections")
	}
}

// A listener that is drained goes on when many more have connected than its
// queue takes, and does not free the 4-tuples of those that are still open.
func TestDrain(t *testing.T) {
	h := begin(t, "tcp")
	address := netip.MustParseAddrPort("127.1.0.3:1000")
	listener, err := socket("tcp", address.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(listener)
	if err := unix.Bind(listener, sockaddr(address)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(listener, 2048); err != nil {
		t.Fatal(err)
	}
	go drain(listener)
	held, err := dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	for i := range 5000 {
		conn, err := dial("tcp", address)
		if err != nil {
			t.Fatalf("dial %d: %v", i, err)
		}
		hold(descriptorOf(t, conn))
		conn.Close()
	}
	if err := h.Take("tcp", source, address, []uint16{portOf(held)}); !errors.Is(err, unix.EADDRNOTAVAIL) {
		t.Errorf("a 4-tuple is free although its connection is open: %v", err)
	}
}

func portOf(conn net.Conn) uint16 {
	return netip.MustParseAddrPort(conn.LocalAddr().String()).Port()
}
