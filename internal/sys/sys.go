//go:build linux

// Package sys holds the few system calls of the dial path.
//
// They differ from those of golang.org/x/sys/unix in two ways. Addresses and
// options are passed from the stack, so a call allocates nothing. And the
// calls that run while a port is locked enter the kernel without telling the
// Go scheduler: none of them can block, and a goroutine that lost its
// processor on the way out of one would hold the lock until it is scheduled
// again.
package sys

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Sockaddr is a struct sockaddr_in or sockaddr_in6, ready for the kernel.
type Sockaddr struct {
	raw unix.RawSockaddrInet6 // large enough for either
	len uintptr
}

// NewSockaddr returns the socket address of ap for a socket of the given
// family (AF_INET or AF_INET6). scope is the index of the interface that a
// link-local IPv6 address belongs to, else 0. An invalid address stands for
// the wildcard.
func NewSockaddr(family int, ap netip.AddrPort, scope uint32) Sockaddr {
	var sa Sockaddr
	port := (*[2]byte)(unsafe.Pointer(&sa.raw.Port))
	binary.BigEndian.PutUint16(port[:], ap.Port())
	if family == unix.AF_INET {
		in := (*unix.RawSockaddrInet4)(unsafe.Pointer(&sa.raw))
		in.Family = unix.AF_INET
		if ap.Addr().IsValid() {
			in.Addr = ap.Addr().As4()
		}
		sa.len = unix.SizeofSockaddrInet4
		return sa
	}
	sa.raw.Family = unix.AF_INET6
	if ap.Addr().IsValid() {
		sa.raw.Addr = ap.Addr().As16()
	}
	sa.raw.Scope_id = scope
	sa.len = unix.SizeofSockaddrInet6
	return sa
}

func errno(e unix.Errno) error {
	if e != 0 {
		return e
	}
	return nil
}

// Bind is bind(2).
func Bind(fd int, sa *Sockaddr) error {
	_, _, e := unix.RawSyscall(unix.SYS_BIND, uintptr(fd), uintptr(unsafe.Pointer(&sa.raw)), sa.len)
	return errno(e)
}

// BindAnyPort is bind(2) to port 0. The kernel searches for a port, which may take
// long, so the scheduler is told.
func BindAnyPort(fd int, sa *Sockaddr) error {
	_, _, e := unix.Syscall(unix.SYS_BIND, uintptr(fd), uintptr(unsafe.Pointer(&sa.raw)), sa.len)
	return errno(e)
}

// ConnectUDP is connect(2) on a datagram socket, which never waits.
func ConnectUDP(fd int, sa *Sockaddr) error {
	_, _, e := unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&sa.raw)), sa.len)
	return errno(e)
}

// ConnectTCP is connect(2) on a non-blocking stream socket. The kernel's
// search for a port, and on loopback the whole handshake, happen in it, so
// the scheduler is told.
func ConnectTCP(fd int, sa *Sockaddr) error {
	_, _, e := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&sa.raw)), sa.len)
	return errno(e)
}

// SetInt sets a socket option that is an int.
func SetInt(fd, level, option int, value int32) error {
	_, _, e := unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&value)), unsafe.Sizeof(value), 0)
	return errno(e)
}

// Int reads a socket option that is an int.
func Int(fd, level, option int) (int32, error) {
	var value int32
	size := uint32(unsafe.Sizeof(value))
	_, _, e := unix.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&value)), uintptr(unsafe.Pointer(&size)), 0)
	return value, errno(e)
}

// Cookie reads a socket option that is a 64-bit number: SO_COOKIE or
// SO_NETNS_COOKIE.
func Cookie(fd, option int) (uint64, error) {
	var value uint64
	size := uint32(unsafe.Sizeof(value))
	_, _, e := unix.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, uintptr(option),
		uintptr(unsafe.Pointer(&value)), uintptr(unsafe.Pointer(&size)), 0)
	return value, errno(e)
}

// Send is send(2) without waiting.
func Send(fd int, p []byte) error {
	_, _, e := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))),
		uintptr(len(p)), unix.MSG_DONTWAIT, 0, 0)
	return errno(e)
}

// Recv is recv(2) without waiting. With MSG_TRUNC in flags the length
// returned is that of the whole message, even where p is shorter.
func Recv(fd int, p []byte, flags int) (int, error) {
	n, _, e := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))),
		uintptr(len(p)), uintptr(flags)|unix.MSG_DONTWAIT, 0, 0)
	return int(n), errno(e)
}

// Messages is room for several messages that are received in one system call.
type Messages struct {
	headers []mmsghdr
	buffers []byte
	size    int
}

type mmsghdr struct {
	unix.Msghdr
	len uint32
}

// NewMessages returns room for n messages of the given size; of a longer one,
// the beginning is kept.
func NewMessages(n, size int) *Messages {
	m := &Messages{headers: make([]mmsghdr, n), buffers: make([]byte, n*size), size: size}
	iovecs := make([]unix.Iovec, n)
	for i := range n {
		iovecs[i].Base = &m.buffers[i*size]
		iovecs[i].SetLen(size)
		m.headers[i].Iov = &iovecs[i]
		m.headers[i].SetIovlen(1)
	}
	return m
}

// At returns what the last Recv has received into the ith place.
func (m *Messages) At(i int) []byte {
	return m.buffers[i*m.size:][:m.headers[i].len]
}

// Recv is recvmmsg(2) without waiting. It receives at most n messages and
// returns how many there were.
func (m *Messages) Recv(fd, n int) (int, error) {
	got, _, e := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(m.headers))),
		uintptr(n), unix.MSG_DONTWAIT, 0, 0)
	return int(got), errno(e)
}

// Peek returns the source of the first datagram that is waiting, and leaves it
// where it is. An IPv4-mapped address comes back as IPv4, without a zone.
func Peek(fd int) (netip.AddrPort, error) {
	var raw unix.RawSockaddrInet6
	size := uint32(unsafe.Sizeof(raw))
	_, _, e := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), 0, 0, unix.MSG_PEEK|unix.MSG_DONTWAIT,
		uintptr(unsafe.Pointer(&raw)), uintptr(unsafe.Pointer(&size)))
	return addrPort(&raw), errno(e)
}

// LocalAddr is getsockname(2) for IPv4 and IPv6. An IPv4-mapped address
// comes back as IPv4, without a zone.
func LocalAddr(fd int) (netip.AddrPort, error) {
	var raw unix.RawSockaddrInet6
	size := uint32(unsafe.Sizeof(raw))
	_, _, e := unix.RawSyscall(unix.SYS_GETSOCKNAME, uintptr(fd),
		uintptr(unsafe.Pointer(&raw)), uintptr(unsafe.Pointer(&size)))
	return addrPort(&raw), errno(e)
}

func addrPort(raw *unix.RawSockaddrInet6) netip.AddrPort {
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&raw.Port))[:])
	if raw.Family == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(raw)).Addr), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom16(raw.Addr).Unmap(), port)
}
