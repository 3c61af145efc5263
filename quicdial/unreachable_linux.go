package quicdial

import "syscall"

// unreachable lists what the kernel makes of ICMP errors (icmp_err_convert in
// net/ipv4/icmp.c, icmpv6_err_convert in net/ipv6/icmp.c), and of a route or an
// interface that is gone.
var unreachable = []syscall.Errno{
	syscall.ECONNREFUSED, // port unreachable
	syscall.EHOSTUNREACH, // host unreachable, filtered, or the hop limit exceeded; no neighbour
	syscall.ENETUNREACH,  // network unreachable; no route
	syscall.EHOSTDOWN,    // host unknown
	syscall.ENONET,       // host isolated
	syscall.ENOPROTOOPT,  // protocol unreachable
	syscall.EPROTO,       // parameter problem
	syscall.EACCES,       // administratively prohibited; prohibited by a route
	syscall.ENETDOWN,     // the interface is down
}
