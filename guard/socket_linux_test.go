package guard

import (
	"cmp"
	"net/netip"
	"slices"
	"testing"
	"time"
	"unsafe"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A socket is a UDP socket of a test.
type socket struct {
	t      testing.TB
	fd     int
	family int
}

// open opens a socket that shares its port.
func open(t testing.TB, family int) *socket {
	t.Helper()
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	s := &socket{t: t, fd: fd, family: family}
	t.Cleanup(s.close)
	s.set(unix.SO_REUSEADDR, 1)
	return s
}

func (s *socket) set(option, value int) {
	s.t.Helper()
	if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, option, value); err != nil {
		s.t.Fatal(err)
	}
}

func (s *socket) get(option int) int {
	s.t.Helper()
	value, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, option)
	if err != nil {
		s.t.Fatal(err)
	}
	return value
}

// close may be called twice.
func (s *socket) close() {
	if s.fd >= 0 {
		unix.Close(s.fd)
	}
	s.fd = -1
}

func (s *socket) bind(local string) *socket {
	s.t.Helper()
	if err := unix.Bind(s.fd, s.address(local)); err != nil {
		s.t.Fatalf("bind %s: %v", local, err)
	}
	return s
}

func (s *socket) connect(remote string) error { return unix.Connect(s.fd, s.address(remote)) }

func (s *socket) mustConnect(remote string) *socket {
	s.t.Helper()
	if err := s.connect(remote); err != nil {
		s.t.Fatalf("connect %s: %v", remote, err)
	}
	return s
}

// mustFail connects, which has to end with the error.
func (s *socket) mustFail(remote string, want error) {
	s.t.Helper()
	if err := s.connect(remote); err != want {
		s.t.Fatalf("connect %s: %v, want %v", remote, err, want)
	}
}

func (s *socket) disconnect() {
	s.t.Helper()
	if err := disconnect(s.fd); err != nil {
		s.t.Fatal(err)
	}
}

// disconnect connects to AF_UNSPEC, which is 0.
func disconnect(fd int) error {
	var unspec [16]byte
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&unspec)), uintptr(len(unspec)))
	if errno != 0 {
		return errno
	}
	return nil
}

func (s *socket) port() uint16 {
	s.t.Helper()
	switch sa, err := unix.Getsockname(s.fd); sa := sa.(type) {
	case *unix.SockaddrInet4:
		return uint16(sa.Port)
	case *unix.SockaddrInet6:
		return uint16(sa.Port)
	default:
		s.t.Fatal(err)
		return 0
	}
}

// address has IPv4 addresses in the mapped form for an IPv6 socket.
func (s *socket) address(text string) unix.Sockaddr {
	a := netip.MustParseAddrPort(text)
	if s.family == unix.AF_INET {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

// A connection is what both sock_diag and a guard know.
type connection struct {
	Cookie        uint64
	Local, Remote netip.AddrPort
	inode         uint32 // only in a dump
}

// connected is the dump of connected UDP sockets that have their port to
// themselves or share it, but not of those for which the kernel has picked one.
func connected(t testing.TB) []connection {
	t.Helper()
	var all []connection
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		found, err := netlink.SocketDiagUDP(family)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range found {
			if s.State == netlink.TCP_ESTABLISHED {
				all = append(all, connection{
					Cookie: uint64(s.ID.Cookie[1])<<32 | uint64(s.ID.Cookie[0]),
					Local:  addrPort(s.ID.Source, s.ID.SourcePort), Remote: addrPort(s.ID.Destination, s.ID.DestinationPort),
					inode: s.INode,
				})
			}
		}
	}
	return all
}

func addrPort(ip []byte, port uint16) netip.AddrPort {
	a, _ := netip.AddrFromSlice(ip)
	return netip.AddrPortFrom(a.Unmap(), port)
}

// patience is for what comes in a moment, on however busy a machine.
const patience = 30 * time.Second

// eventually waits until something is so.
func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !is(); {
		if time.Now().After(deadline) {
			t.Fatalf("not in %v: %s", patience, what)
		}
	}
}

// mustMatch has the reservations be the connected sockets, except those with a
// cookie in aside. What a running thread is in doubt about may take a moment.
func mustMatch(t testing.TB, g *Guard, aside ...uint64) {
	t.Helper()
	byCookie := cmpopts.SortSlices(func(a, b connection) bool {
		return cmp.Or(cmp.Compare(a.Cookie, b.Cookie), a.Remote.Compare(b.Remote)) < 0
	})
	for deadline := time.Now().Add(patience); ; {
		reservations, err := g.Reservations()
		if err != nil {
			t.Fatal(err)
		}
		var reserved []connection
		for _, r := range reservations {
			if slices.Contains(aside, r.Cookie) {
				continue
			}
			reserved = append(reserved, connection{Cookie: r.Cookie, Local: r.Local, Remote: r.Remote})
		}
		want := slices.DeleteFunc(connected(t), func(c connection) bool { return slices.Contains(aside, c.Cookie) })
		diff := gocmp.Diff(want, reserved, byCookie, cmpopts.EquateEmpty(), cmpopts.IgnoreUnexported(connection{}), cmpopts.EquateComparable(netip.AddrPort{}))
		if diff == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("connected sockets and reservations (-want +got):\n%s", diff)
		}
	}
}

func (s *socket) cookie() uint64 {
	s.t.Helper()
	cookie, err := unix.GetsockoptUint64(s.fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		s.t.Fatal(err)
	}
	return cookie
}
