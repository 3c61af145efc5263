// Package fewports is the network that the examples run in: a namespace of their
// own with a small ephemeral port range, in which ports run out soon, and with
// servers on several loopback addresses.
package fewports

import (
	"context"
	"fmt"
	"log"
	"net"
	"os"

	"github.com/seed22601231/connectx/internal/netns"
)

// Main is for a main function: it calls f in a new network namespace with that
// many ephemeral ports, and ends the program.
func Main(ports int, f func(context.Context) error) {
	log.SetFlags(0)
	if !netns.Inside() {
		code, err := netns.Reexec()
		if err != nil {
			log.Fatal(err)
		}
		os.Exit(code)
	}
	if err := netns.LoopbackUp(); err != nil {
		log.Fatal(err)
	}
	if err := SetUp(ports); err != nil {
		log.Fatal(err)
	}
	if err := f(context.Background()); err != nil {
		log.Fatal(err)
	}
}

// SetUp leaves that many ephemeral ports in the namespace.
func SetUp(ports int) error {
	const low = 32768
	if err := netns.SetPortRange(low, uint16(low+ports-1)); err != nil {
		return fmt.Errorf("set the ephemeral port range: %w", err)
	}
	// A count of connections that are open together should not depend on
	// those that were closed a moment ago: no TIME_WAIT.
	return os.WriteFile("/proc/sys/net/ipv4/tcp_max_tw_buckets", []byte("0\n"), 0)
}

// Serve calls serve for a listener on each of n loopback addresses. To stop is
// up to the server that it is a method of, which closes its listeners.
//
// The port is the same everywhere, and not one of the ephemeral ones: a server
// takes none of those.
func Serve(n int, serve func(net.Listener) error) (addrs []string, err error) {
	listeners := make([]net.Listener, n)
	for i := range listeners {
		l, err := net.Listen("tcp4", fmt.Sprintf("127.0.1.%d:8080", i+1))
		if err != nil {
			for _, l := range listeners[:i] {
				l.Close()
			}
			return nil, err
		}
		listeners[i] = l
		addrs = append(addrs, l.Addr().String())
	}
	for _, l := range listeners {
		go serve(l)
	}
	return addrs, nil
}
