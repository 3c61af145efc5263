package lookup

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/netns"
	"github.com/seed22601231/connectx/internal/sys"
)

func TestMain(m *testing.M) { os.Exit(netns.Main(m.Run)) }

// comparable lets cmp look at types of other packages that it need not see the
// inside of.
var comparable = cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{})

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func openConn(t testing.TB) *Conn {
	t.Helper()
	c, err := Open()
	check(t, err)
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// A spec describes a UDP socket.
type spec struct {
	family  int            // AF_INET or AF_INET6; 0: that of bind
	device  uint32         // SO_BINDTOIFINDEX
	share   bool           // SO_REUSEADDR
	v6only  bool           // IPV6_V6ONLY
	mark    uint32         // SO_MARK
	bind    netip.AddrPort // not bound if invalid
	connect netip.AddrPort // not connected if invalid
	scope   uint32         // interface of link-local addresses
}

// open makes a socket. Its error is that of the first step which fails.
func (s spec) open() (int, error) {
	family := s.family
	if family == 0 {
		family = familyOf(s.bind.Addr())
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if err := s.apply(fd, family); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func (s spec) apply(fd, family int) (err error) {
	set := func(level, option int, value uint32) {
		if value != 0 && err == nil {
			err = os.NewSyscallError(fmt.Sprintf("setsockopt %d", option), sys.SetInt(fd, level, option, int32(value)))
		}
	}
	set(unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, s.device)
	set(unix.SOL_SOCKET, unix.SO_MARK, s.mark)
	if s.share {
		set(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	if s.v6only {
		set(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if err != nil {
		return err
	}
	if s.bind.IsValid() {
		sa := sys.NewSockaddr(family, s.bind, s.scope)
		if err := sys.Bind(fd, &sa); err != nil {
			return os.NewSyscallError("bind", err)
		}
	}
	if s.connect.IsValid() {
		sa := sys.NewSockaddr(family, s.connect, s.scope)
		if err := sys.ConnectUDP(fd, &sa); err != nil {
			return os.NewSyscallError("connect", err)
		}
	}
	return nil
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// openSocket makes a socket, and returns what a lookup should say of it.
func openSocket(t testing.TB, s spec) (fd int, want Socket) {
	t.Helper()
	fd, err := s.open()
	check(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	cookie, err := sys.Cookie(fd, unix.SO_COOKIE)
	check(t, err)
	local, err := sys.LocalAddr(fd)
	check(t, err)
	want = Socket{Cookie: cookie, Local: local, UID: uint32(os.Getuid())}
	if s.connect.IsValid() {
		want.Remote = netip.AddrPortFrom(s.connect.Addr().Unmap(), s.connect.Port())
	}
	return fd, want
}

// freePorts returns ports that nobody uses. The sockets that found them are
// closed again: they would be what the lookups find.
func freePorts(t testing.TB, n int) []uint16 {
	t.Helper()
	var ports []uint16
	for range n {
		fd, err := spec{family: unix.AF_INET, bind: netip.AddrPortFrom(netip.IPv4Unspecified(), 0)}.open()
		check(t, err)
		defer unix.Close(fd)
		local, err := sys.LocalAddr(fd)
		check(t, err)
		ports = append(ports, local.Port())
	}
	return ports
}

func needIPv6(t testing.TB) {
	t.Helper()
	fd, err := spec{bind: netip.AddrPortFrom(netip.IPv6Loopback(), 0)}.open()
	if err != nil {
		t.Skip("needs IPv6:", err)
	}
	unix.Close(fd)
}

// enter gives the test a network namespace of its own.
func enter(t testing.TB) {
	t.Helper()
	netns.Need(t)
	check(t, netns.Enter())
}

// veths makes two interfaces that are connected with each other, and brings
// them up.
func veths(t testing.TB) (v0, v1 netlink.Link) {
	t.Helper()
	err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "v0"}, PeerName: "v1"})
	if errors.Is(err, unix.EOPNOTSUPP) {
		t.Skip("needs veth interfaces:", err)
	}
	check(t, err)
	links := make([]netlink.Link, 2)
	for i, name := range []string{"v0", "v1"} {
		links[i], err = netlink.LinkByName(name)
		check(t, err)
		check(t, netlink.LinkSetUp(links[i]))
	}
	return links[0], links[1]
}

func index(l netlink.Link) uint32 { return uint32(l.Attrs().Index) }

func address(t testing.TB, s string) *netlink.Addr {
	t.Helper()
	a, err := netlink.ParseAddr(s)
	check(t, err)
	if a.IP.To4() == nil {
		a.Flags = unix.IFA_F_NODAD // usable at once
	}
	return a
}

func countDescriptors(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip(err)
	}
	return len(entries)
}

func TestCloseClosesBothSockets(t *testing.T) {
	before := countDescriptors(t)
	for range 10 {
		c, err := Open()
		check(t, err)
		if n := countDescriptors(t); n != before+2 {
			t.Fatalf("an open Conn has %d descriptors, want 2", n-before)
		}
		check(t, c.Close())
		if n := countDescriptors(t); n != before {
			t.Fatalf("%d descriptors are left after Close", n-before)
		}

		loopback := netip.MustParseAddrPort("127.0.0.1:9")
		if _, err := c.UDP(loopback, loopback, 0); !errors.Is(err, unix.EBADF) {
			t.Errorf("UDP on a closed Conn: %v", err)
		}
		if _, err := c.Source(loopback, RouteOptions{}); !errors.Is(err, unix.EBADF) {
			t.Errorf("Source on a closed Conn: %v", err)
		}
		if err := c.Close(); !errors.Is(err, unix.EBADF) {
			t.Errorf("Close a second time: %v", err)
		}
	}
}

// With ever more descriptors allowed, at first both sockets are refused, then
// only the second.
func TestOpenReportsWhichSocketIsRefusedAndLeavesNothingBehind(t *testing.T) {
	before := countDescriptors(t)
	var limit unix.Rlimit
	check(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	refused := map[string]int{}
	for allowed := uint64(0); allowed < limit.Cur; allowed++ {
		check(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: allowed, Max: limit.Max}))
		c, err := Open()
		check(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &limit))
		if n := countDescriptors(t); err != nil && n != before {
			t.Fatalf("%d descriptors are left after: %v", n-before, err)
		}
		if err == nil {
			check(t, c.Close())
			break
		}
		if !errors.Is(err, unix.EMFILE) {
			t.Fatal(err)
		}
		what, _, _ := strings.Cut(err.Error(), ":")
		refused[what]++
	}
	if refused["open sock_diag netlink"] == 0 || refused["open route netlink"] == 0 || len(refused) != 2 {
		t.Errorf("refused: %v", refused)
	}
}

// connElsewhere opens a Conn in another network namespace, after setup was run
// there, for use in this one. The thread that was there is gone by then.
func connElsewhere(t *testing.T, setup func() error) *Conn {
	t.Helper()
	netns.Need(t)
	type result struct {
		conn *Conn
		err  error
	}
	opened := make(chan result)
	go func() {
		var r result
		if r.err = netns.Enter(); r.err == nil {
			if r.err = setup(); r.err == nil {
				r.conn, r.err = Open()
			}
		}
		opened <- r
	}()
	r := <-opened
	check(t, r.err)
	t.Cleanup(func() { r.conn.Close() })
	return r.conn
}
