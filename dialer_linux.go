package connectx

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/sys"
	"github.com/seed22601231/connectx/lookup"
	"github.com/seed22601231/connectx/portpick"
)

// supported is true where the hook does the work. See dialer_other.go for the
// other systems.
const supported = true

// An attempt is one attempt to connect to one address, on one descriptor.
type attempt struct {
	inControl func(fd uintptr) // control, made into a func once

	hook             *hook
	ctx              context.Context
	network, address string // as net.Dialer gives them to a hook
	rawConn          syscall.RawConn

	err    error // what became of it
	fd     int
	family int // AF_INET or AF_INET6
	ns     *namespace
	local  netip.AddrPort // what the caller chose
	remote netip.AddrPort
	scope  uint32 // interface of a link-local destination, else 0

	// localScope is that of a link-local source.
	localScope uint32
	ports      *portpick.Ports // to pick from

	// outside says that ports are not a part of the system's range, out of
	// which the kernel would choose.
	outside bool

	// brief says that there are other source addresses to try before it pays
	// to search the range of this one to the last port.
	brief bool
	dirty bool // the socket has been of use for another source address

	waited time.Duration // for locked ports, of all source addresses

	trying bool // between begin and end

	trace  *Trace
	source netip.Addr // for the trace; invalid if the kernel chooses it
	did    ProtocolStats

	lock tupleLock // UDP
}

// run is the ControlContext of the inner net.Dialer. It does all the work of
// one attempt to connect, connect itself included: only so can it go on to
// another port on the same descriptor, and only so is a UDP port locked for no
// longer than a few system calls.
//
// Afterwards net.Dialer calls connect once more. A TCP socket answers EALREADY
// or EISCONN, and net.Dialer waits for the connection or has it; a UDP socket
// connects to the same peer again.
func (h *hook) run(ctx context.Context, network, address string, c syscall.RawConn) error {
	if err := h.check(); err != nil {
		return err
	}
	if err := h.userControl(ctx, network, address, c); err != nil {
		return err
	}
	a := attempts.Get().(*attempt)
	defer a.release()
	a.hook, a.ctx, a.network, a.address, a.rawConn = h, ctx, network, address, c
	a.trace = traceOf(ctx)
	if err := c.Control(a.inControl); err != nil {
		return err
	}
	return a.err
}

// attempts saves each dial some allocations.
var attempts = sync.Pool{New: func() any {
	a := new(attempt)
	a.inControl = a.control
	return a
}}

func (a *attempt) release() {
	a.count()
	*a = attempt{inControl: a.inControl}
	attempts.Put(a)
}

func (a *attempt) control(fd uintptr) {
	a.fd = int(fd)
	a.err = a.connect()
}

func (a *attempt) connect() error {
	a.family = unix.AF_INET
	if strings.HasSuffix(a.network, "6") {
		a.family = unix.AF_INET6
	}
	ns, err := namespaceOf(a.fd)
	if err != nil {
		return os.NewSyscallError("getsockopt", err)
	}
	a.ns = ns
	if err := a.usePorts(ns.ports.Load()); err != nil {
		return err
	}
	if len(a.hook.sources) > 0 {
		return a.connectFromSources()
	}
	return a.dialFrom(a.hook.local)
}

// usePorts sets what to pick ports from, given the system's range.
func (a *attempt) usePorts(system *portpick.Ports) (err error) {
	a.ports, a.outside = system, false
	if own := a.hook.ports; own != (PortRange{}) {
		a.outside = own.Low < system.Low() || own.High > system.High()
		if a.ports, err = system.Within(own.Low, own.High); err != nil {
			return &fieldError{field: "PortRange", value: own.String(), problem: "not a range of ports", err: err}
		}
	}
	return nil
}

// dialFrom connects from what the caller has chosen.
func (a *attempt) dialFrom(local netip.AddrPort) error {
	if err := a.parseAddresses(local); err != nil {
		return err
	}
	if a.hook.hasUserControl() {
		if bound, err := a.boundByUser(); bound || err != nil {
			return err
		}
	}
	if source := a.local.Addr(); source.IsValid() {
		a.sourceChosen(source)
	}
	if protocolOf(a.network) == "tcp" {
		return a.connectTCP()
	}
	return a.connectUDP()
}

