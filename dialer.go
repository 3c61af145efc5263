package connectx

import (
	"context"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// A Dialer is a [net.Dialer] whose connections share the local ports: each
// destination has the whole ephemeral port range to itself.
//
// The zero value is ready to use. A Dialer may be copied, is safe for
// concurrent use, and is cheap enough to be made for one call: what is shared
// (netlink sockets, the order of ports) is shared by the whole process, per
// network namespace.
//
// All fields of net.Dialer keep their meaning. Control and ControlContext run
// before the socket is bound, once on each socket; a UDP dial may use several.
// SO_REUSEADDR is the Dialer's own business, and SO_REUSEPORT is taken off UDP
// sockets, since with it the lock would not hold.
//
// LocalAddr chooses the source address, the source port, or both:
//
//   - nil, or neither: the source address comes from the routing table, the port
//     from the ephemeral range.
//   - an address without a port: the port comes from the ephemeral range.
//   - a port: that port, shared with the connections that other Dialers have
//     to other destinations.
//
// A dial fails with [ErrPortsExhausted] when every port towards the destination
// is taken; with EADDRNOTAVAIL (TCP) or EADDRINUSE (UDP) when the very 4-tuple
// asked for exists; and with EADDRINUSE when a socket that does not share holds
// the port asked for. All of them come in a [*net.OpError] and are found with
// [errors.Is].
//
// Where the kernel does not answer the lookup that sharing a UDP port depends
// on (netlink refused by a sandbox, no udp_diag), a UDP dial takes a port of
// its own as net.Dialer would: limited, but never overshadowed.
//
// Fields that make no sense, alone or together, fail each dial with an error that
// names the field and the value. On systems other than Linux, so do SourceAddrs
// and PortRange, with [errors.ErrUnsupported].
type Dialer struct {
	net.Dialer

	// SourceAddrs are the source addresses to use, of both families, in place
	// of the one that LocalAddr can have; an error if LocalAddr is given as well.
	// A dial uses one of the destination's family, at random, and the others if
	// all ports of that one are taken towards the destination. A destination of
	// which there is no address of the same family is left out if it is one of
	// several of a host name, or else fails. With none, the source address comes
	// from LocalAddr or from the routing table.
	//
	// A dial that comes upon an address that is not on this machine fails, unless
	// a Control hook sets IP_FREEBIND or the like. However many addresses there
	// are, a dial takes no longer, until nearly all ports of nearly all of them are
	// taken towards the destination. The slice must not be changed while there are
	// dials.
	SourceAddrs []netip.Addr

	// PortRange is the range to pick source ports from, in place of the system's
	// ephemeral range; reserved ports (net.ipv4.ip_local_reserved_ports) are left
	// out of both. A LocalAddr whose port is not in it is an error.
	//
	// A Control hook that binds the socket itself must have a port of the range.
	//
	// It need not be a part of the system's range. TCP connections from ports
	// outside of that, and all of them before Linux 6.3, are bound to their
	// port, which from then on programs that leave the choice of a port to
	// connect do not get, not even for other destinations.
	PortRange PortRange

	// FastOpen lets TCP send the data of the first Write together with its SYN
	// (RFC 7413, TCP_FASTOPEN_CONNECT), once the peer has handed out a cookie to
	// an earlier connection. Where the kernel (net.ipv4.tcp_fastopen) or the peer
	// does not do it, the connection is an ordinary one.
	//
	// With a cookie, a dial is done at once, and the handshake begins with the
	// first Write. So neither Timeout nor the race of Happy Eyeballs covers it; a
	// refused connection shows in the first Write or in what follows it; there is
	// nothing to read before; and Close or CloseWrite before the peer has answered
	// give the connection up, with what was written. It is for protocols in which
	// the client speaks first and waits for an answer. The data must be safe to
	// receive twice, as the RFC says.
	FastOpen bool
}

// Dial connects to address with a zero [Dialer]. See [net.Dial].
func Dial(network, address string) (net.Conn, error) {
	var d Dialer
	return d.DialContext(context.Background(), network, address)
}

// DialContext connects to address with a zero [Dialer]. See
// [net.Dialer.DialContext].
func DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	var d Dialer
	return d.DialContext(ctx, network, address)
}

