//go:build linux

package main

import "time"

// tcpMutations are of a TCP dial.
var tcpMutations = []mutation{
	{
		name:     "TCP: does not set SO_REUSEADDR",
		file:     "control_tcp.go",
		old:      "sys.SetInt(a.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)",
		new:      "sys.SetInt(a.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 0)",
		catchers: []catcher{in(".", "TestPickedAndExplicitPortsShare"), stress(20 * time.Second)},
	},
	{
		name:     "TCP: leaves out IP_BIND_ADDRESS_NO_PORT",
		file:     "control_tcp.go",
		old:      "if sys.SetInt(a.fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1) != nil {",
		new:      "if sys.SetInt(a.fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 0) != nil {",
		catchers: []catcher{in(".", "TestEveryDestinationHasTheWholeRange"), stress(20 * time.Second)},
	},
	{
		name:     "TCP: does not set IP_LOCAL_PORT_RANGE",
		file:     "control_tcp.go",
		old:      "return sys.SetInt(a.fd, unix.SOL_IP, unix.IP_LOCAL_PORT_RANGE, int32(uint32(high)<<16|uint32(low))) == nil",
		new:      "return true",
		catchers: []catcher{in(".", "TestSystemCallsOfADial"), stress(20 * time.Second)},
	},
	{
		name:     "TCP: leaves out the ports that are bound explicitly",
		file:     "control_tcp.go",
		old:      "return a.connectTCPBoundPort(start, a.hook.ports == (PortRange{}))\n}\n\n// connectTCPExplicit connects",
		new:      "_ = start\n\treturn a.exhausted(a.local.Addr(), taken{})\n}\n\n// connectTCPExplicit connects",
		catchers: []catcher{in(".", "TestPickedAndExplicitPortsShare"), stress(20 * time.Second)},
	},
	{
		name:     "TCP: does not let the kernel search the whole range",
		file:     "control_tcp.go",
		old:      "return a.connectTCPLastPort()",
		new:      "return a.exhausted(a.local.Addr(), taken{})",
		catchers: []catcher{in(".", "TestEveryDestinationHasTheWholeRange"), stress(20 * time.Second)},
	},
	{
		name:     "TCP: does not count the ports in TIME_WAIT",
		file:     "search_tcp_linux.go",
		old:      "s.taken.timeWait++",
		new:      "",
		catchers: []catcher{in(".", "TestExhaustedErrorGivesAdvice")},
	},
	{
		name:     "TCP: keeps a port outside of PortRange",
		file:     "control_tcp.go",
		old:      "return err == nil && !a.hook.ports.Contains(local.Port())",
		new:      "return err != nil && !a.hook.ports.Contains(local.Port())",
		catchers: []catcher{in(".", "TestPortRangeWhenTheSystemsChanges")},
	},
	{
		name:     "TCP: binds a port from which it would be connected to itself",
		file:     "control_tcp.go",
		old:      "if local == a.remote || !local.Addr().IsValid() && local.Port() == a.remote.Port() {",
		new:      "if false {",
		catchers: []catcher{in(".", "TestNoSelfConnectFromTheLastPort")},
	},
	{
		name:     "TCP: does not say that a chosen port is not shared",
		file:     "control_tcp.go",
		old:      "a.end(local.Port(), local.Port(), contention)\n\t\treturn contention, nil",
		new:      "a.end(local.Port(), local.Port(), contention)\n\t\treturn conflict, nil",
		catchers: []catcher{in(".", "TestTCPPortOfAListener")},
	},
}
