// Package quicdial dials QUIC connections that each have a connected UDP socket
// of their own, with the local ports shared as package connectx does it.
//
// quic-go dials from one unconnected socket for all destinations, or from one for
// each connection, which takes a local port away from all destinations. What a
// connected socket gains: the kernel finds the connection by its 4-tuple, spreads
// the connections over CPUs and receive buffers, and says at once when nobody is
// there. A [Dialer] needs no more ports for it, since each destination has the
// whole range to itself.
//
// [Dialer.Dial] is for HTTP/3 as well:
//
//	var d quicdial.Dialer
//	client := http.Client{Transport: &http3.Transport{Dial: d.Dial}}
//
// # Errors that the network reports
//
// The kernel reports an ICMP error (destination unreachable and its kin) to the
// socket that is connected to the peer in question, in place of the result of the
// next read or write. Without the peer's first datagram it fails the dial: a
// closed port is found out in a round trip and not after a timeout.
//
// From the first datagram on such an error ends nothing. The peer may be back
// before QUIC's own timeouts (RFC 9000, section 10.1) give it up, and whoever
// guesses the ports can forge an ICMP message, but no QUIC packet. The datagram
// that a write reported the error instead of is sent once more; [Stats] counts the
// errors. A peer that has come back without its state ends the connection with a
// stateless reset (RFC 9000, section 10.3).
//
// On Windows the net package has these errors switched off, and a dial to a closed
// port fails after quic-go's HandshakeIdleTimeout.
package quicdial
