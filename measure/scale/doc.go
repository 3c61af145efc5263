//go:build linux

// Command scale holds a million UDP connections and 250,000 TCP connections at
// once, from one source address and the default ephemeral port range, and checks
// every one of them: that it gets its own bytes back from a server on this
// machine once all are open, and that no 4-tuple is there twice.
//
// It runs in a network namespace of its own. Since a process may have only so
// many descriptors, the connections belong to many processes, none of which
// knows which ports the others use. Every destination is dialled by all of them,
// up to its very last port, and as many of them dial at a time as there are
// processors.
package main
