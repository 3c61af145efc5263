package inuse

import (
	"iter"
	"net/netip"
	"slices"

	"github.com/seed22601231/connectx/portpick"
)

// all are the ports that can be offered.
func all(ports *portpick.Ports) iter.Seq[uint16] {
	return func(yield func(uint16) bool) {
		for port := int(ports.Low()); port <= int(ports.High()); port++ {
			if ports.Contains(uint16(port)) && !yield(uint16(port)) {
				return
			}
		}
	}
}

// heldFor returns the ports that the source address cannot share with the
// sockets on them. The unspecified address stands for all addresses of its
// family: then it is the ports that one of them cannot have.
func (s *Snapshot) heldFor(source netip.Addr) (*portSet, error) {
	if held, ok := s.held[source]; ok {
		return held, nil
	}
	p, err := newProbe(s.protocol, source)
	if err != nil {
		return nil, err
	}
	defer p.close()
	shareable := s.shareableUDP
	if s.protocol == "tcp" {
		shareable = s.shareableTCP
	}
	held := new(portSet)
	for port := range all(s.ports) {
		ok, err := shareable(p, port)
		if err != nil {
			return nil, err
		}
		if !ok {
			held.add(port)
		}
	}
	s.confined = s.confined || p.confined
	s.held[source] = held
	return held, nil
}

// shareableTCP tries each port, since sockets that are bound and not yet
// connected are in no dump. Where connect does not tell, ports on which there are
// connections and nothing else count as chosen by connect, which is the rule.
func (s *Snapshot) shareableTCP(p *probe, port uint16) (bool, error) {
	if !s.connectable.has(port) && p.connect(port) {
		s.connectable.add(port)
	}
	if s.connectable.has(port) {
		return true, nil
	}
	if ok, err := p.bind(port, true); ok || err != nil || p.confined {
		return ok, err
	}
	sockets := s.byPort[port]
	return len(sockets) > 0 && !slices.ContainsFunc(sockets, func(socket Socket) bool { return socket.State == Listen }), nil
}

// shareableUDP tries only ports on which there are sockets, and none of them
// unconnected: of the sockets on a port, the one bound last receives what is for
// no connected one, so the probe would take datagrams away from another. Such a
// port counts as held. That a socket on [::] may leave IPv4 alone is found out
// without SO_REUSEADDR, which succeeds only if nobody is there.
func (s *Snapshot) shareableUDP(p *probe, port uint16) (bool, error) {
	connected, both := false, false
	for _, socket := range s.byPort[port] {
		local := socket.Local.Addr()
		switch {
		case !meets(local, p.source):
		case socket.State != Close:
			connected = true
		case local.Is6() && p.source.Is4():
			both = true
		default:
			return false, nil
		}
	}
	if !connected && !both {
		return true, nil
	}
	return p.bind(port, !both)
}

// meets reports whether sockets that are bound to the two addresses may be in
// each other's way.
func meets(local, source netip.Addr) bool {
	if local.Is6() && source.Is4() {
		return local.IsUnspecified()
	}
	return local.Is4() == source.Is4() && (local == source || local.IsUnspecified() || source.IsUnspecified())
}
