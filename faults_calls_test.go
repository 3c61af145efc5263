//go:build linux && (amd64 || arm64)

package connectx_test

import (
	"bytes"
	"encoding/binary"
	"strings"

	"golang.org/x/sys/unix"
)

// A place is where among the system calls of a dial a fault is put: at the nth of
// those calls that is holds for, or at all from the nth on.
type place struct {
	number  uint32
	is      func(c *caughtCall) bool
	nth     int
	andRest bool
}

// at is the nth of the calls.
func (p place) at(n int) place {
	p.nth, p.andRest = n, false
	return p
}

// from is the nth of the calls and all after it.
func (p place) from(n int) place {
	p.nth, p.andRest = n, true
	return p
}

// faultCalls are the system calls that faults are put at.
var faultCalls = []uint32{
	unix.SYS_SOCKET, unix.SYS_BIND, unix.SYS_CONNECT, unix.SYS_SETSOCKOPT, unix.SYS_GETSOCKOPT,
	unix.SYS_GETSOCKNAME, unix.SYS_GETPEERNAME, unix.SYS_SENDTO, unix.SYS_RECVFROM, unix.SYS_RECVMMSG,
	unix.SYS_DUP3, unix.SYS_IOCTL, unix.SYS_OPENAT, unix.SYS_PREAD64, sysStat, unix.SYS_EPOLL_CTL,
}

var (
	// What package net and renew open does not block; what onThread opens to
	// have a look at it does.
	dialSocket    = place{number: unix.SYS_SOCKET, is: func(c *caughtCall) bool { return isInet(c.args[0]) && c.args[1]&unix.SOCK_NONBLOCK != 0 }}
	lookSocket    = place{number: unix.SYS_SOCKET, is: func(c *caughtCall) bool { return isInet(c.args[0]) && c.args[1]&unix.SOCK_NONBLOCK == 0 }}
	netlinkSocket = place{number: unix.SYS_SOCKET, is: func(c *caughtCall) bool { return c.args[0] == unix.AF_NETLINK }}

	bindNetlink = place{number: unix.SYS_BIND, is: func(c *caughtCall) bool { return c.family() == unix.AF_NETLINK }}
	bindAny     = place{number: unix.SYS_BIND, is: func(c *caughtCall) bool { return isInet(c.family()) && c.port() == 0 }}
	bindPort    = place{number: unix.SYS_BIND, is: func(c *caughtCall) bool { return isInet(c.family()) && c.port() != 0 }}

	connectCall = place{number: unix.SYS_CONNECT, is: func(c *caughtCall) bool { return isInet(c.family()) }}

	nameOfNetlink = place{number: unix.SYS_GETSOCKNAME, is: func(c *caughtCall) bool { return c.protocol() >= 0 }}
	nameOfSocket  = place{number: unix.SYS_GETSOCKNAME, is: func(c *caughtCall) bool { return c.protocol() < 0 }}
	peerOfSocket  = place{number: unix.SYS_GETPEERNAME, is: anyCall}

	sendDiag  = place{number: unix.SYS_SENDTO, is: func(c *caughtCall) bool { return c.netlinkType() == unix.SOCK_DIAG_BY_FAMILY }}
	sendRoute = place{number: unix.SYS_SENDTO, is: func(c *caughtCall) bool { return c.netlinkType() == unix.RTM_GETROUTE }}
	// One byte is what is read to see whether there is anything.
	recvDiag    = place{number: unix.SYS_RECVFROM, is: func(c *caughtCall) bool { return c.args[2] > 1 && c.protocol() == unix.NETLINK_SOCK_DIAG }}
	recvRoute   = place{number: unix.SYS_RECVFROM, is: func(c *caughtCall) bool { return c.args[2] > 1 && c.protocol() == unix.NETLINK_ROUTE }}
	recvChanges = place{number: unix.SYS_RECVFROM, is: func(c *caughtCall) bool { return c.args[2] == 1 && c.protocol() == unix.NETLINK_ROUTE }}
	recvDrain   = place{number: unix.SYS_RECVFROM, is: func(c *caughtCall) bool {
		return c.args[2] == 1 && c.args[3]&unix.MSG_PEEK == 0 && c.protocol() < 0
	}}
	recvPeek    = place{number: unix.SYS_RECVFROM, is: func(c *caughtCall) bool { return c.args[3]&unix.MSG_PEEK != 0 }}
	recvAnswers = place{number: unix.SYS_RECVMMSG, is: anyCall}

	dupCall        = place{number: unix.SYS_DUP3, is: anyCall}
	interfaceCall  = place{number: unix.SYS_IOCTL, is: func(c *caughtCall) bool { return c.args[1] == unix.SIOCGIFINDEX }}
	openRange      = place{number: unix.SYS_OPENAT, is: func(c *caughtCall) bool { return c.pathHas("ip_local_port_range") }}
	openReserved   = place{number: unix.SYS_OPENAT, is: func(c *caughtCall) bool { return c.pathHas("ip_local_reserved_ports") }}
	readSysctl     = place{number: unix.SYS_PREAD64, is: anyCall}
	statNamespace  = place{number: sysStat, is: func(c *caughtCall) bool { return c.pathHas("/ns/net") }}
	registerSocket = place{number: unix.SYS_EPOLL_CTL, is: func(c *caughtCall) bool { return c.args[1] == unix.EPOLL_CTL_ADD }}
)

