package guard

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/portpick"
)

// setPorts tells the programs the ephemeral port range of the namespace, and
// whether few of the ports were free when sync last went through the sockets, if
// they are to share ports.
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
	ns, err := namespace()
	if err != nil {
		return err
	}
	var taken programsPortSet
	if err := g.objects.Taken.Lookup(ns, &taken); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("look which ports are taken: %w", err)
	}
	p := programsPorts{Low: uint32(ports.Low()), Count: uint32(ports.High()-ports.Low()) + 1}
	free := ports.Len()
	for port := int(ports.Low()); port <= int(ports.High()); port++ {
		word, bit := port/64, uint64(1)<<(port%64)
		switch {
		case !ports.Contains(uint16(port)):
			p.Reserved[word] |= bit
		case taken.Ports[word]&bit != 0:
			free--
		}
	}
	if free <= ports.Len()/crowded {
		p.Crowded = 1
	}
	if err := g.objects.Ports.Put(ns, &p); err != nil {
		return fmt.Errorf("note the ephemeral port range: %w", err)
	}
	return nil
}

// crowded is the part of the ports below which few are free.
const crowded = 8

// forgetTaken makes ready for the next time that sync goes through the sockets.
func (g *Guard) forgetTaken() error {
	if !g.share {
		return nil
	}
	ns, err := namespace()
	if err != nil {
		return err
	}
	if err := g.objects.Taken.Put(ns, &programsPortSet{}); err != nil {
		return fmt.Errorf("forget which ports are taken: %w", err)
	}
	return nil
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