// Dial connects to the address on the named network. See [net.Dial] for both.
func (d *Dialer) Dial(network, address string) (net.Conn, error) {
	return d.DialContext(context.Background(), network, address)
}

// DialContext connects to the address on the named network using the provided
// context. See [net.Dialer.DialContext]. Networks other than TCP and UDP are
// net.Dialer's alone, except that raw IP sockets use SourceAddrs as well.
func (d *Dialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	inner := d.plan(network, address)
	if inner == nil {
		return d.plain(network).DialContext(ctx, network, address)
	}
	defer inner.release()
	conn, err := inner.dialer.DialContext(ctx, inner.network, inner.address)
	if err != nil {
		return nil, completeError(err, network, d.LocalAddr)
	}
	if udp, ok := conn.(*net.UDPConn); ok {
		dropStrangers(udp)
	}
	return conn, nil
}

// DialTCP connects to raddr from laddr on "tcp", "tcp4" or "tcp6". A zero laddr
// means that none is chosen, one with an invalid Addr and a port that only the
// port is. See [net.Dialer.DialTCP].
func (d *Dialer) DialTCP(ctx context.Context, network string, laddr, raddr netip.AddrPort) (*net.TCPConn, error) {
	if !supported || protocolOf(network) != "tcp" || !sameFamily(network, laddr, raddr) {
		return d.plain(network).DialTCP(ctx, network, laddr, raddr)
	}
	typed := *d
	typed.LocalAddr = net.TCPAddrFromAddrPort(laddr)
	conn, err := typed.DialContext(ctx, network, raddr.String())
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}

// DialUDP connects to raddr from laddr on "udp", "udp4" or "udp6". A zero laddr
// means that none is chosen, one with an invalid Addr and a port that only the
// port is. See [net.Dialer.DialUDP].
func (d *Dialer) DialUDP(ctx context.Context, network string, laddr, raddr netip.AddrPort) (*net.UDPConn, error) {
	if !supported || protocolOf(network) != "udp" || !sameFamily(network, laddr, raddr) {
		return d.plain(network).DialUDP(ctx, network, laddr, raddr)
	}
	typed := *d
	typed.LocalAddr = net.UDPAddrFromAddrPort(laddr)
	conn, err := typed.DialContext(ctx, network, raddr.String())
	if err != nil {
		return nil, err
	}
	return conn.(*net.UDPConn), nil
}

// DialIP connects to raddr from laddr, or from one of SourceAddrs, on "ip",
// "ip4" or "ip6". See [net.Dialer.DialIP].
func (d *Dialer) DialIP(ctx context.Context, network string, laddr, raddr netip.Addr) (*net.IPConn, error) {
	if supported && raddr.IsValid() && len(d.SourceAddrs) > 0 {
		h := d.hook()
		h.local = netip.AddrPortFrom(laddr, 0)
		source, err := h.sourceIP(raddr.Unmap().Is4(), raddr.String())
		if err != nil {
			return nil, &net.OpError{Op: "dial", Net: network, Addr: &net.IPAddr{IP: raddr.AsSlice(), Zone: raddr.Zone()}, Err: err}
		}
		return d.Dialer.DialIP(ctx, network, source, raddr)
	}
	return d.plain(network).DialIP(ctx, network, laddr, raddr)
}

