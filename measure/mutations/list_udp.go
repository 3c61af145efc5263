//go:build linux

package main

// udpMutations are of the rest of a UDP dial.
var udpMutations = []mutation{
	{
		name:     "shares a port although the kernel does not answer lookups",
		file:     "control_udp.go",
		old:      "if err := sys.SetInt(a.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 0); err != nil {",
		new:      "if err := sys.SetInt(a.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {",
		catchers: []catcher{in(".", "TestUDPWhenTheKernelDoesNotAnswer")},
	},
	{
		name:     "does not read the port range again when all ports are taken",
		file:     "search_udp_linux.go",
		old:      "if now == system {",
		new:      "if now == system || true {",
		catchers: []catcher{in(".", "TestPortRangeChangesAreFollowed")},
	},
	{
		name:     "leaves the datagrams of strangers that came before connect",
		file:     "control_udp.go",
		old:      "\tl.drain()\n",
		new:      "",
		catchers: []catcher{in(".", "TestDatagramsOfStrangersAreNeverRead")},
	},
	{
		name:     "leaves the datagrams of strangers that came during connect",
		file:     "control_udp.go",
		old:      "if err != nil || from == peerOf(conn) {",
		new:      "if err != nil || from != peerOf(conn) {",
		catchers: []catcher{in(".", "TestStrangersOfASocketThatAHookHasBound")},
	},
	{
		name:     "takes a port that the kernel has chosen outside of PortRange",
		file:     "control_udp.go",
		old:      "case own != (PortRange{}) && !own.Contains(local.Port()):",
		new:      "case false:",
		catchers: []catcher{in(".", "TestPortRangeWhenTheSystemsChangesAndFewPortsAreFree")},
	},
}
