//go:build linux && (amd64 || arm64)

package connectx_test

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// A fault makes system calls at a place fail with errno, unless there is another
// answer.
type fault struct {
	place
	errno  unix.Errno
	answer answer
}

// A faultRow is one place, the dials that come by it, and what is to become of
// them.
type faultRow struct {
	call, where string
	at          place
	first       []fault // what leads the dial there
	dials       []string
	want        []faultWant

	what      string // in place of an errno
	answer    answer
	meanwhile func(*faultStage) error // in place of a fault

	// reason is what a fallback has to give as its reason, in place of the
	// errno's text.
	reason string

	// untold says that a dial which gets a port of its own need not give a
	// reason: the kernel has answered that there is no route.
	untold bool

	// next is the outcome of the dial after it, if a fault may have consequences
	// for that; else it is as if nothing had been.
	next string

	// anew says that the namespace goes by another name, and so has netlink
	// sockets twice.
	anew bool
}

// A faultWant is the outcome that is wanted for some errnos. Outcomes are those
// of docs/faults.md.
type faultWant struct {
	outcome string
	errnos  []unix.Errno
}

func want(outcome string, errnos ...unix.Errno) faultWant { return faultWant{outcome, errnos} }

// A faultCell is one row with one dial and one errno.
type faultCell struct {
	row   *faultRow
	dial  string
	errno unix.Errno
	want  string
}

func (c *faultCell) scene() faultScene { return faultScenes[c.dial] }

func (c *faultCell) String() string {
	what := c.row.what
	if c.errno != 0 {
		what = errnoName(c.errno)
	}
	return fmt.Sprintf("%s, %s: %s: %s", c.row.call, c.row.where, c.dial, what)
}

// faults are those of the cell in the order in which they are looked for.
func (c *faultCell) faults() []fault {
	return append([]fault{{c.row.at, c.errno, c.row.answer}}, c.row.first...)
}

// faultCells are all cells of the table.
func faultCells() (cells []faultCell) {
	for i := range faultTable {
		row := &faultTable[i]
		for _, dial := range row.dials {
			for _, want := range row.want {
				errnos := want.errnos
				if len(errnos) == 0 {
					errnos = []unix.Errno{0}
				}
				for _, errno := range errnos {
					cells = append(cells, faultCell{row, dial, errno, want.outcome})
				}
			}
		}
	}
	return cells
}

