package quicdial

import (
	"errors"
	"net"
	"slices"
	"sync/atomic"
	"syscall"

	"github.com/quic-go/quic-go"
	"golang.org/x/net/ipv4"

	"github.com/seed22601231/connectx"
)

// Stats counts errors that the network has reported to connections after the
// peer's first datagram, and that were dropped: ECONNREFUSED, EHOSTUNREACH,
// ENETUNREACH and their kin. Its zero value is ready to use; it must not be
// copied.
//
// EMSGSIZE is dropped, too, but not counted: path MTU discovery sends datagrams
// that are too large on purpose.
type Stats struct {
	// ReadErrors counts those that a read came across.
	ReadErrors atomic.Uint64
	// WriteErrors counts those that a write came across. Its datagram was sent
	// once more, and is lost only if that failed as well.
	WriteErrors atomic.Uint64
}

// A socket is the Conn of a quic.Transport with a single connection. quic-go ends
// the connection on every error of a read, and on every error of a write but
// EMSGSIZE, so a socket returns those only that should.
type socket struct {
	*connectx.PacketConn
	batch *ipv4.PacketConn
	stats *Stats

	answered atomic.Bool // a datagram of the peer was read
}

var (
	_ quic.OOBCapablePacketConn = (*socket)(nil)
	// quic-go reads with this method if it is there, and from the descriptor
	// if not.
	_ interface {
		ReadBatch(ms []ipv4.Message, flags int) (int, error)
	} = (*socket)(nil)
)

func newSocket(pc *connectx.PacketConn, stats *Stats) *socket {
	if stats == nil {
		stats = new(Stats)
	}
	// Despite its name, an ipv4.PacketConn reads batches of either family.
	return &socket{PacketConn: pc, batch: ipv4.NewPacketConn(pc.UDPConn), stats: stats}
}

// ReadBatch is what quic-go reads with on Linux, macOS and FreeBSD.
func (s *socket) ReadBatch(ms []ipv4.Message, flags int) (int, error) {
	for {
		n, err := s.batch.ReadBatch(ms, flags)
		if !s.dropRead(err) {
			return n, err
		}
	}
}

// ReadFrom is what quic-go reads with on other systems.
func (s *socket) ReadFrom(b []byte) (int, net.Addr, error) {
	for {
		n, addr, err := s.PacketConn.ReadFrom(b)
		if !s.dropRead(err) {
			return n, addr, err
		}
	}
}

// dropRead reports whether a read should start over. It does not return EMSGSIZE,
// which is the ICMP message "fragmentation needed": quic-go ignores it in writes
// only, because an unconnected socket never reads one.
func (s *socket) dropRead(err error) bool {
	switch {
	case err == nil:
		if !s.answered.Load() {
			s.answered.Store(true)
		}
		return false
	case errors.Is(err, syscall.EMSGSIZE):
		return true
	case isUnreachable(err) && s.answered.Load():
		s.stats.ReadErrors.Add(1)
		return true
	}
	return false
}

// WriteMsgUDP is what quic-go writes with on Linux, macOS and FreeBSD.
func (s *socket) WriteMsgUDP(b, oob []byte, addr *net.UDPAddr) (n, oobn int, err error) {
	n, oobn, err = s.PacketConn.WriteMsgUDP(b, oob, addr)
	if s.writeAgain(err) {
		n, oobn, err = s.PacketConn.WriteMsgUDP(b, oob, addr)
		if s.dropWrite(err) {
			return len(b), len(oob), nil
		}
	}
	return n, oobn, err
}

// WriteTo is what quic-go writes with on other systems.
func (s *socket) WriteTo(b []byte, addr net.Addr) (n int, err error) {
	n, err = s.PacketConn.WriteTo(b, addr)
	if s.writeAgain(err) {
		n, err = s.PacketConn.WriteTo(b, addr)
		if s.dropWrite(err) {
			return len(b), nil
		}
	}
	return n, err
}

// writeAgain reports whether the error may be about an earlier datagram. The
// kernel reports such a one once, and sends nothing then.
func (s *socket) writeAgain(err error) bool {
	return err != nil && (errors.Is(err, syscall.EMSGSIZE) || s.dropWrite(err))
}

// dropWrite reports whether a datagram that could not be sent is to be taken as
// lost on its way, which QUIC is prepared for.
func (s *socket) dropWrite(err error) bool {
	if err == nil || !isUnreachable(err) || !s.answered.Load() {
		return false
	}
	s.stats.WriteErrors.Add(1)
	return true
}

// isUnreachable reports whether err says that the network, or the host at its far
// end, does not deliver to the peer.
func isUnreachable(err error) bool {
	errno, ok := errors.AsType[syscall.Errno](err)
	return ok && slices.Contains(unreachable, errno)
}
