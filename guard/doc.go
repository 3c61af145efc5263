// Package guard keeps the promise of connectx for all programs of a cgroup, with
// programs in the kernel (eBPF): no two UDP sockets are ever connected to the
// same 4-tuple, whatever options they set and whether or not they know of any of
// this. The connect that would be the second one fails with EADDRINUSE. The kernel
// itself has no such error in connect of a UDP socket, and a firewall's would be
// EPERM: so a Dialer knows it for a conflict, and goes on to the next port.
//
// The lock of [github.com/seed22601231/connectx.Dialer] is cooperative, and who
// only dials with it does not need a guard. It is for machines on which others
// set SO_REUSEADDR and connect.
//
// It takes root, or CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN (for Sync also
// CAP_SYS_PTRACE), a cgroup v2, and a kernel with BTF, Linux 6.1 or later (tried on
// 6.1, 6.12 and 6.18, amd64).
//
// # What a program notices
//
//   - A socket that is bound to a port, and connects: EADDRINUSE if another one
//     has the 4-tuple.
//   - One that is not bound gets a port that nobody is on, as if SO_REUSEADDR and
//     SO_REUSEPORT were not set; the guard takes both off. With all ports taken
//     connect fails with EAGAIN. What it would have got else is a 4-tuple at
//     random.
//   - More than three threads that connect one socket, to different peers at the
//     same time or in turn before the next Sync: EALREADY. So does, before Linux
//     6.5, a socket that connects at the very moment in which Sync is at it.
//   - Multicast and broadcast destinations are nobody's.
//
// # In doubt
//
// Where it is not certain that two sockets do not come to the same 4-tuple, the
// second one is denied.
//
// A socket that is bound to a port of the unspecified address gets its source
// address from connect, and the programs run before that. Meanwhile it may become
// any 4-tuple with its port and its peer: it is denied if there is a connection
// from that port to that peer from any source address, and whoever comes before
// it is known to have its address is denied as well.
//
// Nothing runs after a connect, or when a socket is disconnected (AF_UNSPEC). A
// 4-tuple that a socket has not got, or that it has left, stays reserved until the
// socket connects again, until it is closed, or until the next [Guard.Sync]. What
// many threads have connected one socket to, one after the other without a Sync,
// stays until it is closed: it is not known of which of them the connect is over.
//
// Interfaces are not told apart: the same 4-tuple on two of them (two VRFs, or
// link-local addresses) is one.
//
// # Sharing
//
// With [Options.Share], a socket that connects and has no port gets one from which
// the destination is not connected, and keeps it until it is closed: a program
// that connects one socket to several destinations in turn may be denied one of
// them. IP_LOCAL_PORT_RANGE of the socket is not looked at.
//
// # TCP
//
// A guard leaves TCP alone. A program that connects without binding shares ports
// anyway. One that binds a source address first gets a port from bind, before the
// destination is known, and what would help the kernel does not allow
// (TestWhatTheKernelDoesNotAllowForTCP):
//
//   - to turn IP_BIND_ADDRESS_NO_PORT on in bind: of the options of SOL_IP,
//     bpf_setsockopt takes no other than IP_TOS (sol_ip_sockopt);
//   - to bind without a port there: bpf_bind is for connect only;
//   - to leave the bind out: a program that ends the call ends it with an error;
//   - to change the port in connect: bpf_bind fails for a socket that has one.
//
// A program may turn SO_REUSEADDR on in bind and choose a port at random, or leave
// that to net.ipv4.ip_autobind_reuse. Then ten destinations got 62 or 32 % of the
// 4-tuples from an address, instead of 10 %, but the other connects failed with
// EADDRNOTAVAIL, which a program that has a port does not expect
// (TestHowFarTCPGetsThatBindsAnAddress).
//
// # What it does not see
//
// Sockets of other cgroups, those that have connected in another network
// namespace before Attach, and those for which the kernel has picked a port that
// they share later on have no reservation. The kernel is asked for them, so
// they are not overshadowed either, except by a socket of the unspecified address,
// and if they are bound to an interface. A cgroup program that runs after the
// guard's and sets another destination (a load balancer's) is seen too late to
// deny anything; Stats counts that.
//
// A socket that is being closed has no reservation for its last microseconds. One
// that the kernel has for itself, as for a tunnel that a program of the cgroup has
// set up, is not seen to be closed: its reservation stays until the guard ends.
//
// A program may turn SO_REUSEADDR on in one thread while another connects the
// socket that has no port yet: the port that the kernel picks then is reserved
// only when it is connected.
package guard
