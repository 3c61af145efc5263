// Package techniques has the ways in which Go programs open connections where
// local ports are scarce, as far as one would think of them instead of
// [github.com/seed22601231/connectx.Dialer]: that Dialer is measured beside
// them. They are for Linux.
package techniques

import (
	"net"
	"net/netip"
)

// A Dialer opens connections. It is safe for concurrent use. The address has to
// be a literal one, with a port number.
type Dialer interface {
	Dial(network, address string) (net.Conn, error)
}

// A Technique is one way to open connections.
type Technique struct {
	// Name is short and without spaces.
	Name string

	// TCP and UDP say what it is used for.
	TCP, UDP bool

	// New returns a Dialer for the network ("tcp" or "udp", with "4" or "6"
	// after it or not). It connects from the source address, unless the
	// technique is to choose none, and from the ports low to high, which have
	// to be the ephemeral port range of the namespace: some techniques leave
	// the choice to the kernel.
	//
	// The network namespace is that of the thread which dials. Connections of
	// TCP have the method SetLinger of [net.TCPConn].
	New func(network string, source netip.Addr, low, high uint16) Dialer
}
