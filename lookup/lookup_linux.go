package lookup

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/sys"
)

// A Conn asks the kernel on behalf of one network namespace: that of the
// thread which opened it. It is not safe for concurrent use.
type Conn struct {
	diag  socket // NETLINK_SOCK_DIAG
	route socket // NETLINK_ROUTE, subscribed to changes
	seq   uint32
	buf   [1024]byte // the request, and then the reply
	batch *batch     // nil until the first use of UDPPorts or TCPPorts

	// routes are answers that hold until something changes: the kernel says
	// so on the route socket before the change returns to who made it.
	routes  [routeSets][routeWays]cachedRoute
	changed time.Time // when it last said so; zero if that is long ago
}

// A destination may be in any place of its set.
const routeSets, routeWays = 64, 4

// settle is how long after a change no answer is kept. The notification of a
// deleted address is there before the routes that name it are gone, so what
// the kernel answers in between is out of date, and nothing more is heard of it.
const settle = time.Second

type socket struct {
	fd   int
	port uint32 // what the kernel's replies, but not its notifications, carry as nlmsg_pid
}

type cachedRoute struct {
	destination netip.AddrPort // the zero AddrPort if the entry is empty
	opts        RouteOptions
	route       Route
}

// Open opens a Conn in the network namespace of the calling thread. Where the
// kernel or a seccomp filter refuses netlink, the error is that of socket(2).
func Open() (*Conn, error) {
	diag, err := openNetlink(unix.NETLINK_SOCK_DIAG, 0)
	if err != nil {
		return nil, fmt.Errorf("open sock_diag netlink: %w", err)
	}
	route, err := openNetlink(unix.NETLINK_ROUTE, routeGroups)
	if err != nil {
		unix.Close(diag.fd)
		return nil, fmt.Errorf("open route netlink: %w", err)
	}
	return &Conn{diag: diag, route: route}, nil
}

// routeGroups are the notifications after which a source address may be another
// one. Links are among them because the IPv4 routes of a link that goes down
// disappear without a word.
const routeGroups = 1<<(unix.RTNLGRP_LINK-1) |
	1<<(unix.RTNLGRP_IPV4_IFADDR-1) | 1<<(unix.RTNLGRP_IPV6_IFADDR-1) |
	1<<(unix.RTNLGRP_IPV4_ROUTE-1) | 1<<(unix.RTNLGRP_IPV6_ROUTE-1) |
	1<<(unix.RTNLGRP_IPV4_RULE-1) | 1<<(unix.RTNLGRP_IPV6_RULE-1) |
	1<<(unix.RTNLGRP_NEXTHOP-1)