// NetDialer returns a plain [net.Dialer] that shares ports as d does, for the many
// places that take nothing else:
//
//	tls.Dialer{NetDialer: d.NetDialer()}
//
// What d does it does in its ControlContext hook, which must stay in place; d's
// own hooks run in there. A LocalAddr of TCP or UDP has moved there too: the field
// is nil, and stays so, and destination addresses of another family than
// LocalAddr's fail instead of being left out (but for the unspecified address,
// which goes with both). That aside, the connections and errors are those of d,
// except that Source in a [*net.OpError] is not filled in. There is no last look,
// after connect, for datagrams of strangers.
//
// Dial and DialContext share ports. DialTCP and DialUDP of a net.Dialer bind the
// socket themselves and fail, and so do DialIP and DialUnix if LocalAddr is of TCP
// or UDP; use those of d.
func (d *Dialer) NetDialer() *net.Dialer {
	plain := d.Dialer
	if !supported {
		return d.plain("")
	}
	h := d.hook()
	switch d.LocalAddr.(type) {
	case *net.TCPAddr, *net.UDPAddr:
		h.anyLocal, plain.LocalAddr = d.LocalAddr, nil
	case *net.IPAddr:
		if len(d.SourceAddrs) > 0 { // runIP refuses both
			h.anyLocal, plain.LocalAddr = d.LocalAddr, nil
		}
	}
	plain.Control = nil
	plain.ControlContext = h.runAny
	return &plain
}

// runAny is run for a net.Dialer that is not told which network it is for until
// it dials.
func (h *hook) runAny(ctx context.Context, network, address string, c syscall.RawConn) error {
	if protocolOf(network) == "" {
		if isIP(network) {
			return h.runIP(ctx, network, address, c)
		}
		if h.anyLocal != nil {
			return &net.AddrError{Err: errMismatchedType, Addr: h.anyLocal.String()}
		}
		return h.userControl(ctx, network, address, c)
	}
	local, ok := localAddrPort(network, h.anyLocal)
	if !ok {
		return &net.AddrError{Err: errMismatchedType, Addr: h.anyLocal.String()}
	}
	if a := local.Addr(); a.IsValid() && !isWildcard(a) {
		if _, _, ok := withFamily(network, address, a); !ok {
			return &net.AddrError{Err: errNoSuitableAddress, Addr: h.anyLocal.String()}
		}
	}
	of := *h
	of.local = local
	return of.run(ctx, network, address, c)
}

// plain returns the net.Dialer for a dial that does not go through run: on other
// systems, on other networks, and where it is bound to fail.
func (d *Dialer) plain(network string) *net.Dialer {
	plain := d.Dialer
	h := d.hook()
	switch {
	case !supported && (len(d.SourceAddrs) > 0 || d.PortRange != PortRange{}): // run refuses
		plain.ControlContext = h.run
	case supported && len(d.SourceAddrs) > 0 && isIP(network):
		h.anyLocal = d.LocalAddr
		plain.LocalAddr = nil
		plain.ControlContext = h.runIP
	}
	return &plain
}

// isIP reports whether the network is that of raw IP sockets: "ip4:icmp".
func isIP(network string) bool {
	name, _, _ := strings.Cut(network, ":")
	return name == "ip" || name == "ip4" || name == "ip6"
}

// protocolOf is "tcp" or "udp", or empty for all other networks.
func protocolOf(network string) string {
	switch network {
	case "tcp", "tcp4", "tcp6":
		return "tcp"
	case "udp", "udp4", "udp6":
		return "udp"
	}
	return ""
}

// sameFamily reports whether a socket of the network can have both addresses.
// If not, the dial is bound to fail, and net.Dialer has the words for it.
func sameFamily(network string, laddr, raddr netip.AddrPort) bool {
	if !raddr.IsValid() {
		return false
	}
	if isIPv6WildcardOnIPv4(network, laddr.Addr().Unmap()) {
		return false
	}
	is4 := raddr.Addr().Unmap().Is4()
	switch network[len(network)-1] {
	case '4':
		if !is4 {
			return false
		}
	case '6':
		if is4 {
			return false
		}
	}
	local := laddr.Addr().Unmap()
	return !local.IsValid() || isWildcard(local) || local.Is4() == is4
}

