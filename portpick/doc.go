// Package portpick decides which source port to try next.
//
// An [Order] gives every pair of source and destination an order of its own: a
// permutation of the port range, keyed with a secret, that consecutive dials
// walk. No port comes a second time before all others had their turn, so as
// long as the range is not used up the first port offered is normally free.
// Somebody who observes the ports towards one destination learns nothing about
// those towards another (RFC 6056, section 3.3).
//
// Ports with an even offset in the range come first, those with an odd offset
// when the even ones run out. The kernel does the same when TCP connects, and
// for the same reason: programs that need a port of their own (bind to port 0,
// plain UDP, a DNS resolver) still find one among the odd ones.
//
// Memory is fixed: an Order is 128 KiB, whatever the number of destinations.
//
// [Ports] is the range with its reserved ports left out, [Sysctl] reads it
// from a network namespace. The package knows nothing of sockets.
package portpick
