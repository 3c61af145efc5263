//go:build linux && (amd64 || arm64)

package connectx_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/netns"
)

// A faultScene is a dial that faults are put into, in a network namespace of its
// own. Unless it is cold, others have gone before it there.
type faultScene struct {
	network   string
	six       bool
	zone      string
	source    bool   // LocalAddr has an address
	port      uint16 // of LocalAddr
	ports     connectx.PortRange
	wide      bool // the system's range has 2,000 ports, not 10
	hook      bool
	fastOpen  bool
	cold      bool
	neighbour neighbour
	clean     string // the outcome without a fault, if there is anything to say
	next      string // that of the dial after it, if it is another
}

// A neighbour is what others have connected before the dial.
type neighbour int

const (
	nobody             neighbour = iota
	onThePort                    // from the same port to another destination
	onTheTuple                   // on the 4-tuple
	onTheTupleOfDevice           // on the 4-tuple, bound to the interface
	onAllPorts                   // to the destination, from all ports of the range
	onEvenPorts                  // to the destination, from those that are picked first
	elsewhereOnEach              // to another destination, from all ports of the range
)

const (
	faultLow, faultHigh = 40000, 40009
	faultWideHigh       = 41999
	faultPort           = 40004
)

var outside = connectx.PortRange{Low: 50000, High: 50001}

// faultScenes are by the names that the table has for them.
var faultScenes = map[string]faultScene{
	"TCP":                                   {network: "tcp"},
	"TCP, address":                          {network: "tcp", source: true},
	"TCP, port":                             {network: "tcp", source: true, port: faultPort},
	"TCP, 4-tuple in use":                   {network: "tcp", source: true, port: faultPort, neighbour: onTheTuple, clean: "error EADDRNOTAVAIL"},
	"TCP, range full":                       {network: "tcp", source: true, neighbour: onAllPorts, clean: "exhausted"},
	"TCP, no source, range full":            {network: "tcp", neighbour: onAllPorts, clean: "exhausted"},
	"TCP, PortRange":                        {network: "tcp", source: true, ports: connectx.PortRange{Low: 40002, High: 40005}},
	"TCP, PortRange outside":                {network: "tcp", source: true, ports: outside},
	"TCP, PortRange outside, full":          {network: "tcp", source: true, ports: outside, neighbour: onAllPorts, clean: "exhausted"},
	"TCP, FastOpen":                         {network: "tcp", fastOpen: true},
	"TCP, Control":                          {network: "tcp", hook: true},
	"TCP, IPv6":                             {network: "tcp", six: true},
	"TCP, IPv6, PortRange outside":          {network: "tcp", six: true, source: true, ports: outside},
	"TCP, zone":                             {network: "tcp", six: true, zone: "lo"},
	"TCP, first dial":                       {network: "tcp", cold: true},
	"UDP":                                   {network: "udp"},
	"UDP, address":                          {network: "udp", source: true},
	"UDP, port":                             {network: "udp", source: true, port: faultPort},
	"UDP, shared port":                      {network: "udp", source: true, port: faultPort, neighbour: onThePort},
	"UDP, 4-tuple in use":                   {network: "udp", source: true, port: faultPort, neighbour: onTheTuple, clean: "error EADDRINUSE"},
	"UDP, all ports shared":                 {network: "udp", source: true, neighbour: elsewhereOnEach},
	"UDP, even ports taken":                 {network: "udp", source: true, neighbour: onEvenPorts, clean: "next port", next: "ignored or next port"},
	"UDP, range full":                       {network: "udp", source: true, neighbour: onAllPorts, clean: "exhausted"},
	"UDP, wide range":                       {network: "udp", source: true, wide: true},
	"UDP, PortRange of a wide range":        {network: "udp", source: true, wide: true, ports: connectx.PortRange{Low: 40000, High: 41499}},
	"UDP, Control":                          {network: "udp", hook: true},
	"UDP, IPv6":                             {network: "udp", six: true},
	"UDP, IPv6, shared port":                {network: "udp", six: true, source: true, port: faultPort, neighbour: onThePort},
	"UDP, zone":                             {network: "udp", six: true, zone: "lo"},
	"UDP, first dial":                       {network: "udp", cold: true},
	"UDP, address, first dial":              {network: "udp", source: true, cold: true},
	"UDP, PortRange, first dial":            {network: "udp", source: true, ports: connectx.PortRange{Low: 40002, High: 40005}, cold: true},
	"UDP, shared port, first dial":          {network: "udp", source: true, port: faultPort, neighbour: onThePort, cold: true},
	"UDP, 4-tuple in use, first dial":       {network: "udp", source: true, port: faultPort, neighbour: onTheTuple, cold: true, clean: "error EADDRINUSE"},
	"UDP, 4-tuple in use on lo, first dial": {network: "udp", source: true, port: faultPort, neighbour: onTheTupleOfDevice, cold: true, clean: "error EADDRINUSE"},
}

