// Package connectx is a drop-in for [net.Dialer] that does not run out of
// ephemeral ports.
//
// On Linux an outgoing UDP connection, and a TCP connection whose source
// address was chosen with bind, takes a local port away from all destinations:
// after about 28,000 of them a host cannot connect anywhere. With a [Dialer]
// every destination has the whole port range to itself, for TCP and UDP, IPv4
// and IPv6, with or without a chosen source address or port, and without
// privileges:
//
//	var d connectx.Dialer
//	conn, err := d.DialContext(ctx, "udp", "192.0.2.1:53")
//
// # TCP
//
// Sockets share local ports with SO_REUSEADDR, and a chosen source address is
// bound with IP_BIND_ADDRESS_NO_PORT, so that the port is chosen when the
// destination is known. The port comes from package portpick and is put to the
// kernel with IP_LOCAL_PORT_RANGE, which spares it the search that makes
// connect slow once half of the range is taken.
//
// # UDP
//
// The kernel lets UDP sockets share a port only with SO_REUSEADDR, and then
// lets two of them connect to the same peer as well: one of them silently
// receives everything ("overshadowing"). A Dialer never lets that happen among
// those who use one. A port is bound with the flag off, and while it is off
// nobody else can bind that port. If nobody was on it before, the Dialer
// connects; if the port is shared already, it first asks the kernel which socket
// would receive a datagram on the 4-tuple, and connects only if it is its own.
// Then it sets the flag. Package lookup asks that question.
//
// This is cooperative. A program that sets SO_REUSEADDR and connects a UDP
// socket without asking can still overshadow any other socket of its port, as
// it always could.
//
// # Egress policy
//
// SourceAddrs gives a Dialer several source addresses, each with the whole range
// to a destination, and PortRange a range of its own. [ReadStats], [Usage],
// [PortsExhaustedError] and [Trace] tell how close the next failure is, or why a
// dial has failed; so does the command connectx ports.
//
// # Who should use something else
//
// A UDP program with one unconnected socket for all its peers does not use up
// ports and needs none of this. A TCP client that does not choose its source
// address has the whole range per destination from the kernel already; what it
// gains here is the speed when the range is nearly full.
//
// On systems other than Linux a Dialer does what net.Dialer does.
package connectx
