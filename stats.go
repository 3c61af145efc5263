package connectx

import "sync/atomic"

// Stats counts what all Dialers of this process have done, since it started.
type Stats struct {
	TCP ProtocolStats `json:"tcp"`
	UDP ProtocolStats `json:"udp"`
}

// ProtocolStats are the counters of one protocol.
//
// Once no dial is under way, Tries = Wins + Conflicts + Contention + Errors.
type ProtocolStats struct {
	// Dials to one address (of the several that a name may have; and once more if
	// net.Dialer does without MPTCP), by what the caller has chosen: no source, a source address (LocalAddr or
	// SourceAddrs), a source port (with or without an address).
	DialsFromAny  uint64 `json:"dials_from_any"`
	DialsFromAddr uint64 `json:"dials_from_addr"`
	DialsFromPort uint64 `json:"dials_from_port"`

	// Tries to take a port, or for TCP a port of a part of the range that the
	// kernel searches.
	Tries uint64 `json:"tries"`

	// Wins are tries after which the socket is connected or, for TCP, is
	// connecting.
	Wins uint64 `json:"wins"`

	// Conflicts are tries that found the 4-tuple to exist.
	Conflicts uint64 `json:"conflicts"`

	// Contention are tries that found the port locked by a dial, or held by a
	// socket that does not share it.
	Contention uint64 `json:"contention"`

	// Errors are tries that failed for another reason, most of all a peer that
	// refuses the connection at once, or a destination without a route.
	Errors uint64 `json:"errors"`

	// Exhausted are such dials that failed with ErrPortsExhausted.
	Exhausted uint64 `json:"exhausted"`

	// Fallbacks are dials that had to do without a feature of the kernel (see
	// Trace.Fallback).
	Fallbacks uint64 `json:"fallbacks"`

	// Lookups are questions to the kernel for the socket on a 4-tuple.
	Lookups uint64 `json:"lookups"`
}

var stats Stats // its fields are added to and read atomically

// ReadStats returns the counters, which cost a dial some nanoseconds. It does
// not stop anything, so that counters which belong together may be a dial or two
// apart while there are dials.
//
// The names that Stats has in JSON stay as they are. Under [expvar] they are
// published by
//
//	expvar.Publish("connectx", expvar.Func(func() any { return connectx.ReadStats() }))
//
// This package does not do that by itself, because importing expvar adds a
// handler to the program's http.DefaultServeMux.
func ReadStats() Stats {
	var s Stats
	read := func(to, from *ProtocolStats) {
		counters := from.counters()
		for i, counter := range to.counters() {
			*counter = atomic.LoadUint64(counters[i])
		}
	}
	read(&s.TCP, &stats.TCP)
	read(&s.UDP, &stats.UDP)
	return s
}

// add adds the counters of one dial.
func (s *ProtocolStats) add(dial *ProtocolStats) {
	counters := s.counters()
	for i, counter := range dial.counters() {
		if *counter != 0 {
			atomic.AddUint64(counters[i], *counter)
		}
	}
}

func (s *ProtocolStats) counters() [11]*uint64 {
	return [...]*uint64{
		&s.DialsFromAny, &s.DialsFromAddr, &s.DialsFromPort,
		&s.Tries, &s.Wins, &s.Conflicts, &s.Contention, &s.Errors,
		&s.Exhausted, &s.Fallbacks, &s.Lookups,
	}
}