func (s *faultScene) tcp() bool { return s.network == "tcp" }

// servers are the destination of the dial, and another one.
func (s *faultScene) servers() [2]netip.AddrPort {
	if s.six {
		return [2]netip.AddrPort{netip.MustParseAddrPort("[::1]:7"), netip.MustParseAddrPort("[::1]:8")}
	}
	return [2]netip.AddrPort{netip.MustParseAddrPort("127.1.0.1:7"), netip.MustParseAddrPort("127.1.0.2:7")}
}

// address is the source address, be it chosen or not.
func (s *faultScene) address() netip.Addr {
	switch {
	case s.six:
		return netip.IPv6Loopback()
	case s.source:
		return netip.MustParseAddr("127.2.0.1")
	default:
		return netip.MustParseAddr("127.0.0.1")
	}
}

func (s *faultScene) destination() string {
	server := s.servers()[0]
	return netip.AddrPortFrom(server.Addr().WithZone(s.zone), server.Port()).String()
}

// system is the system's port range.
func (s *faultScene) system() connectx.PortRange {
	if s.wide {
		return connectx.PortRange{Low: faultLow, High: faultWideHigh}
	}
	return connectx.PortRange{Low: faultLow, High: faultHigh}
}

// usable are the ports that the dial may pick from.
func (s *faultScene) usable() connectx.PortRange {
	if s.ports != (connectx.PortRange{}) {
		return s.ports
	}
	return s.system()
}

func (s *faultScene) dialer() *connectx.Dialer {
	d := &connectx.Dialer{PortRange: s.ports, FastOpen: s.fastOpen}
	d.SetMultipathTCP(false)
	if s.source {
		d.LocalAddr = localAddr(s.network, s.address().String(), s.port)
	}
	if s.hook {
		d.Control = func(string, string, syscall.RawConn) error { return nil }
	}
	return d
}

// A faultStage is a scene with its network namespace, servers and neighbours.
type faultStage struct {
	faultScene
	datagrams  *net.UDPConn
	listener   *net.TCPListener
	accepted   []net.Conn
	neighbours []int
}

// enter moves the calling thread to a new network namespace and sets the stage.
func (s *faultScene) enter() (stage *faultStage, err error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, os.NewSyscallError("unshare", err)
	}
	if err := netns.LoopbackUp(); err != nil {
		return nil, err
	}
	system := s.system()
	if err := netns.SetPortRange(system.Low, system.High); err != nil {
		return nil, err
	}
	// What remains of connections after a fault is none of our business, if it
	// would remain of net.Dialer's as well.
	if err := os.WriteFile("/proc/sys/net/ipv4/tcp_max_tw_buckets", []byte("0\n"), 0); err != nil {
		return nil, err
	}
	stage = &faultStage{faultScene: *s}
	server := s.servers()[0]
	if stage.datagrams, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(server)); err != nil {
		return nil, err
	}
	// On all addresses, for the neighbours' destination.
	everywhere := netip.IPv4Unspecified()
	if s.six {
		everywhere = netip.IPv6Unspecified()
	}
	if stage.listener, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(everywhere, server.Port()))); err != nil {
		return nil, err
	}
	if !s.cold {
		if err := stage.warmUp(); err != nil {
			return nil, err
		}
	}
	return stage, stage.invite()
}

