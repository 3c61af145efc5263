//go:build !linux

package quicdial

import "syscall"

// unreachable lists what kernels make of ICMP errors, and of a route or an
// interface that is gone (inetctlerrmap in FreeBSD's netinet/ip_input.c).
var unreachable = []syscall.Errno{
	syscall.ECONNREFUSED,
	syscall.EHOSTUNREACH,
	syscall.ENETUNREACH,
	syscall.EHOSTDOWN,
	syscall.ENOPROTOOPT,
	syscall.ENETDOWN,
}
