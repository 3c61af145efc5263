//go:build linux

package connectx_test

import (
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/sys"
)

// floorCalls are the system calls that a connectx.Dialer makes for an
// uncontended connection and a net.Dialer does not (strace shows them), by
// network and contract row. What net.Dialer does afterwards, connect once more
// included, is left to it.
var floorCalls = map[string][]func(*floor) error{
	"tcp/destination": {(*floor).netnsCookie, (*floor).share, (*floor).onePort, (*floor).connect},
	"tcp/source":      {(*floor).netnsCookie, (*floor).share, (*floor).noPort, (*floor).bind, (*floor).onePort, (*floor).connect},
	"tcp/source+port": {(*floor).netnsCookie, (*floor).share, (*floor).bind, (*floor).connect},
	"tcp/port":        {(*floor).netnsCookie, (*floor).share, (*floor).bind, (*floor).connect},
	"udp/destination": {(*floor).netnsCookie, (*floor).routeChanges, (*floor).bind, (*floor).connect, (*floor).share, (*floor).drain},
	"udp/source":      {(*floor).netnsCookie, (*floor).bind, (*floor).connect, (*floor).share, (*floor).drain},
	"udp/source+port": {(*floor).netnsCookie, (*floor).bind, (*floor).connect, (*floor).share, (*floor).drain},
	"udp/port":        {(*floor).netnsCookie, (*floor).routeChanges, (*floor).bind, (*floor).connect, (*floor).share, (*floor).drain},
}

// A floor is a net.Dialer with those system calls and nothing else: no decision
// is made, nothing is looked up or allocated, and addresses are ready. No dialer
// that works in net.Dialer's hook and makes these calls can cost less.
type floor struct {
	net.Dialer
	udp     bool
	family  int
	calls   []func(*floor) error
	control func(fd uintptr)
	source  netip.Addr               // where bind needs one
	port    uint16                   // that the caller chose, else 0
	remotes map[string]*sys.Sockaddr // by address, as the hook gets it
	route   int                      // a socket with nothing to read

	fd     int // of the dial under way
	remote *sys.Sockaddr
	err    error
	walk   uint16
}

func newFloor(b *testing.B, row benchRow, network, source string, addresses []string) *floor {
	b.Helper()
	f := &floor{
		udp: strings.HasPrefix(network, "udp"), family: unix.AF_INET,
		calls: floorCalls[network+"/"+row.name], port: row.port, remotes: map[string]*sys.Sockaddr{},
	}
	if f.calls == nil {
		b.Fatalf("no system calls are known for %s/%s", network, row.name)
	}
	for _, address := range addresses {
		remote := netip.MustParseAddrPort(address)
		if remote.Addr().Is6() {
			f.family = unix.AF_INET6
		}
		sa := sys.NewSockaddr(f.family, remote, 0)
		f.remotes[address] = &sa
	}
	switch {
	case row.source:
		f.source = netip.MustParseAddr(source)
	case f.udp:
		conn, err := net.Dial(network, addresses[0])
		if err != nil {
			b.Fatal(err)
		}
		f.source = conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap()
		conn.Close()
	}
	route, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { unix.Close(route) })
	f.route = route
	f.Dialer.Control = f.hook
	f.control = f.run
	return f
}

func (f *floor) Dial(network, address string) (net.Conn, error) {
	conn, err := f.Dialer.Dial(network, address)
	if f.udp && err == nil {
		_, _ = sys.Peek(f.fd)
	}
	return conn, err
}

func (f *floor) hook(_, address string, c syscall.RawConn) error {
	f.remote = f.remotes[address]
	if err := c.Control(f.control); err != nil {
		return err
	}
	return f.err
}

func (f *floor) run(fd uintptr) {
	f.fd = int(fd)
	for _, call := range f.calls {
		if f.err = call(f); f.err != nil {
			return
		}
	}
}

func (f *floor) netnsCookie() error {
	_, err := sys.Cookie(f.fd, unix.SO_NETNS_COOKIE)
	return err
}

func (f *floor) share() error { return sys.SetInt(f.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) }

func (f *floor) noPort() error {
	return sys.SetInt(f.fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
}

func (f *floor) onePort() error {
	port := uint32(f.nextPort())
	return sys.SetInt(f.fd, unix.SOL_IP, unix.IP_LOCAL_PORT_RANGE, int32(port<<16|port))
}

func (f *floor) bind() error {
	port := f.port
	if f.udp && port == 0 {
		port = f.nextPort()
	}
	sa := sys.NewSockaddr(f.family, netip.AddrPortFrom(f.source, port), 0)
	return sys.Bind(f.fd, &sa)
}

func (f *floor) connect() error {
	if f.udp {
		return sys.ConnectUDP(f.fd, f.remote)
	}
	err := sys.ConnectTCP(f.fd, f.remote)
	if err == unix.EINPROGRESS {
		return nil
	}
	return err
}

func (f *floor) drain() error {
	var b [1]byte
	_, _ = sys.Recv(f.fd, b[:], 0)
	return nil
}

func (f *floor) routeChanges() error {
	var b [1]byte
	_, _ = sys.Recv(f.route, b[:], 0)
	return nil
}

// nextPort walks through the even offsets of the range in steps that have no
// common divisor with their number, so that ports are as far apart as those that
// a dialer picks at random.
func (f *floor) nextPort() uint16 {
	const half, step = (benchHigh - benchLow + 1) / 2, 5003
	f.walk = (f.walk + step) % half
	return benchLow + 2*f.walk
}