// connectFromSources connects from one of SourceAddrs: from the next one if all
// ports of those before are taken.
//
// To find out that all are takes long where they are many. So the first round
// looks at each source address only as long as it takes to find a port where one
// in a hundred is free.
func (a *attempt) connectFromSources() error {
	// Tells the family; what is chosen comes below.
	if err := a.parseAddresses(netip.AddrPort{}); err != nil {
		return err
	}
	is4 := a.remote.Addr().Is4()
	a.brief = len(a.hook.sources) > 1
	all, err := a.connectFromEach(is4)
	if a.brief && all != nil {
		a.brief = false
		all, err = a.connectFromEach(is4)
	}
	if all == nil {
		return err
	}
	slices.SortFunc(all.Sources, netip.Addr.Compare)
	return all
}

// connectFromEach returns an error of its own for each source address on which
// there was no port.
func (a *attempt) connectFromEach(is4 bool) (all *PortsExhaustedError, err error) {
	for source, err := range a.hook.sources.inTurn(is4) {
		if all != nil && slices.Contains(all.Sources, source) {
			continue // is in SourceAddrs more than once
		}
		if err == nil {
			err = a.connectFromSource(source)
		}
		exhausted, ok := err.(*PortsExhaustedError)
		if !ok {
			return nil, notThisMachines(source, err)
		}
		all = all.and(exhausted)
	}
	if all == nil {
		return nil, a.hook.sources.noneFor(a.address)
	}
	return all, nil
}

func (a *attempt) connectFromSource(source netip.Addr) error {
	if err := a.fullFrom(source); err != nil {
		return err
	}
	if a.dirty {
		if err := a.renew(); err != nil {
			return err
		}
	}
	a.dirty = true
	start := time.Now()
	err := a.dialFrom(netip.AddrPortFrom(source, 0))
	if _, ok := err.(*PortsExhaustedError); ok && a.brief {
		f := a.flow(a.local.Addr(), a.boundDevice())
		f.brief = true
		// Brief searches in vain take three percent of the time, whatever the
		// number of source addresses.
		again := 32 * time.Since(start) * time.Duration(len(a.hook.sources))
		a.ns.full.rememberFor(f, fullFlow{source: a.local.Addr()}, again)
	}
	return err
}

// fullFrom spares a dial the search on a source address for which another one
// has found no port a moment ago.
func (a *attempt) fullFrom(source netip.Addr) error {
	if !a.ns.full.used.Load() {
		return nil
	}
	if err := a.parseAddresses(netip.AddrPortFrom(source, 0)); err != nil {
		return err
	}
	f := a.flow(a.local.Addr(), a.boundDevice())
	known, full := a.ns.full.isKnown(f)
	if !full && a.brief {
		f.brief = true
		known, full = a.ns.full.isKnown(f)
	}
	if full {
		return a.exhausted(a.local.Addr(), known.taken)
	}
	return nil
}

// notThisMachines says which of SourceAddrs could not be bound.
func notThisMachines(source netip.Addr, err error) error {
	if call, ok := err.(*os.SyscallError); !ok || call.Syscall != "bind" {
		return err
	}
	problem := "cannot be used"
	if errors.Is(err, unix.EADDRNOTAVAIL) {
		problem = "not an address of this machine"
	}
	return &fieldError{field: "SourceAddrs", value: source.String(), problem: problem, err: err}
}

// runIP is the ControlContext for raw IP sockets, which have no ports: all there
// is to do is to bind the source address.
func (h *hook) runIP(ctx context.Context, network, address string, c syscall.RawConn) error {
	if err := h.userControl(ctx, network, address, c); err != nil {
		return err
	}
	family := unix.AF_INET
	if strings.HasSuffix(network, "6") {
		family = unix.AF_INET6
	}
	of := *h
	switch a := h.anyLocal.(type) {
	case nil:
	case *net.IPAddr:
		if a != nil {
			local, ok := addrPort(a.IP, a.Zone, 0)
			if !ok {
				return &net.AddrError{Err: errMismatchedType, Addr: a.String()}
			}
			of.local = local
		}
	default:
		return &net.AddrError{Err: errMismatchedType, Addr: a.String()}
	}
	source, err := of.sourceIP(family == unix.AF_INET, address)
	if err != nil || !source.IsValid() {
		return err
	}
	if family == unix.AF_INET && !source.Is4() {
		return &net.AddrError{Err: errNoSuitableAddress, Addr: source.String()}
	}
	ctlErr := c.Control(func(fd uintptr) {
		sa := sys.NewSockaddr(family, netip.AddrPortFrom(source.WithZone(""), 0), interfaceIndex(int(fd), source.Zone()))
		err = os.NewSyscallError("bind", sys.Bind(int(fd), &sa))
	})
	switch {
	case ctlErr != nil:
		return ctlErr
	case len(h.sources) > 0:
		return notThisMachines(source, err)
	default:
		return err
	}
}

