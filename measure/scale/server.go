//go:build linux

package main

import (
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// serverSocket returns a socket of an echo server that several processes can
// inherit. It is in blocking mode: handed to a process by way of package os, it
// would be put into that anyway, for all who have it.
func serverSocket(tcp bool, address netip.AddrPort) (*os.File, error) {
	kind := unix.SOCK_DGRAM
	if tcp {
		kind = unix.SOCK_STREAM
	}
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: address.Addr().As4(), Port: int(address.Port())}); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("bind", err)
	}
	if tcp {
		if err := unix.Listen(fd, unix.SOMAXCONN); err != nil {
			unix.Close(fd)
			return nil, os.NewSyscallError("listen", err)
		}
	}
	return os.NewFile(uintptr(fd), address.String()), nil
}

// echoUDP returns every datagram that comes to the first so many inherited
// sockets. It ends only with an error.
func echoUDP(sockets int) error {
	failed := make(chan error)
	for i := range sockets {
		file := os.NewFile(uintptr(firstInherited+i), "socket")
		conn, err := net.FilePacketConn(file)
		file.Close()
		if err != nil {
			return err
		}
		go func() {
			udp := conn.(*net.UDPConn)
			var b [tokenSize + 1]byte
			for {
				n, from, err := udp.ReadFromUDPAddrPort(b[:])
				if err == nil {
					_, err = udp.WriteToUDPAddrPort(b[:n], from)
				}
				if err != nil {
					failed <- err
					return
				}
			}
		}()
	}
	return <-failed
}

// echoTCP returns every byte of the connections that come to the first so many
// inherited sockets. Several processes accept from the same ones; each stops at
// its capacity. It ends only with an error.
func echoTCP(sockets, capacity int) error {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("epoll_create1", err)
	}
	watch := func(fd int, events uint32) error {
		event := unix.EpollEvent{Events: events, Fd: int32(fd)}
		return os.NewSyscallError("epoll_ctl", unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, fd, &event))
	}
	for fd := firstInherited; fd < firstInherited+sockets; fd++ {
		if err := unix.SetNonblock(fd, true); err != nil {
			return os.NewSyscallError("fcntl", err)
		}
		// Only one process need wake up for a connection.
		if err := watch(fd, unix.EPOLLIN|unix.EPOLLEXCLUSIVE); err != nil {
			return err
		}
	}
	accept := func(listener int) error {
		fd, _, err := unix.Accept4(listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		if err == unix.EAGAIN || err == unix.ECONNABORTED {
			return nil
		}
		if err != nil {
			return os.NewSyscallError("accept4", err)
		}
		if capacity--; capacity == 0 {
			for fd := firstInherited; fd < firstInherited+sockets; fd++ {
				if err := unix.EpollCtl(epoll, unix.EPOLL_CTL_DEL, fd, nil); err != nil {
					return os.NewSyscallError("epoll_ctl", err)
				}
			}
		}
		return watch(fd, unix.EPOLLIN)
	}
	var (
		events [128]unix.EpollEvent
		b      [4096]byte
	)
	for {
		n, err := unix.EpollWait(epoll, events[:], -1)
		if err != nil && err != unix.EINTR {
			return os.NewSyscallError("epoll_wait", err)
		}
		for _, event := range events[:max(n, 0)] {
			fd := int(event.Fd)
			if fd < firstInherited+sockets {
				if capacity > 0 {
					if err := accept(fd); err != nil {
						return err
					}
				}
				continue
			}
			length, err := unix.Read(fd, b[:])
			if err == unix.EAGAIN {
				continue
			}
			if length > 0 {
				_, err = unix.Write(fd, b[:length])
			}
			if length <= 0 || err != nil {
				unix.Close(fd) // the other end is gone
			}
		}
	}
}
