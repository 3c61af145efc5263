//go:build linux

package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
)

// A kind is what a dial chooses beside the destination.
type kind int

const (
	noSource kind = iota
	sourceAddress
	sourceAddressAndPort
	sourceAddrs
	kinds
)

func (k kind) String() string {
	return [...]string{"no source", "source address", "source address and port", "SourceAddrs"}[k]
}

// A way is which of the methods dials.
type way int

const (
	dialContext way = iota
	netDialer
	dialPacket // UDP only
	ways
)

func (w way) String() string { return [...]string{"DialContext", "NetDialer", "DialPacket"}[w] }

// A job is a dial that was decided on.
type job struct {
	flow flow // with SourceAddrs, one of those that it may become
	kind kind
	way  way
	port int // counted from firstPort, with sourceAddressAndPort

	// cancelled is after how long the context is cancelled, or 0.
	cancelled time.Duration
	hook      bool // with a Control hook
}

// maxCancel is longer than most dials take.
const maxCancel = 200 * time.Microsecond

func newJob(ports int, random *rand.Rand) job {
	j := job{
		flow: flowOf(random.IntN(allFlows)),
		kind: kind(random.IntN(int(kinds))),
		way:  way(random.IntN(int(ways))),
		port: random.IntN(ports),
		hook: random.IntN(4) == 0,
	}
	if j.flow.protocol == tcp && j.way == dialPacket {
		j.way = dialContext
	}
	if j.kind == noSource {
		j.flow.source = mainSource
	}
	if random.IntN(16) == 0 {
		// The hook sees to it that nothing is left in TIME_WAIT.
		j.cancelled, j.hook = 1+time.Duration(random.Int64N(int64(maxCancel))), true
	}
	return j
}

func (j job) String() string {
	s := fmt.Sprintf("%s, %s, %s to %s", j.flow.protocol, j.kind, j.way, j.to())
	switch j.kind {
	case sourceAddress:
		s += fmt.Sprintf(" from %s", sourceAddr(j.flow.family, j.flow.source))
	case sourceAddressAndPort:
		s += fmt.Sprintf(" from %s", j.local())
	}
	return s
}

func (j job) to() netip.AddrPort { return destination(j.flow.family, mainNet, j.flow.destination) }

func (j job) local() netip.AddrPort {
	return netip.AddrPortFrom(sourceAddr(j.flow.family, j.flow.source), firstPort+uint16(j.port))
}

// flows are those that the connection may come to belong to.
func (j job) flows() []flow {
	if j.kind != sourceAddrs {
		return []flow{j.flow}
	}
	all := make([]flow, sources)
	for i := range all {
		all[i] = j.flow
		all[i].source = i
	}
	return all
}

// mayBeFrom reports whether the connection may come to have this source address.
func (j job) mayBeFrom(source int) bool { return j.kind == sourceAddrs || j.flow.source == source }

// dialPatience is how long a dial may take: a SYN may be lost with its source
// address, and sent again after seconds.
const dialPatience = 20 * time.Second

// dialer is the Dialer of the job.
func (j job) dialer() *connectx.Dialer {
	d := new(connectx.Dialer)
	switch j.kind {
	case sourceAddress:
		d.LocalAddr = netAddr(j.flow.protocol, netip.AddrPortFrom(j.local().Addr(), 0))
	case sourceAddressAndPort:
		d.LocalAddr = netAddr(j.flow.protocol, j.local())
	case sourceAddrs:
		for i := range sources {
			d.SourceAddrs = append(d.SourceAddrs, sourceAddr(j.flow.family, i))
		}
	}
	if j.hook {
		d.Control = leaveNoTimeWait
	}
	return d
}

// leaveNoTimeWait is a Control hook.
func leaveNoTimeWait(_, _ string, c syscall.RawConn) error {
	return c.Control(func(fd uintptr) {
		_ = unix.SetsockoptLinger(int(fd), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	})
}

func (j job) dial() (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), dialPatience)
	defer cancel()
	if j.cancelled != 0 {
		defer time.AfterFunc(j.cancelled, cancel).Stop()
	}
	return dialTo(ctx, j.dialer(), j.way, j.flow.protocol.String(), j.to().String())
}

func dialTo(ctx context.Context, d *connectx.Dialer, w way, network, address string) (net.Conn, error) {
	switch w {
	case netDialer:
		return d.NetDialer().DialContext(ctx, network, address)
	case dialPacket:
		conn, err := d.DialPacket(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return conn, nil
	default:
		return d.DialContext(ctx, network, address)
	}
}

func netAddr(p protocol, a netip.AddrPort) net.Addr {
	if p == tcp {
		return net.TCPAddrFromAddrPort(a)
	}
	return net.UDPAddrFromAddrPort(a)
}
