//go:build linux

// Command stress dials from many processes at once, towards so few destinations
// and from so few ports that everything collides, beside neighbours of all kinds,
// and checks that no promise of connectx is broken meanwhile:
//
//   - Every connection gets its own bytes back, with its own address as the
//     server has seen it.
//   - No two connected sockets have the same 4-tuple. A process that does nothing
//     else lists all sockets again and again.
//   - A dial fails with ErrPortsExhausted only if all 4-tuples could be taken at
//     the time, from an explicit port with a conflict only if the 4-tuple may
//     exist, and for a socket that does not share the port only if there may be
//     one. All processes keep account of that in shared memory (see claims).
//   - No port stays locked, and when all are gone, killed or not, every port can
//     be bound alone and all 4-tuples of a destination can be had.
//
// The neighbours are plain sockets, which do not share; listeners with
// SO_REUSEADDR, which must get all datagrams sent to them; a process in Python
// that follows the protocol of the UDP lock; and SIGKILL.
//
// It runs in a network namespace of its own. The seed settles what each goroutine
// does and in which order; how they interleave is up to the scheduler.
package main
