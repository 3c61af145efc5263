//go:build linux

// Command soak keeps 90 % of the 4-tuples of a few destinations taken for as long
// as it is told, while connections are opened and closed at random and faults of
// all kinds come and go, and samples what the process has in use. What it looks for
// is a flat line: nothing may grow, and no dial may fail without a fault that
// explains it.
//
// The faults are real ones: the server is killed, a source address is removed,
// there are no descriptors left, route changes overrun the netlink sockets, foreign
// sockets hold ports, system calls fail (a seccomp filter on the thread that dials),
// network namespaces come and go, contexts are cancelled, a destination does not
// answer.
//
// One process dials and samples itself, in a network namespace of its own; the
// server is another one. A sample is taken while no dial is under way, so that
// what the process should have is known exactly: see verdict.go for what is
// demanded of a flat line. The seed settles what each goroutine does and in which
// order; how they interleave is up to the scheduler.
package main
