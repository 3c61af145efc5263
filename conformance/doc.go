// Package conformance holds the tests of connectx that need more packages than
// the library itself: golang.org/x/net/nettest for the connections, and a name
// server for Happy Eyeballs. Each runs for net.Dialer as well.
package conformance