// parseAddresses sets local, remote and scope.
func (a *attempt) parseAddresses(local netip.AddrPort) error {
	address := a.address
	if strings.HasPrefix(address, ":") {
		// Package net's form of "this host".
		address = "0.0.0.0" + address
	}
	if zone := strings.IndexByte(address, '%'); zone >= 0 {
		// An IPv4-mapped destination has no use for it.
		if host := strings.TrimPrefix(address[:zone], "["); !strings.Contains(host, ":") {
			address = host + address[strings.LastIndexByte(address, ':'):]
		}
	}
	remote, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	addr := remote.Addr().Unmap()
	a.local = local
	zone, localZone := addr.Zone(), local.Addr().Zone()
	if zone == "" {
		zone = localZone
	}
	if localZone == "" {
		localZone = zone
	}
	if local := a.local.Addr(); local.IsValid() {
		if local = local.WithZone(""); local.IsUnspecified() {
			local = netip.Addr{}
		}
		a.local = netip.AddrPortFrom(local, a.local.Port())
	}
	addr = addr.WithZone("")
	if addr.IsUnspecified() {
		addr = a.thisHost()
	}
	a.remote = netip.AddrPortFrom(addr, remote.Port())
	a.scope = interfaceIndex(a.fd, zone)
	a.localScope = a.scope
	if localZone != zone {
		a.localScope = interfaceIndex(a.fd, localZone)
	}
	for _, addr := range []netip.Addr{a.local.Addr(), a.remote.Addr()} {
		if a.family == unix.AF_INET && addr.Is6() {
			return &net.AddrError{Err: "non-IPv4 address", Addr: addr.String()}
		}
	}
	return nil
}

// thisHost is the address that the kernel connects to when told the unspecified
// one (ip_route_output_key_hash_rcu, __ip6_datagram_connect).
func (a *attempt) thisHost() netip.Addr {
	switch {
	case a.family == unix.AF_INET6:
		return netip.IPv6Loopback()
	case a.local.Addr().IsValid():
		return a.local.Addr()
	default:
		return netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
}

// interfaceIndex returns the index of the interface that a zone names, in the
// namespace of the socket; 0 if there is none, which the kernel refuses then.
func interfaceIndex(fd int, zone string) uint32 {
	if zone == "" {
		return 0
	}
	// The ioctl takes "lo:1" for lo (dev_ioctl in net/core/dev_ioctl.c).
	if ifreq, err := unix.NewIfreq(zone); err == nil && !strings.Contains(zone, ":") {
		if unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifreq) == nil {
			return ifreq.Uint32()
		}
	}
	index, err := strconv.ParseUint(zone, 10, 32)
	if err != nil {
		return 0
	}
	return uint32(index)
}

// boundByUser reports whether the caller's hook has bound the socket itself.
// Then it is left as it is, for net.Dialer to connect.
func (a *attempt) boundByUser() (bool, error) {
	if a.local != (netip.AddrPort{}) {
		return false, nil // both bind, and the second one fails as with net.Dialer
	}
	bound, err := sys.LocalAddr(a.fd)
	if err != nil || bound.Port() == 0 && bound.Addr().IsUnspecified() {
		return false, nil
	}
	if own := a.hook.ports; own != (PortRange{}) && !own.Contains(bound.Port()) {
		return true, &fieldError{field: "PortRange", value: own.String(), problem: "does not contain the port of " + bound.String() + ", to which a Control hook has bound the socket"}
	}
	return true, nil
}

// boundDevice is the interface that the socket is bound to, else 0: by the
// caller's hook, by the control group of the process (ip vrf exec), or soon by
// the kernel on account of a link-local address.
func (a *attempt) boundDevice() uint32 {
	if a.scope != 0 && a.remote.Addr().IsLinkLocalUnicast() {
		return a.scope
	}
	if a.localScope != 0 && a.local.Addr().IsLinkLocalUnicast() {
		return a.localScope
	}
	if a.hook.hasUserControl() {
		return boundDevice(a.fd)
	}
	return a.ns.device.Load()
}

