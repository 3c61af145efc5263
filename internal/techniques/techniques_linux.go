package techniques

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/lookup"
)

// All returns the techniques, connectx among them.
func All() []Technique {
	return []Technique{
		{"net.Dialer", true, true, newNet},
		{"connectx.Dialer", true, true, newConnectx},
		{"connectx.Dialer+source", true, true, newConnectxSource},
		{"bind-before-connect", true, true, newBindBeforeConnect},
		{"SO_REUSEADDR", true, true, newReuseAddr},
		{"IP_BIND_ADDRESS_NO_PORT", true, false, newNoPort},
		{"random-port", true, true, newRandomPort},
		{"port-ring", true, true, newPortRing},
		{"article", true, true, newArticle},
		{"system-calls", true, true, newSystemCalls},
	}
}

// newNet leaves everything to connect.
func newNet(string, netip.Addr, uint16, uint16) Dialer { return &net.Dialer{} }

func newConnectx(string, netip.Addr, uint16, uint16) Dialer { return &connectx.Dialer{} }

func newConnectxSource(network string, source netip.Addr, _, _ uint16) Dialer {
	return &connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr(network, source, 0)}}
}

// newBindBeforeConnect lets bind choose the port, which does not know the
// destination.
func newBindBeforeConnect(network string, source netip.Addr, _, _ uint16) Dialer {
	return &net.Dialer{LocalAddr: localAddr(network, source, 0)}
}

// newReuseAddr sets both flags, as go-reuseport does. UDP connections may
// overshadow one another.
func newReuseAddr(network string, source netip.Addr, _, _ uint16) Dialer {
	return &net.Dialer{
		LocalAddr: localAddr(network, source, 0),
		Control: options(
			option{unix.SOL_SOCKET, unix.SO_REUSEADDR},
			option{unix.SOL_SOCKET, unix.SO_REUSEPORT},
		),
	}
}

// newNoPort leaves the choice of the port to connect, although bind gives the
// socket its source address. UDP ports are not shared for that.
func newNoPort(network string, source netip.Addr, _, _ uint16) Dialer {
	return &net.Dialer{
		LocalAddr: localAddr(network, source, 0),
		Control:   options(option{unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT}),
	}
}

// randomPortTries is how often random-port dials before it gives up: with 95 %
// of the ports taken it fails once in 170 dials then, with 99 % once in three.
const randomPortTries = 100

type randomPort struct {
	source    netip.Addr
	low, high uint16
}

func newRandomPort(_ string, source netip.Addr, low, high uint16) Dialer {
	return randomPort{source, low, high}
}

func (r randomPort) Dial(network, address string) (conn net.Conn, err error) {
	for range randomPortTries {
		port := r.low + uint16(rand.IntN(int(r.high)-int(r.low)+1))
		conn, err = dialFrom(network, r.source, port, address)
		if !portTaken(err) {
			break
		}
	}
	return conn, err
}

// dialFrom dials from a port of the caller's choice. TCP shares it; for UDP that
// would risk overshadowing, so it is had only while nobody else has it.
func dialFrom(network string, source netip.Addr, port uint16, address string) (net.Conn, error) {
	d := net.Dialer{LocalAddr: localAddr(network, source, port)}
	if isTCP(network) {
		d.Control = options(option{unix.SOL_SOCKET, unix.SO_REUSEADDR})
	}
	return d.Dial(network, address)
}

func portTaken(err error) bool {
	return errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EADDRNOTAVAIL)
}

// A portRing is the ports that this program has no connection on, in the order
// in which they became free: HAProxy's way. Ports that others have taken are
// found out by trying.
type portRing struct {
	source netip.Addr
	free   chan uint16
}

func newPortRing(_ string, source netip.Addr, low, high uint16) Dialer {
	r := &portRing{source, make(chan uint16, int(high)-int(low)+1)}
	for i := range cap(r.free) {
		r.free <- low + uint16(i)
	}
	return r
}

// errNoPort is the error of the techniques that choose ports themselves and
// have found none.
var errNoPort = fmt.Errorf("no free port: %w", unix.EADDRNOTAVAIL)

// Dial tries each port once at most. A port that is taken goes to the end of
// the ring.
func (r *portRing) Dial(network, address string) (net.Conn, error) {
	for range cap(r.free) {
		var port uint16
		select {
		case port = <-r.free:
		default:
			return nil, errNoPort
		}
		giveBack := sync.OnceFunc(func() { r.free <- port })
		conn, err := dialFrom(network, r.source, port, address)
		switch conn := conn.(type) {
		case *net.TCPConn:
			return ringTCPConn{conn, giveBack}, nil
		case *net.UDPConn:
			return ringUDPConn{conn, giveBack}, nil
		}
		giveBack()
		if !portTaken(err) {
			return nil, err
		}
	}
	return nil, errNoPort
}

