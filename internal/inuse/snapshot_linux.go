package inuse

import (
	"cmp"
	"errors"
	"maps"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/portpick"
)

// A Snapshot is what was on the local ports at one time. Which sockets share their
// port is found out when that is asked for, in the network namespace that the
// calling thread is in then.
type Snapshot struct {
	protocol    string
	ports       *portpick.Ports
	byPort      map[uint16][]Socket
	pairs       map[pair][]Socket // those that are connected
	listening   map[netip.AddrPort]bool
	held        map[netip.Addr]*portSet
	connectable portSet // TCP: those that connect may choose
	confined    bool    // TCP: the rest it may not choose
}

type pair struct {
	source      netip.Addr
	destination netip.AddrPort
}

// Take returns a Snapshot of the ports, of "tcp" or "udp".
func Take(protocol string, ports *portpick.Ports) (*Snapshot, error) {
	sockets, err := Sockets(protocol)
	if err != nil {
		return nil, err
	}
	s := &Snapshot{
		protocol:  protocol,
		ports:     ports,
		byPort:    make(map[uint16][]Socket),
		pairs:     make(map[pair][]Socket),
		listening: make(map[netip.AddrPort]bool),
		held:      make(map[netip.Addr]*portSet),
	}
	for _, socket := range sockets {
		port := socket.Local.Port()
		if !ports.Contains(port) {
			continue
		}
		s.byPort[port] = append(s.byPort[port], socket)
		if socket.State == Listen {
			s.listening[socket.Local] = true
		}
		if socket.Remote.IsValid() {
			key := pair{socket.Local.Addr(), socket.Remote}
			s.pairs[key] = append(s.pairs[key], socket)
		}
	}
	return s, nil
}

// A Flow is what connections there are from one source address to one
// destination.
type Flow struct {
	Source      netip.Addr
	Destination netip.AddrPort
	Counts
}

// Flows returns those of one address family that have a port of the range, with
// the fewest free ports first. Connections that a listening socket of this host
// has accepted are left out: their port was not chosen from the range.
func (s *Snapshot) Flows(is4 bool) ([]Flow, error) {
	var flows []Flow
	for key, sockets := range s.pairs {
		if key.source.Is4() != is4 || s.listens(sockets[0].Local) {
			continue
		}
		held, err := s.heldFor(key.source)
		if errors.Is(err, unix.EADDRNOTAVAIL) {
			// The address has left this machine before its sockets.
			held, err = new(portSet), nil
		}
		if err != nil {
			return nil, err
		}
		flows = append(flows, Flow{key.source, key.destination, s.count(sockets, held)})
	}
	slices.SortFunc(flows, func(a, b Flow) int {
		return cmp.Or(a.Free-b.Free, b.InUse-a.InUse, a.Source.Compare(b.Source), a.Destination.Compare(b.Destination))
	})
	return flows, nil
}

// listens reports whether a TCP socket accepts connections at the address.
func (s *Snapshot) listens(local netip.AddrPort) bool {
	all4 := netip.AddrPortFrom(netip.IPv4Unspecified(), local.Port())
	all6 := netip.AddrPortFrom(netip.IPv6Unspecified(), local.Port())
	return s.listening[local] || s.listening[all6] || local.Addr().Is4() && s.listening[all4]
}

// Sources returns the addresses of one family that sockets have with a port of
// the range, the one with the most sockets first.
func (s *Snapshot) Sources(is4 bool) []netip.Addr {
	count := make(map[netip.Addr]int)
	for _, sockets := range s.byPort {
		for _, socket := range sockets {
			if a := socket.Local.Addr(); a.Is4() == is4 && !a.IsUnspecified() {
				count[a]++
			}
		}
	}
	sources := slices.Collect(maps.Keys(count))
	slices.SortFunc(sources, func(a, b netip.Addr) int { return cmp.Or(count[b]-count[a], a.Compare(b)) })
	return sources
}

// Used counts the ports of the range with a socket of one address family, and
// those of them which cannot be shared with each address of the family.
func (s *Snapshot) Used(is4 bool) (used, held int, err error) {
	h, err := s.heldFor(unspecified(is4))
	if err != nil {
		return 0, 0, err
	}
	all := *h
	for port, sockets := range s.byPort {
		if slices.ContainsFunc(sockets, func(socket Socket) bool { return socket.Local.Addr().Is4() == is4 }) {
			all.add(port)
		}
	}
	return all.len(), h.len(), nil
}

func unspecified(is4 bool) netip.Addr {
	if is4 {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// Connectable counts the ports that TCP connect could choose for a flow: neither
// connections of its own are on them, nor sockets that were bound to them. Those
// in TIME_WAIT are among them if timeWait is true.
func (s *Snapshot) Connectable(f Flow, timeWait bool) (int, error) {
	if _, err := s.heldFor(unspecified(f.Source.Is4())); err != nil {
		return 0, err
	}
	if !s.confined {
		if timeWait {
			return f.Free + f.TimeWait, nil
		}
		return f.Free, nil
	}
	free := s.connectable
	for _, socket := range s.pairs[pair{f.Source, f.Destination}] {
		if socket.State != TimeWait || !timeWait {
			free.remove(socket.Local.Port())
		}
	}
	// Of an odd number of ports connect leaves out one: the last if it happens to
	// begin at the first, else the first (__inet_hash_connect).
	if low, high := s.ports.Low(), s.ports.High(); low != high && (high-low)%2 == 0 {
		free.remove(low)
	}
	return free.len(), nil
}
