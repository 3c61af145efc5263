package connectx

import (
	"context"
	"net/netip"
)

// A Trace is a set of hooks that are told what a dial does, for the one dial
// that is being looked into. Any of them may be nil. They are called from the
// goroutines of the dial, several at a time if it has several addresses to
// connect to, and never while a port is locked; the dial goes on when they
// return. See [net/http/httptrace] for what comes before and after: name
// lookups, and when each connect starts and is done.
type Trace struct {
	// SourceChosen is called with the source address that ports are looked for
	// on: one of SourceAddrs, that of LocalAddr, or for UDP the routing table's.
	// Without any of those a TCP dial leaves it to the kernel.
	SourceChosen func(source netip.Addr, destination netip.AddrPort)

	// Try is called before a port is tried, or a part of the range that the
	// kernel searches by itself.
	Try func(TraceTry)

	// Conflict is called after a try if the 4-tuple exists, or all of that part
	// of the range do.
	Conflict func(TraceTry)

	// Contention is called after a try if the port is held by a socket that does
	// not share it, or does not share it at the moment because it is connecting.
	Contention func(TraceTry)

	// Fallback is called when the dial has to do without a feature of the
	// kernel: UDP without sharing ports, TCP without a choice of port.
	Fallback func(reason error)
}

// A TraceTry is one try to take a port.
type TraceTry struct {
	Network     string         // "tcp4", "tcp6", "udp4" or "udp6"
	Source      netip.Addr     // invalid if the kernel chooses it
	Ports       PortRange      // Low and High are the same for a single port
	Destination netip.AddrPort // without a zone
}

type traceKey struct{}

// WithTrace returns a context whose dials call the hooks of trace, and not those
// of a Trace that ctx may have had.
func WithTrace(ctx context.Context, trace *Trace) context.Context {
	return context.WithValue(ctx, traceKey{}, trace)
}

var noTrace Trace

// traceOf returns the hooks of a context, never nil.
func traceOf(ctx context.Context) *Trace {
	if trace, _ := ctx.Value(traceKey{}).(*Trace); trace != nil {
		return trace
	}
	return &noTrace
}
