//go:build linux

package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// runPlain runs programs that do not share their ports: sockets of both protocols
// that connect, and that bind before they connect.
func runPlain(c Config, cl *claims, reports *reporter, stop *atomic.Bool) error {
	var wg sync.WaitGroup
	for i, p := range []protocol{udp, udp, tcp, tcp} {
		h := newHolder(c, cl, i, reports, stop)
		wg.Go(func() { h.runPlain(p, i%2 == 1) })
	}
	wg.Wait()
	return nil
}

// plainHold is how long a socket is held that does not share its port, at most.
// There are not many: plainMost of each kind.
const (
	plainHold = time.Second
	plainMost = 2
)

func (h *holder) runPlain(p protocol, bind bool) {
	for !h.stop.Load() {
		for range plainMost {
			h.dialPlain(p, bind)
		}
		// They get a port in the pauses of the others, if at all, and soon
		// after that.
		wait := 2 * time.Millisecond
		if len(h.conns) > 0 {
			h.use()
			wait = time.Duration(h.random.Int64N(int64(plainHold)))
		}
		for end := now() + int64(wait); now() < end && !h.stop.Load(); {
			time.Sleep(min(wait, 10*time.Millisecond))
		}
		h.closeDownTo(0)
	}
}

// dialPlain dials with net.Dialer.
func (h *holder) dialPlain(p protocol, bind bool) {
	f := family(h.random.IntN(2))
	d := net.Dialer{Timeout: dialPatience, Control: func(_, _ string, c syscall.RawConn) error {
		return onSocket(c, func(fd int) error {
			ports := h.Layout.plain()
			return unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_LOCAL_PORT_RANGE, int(ports.High)<<16|int(ports.Low))
		})
	}}
	name, source := "connect", 0
	if bind {
		name, source = "bind, connect", h.random.IntN(len(sources[f]))
		d.LocalAddr = netAddr(p, netip.AddrPortFrom(sources[f][source], 0))
	}
	n := h.random.IntN(sharedDestinations)
	flow := plainFlow(h.Layout, p, f, n, source)
	h.claims.begin(h.Process, flow)
	defer h.claims.end(h.Process, flow)
	conn, err := d.Dial(p.network()+f.suffix(), destination(f, n).String())
	o := Outcomes{Dials: 1}
	switch {
	case err == nil:
		o.Connected = 1
		h.keep(&goConn{Conn: conn}, p, flow)
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EADDRINUSE), errors.Is(err, unix.EADDRNOTAVAIL):
		o.Exhausted = 1
	default:
		o.Spurious = 1
		h.reports.fail(Failure{Promise: spurious, What: fmt.Sprintf("%s, net.Dialer: %v", p, err)})
	}
	h.reports.dialled(fmt.Sprintf("%s, net.Dialer, %s", p, name), o)
}
