//go:build linux

package main

import (
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Descriptors are what is open, by kind.
type descriptors struct {
	inet    int // sockets of IPv4 and IPv6
	netlink int
	sysctl  int // files of /proc/sys/net, of which the library keeps two for each namespace
	other   int
}

func (d descriptors) all() int { return d.inet + d.netlink + d.sysctl + d.other }

// openDescriptors counts what is open, without what the count itself takes.
func openDescriptors() (d descriptors, err error) {
	dir, err := os.Open("/proc/self/fd")
	if err != nil {
		return d, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return d, err
	}
	for _, name := range names {
		fd, err := strconv.Atoi(name)
		if err != nil || fd == int(dir.Fd()) {
			continue
		}
		if domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err == nil {
			switch domain {
			case unix.AF_INET, unix.AF_INET6:
				d.inet++
			case unix.AF_NETLINK:
				d.netlink++
			default:
				d.other++
			}
			continue
		}
		target, err := os.Readlink("/proc/self/fd/" + name)
		switch {
		case err != nil: // closed meanwhile
		case strings.Contains(target, "/sys/net/"):
			d.sysctl++
		default:
			d.other++
		}
	}
	return d, nil
}
