package inuse

import (
	"net"
	"net/netip"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/sys"
)

// An origin is what sockets are made for that try ports of a source address.
type origin struct {
	protocol string
	family   int
	source   netip.Addr
	scope    uint32
}

func newOrigin(protocol string, source netip.Addr) origin {
	o := origin{protocol: protocol, family: unix.AF_INET, source: source}
	if source.Is6() {
		o.family = unix.AF_INET6
		o.scope = interfaceIndex(source.Zone())
	}
	return o
}

func loopback(is4 bool) netip.Addr {
	if is4 {
		return netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	return netip.IPv6Loopback()
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

// socket makes a socket. An IPv6 socket has IPV6_V6ONLY if only6 is true.
func (o *origin) socket(only6 bool) (int, error) {
	kind := unix.SOCK_DGRAM
	if o.protocol == "tcp" {
		kind = unix.SOCK_STREAM
	}
	fd, err := unix.Socket(o.family, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if o.family == unix.AF_INET6 && only6 {
		if err := sys.SetInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			unix.Close(fd)
			return -1, os.NewSyscallError("setsockopt", err)
		}
	}
	return fd, nil
}
