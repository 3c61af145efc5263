package inuse

import (
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/sys"
)

// BindAnyPort binds a socket of "tcp" or "udp" to the address and a port of the
// kernel's choice, and closes it: EADDRINUSE if there is no port that nobody is
// on. An IPv6 socket has IPV6_V6ONLY if only6 is true.
func BindAnyPort(protocol string, source netip.Addr, only6 bool) error {
	o := newOrigin(protocol, source)
	fd, err := o.socket(only6)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	sa := sys.NewSockaddr(o.family, netip.AddrPortFrom(source, 0), o.scope)
	return os.NewSyscallError("bind", sys.BindAnyPort(fd, &sa))
}