// warmUp dials once before there are neighbours: the netlink sockets are open
// then, the port range is known, and so is the route.
func (s *faultStage) warmUp() error {
	d := s.dialer()
	if s.network == "udp" {
		// A dial to a port that is in use opens them in any case.
		fd, err := sharedSocket(s.network, netip.AddrPortFrom(s.address(), faultPort), s.servers()[1])
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		d = &connectx.Dialer{}
		d.LocalAddr = localAddr(s.network, s.address().String(), faultPort)
		conn, err := d.Dial(s.network, s.destination())
		if err != nil {
			return err
		}
		conn.Close()
		d = s.dialer()
	}
	conn, err := d.Dial(s.network, s.destination())
	if err != nil {
		return err
	}
	hangUp(conn)
	return nil
}

// invite lets the neighbours in.
func (s *faultStage) invite() error {
	servers, ports := s.servers(), s.usable()
	destination := servers[0]
	first, last, step := ports.Low, ports.High, uint16(1)
	switch s.neighbour {
	case nobody:
		return nil
	case onThePort, onTheTuple, onTheTupleOfDevice:
		first, last = s.port, s.port
	case onEvenPorts:
		step = 2
	}
	if s.neighbour == onThePort || s.neighbour == elsewhereOnEach {
		destination = servers[1]
	}
	for port := first; port <= last; port += step {
		fd, err := sharedSocket(s.network, netip.AddrPortFrom(s.address(), port), destination)
		if err != nil {
			return err
		}
		s.neighbours = append(s.neighbours, fd)
		if s.neighbour == onTheTupleOfDevice {
			if err := unix.BindToDevice(fd, "lo"); err != nil {
				return os.NewSyscallError("setsockopt", err)
			}
		}
		if s.tcp() {
			accepted, err := s.accept(netip.AddrPortFrom(s.address(), port))
			if err != nil {
				return err
			}
			s.accepted = append(s.accepted, accepted)
		}
	}
	return nil
}

// sharedSocket is a connected socket that shares its port, made by hand.
func sharedSocket(network string, local, remote netip.AddrPort) (fd int, err error) {
	family, kind := unix.AF_INET, unix.SOCK_DGRAM
	if local.Addr().Is6() {
		family = unix.AF_INET6
	}
	if network == "tcp" {
		kind = unix.SOCK_STREAM
	}
	if fd, err = unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if network == "tcp" {
		err = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	}
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	if err == nil {
		err = unix.Bind(fd, sockaddr(local.Addr().String(), int(local.Port())))
	}
	if err == nil {
		err = unix.Connect(fd, sockaddr(remote.Addr().String(), int(remote.Port())))
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("neighbour %v->%v: %w", local, remote, err)
	}
	return fd, nil
}

// A faultDial is a dial and what became of it.
type faultDial struct {
	conn    net.Conn
	err     error
	reason  string // of a fallback
	outcome string
	took    time.Duration
	did     connectx.ProtocolStats
}

// faultDeadline is far beyond what any dial takes.
const faultDeadline = 10 * time.Second

