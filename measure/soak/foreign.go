//go:build linux

package main

import (
	"math/rand/v2"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// most foreign sockets at a time, of both protocols and families.
const maxForeign = 4

// A foreignSocket is one of a program that knows nothing of connectx.
type foreignSocket struct {
	fd   int
	mark *window
}

// runForeign has foreign sockets come and go on ports of the range.
func (r *run) runForeign(random *rand.Rand) {
	var open []foreignSocket
	closeFirst := func() {
		unix.Close(open[0].fd)
		open[0].mark.end()
		open = open[1:]
		r.foreign.Add(-1)
	}
	for !r.stopped() {
		r.quiet.RLock()
		if len(open) == maxForeign {
			closeFirst()
		}
		if s, ok := r.openForeign(random); ok {
			open = append(open, s)
			r.foreign.Add(1)
		}
		r.quiet.RUnlock()
		moment(random, 20*time.Millisecond)
	}
	for len(open) > 0 {
		closeFirst()
	}
}

// openForeign binds a socket, with SO_REUSEADDR or without, and has it listen if it
// is one of TCP. Without, it gets a port only if nobody is on it.
func (r *run) openForeign(random *rand.Rand) (s foreignSocket, ok bool) {
	f, port := flowOf(random.IntN(allFlows)), random.IntN(r.options.ports)
	s.mark = r.flows.foreignAt(f, port)
	s.mark.begin()
	defer func() {
		if !ok {
			s.mark.end()
		}
	}()
	kind := [...]int{udp: unix.SOCK_DGRAM, tcp: unix.SOCK_STREAM}[f.protocol]
	var err error
	s.fd, err = unix.Socket([...]int{unix.AF_INET, unix.AF_INET6}[f.family], kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return s, false // no descriptors
	}
	_ = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, random.IntN(2))
	local := netip.AddrPortFrom(sourceAddr(f.family, f.source), firstPort+uint16(port))
	err = unix.Bind(s.fd, sockaddr(local))
	if err == nil && f.protocol == tcp {
		err = unix.Listen(s.fd, 1)
	}
	if err != nil {
		unix.Close(s.fd) // the port is in use, or the address not there
		return s, false
	}
	return s, true
}
