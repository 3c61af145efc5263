// Package lookup asks the Linux kernel about one flow: which socket would
// receive a datagram that arrives on a given UDP 4-tuple, which socket is on a
// TCP 4-tuple, and which source address the routing table chooses for a
// destination.
//
// None of it needs privileges. Each is one request and one reply on a netlink
// socket that stays open, a microsecond or a few; none walks a table. Programs
// that want lists of sockets or routes are better served by
// github.com/vishvananda/netlink, whose SocketGet for one UDP socket dumps the
// whole table.
//
// On systems other than Linux, [Open] fails with [errors.ErrUnsupported].
package lookup

import (
	"errors"
	"net/netip"
)

// ErrNotFound says that no socket would receive the datagram. The kernel uses
// the same answer when it lacks the udp_diag module; whoever has a socket of
// their own on the 4-tuple and still gets ErrNotFound has found that out.
var ErrNotFound = errors.New("no such socket")

// ErrNoSource says that there is a route but no source address to use with it.
var ErrNoSource = errors.New("no source address for destination")

// MaxPorts is how many ports [Conn.UDPPorts] and [Conn.TCPPorts] take at once.
// More would hardly be faster, and the replies have to fit into a socket's
// receive buffer.
const MaxPorts = 64

// A Socket is the answer to [Conn.UDP] and [Conn.TCP].
type Socket struct {
	// Cookie is the socket's identity, the value of its SO_COOKIE option:
	// unique while the kernel runs.
	Cookie uint64

	// Local is the address and port that the socket is bound to. The
	// address may be the unspecified one.
	Local netip.AddrPort

	// Remote is the peer that the socket is connected to. It is the zero
	// AddrPort if the socket is not connected.
	Remote netip.AddrPort

	// UID is the user that the socket belongs to.
	UID uint32

	// TimeWait says that a TCP connection is over, and its 4-tuple only kept
	// from use for a while.
	TimeWait bool
}

// Connected reports whether the socket is connected. That need not be on the
// 4-tuple that was asked for: a socket that is found unconnected may connect
// before the kernel has written down its addresses.
func (s Socket) Connected() bool { return s.Remote.IsValid() }

// RouteOptions are what the choice of a source address depends on besides the
// destination. The zero value means none of them.
type RouteOptions struct {
	// Protocol is the transport protocol (IPPROTO_TCP, IPPROTO_UDP), for
	// routing rules that match it. Zero means UDP.
	Protocol uint8

	// Interface is the index of the interface that the datagrams must leave
	// by (SO_BINDTODEVICE, or the zone of a link-local destination). Zero
	// means any.
	Interface uint32

	// Mark is the firewall mark (SO_MARK). Zero means none.
	Mark uint32

	// Source is the source address, where it is chosen already and only the
	// interface is of interest. Invalid means none.
	Source netip.Addr

	// SourcePort is the source port, for routing rules that match it.
	// Zero means that it is not known yet.
	SourcePort uint16
}

// A Route is the answer to [Conn.Source].
type Route struct {
	// Source is the address that the kernel would give a socket that
	// connects to the destination. It has no zone.
	Source netip.Addr

	// Interface is the index of the interface that the datagrams leave by.
	Interface uint32
}