// isWildcard reports whether the address is 0.0.0.0 or ::, with a zone or without.
func isWildcard(a netip.Addr) bool { return a.WithZone("").IsUnspecified() }

// isIPv6WildcardOnIPv4 reports whether local is ::, the one wildcard that net.Dialer
// refuses: on a network of IPv4 only.
func isIPv6WildcardOnIPv4(network string, local netip.Addr) bool {
	return strings.HasSuffix(network, "4") && local.Is6() && isWildcard(local)
}

// An innerDial is a dial for the net.Dialer that does the resolving, the racing
// and the waiting.
type innerDial struct {
	dialer           net.Dialer
	network, address string
	hook             hook

	inHook func(context.Context, string, string, syscall.RawConn) error // hook.run, made into a func once
}

// innerDials saves each dial some allocations.
var innerDials = sync.Pool{New: func() any {
	i := new(innerDial)
	i.inHook = i.hook.run
	return i
}}

// release ends the use of i after the dial, unless the hook may still run: of
// several addresses, net.Dialer does not wait for those that have lost the race.
// A name may have several, and the unspecified address stands for two.
func (i *innerDial) release() {
	if isLiteral(i.address) {
		*i = innerDial{inHook: i.inHook}
		innerDials.Put(i)
	}
}

// isLiteral reports whether there is exactly one address to connect to.
func isLiteral(address string) bool {
	a, err := netip.ParseAddrPort(address)
	return err == nil && !isWildcard(a.Addr())
}

// plan prepares the inner dial. It returns nil for what net.Dialer should do by
// itself: other systems, other networks, and dials that it refuses before there
// is a socket.
func (d *Dialer) plan(network, address string) *innerDial {
	if !supported || protocolOf(network) == "" {
		return nil
	}
	local, ok := localAddrPort(network, d.LocalAddr)
	if !ok || isIPv6WildcardOnIPv4(network, local.Addr()) {
		return nil
	}
	h := d.hook()
	h.local = local
	if a := local.Addr(); a.IsValid() && !isWildcard(a) {
		network, address, ok = withFamily(network, address, a)
		if !ok {
			return nil
		}
	} else if len(h.sources) > 0 && !isLiteral(address) {
		if only := h.sources.onlyFamily(); only.IsValid() {
			if narrow, here, ok := withFamily(network, address, only); ok {
				network, address = narrow, here
			}
		}
	}
	inner := innerDials.Get().(*innerDial)
	inner.dialer, inner.network, inner.address = d.Dialer, network, address
	inner.hook = h
	// The hook binds the socket, and a second bind would fail. What else
	// net.Dialer would do with LocalAddr, to leave out the destination
	// addresses of the other family, withFamily has seen to.
	inner.dialer.LocalAddr = nil
	inner.dialer.Control = nil
	inner.dialer.ControlContext = inner.inHook
	return inner
}

// localAddrPort reads LocalAddr, with IPv4-mapped addresses as IPv4. It returns
// false for an address of another type, which net.Dialer refuses.
func localAddrPort(network string, addr net.Addr) (netip.AddrPort, bool) {
	switch a := addr.(type) {
	case nil:
		return netip.AddrPort{}, true
	case *net.TCPAddr:
		if protocolOf(network) != "tcp" {
			return netip.AddrPort{}, false
		}
		if a == nil {
			return netip.AddrPort{}, true
		}
		return addrPort(a.IP, a.Zone, a.Port)
	case *net.UDPAddr:
		if protocolOf(network) != "udp" {
			return netip.AddrPort{}, false
		}
		if a == nil {
			return netip.AddrPort{}, true
		}
		return addrPort(a.IP, a.Zone, a.Port)
	default:
		return netip.AddrPort{}, false
	}
}

func addrPort(ip net.IP, zone string, port int) (netip.AddrPort, bool) {
	a, ok := netip.AddrFromSlice(ip)
	if !ok && len(ip) > 0 || port < 0 || port > 0xffff {
		return netip.AddrPort{}, false
	}
	a = a.Unmap()
	if a.Is6() {
		a = a.WithZone(zone)
	}
	return netip.AddrPortFrom(a, uint16(port)), true
}

