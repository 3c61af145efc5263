//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
)

// regain checks that all ports have come back once nobody is left: that each can
// be bound alone, and all 4-tuples of a destination can be had.
func (r *run) regain() {
	for _, f := range []family{0, 1} {
		for i := range r.options.layout.rows() {
			if port := r.options.layout.port(i); bindAlone(f, port) != nil {
				r.stuck("UDP port %d of IPv%s: %v", port, f.suffix(), bindAlone(f, port))
			}
		}
		// UDP leaves nothing behind. Of TCP connections there may be TIME_WAIT,
		// but not towards a destination that was never dialled from there.
		r.regainAll(udp, sources[f][0], destination(f, 0))
		r.regainAll(tcp, freshSource[f], destination(f, r.options.layout.destinations()))
	}
}

func (r *run) stuck(format string, args ...any) {
	r.collect(Report{Failures: []Failure{{Promise: stuck, What: fmt.Sprintf(format, args...)}}}, r.progress)
}

// bindAlone binds a UDP port on all addresses of a family, with nobody else on it.
func bindAlone(f family, port uint16) error {
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return onSocket(c, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 0) })
	}}
	conn, err := config.ListenPacket(context.Background(), "udp"+f.suffix(), fmt.Sprintf(":%d", port))
	if err == nil {
		conn.Close()
	}
	return err
}

// regainAll takes all 4-tuples from a source to a destination, within the system's
// range and within the one outside of it.
func (r *run) regainAll(p protocol, source netip.Addr, to netip.AddrPort) {
	for _, own := range []connectx.PortRange{{}, r.options.layout.outside()} {
		d := connectx.Dialer{Dialer: net.Dialer{Timeout: dialPatience, LocalAddr: netAddr(p, netip.AddrPortFrom(source, 0))}, PortRange: own}
		ports := r.options.layout.whole()
		if own != (connectx.PortRange{}) {
			ports = own
		}
		var conns []goConn
		err := error(nil)
		for err == nil && len(conns) <= r.options.layout.Ports {
			var conn net.Conn
			if conn, err = d.Dial(p.network(), to.String()); err == nil {
				conns = append(conns, goConn{Conn: conn})
			}
		}
		r.regained += len(conns)
		if want := int(ports.High-ports.Low) + 1; len(conns) != want || !errors.Is(err, connectx.ErrPortsExhausted) {
			r.stuck("%s from %s to %s: %d connections of %d, then: %v", p, source, to, len(conns), want, err)
		}
		for i := range conns {
			conns[i].close(false)
		}
	}
}
