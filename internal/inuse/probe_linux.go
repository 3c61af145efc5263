package inuse

import (
	"net/netip"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/sys"
)

// A probe finds out by trying whether a source address can have a local port
// beside the sockets that are on it: sock_diag does not tell SO_REUSEADDR. It
// sends nothing.
type probe struct {
	origin
	fd       int        // a socket for the next bind; -1 if there is none
	conn     int        // a socket for connect
	near     netip.Addr // where that connects from and to
	confined bool       // connect answers when confined to a port: since Linux 6.3
}

// newProbe returns the error EADDRNOTAVAIL if the address is not on this machine.
func newProbe(protocol string, source netip.Addr) (*probe, error) {
	p := &probe{origin: newOrigin(protocol, source), fd: -1, conn: -1}
	if err := p.openConn(); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

func (p *probe) close() {
	for _, fd := range []int{p.fd, p.conn} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// bind reports whether a socket can be bound to the port, with SO_REUSEADDR or
// without. A socket whose bind has failed is good for the next port.
func (p *probe) bind(port uint16, reuse bool) (bool, error) {
	if p.fd < 0 {
		fd, err := p.socket(true)
		if err != nil {
			return false, err
		}
		p.fd = fd
	}
	flag := int32(0)
	if reuse {
		flag = 1
	}
	if err := sys.SetInt(p.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, flag); err != nil {
		return false, os.NewSyscallError("setsockopt", err)
	}
	sa := sys.NewSockaddr(p.family, netip.AddrPortFrom(p.source, port), p.scope)
	switch err := sys.Bind(p.fd, &sa); err {
	case nil:
		unix.Close(p.fd)
		p.fd = -1
		return true, nil
	case unix.EADDRINUSE, unix.EACCES: // the latter for a port below net.ipv4.ip_unprivileged_port_start
		return false, nil
	default:
		return false, os.NewSyscallError("bind", err)
	}
}

// connect reports whether connect may choose the port for a TCP socket: it shares
// ports that connect has chosen for other sockets, whatever their flags, but none
// that a socket was bound to (tb->fastreuse in __inet_hash_connect). True holds
// for all source addresses. False may also mean that connect cannot be confined
// to the port, as outside of the namespace's range.
//
// The socket connects to port 0 of its own address, which is no 4-tuple of
// anybody's, and Fast Open puts the handshake off to a first write that never
// comes. Where net.ipv4.tcp_fastopen forbids that, a SYN goes to the loopback
// interface and is refused.
func (p *probe) connect(port uint16) bool {
	if !p.confined || !p.confine(port) {
		return false
	}
	sa := sys.NewSockaddr(p.family, netip.AddrPortFrom(p.near, 0), p.scope)
	switch sys.ConnectTCP(p.conn, &sa) {
	case nil, unix.EINPROGRESS, unix.ECONNREFUSED:
	case unix.EADDRNOTAVAIL:
		return false
	default: // as where a security policy refuses it
		p.confined = false
		return false
	}
	local, err := sys.LocalAddr(p.conn)
	disconnect(p.conn)
	return err == nil && local.Port() == port
}

func (p *probe) confine(port uint16) bool {
	return sys.SetInt(p.conn, unix.SOL_IP, unix.IP_LOCAL_PORT_RANGE, int32(uint32(port)<<16|uint32(port))) == nil
}

// openConn makes the socket for connect. It has an address, but no port.
func (p *probe) openConn() error {
	fd, err := p.socket(true)
	if err != nil {
		return err
	}
	p.conn = fd
	// So that the port it has for a moment can be bound by others meanwhile.
	if err := sys.SetInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	for _, o := range []struct{ level, name int }{
		{unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT},
		{unix.IPPROTO_TCP, unix.TCP_FASTOPEN_NO_COOKIE},
		{unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT},
	} {
		// What a kernel lacks shows in the answers.
		_ = sys.SetInt(fd, o.level, o.name, 1)
	}
	p.confined = p.confine(1)
	p.near = p.source
	if p.source.IsUnspecified() {
		p.near = loopback(p.source.Is4())
	}
	sa := sys.NewSockaddr(p.family, netip.AddrPortFrom(p.near, 0), p.scope)
	err = sys.Bind(fd, &sa)
	if err != nil && p.source.IsUnspecified() {
		p.confined, err = false, nil // the loopback interface is down
	}
	return os.NewSyscallError("bind", err)
}

// disconnect is connect(2) to AF_UNSPEC. A port that connect has chosen is free
// again afterwards.
func disconnect(fd int) {
	sa := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	_, _, _ = unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&sa)), unsafe.Sizeof(sa))
}
