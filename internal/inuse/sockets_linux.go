package inuse

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// States of a socket that matter here, of include/net/tcp_states.h. A connected
// UDP socket is in Established, any other in Close.
const (
	Established = netlink.TCP_ESTABLISHED
	TimeWait    = netlink.TCP_TIME_WAIT
	Close       = netlink.TCP_CLOSE
	Listen      = netlink.TCP_LISTEN
)

// A Socket is one that has a local port. IPv4-mapped addresses are IPv4 here;
// link-local ones have the interface's name as their zone, if it is known.
type Socket struct {
	Local  netip.AddrPort
	Remote netip.AddrPort // zero if not connected
	State  uint8          // of include/net/tcp_states.h, UDP sockets as well
}

// dumpTries is how often a dump is begun anew that changes have interrupted.
const dumpTries = 5

// Sockets returns the sockets of both families, of "tcp" or "udp", in the network
// namespace of the calling thread. TCP sockets that are bound and neither listen
// nor are connected are not among them: sock_diag has those only since Linux 6.8.
func Sockets(protocol string) ([]Socket, error) {
	dump := netlink.SocketDiagTCP
	if protocol == "udp" {
		dump = netlink.SocketDiagUDP
	}
	var sockets []Socket
	zones := make(map[uint32]string)
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		found, err := dump(family)
		for try := 1; errors.Is(err, netlink.ErrDumpInterrupted) && try < dumpTries; try++ {
			found, err = dump(family)
		}
		if err != nil {
			return nil, fmt.Errorf("list %s sockets: %w", protocol, err)
		}
		for _, s := range found {
			sockets = append(sockets, Socket{
				Local:  endpoint(s.ID.Source, s.ID.SourcePort, s.ID.Interface, zones),
				Remote: endpoint(s.ID.Destination, s.ID.DestinationPort, s.ID.Interface, zones),
				State:  s.State,
			}.normal())
		}
	}
	return sockets, nil
}

// normal has no remote address if there is none.
func (s Socket) normal() Socket {
	if s.Remote.Addr().IsUnspecified() && s.Remote.Port() == 0 {
		s.Remote = netip.AddrPort{}
	}
	return s
}

// endpoint makes an address of what sock_diag has. zones remembers the names of
// interfaces.
func endpoint(ip net.IP, port uint16, index uint32, zones map[uint32]string) netip.AddrPort {
	addr, _ := netip.AddrFromSlice(ip)
	addr = addr.Unmap()
	if addr.Is6() && addr.IsLinkLocalUnicast() && index != 0 {
		name, ok := zones[index]
		if !ok {
			name = strconv.FormatUint(uint64(index), 10)
			if i, err := net.InterfaceByIndex(int(index)); err == nil {
				name = i.Name
			}
			zones[index] = name
		}
		addr = addr.WithZone(name)
	}
	return netip.AddrPortFrom(addr, port)
}