// A ringTCPConn gives its port back to the ring when it is closed.
type ringTCPConn struct {
	*net.TCPConn
	giveBack func()
}

func (c ringTCPConn) Close() error {
	defer c.giveBack()
	return c.TCPConn.Close()
}

// A ringUDPConn gives its port back to the ring when it is closed.
type ringUDPConn struct {
	*net.UDPConn
	giveBack func()
}

func (c ringUDPConn) Close() error {
	defer c.giveBack()
	return c.UDPConn.Close()
}

// newArticle is the algorithm of "How to stop running out of ephemeral ports
// and start to love long-lived connections", for a source address without a
// port.
func newArticle(network string, source netip.Addr, low, high uint16) Dialer {
	if isTCP(network) {
		return &net.Dialer{
			LocalAddr: localAddr(network, source, 0),
			Control: options(
				option{unix.SOL_SOCKET, unix.SO_REUSEADDR},
				option{unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT},
			),
		}
	}
	return &article{source: source, low: low, high: high}
}

type article struct {
	source    netip.Addr
	low, high uint16

	mu   sync.Mutex
	diag *lookup.Conn // nil until the first dial
}

func (a *article) Dial(network, address string) (net.Conn, error) {
	remote, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	local, err := a.freeTuple(remote)
	if err != nil {
		return nil, err
	}
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		return control(c, func(fd int) error { return a.lock(fd, local, remote) })
	}}
	conn, err := d.Dial(network, address)
	if err != nil {
		return nil, err
	}
	// Unlocks the port.
	raw, err := conn.(*net.UDPConn).SyscallConn()
	if err == nil {
		err = control(raw, option{unix.SOL_SOCKET, unix.SO_REUSEADDR}.set)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// freeTuple scans the range from a random port for one that no socket has
// towards the destination.
func (a *article) freeTuple(remote netip.AddrPort) (netip.AddrPort, error) {
	ports := int(a.high) - int(a.low) + 1
	start := rand.IntN(ports)
	for i := range ports {
		local := netip.AddrPortFrom(a.source, a.low+uint16((start+i)%ports))
		switch _, err := a.lookup(local, remote); err {
		case nil:
		case lookup.ErrNotFound:
			return local, nil
		default:
			return netip.AddrPort{}, err
		}
	}
	return netip.AddrPort{}, fmt.Errorf("no free port: %w", unix.EAGAIN)
}

func (a *article) lookup(local, remote netip.AddrPort) (lookup.Socket, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.diag == nil {
		diag, err := lookup.Open()
		if err != nil {
			return lookup.Socket{}, err
		}
		a.diag = diag
		runtime.AddCleanup(a, func(c *lookup.Conn) { c.Close() }, diag)
	}
	return a.diag.UDP(local, remote, 0)
}

// lock binds the socket, locks its port, and finds out whether it would receive
// what the peer sends.
func (a *article) lock(fd int, local, remote netip.AddrPort) error {
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		return os.NewSyscallError("getsockopt", err)
	}
	if err := (option{unix.SOL_SOCKET, unix.SO_REUSEADDR}).set(fd); err != nil {
		return err
	}
	if err := unix.Bind(fd, sockaddr(local)); err != nil {
		return os.NewSyscallError("bind", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 0); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	found, err := a.lookup(local, remote)
	if err == nil && found.Cookie != cookie {
		err = fmt.Errorf("%v->%v: %w", local, remote, unix.EADDRINUSE)
	}
	return err
}

// An option is a socket option that a technique switches on.
type option struct{ level, name int }

func (o option) set(fd int) error {
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, o.level, o.name, 1))
}

// options is a Control hook that switches options on.
func options(list ...option) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		return control(c, func(fd int) error {
			for _, o := range list {
				if err := o.set(fd); err != nil {
					return err
				}
			}
			return nil
		})
	}
}

func control(c syscall.RawConn, do func(fd int) error) error {
	var err error
	if controlErr := c.Control(func(fd uintptr) { err = do(int(fd)) }); controlErr != nil {
		return controlErr
	}
	return err
}

func isTCP(network string) bool { return strings.HasPrefix(network, "tcp") }

func localAddr(network string, source netip.Addr, port uint16) net.Addr {
	if isTCP(network) {
		return net.TCPAddrFromAddrPort(netip.AddrPortFrom(source, port))
	}
	return net.UDPAddrFromAddrPort(netip.AddrPortFrom(source, port))
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}
