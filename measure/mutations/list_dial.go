//go:build linux

package main

// dialMutations are of what TCP and UDP dials have in common.
var dialMutations = []mutation{
	{
		name:     "takes all dials for ones of the namespace dialled in last",
		file:     "namespace_linux.go",
		old:      "if ns == nil || ns.key != key {",
		new:      "if ns == nil {",
		catchers: []catcher{in(".", "TestNamespacesInOneProcessKeepApart", "TestManyNamespacesInOneProcess")},
	},
	{
		name:     "opens netlink sockets in whatever namespace the thread is in",
		file:     "namespace_linux.go",
		old:      "case key != ns.key:",
		new:      "case key != ns.key && false:",
		catchers: []catcher{in(".", "TestHookThatLeavesTheNamespace")},
	},
	{
		name:     "never reads the port range again",
		file:     "namespace_linux.go",
		old:      "ports, err := ns.sysctl.Ports(old); err == nil {",
		new:      "ports, err := ns.sysctl.Ports(old); err == nil && old == nil {",
		catchers: []catcher{in(".", "TestPortRangeChangesAreFollowed")},
	},
	{
		name:     "does not notice that the context is over",
		file:     "dialer_linux.go",
		old:      "if err := a.ctx.Err(); err != nil {\n\t\treturn contextError{err}\n\t}",
		new:      "",
		catchers: []catcher{in(".", "TestFailedDialsLeaveNothingBehind")},
	},
	{
		name:     "does not go on to the next of SourceAddrs",
		file:     "sources.go",
		old:      "if first < 0 || !yield(s.at(first)) {",
		new:      "if first < 0 || !yield(s.at(first)) || true {",
		catchers: []catcher{in(".", "TestOneFreeSourceAddrIsFound")},
	},
	{
		name:     "reuses a dial whose hook may still run for another address",
		file:     "dialer.go",
		old:      "if isLiteral(i.address) {",
		new:      "if true {",
		catchers: []catcher{in(".", "TestRaceForTheUnspecifiedAddress").underRace()},
	},
	{
		name:     "does not remember that a range was full",
		file:     "full_linux.go",
		old:      "if took >= minRemember {",
		new:      "if false {",
		catchers: []catcher{in(".", "TestFullRangeIsRememberedBriefly", "TestStormOnAFullRange")},
	},
	{
		name:     "never forgets that a range was full",
		file:     "full_linux.go",
		old:      "known.until = time.Now().Add(d)",
		new:      "known.until = time.Now().Add(d + time.Hour)",
		catchers: []catcher{in(".", "TestFullRangeIsForgotten")},
	},
	{
		name:     "lets one destination's full range count for all",
		file:     "dialer_linux.go",
		old:      "destination: a.remote, ports: a.hook.ports, device: device}\n\tif !source.IsValid()",
		new:      "ports: a.hook.ports, device: device}\n\tif !source.IsValid()",
		catchers: []catcher{in(".", "TestFullRangeIsForgotten")},
	},
	{
		name:     "leaves the socket open that takes another's place",
		file:     "dialer_linux.go",
		old:      "defer unix.Close(fresh)",
		new:      "",
		catchers: []catcher{in(".", "TestSocketThatTakesAnothersPlace")},
	},
	{
		name:     "hands the socket that takes another's place down to child processes",
		file:     "dialer_linux.go",
		old:      "unix.Dup3(fresh, a.fd, unix.O_CLOEXEC)",
		new:      "unix.Dup3(fresh, a.fd, 0)",
		catchers: []catcher{in(".", "TestSocketThatTakesAnothersPlace")},
	},
	{
		name:     "does not run the caller's hook on a socket that takes another's place",
		file:     "dialer_linux.go",
		old:      "return a.hook.userControl(a.ctx, a.network, a.address, a.rawConn)",
		new:      "return nil",
		catchers: []catcher{in(".", "TestSocketThatTakesAnothersPlace")},
	},
}
