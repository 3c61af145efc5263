package guard

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
)

// Stats counts what a guard has done since it was attached, by whatever process.
type Stats struct {
	Allowed    uint64 // connects let through; some fail later on
	Denied     uint64
	FailedOpen uint64 // let through though there was no room for a reservation, or found so by Attach

	// Overlapping counts sockets that were seen on somebody else's 4-tuple
	// after they had connected: another cgroup program has changed their
	// destination.
	Overlapping uint64

	LastDenied *Denial `json:",omitempty"` // nil if none was
}

// A Denial is a connect that was denied.
type Denial struct {
	PID     int
	Command string // of the thread
	Reservation
	Errno     syscall.Errno // EADDRINUSE; or EALREADY, ENOBUFS
	SinceBoot time.Duration // when that was
}

// Stats reads the counters.
func (g *Guard) Stats() (Stats, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	var s Stats
	for what, n := range map[programsCounter]*uint64{
		programsCounterALLOWED:     &s.Allowed,
		programsCounterDENIED:      &s.Denied,
		programsCounterFAILED_OPEN: &s.FailedOpen,
		programsCounterOVERLAPPING: &s.Overlapping,
	} {
		var perCPU []uint64
		if err := g.objects.Counters.Lookup(what, &perCPU); err != nil {
			return Stats{}, fmt.Errorf("read counters: %w", err)
		}
		for _, k := range perCPU {
			*n += k
		}
	}
	var d programsDenial
	switch err := g.objects.Denials.Lookup(uint32(0), &d); {
	case errors.Is(err, ebpf.ErrKeyNotExist):
	case err != nil:
		return Stats{}, fmt.Errorf("read the last denial: %w", err)
	default:
		s.LastDenied = d.denial()
	}
	return s, nil
}

func (d *programsDenial) denial() *Denial {
	var name []byte
	for _, c := range d.Comm {
		if c == 0 {
			break
		}
		name = append(name, byte(c))
	}
	return &Denial{
		PID: int(d.Pid), Command: string(name), Reservation: d.Tuple.reservation(0),
		Errno: syscall.Errno(d.Errno), SinceBoot: time.Duration(d.Ns),
	}
}

// A Reservation is a 4-tuple that a socket has, or is about to have.
type Reservation struct {
	// Local has the unspecified address as long as the kernel has not chosen
	// one.
	Local, Remote netip.AddrPort
	NetNS         uint64 // the namespace, as SO_NETNS_COOKIE has it
	Cookie        uint64 // the socket, as SO_COOKIE has it; 0 in a Denial
}

// Reservations returns those that there are, after Sync. Connects that are under
// way have theirs already, and sockets that are being closed have none. Nor has a
// socket that has its port from the kernel, and does not share it.
func (g *Guard) Reservations() ([]Reservation, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.sync(); err != nil {
		return nil, err
	}
	return g.reservations()
}

func (g *Guard) reservations() ([]Reservation, error) {
	var (
		all    []Reservation
		cursor ebpf.MapBatchCursor
		// The kernel reads a bucket as a whole.
		tuples  = make([]programsTuple, 4096)
		cookies = make([]uint64, len(tuples))
	)
	for {
		n, err := g.objects.Reserved.BatchLookup(&cursor, tuples, cookies, nil)
		for i := range n {
			if tuples[i].PeerPort > 1<<16-1 {
				continue // a port that a socket waits on
			}
			all = append(all, tuples[i].reservation(cookies[i]))
		}
		switch {
		case errors.Is(err, ebpf.ErrKeyNotExist):
			return all, nil
		case err != nil:
			return nil, fmt.Errorf("read reservations: %w", err)
		}
	}
}

func (t *programsTuple) reservation(cookie uint64) Reservation {
	r := Reservation{
		Local:  netip.AddrPortFrom(address(t.Source), uint16(t.Port)),
		Remote: netip.AddrPortFrom(address(t.Peer), uint16(t.PeerPort)),
		NetNS:  t.Netns,
		Cookie: cookie,
	}
	if r.Local.Addr() == netip.IPv6Unspecified() && r.Remote.Addr().Is4() {
		r.Local = netip.AddrPortFrom(netip.IPv4Unspecified(), r.Local.Port())
	}
	return r
}

// address returns IPv4-mapped ones as IPv4.
func address(words [4]uint32) netip.Addr {
	var b [16]byte
	for i, w := range words {
		binary.NativeEndian.PutUint32(b[4*i:], w)
	}
	return netip.AddrFrom16(b).Unmap()
}