func openNetlink(protocol int, groups uint32) (socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return socket{}, os.NewSyscallError("socket", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		unix.Close(fd)
		return socket{}, os.NewSyscallError("bind", err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		unix.Close(fd)
		return socket{}, os.NewSyscallError("getsockname", err)
	}
	s := socket{fd: fd}
	if name, ok := name.(*unix.SockaddrNetlink); ok {
		s.port = name.Pid
	}
	return s, nil
}

// Close closes the netlink sockets.
func (c *Conn) Close() error {
	return errors.Join(unix.Close(c.diag.fd), unix.Close(c.route.fd))
}

// TCP_TIME_WAIT of include/net/tcp_states.h, an idiag_state.
const tcpTimeWait = 6

// Layouts from include/uapi/linux/inet_diag.h.
const (
	sizeofDiagRequest = 56 // struct inet_diag_req_v2
	sizeofDiagMessage = 72 // struct inet_diag_msg

	// Offsets of struct inet_diag_sockid, and within it.
	requestID = 8
	messageID = 4

	idSourcePort = 0
	idDestPort   = 2
	idSource     = 4
	idDest       = 20
	idInterface  = 36
	idCookie     = 40
)

// UDP returns the socket that a datagram from remote to local would be
// delivered to, as the kernel's own receive path looks it up: a connected
// socket before an unconnected one, a specific address before the wildcard,
// and among equals the one that was bound last. ifindex is the interface that
// the datagram would arrive on; with 0, sockets bound to a device are not
// found. IPv4-mapped IPv6 addresses count as IPv4.
//
// If there is no such socket, the error is [ErrNotFound].
//
// Source: udp_dump_one in net/ipv4/udp_diag.c.
func (c *Conn) UDP(local, remote netip.AddrPort, ifindex uint32) (Socket, error) {
	// The kernel looks up a datagram that arrives, so its source is our
	// remote address: "src and dst are swapped for historical reasons".
	s, err := c.socket(unix.IPPROTO_UDP, remote, local, ifindex)
	if err != nil && err != ErrNotFound {
		err = fmt.Errorf("lookup udp %v->%v: %w", local, remote, err)
	}
	return s, err
}

// TCP returns the socket on the 4-tuple, which may be in TIME_WAIT, or else the
// one that listens on local. ifindex is as for [Conn.UDP].
//
// If there is no such socket, the error is [ErrNotFound].
//
// Source: inet_diag_find_one_icsk in net/ipv4/inet_diag.c.
func (c *Conn) TCP(local, remote netip.AddrPort, ifindex uint32) (Socket, error) {
	s, err := c.socket(unix.IPPROTO_TCP, local, remote, ifindex)
	if err != nil && err != ErrNotFound {
		err = fmt.Errorf("lookup tcp %v->%v: %w", local, remote, err)
	}
	return s, err
}

func (c *Conn) socket(protocol byte, source, dest netip.AddrPort, ifindex uint32) (Socket, error) {
	sa, da := source.Addr().Unmap(), dest.Addr().Unmap()
	if !sa.IsValid() || !da.IsValid() || sa.Is4() != da.Is4() {
		return Socket{}, errNotOneFamily
	}

	putDiagRequest(c.request(unix.SOCK_DIAG_BY_FAMILY, sizeofDiagRequest), protocol, sa, source.Port(), da, dest.Port(), ifindex)
	reply, err := c.roundTrip(c.diag, unix.SOCK_DIAG_BY_FAMILY)
	if err == unix.ENOENT {
		return Socket{}, ErrNotFound
	}
	if err != nil {
		return Socket{}, err
	}
	return parseDiagMessage(reply)
}

var errNotOneFamily = errors.New("addresses are not of one family")

// putDiagRequest fills in a struct inet_diag_req_v2, which is zero before.
//
// NLM_F_DUMP is left out of its header on purpose: with it the kernel walks all
// its sockets and does not look at the addresses.
func putDiagRequest(b []byte, protocol byte, source netip.Addr, sourcePort uint16, dest netip.Addr, destPort uint16, ifindex uint32) {
	b[0] = unix.AF_INET6
	if source.Is4() {
		b[0] = unix.AF_INET
	}
	b[1] = protocol
	binary.NativeEndian.PutUint32(b[4:], 0xffffffff) // idiag_states: all
	id := b[requestID:]
	binary.BigEndian.PutUint16(id[idSourcePort:], sourcePort)
	binary.BigEndian.PutUint16(id[idDestPort:], destPort)
	putAddr(id[idSource:], source)
	putAddr(id[idDest:], dest)
	binary.NativeEndian.PutUint32(id[idInterface:], ifindex)
	binary.NativeEndian.PutUint64(id[idCookie:], ^uint64(0)) // INET_DIAG_NOCOOKIE
}

func parseDiagMessage(b []byte) (Socket, error) {
	if len(b) < sizeofDiagMessage {
		return Socket{}, fmt.Errorf("sock_diag reply of %d bytes is too short", len(b))
	}
	family, id := b[0], b[messageID:]
	s := Socket{
		Cookie: binary.NativeEndian.Uint64(id[idCookie:]),
		Local:  netip.AddrPortFrom(addrOf(family, id[idSource:]), binary.BigEndian.Uint16(id[idSourcePort:])),
		UID:    binary.NativeEndian.Uint32(b[64:]),

		TimeWait: b[1] == tcpTimeWait,
	}
	if port := binary.BigEndian.Uint16(id[idDestPort:]); port != 0 {
		s.Remote = netip.AddrPortFrom(addrOf(family, id[idDest:]), port)
	}
	return s, nil
}

func putAddr(b []byte, a netip.Addr) {
	if a.Is4() {
		a4 := a.As4()
		copy(b, a4[:])
		return
	}
	a16 := a.As16()
	copy(b, a16[:])
}

func addrOf(family byte, b []byte) netip.Addr {
	if family == unix.AF_INET {
		return netip.AddrFrom4([4]byte(b[:4]))
	}
	return netip.AddrFrom16([16]byte(b[:16])).Unmap()
}

// Source returns the source address and the interface that the routing table
// chooses for UDP datagrams to destination. IPv4-mapped IPv6 addresses count
// as IPv4; the zone of a link-local address is not looked at, its interface
// belongs in opts.
//
// If there is no route, the error wraps what connect(2) would say
// (ENETUNREACH, EHOSTUNREACH, EACCES); if there is a route without a source
// address, it is [ErrNoSource].
//
// Answers are kept, and are dropped as soon as the kernel reports any change of
// addresses, links, routes or rules; for a second after that, each is asked for
// anew. See also [Conn.Forget].
//
// Source: rtnetlink(7), inet_rtm_getroute in net/ipv4/route.c and
// inet6_rtm_getroute in net/ipv6/route.c.
func (c *Conn) Source(destination netip.AddrPort, opts RouteOptions) (Route, error) {
	if !destination.Addr().IsValid() {
		return Route{}, fmt.Errorf("route to %v: the address is not valid", destination)
	}
	changed := c.routesChanged()
	cached := c.cached(destination, opts)
	if !changed && cached.destination == destination && cached.opts == opts {
		return cached.route, nil
	}
	route, err := c.askRoute(destination, opts)
	for range 1000 {
		// So many notifications at once that the reply did not fit beside
		// them. Make room, and ask again; with the buffer that a socket has
		// by default, once is as good as always enough.
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.ENOBUFS) {
			break
		}
		c.routesChanged()
		route, err = c.askRoute(destination, opts)
	}
	if err != nil {
		return Route{}, err
	}
	if !c.changed.IsZero() {
		if time.Since(c.changed) < settle {
			return route, nil
		}
		c.changed = time.Time{}
	}
	*cached = cachedRoute{destination, opts, route}
	return route, nil
}

