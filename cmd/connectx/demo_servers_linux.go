package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Servers listen below the ephemeral port range, where they take nothing from
// it: on the first of these ports that is free on their address.
const (
	firstServerPort = 7007
	lastServerPort  = firstServerPort + 999
)

// echoServers are one echo server to each destination of a column.
type echoServers struct {
	addrs []netip.AddrPort
	ctx   context.Context // over when they are closed
	stop  context.CancelFunc
	wg    sync.WaitGroup
}

func startServers(c *column) (*echoServers, error) {
	s := &echoServers{}
	s.ctx, s.stop = context.WithCancel(context.Background())
	for _, a := range c.destinations {
		if err := s.start(c, a); err != nil {
			s.close()
			return nil, fmt.Errorf("%s echo server: %w", c.title, err)
		}
	}
	return s, nil
}

// close ends all servers and their connections.
func (s *echoServers) close() {
	s.stop()
	s.wg.Wait()
}

// closeAtStop closes c when the servers stop, and, with the function that it
// returns, as soon as c is not in use any more.
func (s *echoServers) closeAtStop(c io.Closer) (closeNow func()) {
	forget := context.AfterFunc(s.ctx, func() { c.Close() })
	return func() {
		forget()
		c.Close()
	}
}

func (s *echoServers) start(c *column, a netip.Addr) error {
	lc := net.ListenConfig{Control: freebind}
	for port := uint16(firstServerPort); ; port++ {
		addr := netip.AddrPortFrom(a, port)
		var err error
		if c.tcp() {
			var l net.Listener
			if l, err = lc.Listen(s.ctx, c.network, addr.String()); err == nil {
				s.wg.Go(func() { s.acceptTCP(l) })
			}
		} else {
			var conn net.PacketConn
			if conn, err = lc.ListenPacket(s.ctx, c.network, addr.String()); err == nil {
				s.wg.Go(func() { s.echoUDP(conn.(*net.UDPConn)) })
			}
		}
		if err == nil {
			s.addrs = append(s.addrs, addr)
			return nil
		}
		if !errors.Is(err, unix.EADDRINUSE) || port == lastServerPort {
			return err
		}
	}
}

// freebind lets a server bind an IPv6 address of a network that is local only
// by its route.
func freebind(network, _ string, c syscall.RawConn) error {
	if network != "tcp6" && network != "udp6" {
		return nil
	}
	return setsockopt(c, unix.SOL_IPV6, unix.IPV6_FREEBIND, 1)
}

func (s *echoServers) acceptTCP(l net.Listener) {
	defer s.closeAtStop(l)()
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		s.wg.Go(func() { s.echoTCP(conn) })
	}
}

// echoTCP does not use io.Copy, which would splice through a pipe of two more
// descriptors.
func (s *echoServers) echoTCP(conn net.Conn) {
	defer s.closeAtStop(conn)()
	var b [tokenSize]byte
	for {
		n, err := conn.Read(b[:])
		if err != nil {
			return
		}
		if _, err := conn.Write(b[:n]); err != nil {
			return
		}
	}
}

func (s *echoServers) echoUDP(conn *net.UDPConn) {
	defer s.closeAtStop(conn)()
	var b [tokenSize]byte
	for {
		n, from, err := conn.ReadFromUDPAddrPort(b[:])
		if err != nil {
			return
		}
		// An echo that cannot be sent is one that does not come, and counts
		// as such.
		_, _ = conn.WriteToUDPAddrPort(b[:n], from)
	}
}

// setsockopt sets an integer option on the socket of a Control hook.
func setsockopt(c syscall.RawConn, level, option, value int) error {
	var err error
	if e := c.Control(func(fd uintptr) {
		err = os.NewSyscallError("setsockopt", unix.SetsockoptInt(int(fd), level, option, value))
	}); e != nil {
		return e
	}
	return err
}
