//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
)

// A kind is what a dial chooses beside the destination.
type kind int

const (
	noSource kind = iota
	sourceAddress
	sourceAddressAndPort
	sourcePort
	sourceAddrs
	portRangeInside
	portRangeOutside
	kinds
)

func (k kind) String() string {
	return [...]string{
		"no source", "source address", "source address and port", "source port", "SourceAddrs", "PortRange inside", "PortRange outside",
	}[k]
}

// A job is a dial that was decided on.
type job struct {
	protocol    protocol
	family      family
	kind        kind
	destination int
	source      int // the one chosen, or the routing table's
	anySource   bool
	port        uint16 // or 0
}

// newJob decides on a dial of a goroutine that has a destination for itself.
func newJob(l layout, own int, random *rand.Rand) job {
	j := job{
		protocol:    protocol(random.IntN(2)),
		family:      family(random.IntN(2)),
		kind:        kind(random.IntN(int(kinds))),
		destination: random.IntN(sharedDestinations),
		source:      random.IntN(len(sources[0])),
	}
	if random.IntN(3) == 0 {
		j.destination = own
	}
	switch j.kind {
	case noSource, sourcePort:
		j.anySource = true
	case portRangeInside, portRangeOutside:
		j.anySource = random.IntN(2) == 0
	}
	if j.anySource {
		j.source = 0
	}
	if j.kind == sourceAddressAndPort || j.kind == sourcePort {
		j.port = l.port(random.IntN(l.rows()))
	}
	return j
}

func (j job) String() string {
	local := "any"
	switch {
	case j.kind == sourceAddrs:
		local = fmt.Sprint(sources[j.family])
	case !j.anySource:
		local = sources[j.family][j.source].String()
	}
	return fmt.Sprintf("%s, %s, from %s port %d to %s", j.protocol, j.kind, local, j.port, destination(j.family, j.destination))
}

// flows are those that the connection may come to belong to.
func (j job) flows(l layout) []int {
	if j.kind == sourceAddrs {
		var all []int
		for i := range sources[j.family] {
			all = append(all, flowOf(l, j.protocol, j.family, j.destination, i))
		}
		return all
	}
	return []int{flowOf(l, j.protocol, j.family, j.destination, j.source)}
}

// ports are those that it may come to have.
func (j job) ports(l layout) connectx.PortRange {
	switch {
	case j.port != 0:
		return connectx.PortRange{Low: j.port, High: j.port}
	case j.kind == portRangeInside:
		return l.inside()
	case j.kind == portRangeOutside:
		return l.outside()
	}
	return l.whole()
}

// dialPatience is how long a dial may take.
const dialPatience = 30 * time.Second

// dial carries the job out.
func (j job) dial(l layout) (net.Conn, error) {
	var d connectx.Dialer
	switch j.kind {
	case sourceAddrs:
		d.SourceAddrs = append(sources[j.family][:], sources[1-j.family][:]...)
	case portRangeInside, portRangeOutside:
		d.PortRange = j.ports(l)
	}
	local := netip.AddrPortFrom(netip.Addr{}, j.port)
	if !j.anySource && j.kind != sourceAddrs {
		local = netip.AddrPortFrom(sources[j.family][j.source], j.port)
	}
	if local != (netip.AddrPort{}) {
		d.LocalAddr = netAddr(j.protocol, local)
	}
	ctx, cancel := context.WithTimeout(context.Background(), dialPatience)
	defer cancel()
	network := j.protocol.network()
	return d.DialContext(ctx, network, destination(j.family, j.destination).String())
}

func netAddr(p protocol, a netip.AddrPort) net.Addr {
	if p == tcp {
		return net.TCPAddrFromAddrPort(a)
	}
	return net.UDPAddrFromAddrPort(a)
}

// judge says what became of the dial, given the claims at the time. For an error
// that they do not justify it also says why.
func (j job) judge(err error, w *window) (o Outcomes, failure string) {
	o.Dials = 1
	flows, ports := j.flows(w.layout), j.ports(w.layout)
	switch {
	case err == nil:
		o.Connected = 1
		return o, ""
	case errors.Is(err, connectx.ErrPortsExhausted) && j.port == 0:
		for _, flow := range flows {
			if !w.mayBeExhausted(flow, ports) {
				o.Spurious = 1
				return o, fmt.Sprintf("%s: %v, although %s", j, err, w.explain(flow, ports))
			}
		}
		o.Exhausted = 1
		return o, ""
	case j.port != 0 && j.isConflict(err) && (w.mayBeTaken(flows[0], j.port) || w.mayBeHeld(j.port)):
		o.Conflict = 1
		return o, ""
	case j.port != 0 && j.isHeld(err) && w.mayBeHeld(j.port):
		o.Held = 1
		return o, ""
	case j.port != 0:
		o.Spurious = 1
		return o, fmt.Sprintf("%s: %v, although %s", j, err, w.explain(flows[0], ports))
	default:
		o.Spurious = 1
		return o, fmt.Sprintf("%s: %v", j, err)
	}
}

// isConflict reports whether the error is that the 4-tuple exists.
func (j job) isConflict(err error) bool {
	if j.protocol == tcp {
		return errors.Is(err, unix.EADDRNOTAVAIL)
	}
	return errors.Is(err, unix.EADDRINUSE) && !doesNotShare(err)
}

// isHeld reports whether the error is that a socket has the port and does not
// share it.
func (j job) isHeld(err error) bool { return errors.Is(err, unix.EADDRINUSE) && doesNotShare(err) }

// doesNotShare tells the two errors of UDP apart, which have the same errno.
func doesNotShare(err error) bool { return strings.Contains(err.Error(), "does not share") }