// dial dials. If the caller has chosen no port, the reason of a fallback is
// traced, else it is in the error.
func (s *faultStage) dial(errno unix.Errno) (d faultDial) {
	ctx, cancel := context.WithTimeout(context.Background(), faultDeadline)
	defer cancel()
	if s.port == 0 {
		ctx = connectx.WithTrace(ctx, &connectx.Trace{Fallback: func(reason error) { d.reason = reason.Error() }})
	}
	before, start := connectx.ReadStats(), time.Now()
	d.conn, d.err = s.dialer().DialContext(ctx, s.network, s.destination())
	d.took = time.Since(start)
	stats := statsDiff(before, connectx.ReadStats())
	d.did = stats.UDP
	if s.tcp() {
		d.did = stats.TCP
	}
	d.outcome = s.outcome(&d, errno)
	return d
}

// outcome says in a few words what became of a dial: those of the table.
func (s *faultStage) outcome(d *faultDial, errno unix.Errno) string {
	var op *net.OpError
	switch {
	case d.err != nil && !errors.As(d.err, &op):
		return "not a net.OpError: " + d.err.Error()
	case errors.Is(d.err, connectx.ErrPortsExhausted):
		return "exhausted"
	case d.err != nil && strings.Contains(d.err.Error(), "cannot be shared"):
		d.reason = d.err.Error()
		return "not shared"
	case d.err != nil && errno != 0 && errors.Is(d.err, errno):
		return "error"
	case d.err != nil:
		var is unix.Errno
		if errors.As(d.err, &is) {
			return "error " + unix.ErrnoName(is)
		}
		return "error: " + d.err.Error()
	case s.network == "udp" && !reusesAddress(d.conn):
		return "own port"
	case s.port == 0 && !s.usable().Contains(portOfSocket(d.conn)):
		return "default range"
	case d.did.Fallbacks > 0:
		return "fallback"
	case d.did.Tries > 1:
		return "next port"
	default:
		return "ignored"
	}
}

// onConn runs f on the descriptor of a connection.
func onConn(conn net.Conn, f func(fd int)) {
	if raw, err := conn.(syscall.Conn).SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { f(int(fd)) })
	}
}

func reusesAddress(conn net.Conn) (yes bool) {
	onConn(conn, func(fd int) {
		n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR)
		yes = err == nil && n != 0
	})
	return yes
}

// endsOf are the addresses that the kernel has for a connection; net.Conn may not
// know them after a fault.
func endsOf(conn net.Conn) (local, remote netip.AddrPort) {
	onConn(conn, func(fd int) {
		if sa, err := unix.Getsockname(fd); err == nil {
			local = addrPortOf(sa)
		}
		if sa, err := unix.Getpeername(fd); err == nil {
			remote = addrPortOf(sa)
		}
	})
	return local, remote
}

