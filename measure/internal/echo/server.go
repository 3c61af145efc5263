//go:build linux

package echo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// ServeUDP answers every request of IPv4 and IPv6. It calls ready when it can, and
// ends only with an error.
func ServeUDP(ready func()) error {
	failed := make(chan error)
	for _, network := range []string{"udp4", "udp6"} {
		conn, err := ListenUDP(network)
		if err != nil {
			return err
		}
		go func() { failed <- AnswerUDP(conn) }()
	}
	ready()
	return <-failed
}

// ListenUDP returns a socket that is told which of its addresses a datagram was
// sent to.
func ListenUDP(network string) (*net.UDPConn, error) {
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		ctlErr := c.Control(func(fd uintptr) { err = prepareUDP(int(fd), network == "udp4") })
		return errors.Join(ctlErr, err)
	}}
	conn, err := config.ListenPacket(context.Background(), network, fmt.Sprintf(":%d", Port))
	if err != nil {
		return nil, err
	}
	return conn.(*net.UDPConn), nil
}

func prepareUDP(fd int, is4 bool) error {
	// Of all processes together, none is lost.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4<<20)
	if is4 {
		return unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_PKTINFO, 1)
	}
	// The destinations are addresses of a route, not of an interface.
	if err := unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_FREEBIND, 1); err != nil {
		return err
	}
	return unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, 1)
}

// AnswerUDP answers what a socket of ListenUDP receives, until it is closed. An
// answer that cannot be sent is missed at the other end.
func AnswerUDP(conn *net.UDPConn) error {
	var b [AnswerSize]byte
	var to [64]byte
	for {
		n, m, _, from, err := conn.ReadMsgUDPAddrPort(b[:], to[:])
		if err != nil {
			return err
		}
		// What says where the datagram came to also says where one is to come
		// from (in_pktinfo, in6_pktinfo).
		_, _, _ = conn.WriteMsgUDPAddrPort(Answer(b[:n], unmap(from)), to[:m], from)
	}
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

// ServeTCP does the same as ServeUDP with connections.
func ServeTCP(ready func()) error {
	failed := make(chan error)
	for _, network := range []string{"tcp4", "tcp6"} {
		listener, err := net.Listen(network, fmt.Sprintf(":%d", Port))
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
				go answerTCP(conn.(*net.TCPConn))
			}
		}()
	}
	ready()
	return <-failed
}

// answerTCP lasts as long as the other end. What goes wrong is seen there.
func answerTCP(conn *net.TCPConn) {
	defer conn.Close()
	from := unmap(conn.RemoteAddr().(*net.TCPAddr).AddrPort())
	var token [TokenSize]byte
	for {
		if _, err := io.ReadFull(conn, token[:]); err != nil {
			return
		}
		if _, err := conn.Write(Answer(token[:], from)); err != nil {
			return
		}
	}
}
