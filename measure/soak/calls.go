//go:build linux

package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/seccomp"
)

// A brokenCall is a system call that fails, where an argument (its index) has that
// value, for as long as a thread lives.
type brokenCall struct {
	name                  string
	call, argument, value uint32
	errno                 unix.Errno
}

// Types of sockets as package net and connectx open them.
const (
	datagram = unix.SOCK_DGRAM | unix.SOCK_CLOEXEC
	dialled  = unix.SOCK_NONBLOCK | unix.SOCK_CLOEXEC
)

// brokenCalls are of each kind that a dial makes.
var brokenCalls = []brokenCall{
	{"socket, netlink", unix.SYS_SOCKET, 0, unix.AF_NETLINK, unix.EACCES},
	{"socket, a look at new ones", unix.SYS_SOCKET, 1, datagram, unix.ENOMEM},
	{"socket, UDP", unix.SYS_SOCKET, 1, unix.SOCK_DGRAM | dialled, unix.ENOBUFS},
	{"socket, TCP", unix.SYS_SOCKET, 1, unix.SOCK_STREAM | dialled, unix.ENOBUFS},
	{"bind, IPv4", unix.SYS_BIND, 2, unix.SizeofSockaddrInet4, unix.ENOMEM},
	{"bind, IPv4, in use", unix.SYS_BIND, 2, unix.SizeofSockaddrInet4, unix.EADDRINUSE},
	{"bind, IPv6", unix.SYS_BIND, 2, unix.SizeofSockaddrInet6, unix.ENOBUFS},
	{"bind, netlink", unix.SYS_BIND, 2, unix.SizeofSockaddrNetlink, unix.EPERM},
	{"connect, IPv4", unix.SYS_CONNECT, 2, unix.SizeofSockaddrInet4, unix.ENETUNREACH},
	{"connect, IPv6", unix.SYS_CONNECT, 2, unix.SizeofSockaddrInet6, unix.EACCES},
	{"connect, IPv4, no address", unix.SYS_CONNECT, 2, unix.SizeofSockaddrInet4, unix.EADDRNOTAVAIL},
	{"setsockopt, SO_REUSEADDR", unix.SYS_SETSOCKOPT, 2, unix.SO_REUSEADDR, unix.ENOMEM},
	{"setsockopt, IP_LOCAL_PORT_RANGE", unix.SYS_SETSOCKOPT, 2, unix.IP_LOCAL_PORT_RANGE, unix.ENOPROTOOPT},
	{"setsockopt, IP_BIND_ADDRESS_NO_PORT", unix.SYS_SETSOCKOPT, 2, unix.IP_BIND_ADDRESS_NO_PORT, unix.ENOPROTOOPT},
	{"getsockopt, SO_COOKIE", unix.SYS_GETSOCKOPT, 2, unix.SO_COOKIE, unix.ENOPROTOOPT},
	{"getsockopt, SO_NETNS_COOKIE", unix.SYS_GETSOCKOPT, 2, unix.SO_NETNS_COOKIE, unix.ENOPROTOOPT},
	{"sendto, netlink", unix.SYS_SENDTO, 3, unix.MSG_DONTWAIT, unix.ENOBUFS},
	{"recvfrom, netlink", unix.SYS_RECVFROM, 3, unix.MSG_DONTWAIT, unix.ENOMEM},
	{"recvmmsg, netlink", unix.SYS_RECVMMSG, 3, unix.MSG_DONTWAIT, unix.EPERM},
	{"getsockname", unix.SYS_GETSOCKNAME, 0, 0, unix.ENOBUFS},
	{"dup3", unix.SYS_DUP3, 2, unix.O_CLOEXEC, unix.EBUSY},
}

// afterBrokenCall may follow from any of them: a Dialer tries another port, or has
// none to try, or makes do with one of its own.
var afterBrokenCall = []error{connectx.ErrPortsExhausted, unix.EADDRINUSE, unix.EADDRNOTAVAIL, unix.EAGAIN}

// firstBroken begins a range outside of the ephemeral one.
const firstBroken = 45000

// dialsOnThread is how many dials have to do with one broken call.
const dialsOnThread = 8

// runBrokenCalls has threads come and go on which system calls fail.
func (r *run) runBrokenCalls(random *rand.Rand) {
	for !r.stopped() {
		b := brokenCalls[random.IntN(len(brokenCalls))]
		r.quiet.RLock()
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			// The thread, and with it the filter, ends with the goroutine.
			runtime.LockOSThread()
			r.dialBroken(b, random)
		}()
		<-ended
		r.quiet.RUnlock()
		moment(random, 100*time.Millisecond)
	}
}

// dialBroken dials while a system call fails. It has a source address and
// destinations for itself, so that ports which are not shared are in nobody's way.
func (r *run) dialBroken(b brokenCall, random *rand.Rand) {
	f, start := family(random.IntN(families)), time.Now()
	var conns []net.Conn
	defer func() {
		for _, conn := range conns {
			abandon(conn)
			conn.Close()
		}
	}()
	dial := func(p protocol, j job, own connectx.PortRange, n int) error {
		j.flow = flow{protocol: p, family: f, source: brokenSource}
		ctx, cancel := context.WithTimeout(context.Background(), dialPatience)
		defer cancel()
		d := j.dialer()
		if j.kind == sourceAddrs {
			d.SourceAddrs = []netip.Addr{sourceAddr(f, brokenSource)}
		}
		d.PortRange = own
		conn, err := dialTo(ctx, d, j.way, p.String(), destination(f, brokenNet, n).String())
		if err == nil {
			conns = append(conns, conn)
		}
		return err
	}
	// Of a range that the kernel does not know each try that finds a port taken
	// takes another socket.
	var own connectx.PortRange
	if random.IntN(2) == 0 {
		own = connectx.PortRange{Low: firstBroken, High: firstBroken + 1}
	}
	// Connections whose ports others are to share.
	for port := range dialsOnThread / 2 {
		for p := range protocols {
			if err := dial(p, job{kind: sourceAddressAndPort, port: port}, connectx.PortRange{}, 0); err != nil {
				why := r.explainFaults(err, start, false)
				r.failed(why, err, func() string { return fmt.Sprintf("%s, before %s fails: %v", p, b.name, err) })
				return
			}
		}
	}
	if _, err := seccomp.Install(0, seccomp.Fail(b.call, b.argument, b.value, b.errno)); err != nil {
		r.fail("%v", err)
		return
	}
	r.broken.Add(1)
	for i := range dialsOnThread {
		j := newJob(r.options.ports, random)
		j.port = i / 2 // the first are shared
		if own != (connectx.PortRange{}) && j.kind == sourceAddressAndPort {
			j.kind = sourceAddress
		}
		err := dial(j.flow.protocol, j, own, 1)
		if err == nil {
			continue
		}
		why := r.explainFaults(err, start, false)
		if isOneOf(err, append(afterBrokenCall, b.errno)) {
			why = failedCall
		}
		r.failed(why, err, func() string { return fmt.Sprintf("%s, while %s fails: %v", j.flow.protocol, b.name, err) })
	}
}
