package inuse

import (
	"net/netip"
	"slices"
)

// Counts says what the ports of a range are, for one source address and one
// destination. InUse, TimeWait, Held and Free together are all of them but the
// reserved.
type Counts struct {
	InUse    int // with a connection to the destination, in any TCP state but TIME_WAIT
	TimeWait int // with one in TIME_WAIT
	Held     int // none of these, but on it is a socket that does not share the port
	Reserved int // in net.ipv4.ip_local_reserved_ports
	Free     int
}

// Count counts the ports for one source address and one destination. An address
// that is not on this machine is the error EADDRNOTAVAIL.
//
// A range of 28,232 ports takes some 150 ms for TCP, whose ports are tried one by
// one, and further sources little more. For UDP, it is the ports that sockets
// share which are tried: 7 µs each, for each source.
func (s *Snapshot) Count(source netip.Addr, destination netip.AddrPort) (Counts, error) {
	held, err := s.heldFor(source)
	if err != nil {
		return Counts{}, err
	}
	return s.count(s.pairs[pair{source, destination}], held), nil
}

// count counts the ports for the sockets of one pair.
func (s *Snapshot) count(sockets []Socket, held *portSet) Counts {
	var inUse, timeWait []uint16
	for _, socket := range sockets {
		if socket.State == TimeWait {
			timeWait = append(timeWait, socket.Local.Port())
		} else {
			inUse = append(inUse, socket.Local.Port())
		}
	}
	// Where the kernel has let two sockets have the same 4-tuple.
	slices.Sort(inUse)
	inUse = slices.Compact(inUse)

	c := Counts{InUse: len(inUse), TimeWait: len(timeWait), Held: held.len(), Reserved: s.ports.Reserved()}
	for _, port := range slices.Concat(inUse, timeWait) {
		if held.has(port) {
			c.Held--
		}
	}
	c.Free = s.ports.Len() - c.InUse - c.TimeWait - c.Held
	return c
}