// withFamily sees to it that only addresses of the local address's family are
// dialled: by a narrower network if address is a name. It returns false if
// address is a literal of the other family.
func withFamily(network, address string, local netip.Addr) (string, string, bool) {
	narrow, here := protocolOf(network)+"6", "::"
	if local.Is4() {
		narrow, here = protocolOf(network)+"4", "0.0.0.0"
	}
	if network != protocolOf(network) && network != narrow {
		return network, address, false
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return network, address, true // net.Dialer says what is wrong with it
	}
	if host == "" {
		host = here // this host, in the family of the local address
	}
	switch remote, err := netip.ParseAddr(host); {
	case err != nil:
		return narrow, address, true
	case isWildcard(remote) && !(local.Is4() && remote.Is4()):
		return narrow, net.JoinHostPort(here, port), true
	case isWildcard(remote):
		return network, address, true
	default:
		return network, address, remote.Unmap().Is4() == local.Is4()
	}
}

// A hook is the ControlContext of the inner net.Dialer: one call of run is one
// attempt to connect to one address. Calls may run side by side (Happy
// Eyeballs), so a hook does not change.
type hook struct {
	control        func(network, address string, c syscall.RawConn) error
	controlContext func(ctx context.Context, network, address string, c syscall.RawConn) error
	local          netip.AddrPort
	anyLocal       net.Addr // LocalAddr of a NetDialer, from which local follows
	sources        sources
	ports          PortRange
	fastOpen       bool
}

// hook returns the hook for dials of d, without the local address.
func (d *Dialer) hook() hook {
	return hook{
		control: d.Control, controlContext: d.ControlContext,
		sources: d.SourceAddrs, ports: d.PortRange, fastOpen: d.FastOpen,
	}
}

// sourceIP returns the source address of a raw IP socket, which has no port;
// invalid if none is chosen.
func (h *hook) sourceIP(is4 bool, destination string) (netip.Addr, error) {
	if err := h.check(); err != nil {
		return netip.Addr{}, err
	}
	if len(h.sources) == 0 {
		return h.local.Addr(), nil
	}
	for source, err := range h.sources.inTurn(is4) {
		return source, err
	}
	return netip.Addr{}, h.sources.noneFor(destination)
}

// sourceString is a source address and port as text, of which one may be missing.
func sourceString(local netip.AddrPort) string {
	host := ""
	if local.Addr().IsValid() {
		host = local.Addr().String()
	}
	if local.Port() == 0 {
		return host
	}
	return net.JoinHostPort(host, strconv.Itoa(int(local.Port())))
}

// check returns an error for fields that no dial can be made with.
func (h *hook) check() error {
	if port := h.local.Port(); port != 0 && h.ports != (PortRange{}) && !h.ports.Contains(port) {
		return &fieldError{field: "LocalAddr", value: sourceString(h.local), problem: "the port is not in PortRange " + h.ports.String()}
	}
	if a := h.local.Addr(); len(h.sources) > 0 && (h.local.Port() != 0 || a.IsValid() && !a.IsUnspecified()) {
		return &fieldError{field: "LocalAddr", value: sourceString(h.local), problem: "cannot be used together with SourceAddrs"}
	}
	return nil
}

// hasUserControl reports whether the caller has a hook of their own, and the
// socket therefore may be in any state.
func (h *hook) hasUserControl() bool { return h.control != nil || h.controlContext != nil }

// userControl runs the caller's hook with net.Dialer's precedence.
func (h *hook) userControl(ctx context.Context, network, address string, c syscall.RawConn) error {
	if h.controlContext != nil {
		return h.controlContext(ctx, network, address, c)
	}
	if h.control != nil {
		return h.control(network, address, c)
	}
	return nil
}