func addrPortOf(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

func portOfSocket(conn net.Conn) uint16 {
	local, _ := endsOf(conn)
	return local.Port()
}

// leave closes what the stage has, and returns which ports somebody still has.
func (s *faultStage) leave() error {
	for _, fd := range s.neighbours {
		unix.Close(fd)
	}
	for _, conn := range s.accepted {
		hangUp(conn)
	}
	s.datagrams.Close()
	s.listener.Close()
	return soon(s.allPortsFree)
}

// allPortsFree tries to have each port to itself, as a stranger would.
func (s *faultStage) allPortsFree() error {
	for _, table := range []string{"tcp", "tcp6", "udp", "udp6"} {
		sockets, err := kernelSockets(table)
		if err != nil {
			return err
		}
		if len(sockets) > 0 {
			return fmt.Errorf("%s sockets remain: %v", table, sockets)
		}
	}
	if s.wide {
		return nil // a UDP socket that is bound is in the table
	}
	for _, ports := range []connectx.PortRange{s.system(), s.usable()} {
		for port := ports.Low; port <= ports.High; port++ {
			for _, kind := range []int{unix.SOCK_STREAM, unix.SOCK_DGRAM} {
				if err := bindAlone(kind, port); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func bindAlone(kind int, port uint16) error {
	fd, err := unix.Socket(unix.AF_INET6, kind|unix.SOCK_CLOEXEC, 0) // of both families
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, sockaddr("::", int(port))); err != nil {
		return fmt.Errorf("port %d is not free: %w", port, err)
	}
	return nil
}

// kernelSockets are the sockets of the thread's namespace that the kernel lists,
// as "local remote".
func kernelSockets(table string) (sockets []string, err error) {
	b, err := os.ReadFile("/proc/thread-self/net/" + table)
	if err != nil {
		return nil, err
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	for _, line := range lines[1:] {
		if fields := strings.Fields(line); len(fields) > 2 {
			sockets = append(sockets, fields[1]+" "+fields[2])
		}
	}
	return sockets, nil
}

// soon waits for what holds in a moment, when others have done their part.
func soon(condition func() error) (err error) {
	for deadline := time.Now().Add(5 * time.Second); ; runtime.Gosched() {
		if err = condition(); err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

// portLeft returns an error while a TCP connection from the chosen port goes on: one
// that net.Dialer has closed, because of a fault after connect, ends in its time.
func (s *faultStage) portLeft() error {
	table := s.network
	if s.six {
		table += "6"
	}
	sockets, err := kernelSockets(table)
	if err != nil {
		return err
	}
	for _, socket := range sockets {
		local, _, _ := strings.Cut(socket, " ")
		if strings.HasSuffix(local, fmt.Sprintf(":%04X", s.port)) {
			return fmt.Errorf("the connection goes on: %s", socket)
		}
	}
	return nil
}

// checkUnique returns an error if two connected sockets have one 4-tuple.
func (s *faultStage) checkUnique() error {
	table := s.network
	if s.six {
		table += "6"
	}
	sockets, err := kernelSockets(table)
	if err != nil {
		return err
	}
	seen := make(map[string]bool)
	for _, socket := range sockets {
		if seen[socket] && !strings.HasSuffix(socket, ":0000") {
			return fmt.Errorf("two sockets on the 4-tuple %s", socket)
		}
		seen[socket] = true
	}
	return nil
}

// checkConn checks a connection that there is in spite of a fault: it is to the
// destination, it receives what is sent to it, and nobody else gets its 4-tuple.
func (s *faultStage) checkConn(conn net.Conn) error {
	local, remote := endsOf(conn)
	if remote != s.servers()[0] {
		return fmt.Errorf("connected to %v", remote)
	}
	again := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr(s.network, local.Addr().String(), local.Port())}}
	twin, err := again.Dial(s.network, s.destination())
	if err == nil {
		defer hangUp(twin)
		return fmt.Errorf("a second dial got the 4-tuple %v->%v", local, remote)
	}
	if !errors.Is(err, unix.EADDRINUSE) && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("a second dial from %v: %w", local, err)
	}
	return s.checkDelivery(conn, local)
}

func (s *faultStage) checkDelivery(conn net.Conn, local netip.AddrPort) error {
	var b [1]byte
	deadline := time.Now().Add(faultDeadline)
	if !s.tcp() {
		if _, err := s.datagrams.WriteToUDPAddrPort([]byte{1}, local); err != nil {
			return err
		}
		conn.SetReadDeadline(deadline)
		_, err := conn.Read(b[:])
		return err
	}
	if _, err := conn.Write([]byte{1}); err != nil {
		return err
	}
	accepted, err := s.accept(local)
	if err != nil {
		return err
	}
	defer hangUp(accepted)
	accepted.SetReadDeadline(deadline)
	_, err = accepted.Read(b[:])
	return err
}

// accept accepts the connection from an address. Those before it have hung up.
func (s *faultStage) accept(from netip.AddrPort) (net.Conn, error) {
	s.listener.SetDeadline(time.Now().Add(faultDeadline))
	for {
		accepted, err := s.listener.AcceptTCP()
		if err != nil {
			return nil, err
		}
		if _, remote := endsOf(accepted); remote == from {
			return accepted, nil
		}
		hangUp(accepted)
	}
}