var (
	reuseAddress = setOption(unix.SOL_SOCKET, unix.SO_REUSEADDR)
	localRange   = setOption(unix.SOL_IP, unix.IP_LOCAL_PORT_RANGE)
	netnsCookie  = getOption(unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	socketCookie = getOption(unix.SOL_SOCKET, unix.SO_COOKIE)
	device       = getOption(unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX)
	mark         = getOption(unix.SOL_SOCKET, unix.SO_MARK)
)

var (
	// The first tries come to nothing.
	firstPortTaken  = []fault{{place: connectCall.at(1), errno: unix.EADDRNOTAVAIL}}
	everyPortLocked = []fault{{place: bindPort.from(1), errno: unix.EADDRINUSE}}

	// What the dial is left with when nobody answers: the socket has a port
	// already, or has found the first one in use.
	secondLookupFails = []fault{{place: sendDiag.at(2), errno: unix.ENOBUFS}}
	nobodyAnswers     = []fault{{place: netlinkSocket.from(1), errno: unix.EPERM}}
	portInUse         = []fault{{place: bindPort.at(1), errno: unix.EADDRINUSE}, {place: netlinkSocket.from(1), errno: unix.EPERM}}

	// A port range that could not be read is read again within a second.
	afterASecond = "default range or ignored"

	allDials = []string{"TCP", "TCP, port", "TCP, IPv6", "UDP", "UDP, shared port", "UDP, IPv6"}
)

// faultTable is docs/faults.md.
var faultTable = []faultRow{
	{call: "socket", where: "net.Dialer's", at: dialSocket.at(1), dials: []string{"TCP", "UDP"}, want: []faultWant{
		want("error", unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.EACCES, unix.EPERM, unix.EAFNOSUPPORT, unix.EPROTONOSUPPORT, unix.EINVAL),
	}},
	{call: "socket", where: "renew's, after a conflict", at: dialSocket.at(2), first: firstPortTaken, dials: []string{"TCP, PortRange outside"}, want: []faultWant{
		want("error", unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.EACCES, unix.EPERM),
	}},
	{call: "socket", where: "renew's, after a lookup that failed", at: dialSocket.at(2), first: secondLookupFails, dials: []string{"UDP, shared port"}, want: []faultWant{
		want("error", unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.EACCES, unix.EPERM),
	}},
	{call: "socket", where: "netlink, sock_diag", at: netlinkSocket.at(1), dials: []string{"UDP, shared port, first dial", "UDP, 4-tuple in use, first dial"}, want: []faultWant{
		want("not shared", unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.EACCES, unix.EPERM, unix.EAFNOSUPPORT, unix.EPROTONOSUPPORT),
	}},
	{call: "socket", where: "netlink, sock_diag", at: netlinkSocket.at(1), dials: []string{"UDP, first dial"}, want: []faultWant{
		want("own port", unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.EACCES, unix.EPERM, unix.EAFNOSUPPORT, unix.EPROTONOSUPPORT),
	}},
	{call: "socket", where: "netlink, route", at: netlinkSocket.at(2), dials: []string{"UDP, first dial"}, want: []faultWant{
		want("own port", unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.EACCES, unix.EPERM),
	}},
	{call: "socket", where: "a look at what new sockets are like", at: lookSocket.at(1), dials: []string{"TCP, first dial"}, want: []faultWant{
		want("ignored", unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM),
	}},
	{call: "socket", where: "a look at what new sockets are like", at: lookSocket.at(1), dials: []string{"UDP, first dial"}, next: afterASecond, want: []faultWant{
		want("default range", unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM),
	}},
	{call: "socket", where: "a look before netlink is opened", at: lookSocket.at(2), dials: []string{"UDP, first dial"}, want: []faultWant{
		want("own port", unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM),
	}},
	{call: "socket", where: "a look before netlink is opened", at: lookSocket.at(2), dials: []string{"UDP, shared port, first dial"}, want: []faultWant{
		want("not shared", unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM),
	}},

	{call: "bind", where: "netlink, sock_diag", at: bindNetlink.at(1), dials: []string{"UDP, first dial"}, want: []faultWant{
		want("own port", unix.ENOMEM, unix.EPERM, unix.EACCES, unix.EADDRINUSE),
	}},
	{call: "bind", where: "netlink, route", at: bindNetlink.at(2), dials: []string{"UDP, first dial"}, want: []faultWant{
		want("own port", unix.ENOMEM, unix.EPERM, unix.EACCES, unix.EADDRINUSE),
	}},
	{call: "bind", where: "chosen port", at: bindPort.at(1), dials: []string{"TCP, port"}, want: []faultWant{
		want("error", unix.EADDRINUSE, unix.EACCES, unix.EPERM, unix.EINVAL, unix.ENOMEM, unix.ENOBUFS, unix.ENODEV),
		want("next port", unix.EADDRNOTAVAIL), // net.Dialer dials again
	}},
	{call: "bind", where: "chosen port, each time", at: bindPort.from(1), dials: []string{"TCP, port"}, want: []faultWant{
		want("error", unix.EADDRNOTAVAIL),
	}},
	{call: "bind", where: "chosen address, without a port", at: bindAny.at(1), dials: []string{"TCP, address", "TCP, PortRange"}, want: []faultWant{
		want("error", unix.EADDRINUSE, unix.EACCES, unix.EPERM, unix.EINVAL, unix.ENOMEM, unix.ENOBUFS, unix.ENODEV),
		want("ignored", unix.EADDRNOTAVAIL), // net.Dialer dials again
	}},
	{call: "bind", where: "chosen address, without a port, each time", at: bindAny.from(1), dials: []string{"TCP, address"}, want: []faultWant{
		want("error", unix.EADDRNOTAVAIL),
	}},
	{call: "bind", where: "port of PortRange", at: bindPort.at(1), dials: []string{"TCP, PortRange outside"}, want: []faultWant{
		want("next port", unix.EADDRINUSE, unix.EADDRNOTAVAIL),
		want("error", unix.EACCES, unix.EPERM, unix.EINVAL, unix.ENOMEM, unix.ENOBUFS),
	}},
	{call: "bind", where: "picked or chosen port", at: bindPort.at(1), dials: []string{"UDP", "UDP, address", "UDP, port", "UDP, shared port", "UDP, IPv6"}, want: []faultWant{
		want("ignored", unix.EADDRINUSE), // a lookup finds nobody
		want("error", unix.EADDRNOTAVAIL, unix.EACCES, unix.EPERM, unix.EINVAL, unix.ENOMEM, unix.ENOBUFS),
	}},
	{call: "bind", where: "picked port, each time", at: bindPort.from(1), dials: []string{"UDP, address"}, want: []faultWant{
		want("exhausted", unix.EADDRINUSE),
	}},
	{call: "bind", where: "shared port", at: bindPort.at(2), dials: []string{"UDP, shared port", "UDP, all ports shared", "UDP, IPv6, shared port"}, want: []faultWant{
		want("next port", unix.EADDRINUSE), // the same one again if it was chosen
		want("error", unix.EADDRNOTAVAIL, unix.EACCES, unix.EPERM, unix.ENOMEM, unix.ENOBUFS),
	}},
	{call: "bind", where: "shared port, each time", at: bindPort.from(2), dials: []string{"UDP, shared port"}, want: []faultWant{
		want("error", unix.EADDRINUSE),
	}},
	{call: "bind", where: "port that nobody is on", at: bindAny.at(1), first: everyPortLocked, dials: []string{"UDP, wide range"}, want: []faultWant{
		want("exhausted", unix.EADDRINUSE),
		want("error", unix.EADDRNOTAVAIL, unix.EACCES, unix.EPERM, unix.ENOMEM, unix.ENOBUFS),
	}},
	{call: "bind", where: "own port", at: bindAny.at(1), first: portInUse, dials: []string{"UDP, address, first dial"}, want: []faultWant{
		want("error", unix.EADDRINUSE, unix.EADDRNOTAVAIL, unix.EACCES, unix.EPERM, unix.ENOMEM, unix.ENOBUFS),
	}},
	{call: "bind", where: "own port of PortRange", at: bindPort.at(2), first: portInUse, dials: []string{"UDP, PortRange, first dial"}, reason: "operation not permitted", want: []faultWant{
		want("own port", unix.EADDRINUSE), // the next one
		want("error", unix.EADDRNOTAVAIL, unix.EACCES, unix.EPERM, unix.ENOMEM, unix.ENOBUFS),
	}},
	{call: "bind", where: "own chosen port", at: bindPort.at(2), first: nobodyAnswers, dials: []string{"UDP, shared port, first dial"}, want: []faultWant{
		want("not shared", unix.EADDRINUSE),
		want("error", unix.EADDRNOTAVAIL, unix.EACCES, unix.EPERM, unix.ENOMEM, unix.ENOBUFS),
	}, reason: "operation not permitted"},

	{call: "connect", where: "connectx's", at: connectCall.at(1), dials: []string{"TCP", "TCP, address", "TCP, port", "TCP, IPv6"}, want: []faultWant{
		want("error", unix.ECONNREFUSED, unix.ETIMEDOUT, unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EPERM, unix.EADDRINUSE, unix.EAFNOSUPPORT, unix.EINVAL, unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM),
		want("ignored", unix.EINTR, unix.EINPROGRESS),
	}},
	{call: "connect", where: "connectx's", at: connectCall.at(1), dials: []string{"TCP", "TCP, address", "TCP, PortRange", "TCP, PortRange outside"}, want: []faultWant{
		want("next port", unix.EADDRNOTAVAIL),
	}},
	{call: "connect", where: "connectx's", at: connectCall.at(1), dials: []string{"TCP, port"}, want: []faultWant{
		want("error", unix.EADDRNOTAVAIL),
	}},
	{call: "connect", where: "connectx's, each time", at: connectCall.from(1), dials: []string{"TCP", "TCP, address", "TCP, PortRange outside"}, want: []faultWant{
		want("exhausted", unix.EADDRNOTAVAIL),
	}},
	{call: "connect", where: "connectx's", at: connectCall.at(1), dials: []string{"UDP", "UDP, address", "UDP, shared port", "UDP, IPv6"}, want: []faultWant{
		want("error", unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EPERM, unix.EADDRNOTAVAIL, unix.EAFNOSUPPORT, unix.EINVAL, unix.EAGAIN, unix.ECONNREFUSED, unix.ENOBUFS, unix.ENOMEM, unix.EINTR),
	}},
	{call: "connect", where: "connectx's, denied by a guard", at: connectCall.at(1), dials: []string{"UDP", "UDP, address", "UDP, IPv6"}, want: []faultWant{
		want("next port", unix.EADDRINUSE),
	}},
	{call: "connect", where: "connectx's, denied by a guard", at: connectCall.at(1), dials: []string{"UDP, shared port"}, want: []faultWant{
		want("error", unix.EADDRINUSE),
	}},
	{call: "connect", where: "net.Dialer's", at: connectCall.at(2), dials: []string{"TCP", "UDP", "UDP, shared port"}, want: []faultWant{
		want("error", unix.ECONNREFUSED, unix.ETIMEDOUT, unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EPERM, unix.ENOMEM),
	}},
	{call: "connect", where: "net.Dialer's, to pick an own port", at: connectCall.at(1), first: nobodyAnswers, dials: []string{"UDP, first dial"}, want: []faultWant{
		want("error", unix.EAGAIN, unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EPERM, unix.ENOMEM),
	}},

	{call: "setsockopt", where: "SO_BROADCAST, net.Dialer's", at: setOption(unix.SOL_SOCKET, unix.SO_BROADCAST).at(1), dials: []string{"UDP"}, want: []faultWant{
		want("error", unix.EPERM, unix.ENOPROTOOPT, unix.ENOMEM),
	}},
	{call: "setsockopt", where: "SO_BROADCAST, renew's", at: setOption(unix.SOL_SOCKET, unix.SO_BROADCAST).at(2), first: secondLookupFails, dials: []string{"UDP, shared port"}, want: []faultWant{
		want("error", unix.EPERM, unix.ENOPROTOOPT, unix.ENOMEM),
	}},
	{call: "setsockopt", where: "IPV6_V6ONLY, net.Dialer's", at: setOption(unix.SOL_IPV6, unix.IPV6_V6ONLY).at(1), dials: []string{"TCP, IPv6", "UDP, IPv6"}, want: []faultWant{
		want("ignored", unix.EPERM, unix.EINVAL, unix.ENOPROTOOPT),
	}},
	{call: "setsockopt", where: "IPV6_V6ONLY, renew's", at: setOption(unix.SOL_IPV6, unix.IPV6_V6ONLY).at(2), first: firstPortTaken, dials: []string{"TCP, IPv6, PortRange outside"}, want: []faultWant{
		want("next port", unix.EPERM, unix.EINVAL, unix.ENOPROTOOPT),
	}},
	{call: "setsockopt", where: "SO_REUSEADDR on", at: reuseAddress.at(1), dials: []string{"TCP", "TCP, address", "TCP, port"}, want: []faultWant{
		want("error", unix.EPERM, unix.ENOPROTOOPT, unix.EINVAL, unix.ENOMEM),
	}},
	{call: "setsockopt", where: "SO_REUSEADDR on, renew's", at: reuseAddress.at(2), first: firstPortTaken, dials: []string{"TCP, PortRange outside"}, want: []faultWant{
		want("error", unix.EPERM, unix.ENOPROTOOPT, unix.ENOMEM),
	}},
	{call: "setsockopt", where: "SO_REUSEADDR on, to unlock", at: reuseAddress.at(1), dials: []string{"UDP", "UDP, address", "UDP, port", "UDP, IPv6"}, want: []faultWant{
		want("error", unix.EPERM, unix.ENOPROTOOPT, unix.EINVAL, unix.ENOMEM),
	}},
	{call: "setsockopt", where: "SO_REUSEADDR on, to share", at: reuseAddress.at(1), dials: []string{"UDP, shared port", "UDP, all ports shared"}, want: []faultWant{
		want("error", unix.EPERM, unix.ENOPROTOOPT, unix.EINVAL, unix.ENOMEM),
	}},
	{call: "setsockopt", where: "SO_REUSEADDR off, to lock", at: reuseAddress.at(2), dials: []string{"UDP, shared port", "UDP, all ports shared"}, want: []faultWant{
		want("error", unix.EPERM, unix.ENOPROTOOPT, unix.EINVAL, unix.ENOMEM),
	}},
	{call: "setsockopt", where: "SO_REUSEADDR on, to unlock", at: reuseAddress.at(3), dials: []string{"UDP, shared port", "UDP, IPv6, shared port"}, want: []faultWant{
		want("error", unix.EPERM, unix.ENOPROTOOPT, unix.EINVAL, unix.ENOMEM),
	}},
	{call: "setsockopt", where: "SO_REUSEADDR off, for an own port", at: reuseAddress.at(1), first: nobodyAnswers, dials: []string{"UDP, first dial"}, want: []faultWant{
		want("error", unix.EPERM, unix.ENOPROTOOPT, unix.ENOMEM),
	}},
	{call: "setsockopt", where: "SO_REUSEADDR off, after the caller's hook", at: reuseAddress.at(1), dials: []string{"UDP, Control"}, want: []faultWant{
		want("error", unix.EPERM, unix.ENOPROTOOPT, unix.ENOMEM),
	}},
	{call: "setsockopt", where: "SO_REUSEPORT off", at: setOption(unix.SOL_SOCKET, unix.SO_REUSEPORT).at(1), dials: []string{"UDP, Control"}, want: []faultWant{
		want("ignored", unix.EPERM, unix.ENOPROTOOPT, unix.EOPNOTSUPP),
	}},
	{call: "setsockopt", where: "SO_INCOMING_CPU off", at: setOption(unix.SOL_SOCKET, unix.SO_INCOMING_CPU).at(1), dials: []string{"UDP, Control"}, want: []faultWant{
		want("ignored", unix.EPERM, unix.ENOPROTOOPT),
	}},
	{call: "setsockopt", where: "IP_BIND_ADDRESS_NO_PORT", at: setOption(unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT).at(1), dials: []string{"TCP, address", "TCP, PortRange"}, reason: "IP_BIND_ADDRESS_NO_PORT", want: []faultWant{
		want("fallback", unix.ENOPROTOOPT, unix.EPERM, unix.EINVAL, unix.ENOSYS),
	}},
	{call: "setsockopt", where: "IP_LOCAL_PORT_RANGE", at: localRange.at(1), dials: []string{"TCP", "TCP, address", "TCP, IPv6"}, reason: "IP_LOCAL_PORT_RANGE", want: []faultWant{
		want("fallback", unix.ENOPROTOOPT, unix.EPERM, unix.EINVAL, unix.EOPNOTSUPP),
	}},
	{call: "setsockopt", where: "IP_LOCAL_PORT_RANGE, each time", at: localRange.from(1), dials: []string{"TCP, PortRange"}, reason: "IP_LOCAL_PORT_RANGE", want: []faultWant{
		want("fallback", unix.ENOPROTOOPT, unix.EPERM, unix.EINVAL), // bound to a port of PortRange
	}},
	{call: "setsockopt", where: "IP_LOCAL_PORT_RANGE, each time", at: localRange.from(1), dials: []string{"TCP, range full", "TCP, no source, range full"}, want: []faultWant{
		want("exhausted", unix.ENOPROTOOPT, unix.EPERM, unix.EINVAL),
	}},
	{call: "setsockopt", where: "IP_LOCAL_PORT_RANGE, for a port that nobody is on", at: localRange.at(1), first: everyPortLocked, dials: []string{"UDP, PortRange of a wide range"}, want: []faultWant{
		want("exhausted", unix.ENOPROTOOPT),
	}},
	{call: "setsockopt", where: "TCP_FASTOPEN_CONNECT", at: setOption(unix.SOL_TCP, unix.TCP_FASTOPEN_CONNECT).at(1), dials: []string{"TCP, FastOpen"}, want: []faultWant{
		want("ignored", unix.EOPNOTSUPP, unix.ENOPROTOOPT, unix.EPERM, unix.EINVAL),
	}},

	{call: "getsockopt", where: "SO_NETNS_COOKIE, each time", at: netnsCookie.from(1), dials: []string{"TCP", "UDP", "UDP, shared port", "UDP, first dial"}, anew: true, want: []faultWant{
		want("ignored", unix.ENOPROTOOPT, unix.EPERM, unix.EOPNOTSUPP),
	}},
	{call: "getsockopt", where: "SO_NETNS_COOKIE, of a new socket", at: netnsCookie.at(3), dials: []string{"UDP, first dial"}, reason: "not in the calling thread's network namespace", want: []faultWant{
		want("own port", unix.ENOPROTOOPT, unix.EPERM),
	}},
	{call: "stat", where: "/proc/thread-self/ns/net, where there is no SO_NETNS_COOKIE", at: statNamespace.at(1),
		first: []fault{{place: netnsCookie.from(1), errno: unix.ENOPROTOOPT}}, dials: []string{"TCP", "UDP"}, want: []faultWant{
			want("error", unix.EACCES, unix.ENOENT, unix.ENOMEM, unix.EPERM),
		}},
	{call: "getsockopt", where: "SO_COOKIE", at: socketCookie.at(1), dials: []string{"UDP, shared port", "UDP, all ports shared"}, want: []faultWant{
		want("error", unix.ENOPROTOOPT, unix.EPERM, unix.EINVAL, unix.ENOMEM),
	}},
	{call: "getsockopt", where: "SO_BINDTOIFINDEX", at: device.at(1), dials: []string{"TCP, first dial", "UDP, first dial", "UDP, Control"}, want: []faultWant{
		want("ignored", unix.ENOPROTOOPT, unix.EPERM),
	}},
	{call: "getsockopt", where: "SO_MARK", at: mark.at(1), dials: []string{"TCP, first dial", "UDP, first dial", "UDP, Control"}, want: []faultWant{
		want("ignored", unix.ENOPROTOOPT, unix.EPERM),
	}},
	{call: "getsockopt", where: "IP_UNICAST_IF", at: getOption(unix.SOL_IP, unix.IP_UNICAST_IF).at(1), dials: []string{"UDP, Control"}, want: []faultWant{
		want("ignored", unix.ENOPROTOOPT, unix.EPERM),
	}},
	{call: "getsockopt", where: "SO_PROTOCOL, renew's", at: getOption(unix.SOL_SOCKET, unix.SO_PROTOCOL).at(1), first: firstPortTaken, dials: []string{"TCP, PortRange outside"}, want: []faultWant{
		want("next port", unix.ENOPROTOOPT, unix.EPERM),
	}},
	{call: "getsockopt", where: "IPV6_V6ONLY, renew's", at: getOption(unix.SOL_IPV6, unix.IPV6_V6ONLY).at(1), first: firstPortTaken, dials: []string{"TCP, IPv6, PortRange outside"}, want: []faultWant{
		want("next port", unix.ENOPROTOOPT, unix.EPERM),
	}},

	{call: "getsockname", where: "netlink, sock_diag", at: nameOfNetlink.at(1), dials: []string{"UDP, first dial"}, want: []faultWant{
		want("own port", unix.ENOBUFS, unix.EPERM, unix.ENOMEM),
	}},
	{call: "getsockname", where: "netlink, route", at: nameOfNetlink.at(2), dials: []string{"UDP, first dial"}, want: []faultWant{
		want("own port", unix.ENOBUFS, unix.EPERM, unix.ENOMEM),
	}},
	{call: "getsockname", where: "has the caller's hook bound the socket?", at: nameOfSocket.at(1), dials: []string{"TCP, Control", "UDP, Control"}, want: []faultWant{
		want("ignored", unix.ENOBUFS, unix.EPERM),
	}},
	{call: "getsockname", where: "is the port of PortRange?", at: nameOfSocket.at(1), dials: []string{"TCP, PortRange"}, want: []faultWant{
		want("ignored", unix.ENOBUFS, unix.EPERM),
	}},
	{call: "getsockname", where: "has the kernel picked a port of PortRange?", at: nameOfSocket.at(1), first: everyPortLocked, dials: []string{"UDP, PortRange of a wide range"}, want: []faultWant{
		want("exhausted", unix.ENOBUFS),
	}},
	{call: "getsockname", where: "net.Dialer's", at: nameOfSocket.at(1), dials: []string{"UDP", "UDP, shared port"}, want: []faultWant{
		want("ignored", unix.ENOBUFS, unix.EPERM),
	}},
	{call: "getsockname", where: "net.Dialer's", at: nameOfSocket.at(1), dials: []string{"TCP"}, want: []faultWant{
		want("next port", unix.ENOBUFS, unix.EPERM), // net.Dialer dials again
	}},
	{call: "getpeername", where: "net.Dialer's", at: peerOfSocket.at(1), dials: []string{"TCP", "UDP"}, want: []faultWant{
		want("ignored", unix.ENOBUFS, unix.EPERM, unix.ENOTCONN),
	}},

	{call: "sendto", where: "is anybody on the 4-tuple?", at: sendDiag.at(1), dials: []string{"UDP, shared port", "UDP, 4-tuple in use", "UDP, IPv6, shared port"}, want: []faultWant{
		want("not shared", unix.ENOBUFS, unix.ENOMEM, unix.EPERM, unix.EACCES, unix.EAGAIN, unix.ECONNREFUSED, unix.EINTR, unix.ENOENT, unix.EOPNOTSUPP),
	}},
	{call: "sendto", where: "is anybody on the 4-tuple?", at: sendDiag.at(1), dials: []string{"UDP, all ports shared"}, want: []faultWant{
		want("error EADDRINUSE", unix.ENOBUFS, unix.ENOMEM, unix.EPERM, unix.EAGAIN, unix.ECONNREFUSED), // there is no own port
	}},
	{call: "sendto", where: "who receives on the 4-tuple?", at: sendDiag.at(2), dials: []string{"UDP, shared port"}, want: []faultWant{
		want("not shared", unix.ENOBUFS, unix.ENOMEM, unix.EPERM, unix.EACCES, unix.EAGAIN, unix.ECONNREFUSED, unix.EINTR, unix.ENOENT),
	}},
	{call: "sendto", where: "who is on the next 4-tuples?", at: sendDiag.at(3), dials: []string{"UDP, even ports taken"}, want: []faultWant{
		want("next port", unix.ENOBUFS, unix.ENOMEM, unix.EPERM, unix.EAGAIN, unix.ECONNREFUSED), // asked for one by one
	}},
	{call: "sendto", where: "who is on the next 4-tuples?, each time", at: sendDiag.from(3), dials: []string{"UDP, even ports taken"}, want: []faultWant{
		want("own port", unix.ENOBUFS, unix.ENOMEM, unix.EPERM, unix.EAGAIN, unix.ECONNREFUSED),
	}},
	{call: "sendto", where: "who is on the 4-tuples?, each time", at: sendDiag.from(1), dials: []string{"TCP, range full", "TCP, PortRange outside, full", "TCP, no source, range full"}, want: []faultWant{
		want("exhausted", unix.ENOBUFS, unix.ENOMEM, unix.EPERM),
	}},
	{call: "sendto", where: "which source address?", at: sendRoute.at(1), dials: []string{"UDP, first dial"}, want: []faultWant{
		want("ignored", unix.EAGAIN, unix.ENOBUFS), // asked once more
		want("own port", unix.ENOMEM, unix.EPERM, unix.EACCES, unix.ECONNREFUSED, unix.EINTR),
	}},
	{call: "sendto", where: "which source address?, each time", at: sendRoute.from(1), dials: []string{"UDP, first dial"}, want: []faultWant{
		want("own port", unix.ENOBUFS, unix.EPERM),
	}},
	{call: "sendto", where: "which interface?", at: sendRoute.at(1), dials: []string{"UDP, shared port, first dial"}, want: []faultWant{
		want("ignored", unix.EAGAIN, unix.ENOBUFS), // asked once more
		want("not shared", unix.ENOMEM, unix.EPERM, unix.EACCES, unix.ECONNREFUSED),
	}},
	{call: "sendto", where: "which interface?", at: sendRoute.at(1), dials: []string{"UDP, 4-tuple in use on lo, first dial"}, want: []faultWant{
		want("error EADDRINUSE", unix.EAGAIN, unix.ENOBUFS), // asked once more
		want("not shared", unix.ENOMEM, unix.EPERM, unix.EACCES, unix.ECONNREFUSED),
	}},
	{call: "sendto", where: "which source address?, each time", at: sendRoute.from(1), dials: []string{"TCP, no source, range full"}, want: []faultWant{
		want("exhausted", unix.ENOMEM, unix.EPERM),
	}},

	{call: "recvfrom", where: "the socket on the 4-tuple", at: recvDiag.at(1), dials: []string{"UDP, shared port", "UDP, 4-tuple in use"}, want: []faultWant{
		want("not shared", unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM, unix.EINTR, unix.EPERM, unix.EACCES),
	}},
	{call: "recvfrom", where: "the socket that receives on the 4-tuple", at: recvDiag.at(2), dials: []string{"UDP, shared port"}, want: []faultWant{
		want("not shared", unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM, unix.EINTR, unix.EPERM, unix.EACCES),
	}},
	{call: "recvfrom", where: "the route", at: recvRoute.at(1), dials: []string{"UDP, first dial"}, want: []faultWant{
		want("ignored", unix.EAGAIN, unix.ENOBUFS), // asked for once more
		want("own port", unix.ENOMEM, unix.EINTR, unix.EPERM, unix.EACCES),
	}},
	{call: "recvfrom", where: "the route, each time", at: recvRoute.from(1), dials: []string{"UDP, first dial"}, want: []faultWant{
		want("own port", unix.EAGAIN, unix.EPERM),
	}},
	{call: "recvfrom", where: "has a route changed?", at: recvChanges.at(1), dials: []string{"UDP"}, want: []faultWant{
		want("ignored", unix.ENOBUFS, unix.ENOMEM, unix.EINTR, unix.EPERM), // the route is asked for
	}},
	{call: "recvmmsg", where: "the sockets on the next 4-tuples", at: recvAnswers.at(1), dials: []string{"UDP, even ports taken"}, want: []faultWant{
		want("next port", unix.ENOSYS, unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM, unix.EINTR, unix.EPERM), // asked for one by one
	}},
	{call: "recvmmsg", where: "the sockets on the 4-tuples, each time", at: recvAnswers.from(1), dials: []string{"UDP, range full", "TCP, range full", "TCP, PortRange outside, full"}, want: []faultWant{
		want("exhausted", unix.ENOSYS, unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM, unix.EPERM),
	}},
	{call: "recvfrom", where: "drain", at: recvDrain.at(1), dials: []string{"UDP", "UDP, shared port", "UDP, IPv6"}, want: []faultWant{
		want("ignored", unix.ECONNREFUSED, unix.EINTR, unix.ENOMEM, unix.EPERM),
	}},
	{call: "recvfrom", where: "peek", at: recvPeek.at(1), dials: []string{"UDP", "UDP, shared port"}, want: []faultWant{
		want("ignored", unix.ECONNREFUSED, unix.EINTR, unix.ENOMEM, unix.EPERM),
	}},

	{call: "dup3", where: "renew's, after a conflict", at: dupCall.at(1), first: firstPortTaken, dials: []string{"TCP, PortRange outside"}, want: []faultWant{
		want("error", unix.EBUSY, unix.EMFILE, unix.EINTR, unix.EPERM),
	}},
	{call: "dup3", where: "renew's, after a lookup that failed", at: dupCall.at(1), first: secondLookupFails, dials: []string{"UDP, shared port"}, want: []faultWant{
		want("error", unix.EBUSY, unix.EMFILE, unix.EINTR, unix.EPERM),
	}},
	{call: "ioctl", where: "SIOCGIFINDEX", at: interfaceCall.at(1), dials: []string{"TCP, zone", "UDP, zone"}, want: []faultWant{
		want("ignored", unix.ENODEV, unix.EPERM, unix.ENOTTY),
	}},
	{call: "openat", where: "ip_local_port_range", at: openRange.at(1), dials: []string{"UDP, first dial"}, next: afterASecond, want: []faultWant{
		want("default range", unix.EACCES, unix.ENOENT, unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.EPERM, unix.EINTR),
	}},
	{call: "openat", where: "ip_local_reserved_ports", at: openReserved.at(1), dials: []string{"UDP, first dial"}, next: afterASecond, want: []faultWant{
		want("default range", unix.EACCES, unix.ENOENT, unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.EPERM),
	}},
	{call: "openat", where: "ip_local_port_range", at: openRange.at(1), dials: []string{"TCP, first dial"}, want: []faultWant{
		want("ignored", unix.EACCES, unix.ENOENT, unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.EPERM),
	}},
	{call: "pread64", where: "ip_local_port_range", at: readSysctl.at(1), dials: []string{"UDP, first dial"}, next: afterASecond, want: []faultWant{
		want("default range", unix.EIO, unix.ENOMEM, unix.EINTR, unix.EPERM),
	}},
	{call: "pread64", where: "ip_local_reserved_ports", at: readSysctl.at(2), dials: []string{"UDP, first dial"}, next: afterASecond, want: []faultWant{
		want("default range", unix.EIO, unix.ENOMEM, unix.EINTR, unix.EPERM),
	}},
	{call: "epoll_ctl", where: "net.Dialer's", at: registerSocket.at(1), dials: allDials, want: []faultWant{
		want("error", unix.ENOMEM, unix.ENOSPC),
	}},

	// Answers that are there, but are not answers.
	{call: "sendto", where: "is anybody on the 4-tuple?", at: sendDiag.at(1), dials: []string{"UDP, shared port", "UDP, 4-tuple in use"},
		what: "answer to another request", answer: askInstead(asAnother), reason: "recv: resource temporarily unavailable", want: []faultWant{want("not shared")}},
	{call: "sendto", where: "is anybody on the 4-tuple?", at: sendDiag.at(1), dials: []string{"UDP, shared port", "UDP, 4-tuple in use"},
		what: "acknowledgement", answer: askInstead(forAcknowledgement), reason: "acknowledged without an answer", want: []faultWant{want("not shared")}},
	{call: "sendto", where: "is anybody on the 4-tuple?", at: sendDiag.at(1), dials: []string{"UDP, shared port", "UDP, 4-tuple in use"},
		what: "nothing is sent", answer: swallow, reason: "recv: resource temporarily unavailable", want: []faultWant{want("not shared")}},
	{call: "sendto", where: "who receives on the 4-tuple?", at: sendDiag.at(2), dials: []string{"UDP, shared port"},
		what: "answer to another request", answer: askInstead(asAnother), reason: "recv: resource temporarily unavailable", want: []faultWant{want("not shared")}},
	{call: "sendto", where: "who receives on the 4-tuple?", at: sendDiag.at(2), dials: []string{"UDP, shared port"},
		what: "acknowledgement", answer: askInstead(forAcknowledgement), reason: "acknowledged without an answer", want: []faultWant{want("not shared")}},
	{call: "sendto", where: "who is on the next 4-tuples?", at: sendDiag.at(3), dials: []string{"UDP, even ports taken"},
		what: "answers to other requests", answer: askInstead(asAnother), want: []faultWant{want("next port")}},
	{call: "sendto", where: "who is on the next 4-tuples?", at: sendDiag.at(3), dials: []string{"UDP, even ports taken"},
		what: "acknowledgement", answer: askInstead(forAcknowledgement), want: []faultWant{want("next port")}},
	{call: "sendto", where: "who is on the next 4-tuples?", at: sendDiag.at(3), dials: []string{"UDP, even ports taken"},
		what: "nothing is sent", answer: swallow, want: []faultWant{want("next port")}},
	{call: "sendto", where: "which source address?", at: sendRoute.at(1), dials: []string{"UDP, first dial"},
		what: "answer to another request", answer: askInstead(asAnother), want: []faultWant{want("ignored")}},
	{call: "sendto", where: "which source address?", at: sendRoute.at(1), dials: []string{"UDP, first dial"},
		what: "acknowledgement", answer: askInstead(forAcknowledgement), reason: "acknowledged without an answer", want: []faultWant{want("own port")}},
	{call: "recvfrom", where: "the socket on the 4-tuple", at: recvDiag.at(1), dials: []string{"UDP, 4-tuple in use"},
		what: "half an answer", answer: answerInstead(truncated), reason: "netlink reply says", want: []faultWant{want("not shared")}},
	{call: "recvfrom", where: "the socket on the 4-tuple", at: recvDiag.at(1), dials: []string{"UDP, shared port", "UDP, 4-tuple in use"},
		what: "15 bytes", answer: answerInstead(headless), reason: "too short", want: []faultWant{want("not shared")}},
	{call: "recvfrom", where: "the socket on the 4-tuple", at: recvDiag.at(1), dials: []string{"UDP, shared port", "UDP, 4-tuple in use"},
		what: "answer of another type", answer: answerInstead(ofAnotherType), reason: "is of type 16", want: []faultWant{want("not shared")}},
	{call: "recvfrom", where: "the socket on the 4-tuple", at: recvDiag.at(1), dials: []string{"UDP, 4-tuple in use"},
		what: "there is none", answer: answerInstead(withError(unix.ENOENT)), want: []faultWant{want("error EADDRINUSE")}},
	{call: "recvfrom", where: "the socket on the 4-tuple", at: recvDiag.at(1), dials: []string{"UDP, shared port", "UDP, 4-tuple in use"},
		what: "error EPERM", answer: answerInstead(withError(unix.EPERM)), reason: "operation not permitted", want: []faultWant{want("not shared")}},
	{call: "recvfrom", where: "the socket on the 4-tuple", at: recvDiag.at(1), dials: []string{"UDP, shared port", "UDP, 4-tuple in use"},
		what: "error EINVAL", answer: answerInstead(withError(unix.EINVAL)), reason: "invalid argument", want: []faultWant{want("not shared")}},
	{call: "recvfrom", where: "the socket that receives on the 4-tuple", at: recvDiag.at(2), dials: []string{"UDP, shared port"},
		what: "another socket", answer: answerInstead(fromAnother), want: []faultWant{want("next port")}},
	{call: "recvfrom", where: "the socket that receives on the 4-tuple", at: recvDiag.at(2), dials: []string{"UDP, shared port"},
		what: "there is none", answer: answerInstead(withError(unix.ENOENT)), want: []faultWant{want("ignored")}}, // asked for again
	{call: "recvfrom", where: "the socket that receives on the 4-tuple, each time", at: recvDiag.from(2), dials: []string{"UDP, shared port"},
		what: "there is none", answer: answerInstead(withError(unix.ENOENT)), reason: "does not find UDP sockets", want: []faultWant{want("not shared")}, next: "not shared or ignored"},
	{call: "recvfrom", where: "the socket that receives on the 4-tuple", at: recvDiag.at(2), dials: []string{"UDP, shared port"},
		what: "half an answer", answer: answerInstead(truncated), reason: "netlink reply says", want: []faultWant{want("not shared")}},
	{call: "recvfrom", where: "the interface", at: recvRoute.at(1), dials: []string{"UDP, shared port, first dial", "UDP, 4-tuple in use on lo, first dial"},
		what: "half an answer", answer: answerInstead(truncated), reason: "netlink reply says", want: []faultWant{want("not shared")}},
	{call: "recvfrom", where: "the route", at: recvRoute.at(1), dials: []string{"UDP, first dial"},
		what: "half an answer", answer: answerInstead(truncated), reason: "netlink reply says", want: []faultWant{want("own port")}},
	{call: "recvfrom", where: "the route", at: recvRoute.at(1), dials: []string{"UDP, first dial"},
		what: "15 bytes", answer: answerInstead(headless), reason: "too short", want: []faultWant{want("own port")}},
	{call: "recvfrom", where: "the route", at: recvRoute.at(1), dials: []string{"UDP, first dial"},
		what: "answer of another type", answer: answerInstead(ofAnotherType), reason: "is of type 16", want: []faultWant{want("own port")}},
	{call: "recvfrom", where: "the route", at: recvRoute.at(1), dials: []string{"UDP, first dial"},
		what: "error ENETUNREACH", answer: answerInstead(withError(unix.ENETUNREACH)), untold: true, want: []faultWant{want("own port")}},
	{call: "recvfrom", where: "the route", at: recvRoute.at(1), dials: []string{"UDP, first dial"},
		what: "error EINVAL", answer: answerInstead(withError(unix.EINVAL)), untold: true, want: []faultWant{want("own port")}},

	// Netlink sockets that die between two dials.
	{call: "between two dials", where: "sock_diag socket", dials: []string{"UDP, shared port", "UDP, 4-tuple in use"},
		what: "closed, and the number used by a file", meanwhile: replaceNetlink(unix.NETLINK_SOCK_DIAG, aFile), reason: "socket operation on non-socket", want: []faultWant{want("not shared")}},
	{call: "between two dials", where: "sock_diag socket", dials: []string{"UDP, shared port", "UDP, 4-tuple in use"},
		what: "closed, and the number used by a socket that is shut down", meanwhile: replaceNetlink(unix.NETLINK_SOCK_DIAG, aDeadSocket), reason: "send: ", want: []faultWant{want("not shared")}},
	{call: "between two dials", where: "route socket", dials: []string{"UDP"},
		what: "closed, and the number used by a file", meanwhile: replaceNetlink(unix.NETLINK_ROUTE, aFile), reason: "socket operation on non-socket", want: []faultWant{want("own port")}},
	{call: "between two dials", where: "route socket", dials: []string{"UDP, shared port"},
		what: "closed, and the number used by a file", meanwhile: replaceNetlink(unix.NETLINK_ROUTE, aFile), reason: "socket operation on non-socket", want: []faultWant{want("not shared")}},

	// The last one, since what it is about does not end if it goes wrong.
	{call: "between two dials", where: "route socket", dials: []string{"UDP"},
		what: "closed, and the number used by a socket that is shut down", meanwhile: replaceNetlink(unix.NETLINK_ROUTE, aDeadSocket), reason: "send: ", want: []faultWant{want("own port")}},
}