// flow is what the attempt needs a port for.
func (a *attempt) flow(source netip.Addr, device uint32) flow {
	f := flow{protocol: protocolOf(a.network), source: source, destination: a.remote, ports: a.hook.ports, device: device}
	if !source.IsValid() && a.hook.hasUserControl() {
		f.mark, f.unicastInterface = markOf(a.fd), a.unicastInterface()
	}
	return f
}

// errMulticastOptions leaves a case to the kernel.
var errMulticastOptions = errors.New("the source of multicast depends on options of the socket")

// route asks which source address and interface the kernel would give the
// socket.
func (a *attempt) route(conn *lookup.Conn, device uint32) (lookup.Route, error) {
	mark := a.ns.mark.Load()
	if a.hook.hasUserControl() {
		mark = markOf(a.fd)
		if a.remote.Addr().IsMulticast() {
			return lookup.Route{}, errMulticastOptions
		}
		if device == 0 {
			device = a.unicastInterface()
		}
	}
	protocol := uint8(unix.IPPROTO_UDP)
	if protocolOf(a.network) == "tcp" {
		protocol = unix.IPPROTO_TCP
	}
	return conn.Source(a.remote, lookup.RouteOptions{
		Protocol: protocol, Interface: device, Mark: mark, Source: a.local.Addr(), SourcePort: a.local.Port(),
	})
}

// unicastInterface is the interface that IP_UNICAST_IF or IPV6_UNICAST_IF names
// (in network byte order), else 0.
func (a *attempt) unicastInterface() uint32 {
	level, option := unix.SOL_IP, unix.IP_UNICAST_IF
	if a.family == unix.AF_INET6 {
		level, option = unix.SOL_IPV6, unix.IPV6_UNICAST_IF
	}
	index, err := sys.Int(a.fd, level, option)
	if err != nil || index == 0 {
		return 0
	}
	return binary.BigEndian.Uint32(binary.NativeEndian.AppendUint32(nil, uint32(index)))
}

// bind binds the socket to the given address.
func (a *attempt) bind(local netip.AddrPort) error {
	sa := sys.NewSockaddr(a.family, local, a.localScope)
	return sys.Bind(a.fd, &sa)
}

// renew puts a fresh socket on the descriptor in place of one that has a port
// which is of no use: a socket cannot be bound twice. net.Dialer has not handed
// the descriptor to the poller yet.
func (a *attempt) renew() error {
	kind := unix.SOCK_DGRAM
	if protocolOf(a.network) == "tcp" {
		kind = unix.SOCK_STREAM
	}
	protocol, _ := sys.Int(a.fd, unix.SOL_SOCKET, unix.SO_PROTOCOL) // MPTCP, or the default
	fresh, err := unix.Socket(a.family, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, int(protocol))
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fresh)
	// What package net sets on a new socket.
	if a.family == unix.AF_INET6 {
		if only, err := sys.Int(a.fd, unix.SOL_IPV6, unix.IPV6_V6ONLY); err == nil {
			_ = sys.SetInt(fresh, unix.SOL_IPV6, unix.IPV6_V6ONLY, only)
		}
	}
	if kind == unix.SOCK_DGRAM {
		if err := sys.SetInt(fresh, unix.SOL_SOCKET, unix.SO_BROADCAST, 1); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	if err := unix.Dup3(fresh, a.fd, unix.O_CLOEXEC); err != nil {
		return os.NewSyscallError("dup3", err)
	}
	return a.hook.userControl(a.ctx, a.network, a.address, a.rawConn)
}

func (a *attempt) remoteSockaddr() sys.Sockaddr {
	return sys.NewSockaddr(a.family, a.remote, a.scope)
}

// chosen is the source that was asked for, as an error names it.
func (a *attempt) chosen() netip.AddrPort {
	if a.local.Addr().IsValid() {
		return a.local
	}
	if a.family == unix.AF_INET {
		return netip.AddrPortFrom(netip.IPv4Unspecified(), a.local.Port())
	}
	return netip.AddrPortFrom(netip.IPv6Unspecified(), a.local.Port())
}

// ended returns the error of a context that is over, in package net's words.
func (a *attempt) ended() error {
	if err := a.ctx.Err(); err != nil {
		return contextError{err}
	}
	// The timer of the context may be late on a busy machine.
	if deadline, ok := a.ctx.Deadline(); ok && !time.Now().Before(deadline) {
		return contextError{context.DeadlineExceeded}
	}
	return nil
}