// setOption is setsockopt for one option.
func setOption(level, option uint64) place {
	return place{number: unix.SYS_SETSOCKOPT, is: func(c *caughtCall) bool { return c.args[1] == level && c.args[2] == option }}
}

// getOption is getsockopt for one option.
func getOption(level, option uint64) place {
	return place{number: unix.SYS_GETSOCKOPT, is: func(c *caughtCall) bool { return c.args[1] == level && c.args[2] == option }}
}

func anyCall(*caughtCall) bool { return true }

func isInet(family uint64) bool { return family == unix.AF_INET || family == unix.AF_INET6 }

// family is that of the socket address which is the second argument.
func (c *caughtCall) family() uint64 {
	if b := c.read(c.args[1], 2); len(b) == 2 {
		return uint64(binary.NativeEndian.Uint16(b))
	}
	return unix.AF_UNSPEC
}

// port is that of the socket address which is the second argument.
func (c *caughtCall) port() uint16 {
	if b := c.read(c.args[1], 4); len(b) == 4 {
		return binary.BigEndian.Uint16(b[2:])
	}
	return 0
}

// protocol is that of a netlink socket, or -1 for other sockets.
func (c *caughtCall) protocol() int {
	protocol := -1
	_ = c.onDescriptor(func(fd int) {
		if domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err == nil && domain == unix.AF_NETLINK {
			protocol, _ = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
		}
	})
	return protocol
}

// netlinkType is the type of the message that is sent.
func (c *caughtCall) netlinkType() uint16 {
	if b := c.read(c.args[1], unix.SizeofNlMsghdr); len(b) == unix.SizeofNlMsghdr && c.protocol() >= 0 {
		return binary.NativeEndian.Uint16(b[4:])
	}
	return 0
}

func (c *caughtCall) pathHas(part string) bool {
	path, _, _ := bytes.Cut(c.read(c.args[1], 64), []byte{0})
	return strings.Contains(string(path), part)
}

// An answer is what becomes of a call in place of an error: the kernel is asked
// something else, or its answer is changed on the way.
type answer func(c *caughtCall) decision

// askInstead has the request changed before it is sent; the kernel answers that.
func askInstead(change func(request []byte)) answer {
	return func(c *caughtCall) decision {
		request := c.read(c.args[1], int(c.args[2]))
		change(request)
		if err := c.write(c.args[1], request); err != nil {
			return decision{errno: unix.EFAULT}
		}
		return decision{made: true}
	}
}

// answerInstead has the kernel's reply changed before it is received.
func answerInstead(change func(reply []byte) []byte) answer {
	return func(c *caughtCall) decision {
		reply := make([]byte, 4096)
		n, err := 0, error(unix.EBADF)
		if failed := c.onDescriptor(func(fd int) { n, _, err = unix.Recvfrom(fd, reply, unix.MSG_DONTWAIT) }); failed != nil {
			return decision{errno: unix.EFAULT}
		}
		if errno, ok := err.(unix.Errno); ok {
			return decision{errno: errno}
		}
		reply = change(reply[:n])
		if err := c.write(c.args[1], reply[:min(len(reply), int(c.args[2]))]); err != nil {
			return decision{errno: unix.EFAULT}
		}
		return decision{value: int64(min(len(reply), int(c.args[2])))}
	}
}

// asAnother makes it the request with another number.
func asAnother(request []byte) {
	binary.NativeEndian.PutUint32(request[8:], binary.NativeEndian.Uint32(request[8:])+1000)
}

// forAcknowledgement makes it a request that the kernel acknowledges and does not
// answer (netlink_rcv_skb).
func forAcknowledgement(request []byte) {
	binary.NativeEndian.PutUint16(request[4:], unix.NLMSG_NOOP)
	binary.NativeEndian.PutUint16(request[6:], unix.NLM_F_REQUEST|unix.NLM_F_ACK)
}

// truncated keeps half of a reply.
func truncated(reply []byte) []byte { return reply[:len(reply)/2] }

// headless keeps less of a reply than a header.
func headless(reply []byte) []byte { return reply[:unix.SizeofNlMsghdr-1] }

// ofAnotherType makes the reply one to a question about links.
func ofAnotherType(reply []byte) []byte {
	binary.NativeEndian.PutUint16(reply[4:], unix.RTM_NEWLINK)
	return reply
}

// fromAnother gives a sock_diag reply the cookie of another socket.
func fromAnother(reply []byte) []byte {
	const cookie = unix.SizeofNlMsghdr + 4 + 40 // idiag_cookie in struct inet_diag_msg
	binary.NativeEndian.PutUint64(reply[cookie:], binary.NativeEndian.Uint64(reply[cookie:])+1<<40)
	return reply
}

// withError makes the reply one that says that the request has failed.
func withError(errno unix.Errno) func(reply []byte) []byte {
	return func(reply []byte) []byte {
		reply = append(reply[:unix.SizeofNlMsghdr], make([]byte, 4+unix.SizeofNlMsghdr)...)
		binary.NativeEndian.PutUint32(reply[0:], uint32(len(reply)))
		binary.NativeEndian.PutUint16(reply[4:], unix.NLMSG_ERROR)
		binary.NativeEndian.PutUint32(reply[unix.SizeofNlMsghdr:], uint32(-int32(errno)))
		return reply
	}
}

// swallow says that the request was sent, and does not send it.
func swallow(c *caughtCall) decision { return decision{value: int64(c.args[2])} }
