//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// serveUDP answers every token on all addresses of this machine.
func serveUDP(reports *reporter) error {
	failed := make(chan error)
	for _, f := range []family{0, 1} {
		conn, err := listenUDP(f)
		if err != nil {
			return err
		}
		go func() { failed <- answerUDP(conn) }()
	}
	reports.ready()
	return <-failed
}

// listenUDP returns a socket that is told which of its addresses a datagram was
// sent to.
func listenUDP(f family) (*net.UDPConn, error) {
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return onSocket(c, func(fd int) error {
			// Of all processes together, none is lost.
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4<<20)
			if f == 0 {
				return unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_PKTINFO, 1)
			}
			// The destinations are addresses of a route, not of an interface.
			if err := unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_FREEBIND, 1); err != nil {
				return err
			}
			return unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, 1)
		})
	}}
	conn, err := config.ListenPacket(context.Background(), "udp"+f.suffix(), fmt.Sprintf(":%d", serverPort))
	if err != nil {
		return nil, err
	}
	return conn.(*net.UDPConn), nil
}

func onSocket(c syscall.RawConn, f func(fd int) error) (err error) {
	if ctlErr := c.Control(func(fd uintptr) { err = f(int(fd)) }); ctlErr != nil {
		return ctlErr
	}
	return err
}

func answerUDP(conn *net.UDPConn) error {
	var b [answerSize]byte
	var to [64]byte
	for {
		n, m, _, from, err := conn.ReadMsgUDPAddrPort(b[:], to[:])
		if err != nil {
			return err
		}
		// What says where the datagram came to also says where one is to come
		// from (in_pktinfo, in6_pktinfo).
		if _, _, err := conn.WriteMsgUDPAddrPort(newAnswer(b[:n], unmap(from)), to[:m], from); err != nil {
			return err
		}
	}
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

// serveTCP does the same with connections.
func serveTCP(reports *reporter) error {
	failed := make(chan error)
	for _, f := range []family{0, 1} {
		listener, err := net.Listen("tcp"+f.suffix(), fmt.Sprintf(":%d", serverPort))
		if err != nil {
			return err
		}
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					failed <- err
					return
				}
				go answerTCP(conn)
			}
		}()
	}
	reports.ready()
	return <-failed
}

// answerTCP lasts as long as the other end. What goes wrong is seen there.
func answerTCP(conn net.Conn) {
	defer conn.Close()
	from := addrPort(conn.RemoteAddr())
	var t token
	for {
		if _, err := io.ReadFull(conn, t[:]); err != nil {
			return
		}
		if _, err := conn.Write(newAnswer(t[:], from)); err != nil {
			return
		}
	}
}