// cached is where the answer is kept, or, if it is not, where it may go.
func (c *Conn) cached(destination netip.AddrPort, opts RouteOptions) *cachedRoute {
	a := destination.Addr().As16()
	h := binary.LittleEndian.Uint64(a[8:])*0x9e3779b97f4a7c15 + uint64(destination.Port())
	h = (h ^ h>>32) * 0x9e3779b97f4a7c15
	set := &c.routes[h>>32%routeSets]
	place := &set[rand.IntN(routeWays)]
	for i := range set {
		switch cached := &set[i]; {
		case cached.destination == destination && cached.opts == opts:
			return cached
		case !cached.destination.IsValid():
			place = cached
		}
	}
	return place
}

// routesChanged reports whether there was a notification since the last call,
// and sees to what follows from that.
func (c *Conn) routesChanged() bool {
	changed := false
	for {
		switch n, err := sys.Recv(c.route.fd, c.buf[:1], 0); {
		case n > 0, err == unix.ENOBUFS: // ENOBUFS: some did not fit and were lost
			changed = true
			continue
		case err == unix.EAGAIN:
		default: // not even a message: nothing good can be said of the socket
			changed = true
		}
		if changed {
			c.outdated()
		}
		return changed
	}
}

// outdated drops the answers because of a notification.
func (c *Conn) outdated() {
	c.Forget()
	c.changed = time.Now()
}

// Forget drops the answers of [Conn.Source] that are kept. They follow all
// changes of addresses, links, routes and rules by themselves; what goes
// unnoticed are sysctls that have a say in the choice of a source address, and
// the reachability of IPv6 routers.
func (c *Conn) Forget() { clear(c.routes[:]) }

func (c *Conn) askRoute(destination netip.AddrPort, opts RouteOptions) (Route, error) {
	da := destination.Addr().Unmap()
	if da == netip.IPv6Unspecified() {
		da = netip.IPv6Loopback() // as connect does; for 0.0.0.0 the routing does
	}
	request := c.request(unix.RTM_GETROUTE, unix.SizeofRtMsg)
	request[0] = unix.AF_INET6
	if da.Is4() {
		request[0] = unix.AF_INET
	}
	request[1] = byte(da.BitLen()) // rtm_dst_len
	putAddr(c.attribute(unix.RTA_DST, da.BitLen()/8), da)
	c.attribute(unix.RTA_IP_PROTO, 1)[0] = cmp.Or(opts.Protocol, unix.IPPROTO_UDP)
	binary.BigEndian.PutUint16(c.attribute(unix.RTA_DPORT, 2), destination.Port())
	src := opts.Source.Unmap().WithZone("")
	if src.IsValid() && src.Is4() != da.Is4() {
		return Route{}, fmt.Errorf("route from %v to %v: addresses are not of one family", opts.Source, destination)
	}
	if src.IsValid() {
		request[2] = byte(src.BitLen()) // rtm_src_len
		putAddr(c.attribute(unix.RTA_SRC, src.BitLen()/8), src)
	}
	if opts.SourcePort != 0 {
		binary.BigEndian.PutUint16(c.attribute(unix.RTA_SPORT, 2), opts.SourcePort)
	}
	if opts.Interface != 0 {
		binary.NativeEndian.PutUint32(c.attribute(unix.RTA_OIF, 4), opts.Interface)
	}
	if opts.Mark != 0 {
		binary.NativeEndian.PutUint32(c.attribute(unix.RTA_MARK, 4), opts.Mark)
	}

	reply, err := c.roundTrip(c.route, unix.RTM_NEWROUTE)
	if err != nil {
		return Route{}, fmt.Errorf("route to %v: %w", destination, err)
	}
	route, err := parseRoute(reply)
	if src.IsValid() && (err == nil || err == ErrNoSource) {
		route.Source, err = src, nil // the reply does not repeat it
	}
	return route, err
}

