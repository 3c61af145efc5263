package lookup

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/sys"
)

// A batch is the room for several questions that go out in one send: about half
// the price of as many single ones.
type batch struct {
	requests [MaxPorts * sizeofBatchRequest]byte
	replies  *sys.Messages
	answers  [MaxPorts]Socket
}

const (
	sizeofBatchRequest = unix.SizeofNlMsghdr + sizeofDiagRequest

	// Of a reply, what comes after struct inet_diag_msg is of no interest.
	sizeofBatchReply = unix.SizeofNlMsghdr + sizeofDiagMessage
)

// UDPPorts asks the question of [Conn.UDP] for up to [MaxPorts] ports of one
// local address. The answers are in the order of ports: the sockets, or the zero
// Socket where there is none (no socket has the cookie 0). They are valid until
// the next call.
func (c *Conn) UDPPorts(local netip.Addr, ports []uint16, remote netip.AddrPort, ifindex uint32) ([]Socket, error) {
	sockets, err := c.sockets(unix.IPPROTO_UDP, local, ports, remote, ifindex)
	if err != nil {
		err = fmt.Errorf("lookup udp %v->%v: %w", local, remote, err)
	}
	return sockets, err
}

// TCPPorts asks the question of [Conn.TCP] for up to [MaxPorts] ports of one
// local address. The answers are as for [Conn.UDPPorts].
func (c *Conn) TCPPorts(local netip.Addr, ports []uint16, remote netip.AddrPort, ifindex uint32) ([]Socket, error) {
	sockets, err := c.sockets(unix.IPPROTO_TCP, local, ports, remote, ifindex)
	if err != nil {
		err = fmt.Errorf("lookup tcp %v->%v: %w", local, remote, err)
	}
	return sockets, err
}

func (c *Conn) sockets(protocol byte, local netip.Addr, ports []uint16, remote netip.AddrPort, ifindex uint32) ([]Socket, error) {
	local, remote = local.Unmap(), netip.AddrPortFrom(remote.Addr().Unmap(), remote.Port())
	if !local.IsValid() || !remote.IsValid() || local.Is4() != remote.Addr().Is4() {
		return nil, errNotOneFamily
	}
	if len(ports) > MaxPorts {
		return nil, fmt.Errorf("%d ports at once, the limit is %d", len(ports), MaxPorts)
	}
	if c.batch == nil {
		c.batch = &batch{replies: sys.NewMessages(MaxPorts, sizeofBatchReply)}
	}
	if c.askAtOnce(protocol, local, ports, remote, ifindex) == nil {
		return c.batch.answers[:len(ports)], nil
	}
	if err := c.askInTurn(protocol, local, ports, remote, ifindex); err != nil {
		return nil, err
	}
	return c.batch.answers[:len(ports)], nil
}

// askInTurn is for where askAtOnce does not work: the receive buffer
// (net.core.rmem_default) is too small for all replies, or a sandbox does not
// know recvmmsg.
func (c *Conn) askInTurn(protocol byte, local netip.Addr, ports []uint16, remote netip.AddrPort, ifindex uint32) error {
	for {
		// What did arrive is of no use any more.
		if n, err := sys.Recv(c.diag.fd, c.buf[:], 0); n <= 0 && err != unix.ENOBUFS {
			break
		}
	}
	for i, port := range ports {
		source, dest := netip.AddrPortFrom(local, port), remote
		if protocol == unix.IPPROTO_UDP {
			source, dest = dest, source
		}
		var err error
		if c.batch.answers[i], err = c.socket(protocol, source, dest, ifindex); err != nil && err != ErrNotFound {
			return err
		}
	}
	return nil
}

func (c *Conn) askAtOnce(protocol byte, local netip.Addr, ports []uint16, remote netip.AddrPort, ifindex uint32) error {
	first := c.seq + 1
	for i, port := range ports {
		body := c.requestIn(c.batch.requests[i*sizeofBatchRequest:][:sizeofBatchRequest], unix.SOCK_DIAG_BY_FAMILY)
		if protocol == unix.IPPROTO_UDP {
			putDiagRequest(body, protocol, remote.Addr(), remote.Port(), local, port, ifindex) // see UDP
		} else {
			putDiagRequest(body, protocol, local, port, remote.Addr(), remote.Port(), ifindex)
		}
	}
	if err := sys.Send(c.diag.fd, c.batch.requests[:len(ports)*sizeofBatchRequest]); err != nil {
		return os.NewSyscallError("send", err)
	}
	for answered := 0; answered < len(ports); {
		n, err := c.batch.replies.Recv(c.diag.fd, len(ports)-answered)
		if err != nil {
			return os.NewSyscallError("recvmmsg", err)
		}
		for i := range n {
			reply := c.batch.replies.At(i)
			if len(reply) < unix.SizeofNlMsghdr {
				return fmt.Errorf("netlink reply of %d bytes is too short", len(reply))
			}
			index := binary.NativeEndian.Uint32(reply[8:]) - first
			if index >= uint32(len(ports)) {
				continue // an answer nobody waited for
			}
			if c.batch.answers[index], err = parseBatchReply(reply, first+index, c.diag.port); err != nil {
				return err
			}
			answered++
		}
	}
	return nil
}

// parseBatchReply is parseReply and parseDiagMessage for a reply that is cut
// off after what they read.
func parseBatchReply(reply []byte, seq, port uint32) (Socket, error) {
	if size := binary.NativeEndian.Uint32(reply); size > sizeofBatchReply && len(reply) == sizeofBatchReply {
		binary.NativeEndian.PutUint32(reply, sizeofBatchReply)
	}
	body, err := parseReply(reply, unix.SOCK_DIAG_BY_FAMILY, seq, port)
	if err == unix.ENOENT {
		return Socket{}, nil
	}
	if err != nil {
		return Socket{}, err
	}
	return parseDiagMessage(body)
}
