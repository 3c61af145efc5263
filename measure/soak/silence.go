//go:build linux

package main

import (
	"errors"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// silentPort is the port on which nobody answers.
const silentPort = 7008

// A silence is the two listeners, one of each family, that let nobody connect: they
// have room for one connection that is not accepted, and that is there.
type silence []int

func (s *silence) open() error {
	for f := range family(families) {
		domain, sa := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: silentPort})
		if f == 1 {
			domain, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: silentPort}
		}
		listener, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		*s = append(*s, listener)
		if f == 1 {
			_ = unix.SetsockoptInt(listener, unix.SOL_IPV6, unix.IPV6_V6ONLY, 1)
		}
		if err := errors.Join(unix.Bind(listener, sa), unix.Listen(listener, 0)); err != nil {
			return err
		}
		client, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		*s = append(*s, client)
		// From a source of its own: nobody else may be in the way of its port.
		if err := unix.Bind(client, sockaddr(netip.AddrPortFrom(sourceAddr(f, referenceSource), firstReference-1))); err != nil {
			return os.NewSyscallError("bind", err)
		}
		to := netip.AddrPortFrom(destination(f, mainNet, 0).Addr(), silentPort)
		if err := unix.Connect(client, sockaddr(to)); err != nil {
			return os.NewSyscallError("connect", err)
		}
	}
	return nil
}

func (s *silence) close() {
	for _, fd := range *s {
		unix.Close(fd)
	}
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}
