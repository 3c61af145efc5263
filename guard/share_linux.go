package guard

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/inuse"
	"github.com/seed22601231/connectx/portpick"
)

// setPorts tells the programs the ephemeral port range of the namespace, if they
// are to share ports.
func (g *Guard) setPorts() error {
	if !g.share {
		return nil
	}
	sysctl, err := portpick.OpenSysctl()
	if err != nil {
		return err
	}
	defer sysctl.Close()
	ports, err := sysctl.Ports(nil)
	if err != nil {
		return err
	}
	used, err := portsInUse(ports)
	if err != nil {
		return err
	}
	p := programsPorts{Low: uint32(ports.Low()), Count: uint32(ports.High()-ports.Low()) + 1}
	for port := int(ports.Low()); port <= int(ports.High()); port++ {
		if !ports.Contains(uint16(port)) {
			p.Reserved[port/64] |= 1 << (port % 64)
		}
	}
	if free := ports.Len() - used; free <= ports.Len()/crowded {
		p.Crowded = 1
	}
	ns, err := namespace()
	if err != nil {
		return err
	}
	if err := g.objects.Ports.Put(ns, &p); err != nil {
		return fmt.Errorf("note the ephemeral port range: %w", err)
	}
	return nil
}

// crowded is the part of the ports below which few are free.
const crowded = 8

// portsInUse counts those of the ports that UDP sockets are on.
func portsInUse(ports *portpick.Ports) (int, error) {
	sockets, err := inuse.Sockets("udp")
	if err != nil {
		return 0, err
	}
	used := make(map[uint16]bool)
	for _, s := range sockets {
		if port := s.Local.Port(); ports.Contains(port) {
			used[port] = true
		}
	}
	return len(used), nil
}

// namespace is the cookie of the calling thread's network namespace.
func namespace() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	ns, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	return ns, os.NewSyscallError("getsockopt", err)
}
