package inuse

import (
	"net"
	"net/netip"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/sys"
)

// A probe finds out by trying whether a source address can have a local port
// beside the sockets that are on it: sock_diag does not tell SO_REUSEADDR. It
// sends nothing.
type probe struct {
	protocol string
	family   int
	source   netip.Addr
	scope    uint32
	fd       int  // a socket for the next bind; -1 if there is none
	conn     int  // a socket with the source address, for connect
	confined bool // connect can be confined to a port: since Linux 6.3
}

// newProbe returns the error EADDRNOTAVAIL if the address is not on this machine.
func newProbe(protocol string, source netip.Addr) (*probe, error) {
	p := &probe{protocol: protocol, family: unix.AF_INET, source: source, fd: -1, conn: -1}
	if source.Is6() {
		p.family = unix.AF_INET6
		p.scope = interfaceIndex(source.Zone())
	}
	if err := p.openConn(); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// interfaceIndex returns 0, which the kernel refuses where it matters, if there
// is no such interface.
func interfaceIndex(zone string) uint32 {
	if i, err := net.InterfaceByName(zone); err == nil {
		return uint32(i.Index)
	}
	index, err := strconv.ParseUint(zone, 10, 32)
	if err != nil {
		return 0
	}
	return uint32(index)
}

func (p *probe) close() {
	for _, fd := range []int{p.fd, p.conn} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

func (p *probe) socket() (int, error) {
	kind := unix.SOCK_DGRAM
	if p.protocol == "tcp" {
		kind = unix.SOCK_STREAM
	}
	fd, err := unix.Socket(p.family, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if p.family == unix.AF_INET6 {
		if err := sys.SetInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			unix.Close(fd)
			return -1, os.NewSyscallError("setsockopt", err)
		}
	}
	return fd, nil
}

// bind reports whether a socket can be bound to the port, with SO_REUSEADDR or
// without. A socket whose bind has failed is good for the next port.
func (p *probe) bind(port uint16, reuse bool) (bool, error) {
	if p.fd < 0 {
		fd, err := p.socket()
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
	if !p.confine(port) {
		return false
	}
	sa := sys.NewSockaddr(p.family, netip.AddrPortFrom(p.source, 0), p.scope)
	switch sys.ConnectTCP(p.conn, &sa) {
	case nil, unix.EINPROGRESS, unix.ECONNREFUSED:
	default:
		return false
	}
	local, err := sys.LocalAddr(p.conn)
	disconnect(p.conn)
	return err == nil && local.Port() == port
}

func (p *probe) confine(port uint16) bool {
	return sys.SetInt(p.conn, unix.SOL_IP, unix.IP_LOCAL_PORT_RANGE, int32(uint32(port)<<16|uint32(port))) == nil
}

// openConn makes the socket for connect. It has the address, but no port.
func (p *probe) openConn() error {
	fd, err := p.socket()
	if err != nil {
		return err
	}
	p.conn = fd
	for _, o := range []struct{ level, name int }{
		{unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT},
		{unix.IPPROTO_TCP, unix.TCP_FASTOPEN_NO_COOKIE},
		{unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT},
	} {
		// What a kernel lacks shows in the answers.
		_ = sys.SetInt(fd, o.level, o.name, 1)
	}
	p.confined = p.confine(1)
	sa := sys.NewSockaddr(p.family, netip.AddrPortFrom(p.source, 0), p.scope)
	return os.NewSyscallError("bind", sys.Bind(fd, &sa))
}

// disconnect is connect(2) to AF_UNSPEC. A port that connect has chosen is free
// again afterwards.
func disconnect(fd int) {
	sa := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	_, _, _ = unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&sa)), unsafe.Sizeof(sa))
}
