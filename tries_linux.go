package connectx

import (
	"net/netip"

	"golang.org/x/sys/unix"
)

// An outcome is what became of one try to take a 4-tuple.
type outcome int

const (
	won        outcome = iota // the socket is connected, or connecting
	conflict                  // the very 4-tuple exists
	contention                // the port is locked, or held by a socket that does not share
	failed                    // an error that has nothing to do with the port
)

// sourceChosen notes the source address that ports are looked for on.
func (a *attempt) sourceChosen(source netip.Addr) {
	a.source = source
	if call := a.trace.SourceChosen; call != nil {
		call(source, a.remote)
	}
}

// begin notes that a try begins: of one port, or of all from low to high.
func (a *attempt) begin(low, high uint16) {
	a.did.Tries++
	a.trying = true
	if call := a.trace.Try; call != nil {
		call(a.traceTry(low, high))
	}
}

// end notes what has become of the try. No port is locked by then.
func (a *attempt) end(low, high uint16, o outcome) {
	a.trying = false
	var call func(TraceTry)
	switch o {
	case won:
		a.did.Wins++
	case conflict:
		a.did.Conflicts++
		call = a.trace.Conflict
	case contention:
		a.did.Contention++
		call = a.trace.Contention
	default:
		a.did.Errors++
	}
	if call != nil {
		call(a.traceTry(low, high))
	}
}

func (a *attempt) traceTry(low, high uint16) TraceTry {
	network := protocolOf(a.network) + "6"
	if a.remote.Addr().Is4() {
		network = protocolOf(a.network) + "4"
	}
	return TraceTry{Network: network, Source: a.source, Ports: PortRange{low, high}, Destination: a.remote}
}

// fallBack notes that the kernel does not do what sharing ports depends on.
func (a *attempt) fallBack(reason error) {
	a.did.Fallbacks = 1
	if call := a.trace.Fallback; call != nil {
		call(reason)
	}
}

// count adds what the attempt has done to what all have done.
func (a *attempt) count() {
	switch {
	case a.hook.local.Port() != 0:
		a.did.DialsFromPort = 1
	case a.local.Addr().IsValid():
		a.did.DialsFromAddr = 1
	default:
		a.did.DialsFromAny = 1
	}
	if a.trying {
		a.did.Errors++ // a hook has panicked
	}
	if _, ok := a.err.(*PortsExhaustedError); ok {
		a.did.Exhausted = 1
	}
	if protocolOf(a.network) == "tcp" {
		stats.TCP.add(&a.did)
	} else {
		stats.UDP.add(&a.did)
	}
}

// A taken is what the ports are taken by that a search has looked at.
type taken struct {
	tried, timeWait, held int
}

// exhausted is the error of a dial for which there is no port.
func (a *attempt) exhausted(source netip.Addr, by taken) *PortsExhaustedError {
	e := &PortsExhaustedError{
		Network:     protocolOf(a.network),
		Destination: a.remote,
		Ports:       PortRange{a.ports.Low(), a.ports.High()},
		Reserved:    a.ports.Reserved(),
		Tried:       by.tried,
		TimeWait:    by.timeWait,
		Held:        by.held,
		errno:       unix.EAGAIN,
	}
	if e.Network == "tcp" {
		e.errno = unix.EADDRNOTAVAIL
	}
	if source.IsValid() {
		e.Sources = []netip.Addr{source}
	}
	return e
}