func parseRoute(b []byte) (Route, error) {
	if len(b) < unix.SizeofRtMsg {
		return Route{}, fmt.Errorf("route reply of %d bytes is too short", len(b))
	}
	family := b[0]
	var r Route
	for b = b[unix.SizeofRtMsg:]; len(b) >= unix.SizeofRtAttr; {
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofRtAttr || size > len(b) {
			return Route{}, fmt.Errorf("route reply has an attribute of %d bytes where %d are left", size, len(b))
		}
		value := b[unix.SizeofRtAttr:size]
		switch kind := binary.NativeEndian.Uint16(b[2:]); {
		case kind == unix.RTA_PREFSRC && family == unix.AF_INET && len(value) == 4,
			kind == unix.RTA_PREFSRC && family == unix.AF_INET6 && len(value) == 16:
			r.Source = addrOf(family, value)
		case kind == unix.RTA_OIF && len(value) == 4:
			r.Interface = binary.NativeEndian.Uint32(value)
		}
		b = b[min(align4(size), len(b)):]
	}
	if !r.Source.IsValid() || r.Source.IsUnspecified() {
		return r, ErrNoSource
	}
	return r, nil
}

func align4(n int) int { return (n + 3) &^ 3 }

// request starts a request in c.buf and returns its zeroed body.
func (c *Conn) request(kind uint16, size int) []byte {
	return c.requestIn(c.buf[:unix.SizeofNlMsghdr+size], kind)
}

// requestIn makes b a request and returns its zeroed body.
func (c *Conn) requestIn(b []byte, kind uint16) []byte {
	c.seq++
	clear(b)
	binary.NativeEndian.PutUint32(b[0:], uint32(len(b)))
	binary.NativeEndian.PutUint16(b[4:], kind)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST)
	binary.NativeEndian.PutUint32(b[8:], c.seq)
	return b[unix.SizeofNlMsghdr:]
}

// attribute appends an attribute to the request in c.buf and returns its value,
// zeroed.
func (c *Conn) attribute(kind uint16, length int) []byte {
	start := int(binary.NativeEndian.Uint32(c.buf[:]))
	size := unix.SizeofRtAttr + length
	end := start + align4(size)
	a := c.buf[start:end]
	clear(a)
	binary.NativeEndian.PutUint16(a[0:], uint16(size))
	binary.NativeEndian.PutUint16(a[2:], kind)
	binary.NativeEndian.PutUint32(c.buf[:], uint32(end))
	return a[unix.SizeofRtAttr:size]
}

// roundTrip sends the request in c.buf and returns the body of its reply,
// which must be of the given kind. An error that the kernel put into the reply
// comes back as the bare errno.
//
// The kernel works on a request within send(2), so the reply is there when
// send returns and nothing here waits.
func (c *Conn) roundTrip(s socket, kind uint16) ([]byte, error) {
	if err := sys.Send(s.fd, c.buf[:binary.NativeEndian.Uint32(c.buf[:])]); err != nil {
		return nil, os.NewSyscallError("send", err)
	}
	for {
		n, err := sys.Recv(s.fd, c.buf[:], 0)
		if err != nil {
			return nil, os.NewSyscallError("recv", err)
		}
		body, err := parseReply(c.buf[:n], kind, c.seq, s.port)
		if err == errOtherReply {
			// A notification of a change, which need not fit into the
			// buffer, or an answer nobody waited for.
			c.outdated()
			continue
		}
		return body, err
	}
}

var errOtherReply = errors.New("netlink reply to another request")

// parseReply returns the body of a reply to the request number seq of the
// socket with the given port. A notification has the number and the port of
// the request that caused the change; the number alone could be the same.
func parseReply(b []byte, kind uint16, seq, port uint32) ([]byte, error) {
	if len(b) < unix.SizeofNlMsghdr {
		return nil, fmt.Errorf("netlink reply of %d bytes is too short", len(b))
	}
	if binary.NativeEndian.Uint32(b[8:]) != seq || binary.NativeEndian.Uint32(b[12:]) != port {
		return nil, errOtherReply
	}
	size := binary.NativeEndian.Uint32(b)
	if size < unix.SizeofNlMsghdr || uint64(size) > uint64(len(b)) {
		return nil, fmt.Errorf("netlink reply says %d bytes and has %d", size, len(b))
	}
	body := b[unix.SizeofNlMsghdr:size]
	switch got := binary.NativeEndian.Uint16(b[4:]); got {
	case kind:
		return body, nil
	case unix.NLMSG_ERROR:
		if len(body) < 4 {
			return nil, fmt.Errorf("netlink error of %d bytes is too short", len(body))
		}
		if e := int32(binary.NativeEndian.Uint32(body)); e < 0 {
			return nil, syscall.Errno(-e)
		}
		return nil, errors.New("netlink request was acknowledged without an answer")
	default:
		return nil, fmt.Errorf("netlink reply is of type %d, not %d", got, kind)
	}
}
