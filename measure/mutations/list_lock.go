//go:build linux

package main

import "time"

// lockMutations are of the lock that keeps two UDP sockets from one 4-tuple (see
// docs/lock-model.md).
var lockMutations = []mutation{
	{
		name:     "does not compare the cookie of the socket that the lookup finds",
		file:     "control_udp.go",
		old:      "case s.Cookie != cookie:",
		new:      "case s.Cookie != cookie && false:",
		catchers: []catcher{in(".", "TestOneProcessAtATimeHoldsA4Tuple"), stress(20 * time.Second), model("not comparing the cookie")},
	},
	{
		name:     "leaves the flag set while the lookup is made",
		file:     "control_udp.go",
		old:      "if err := l.setShared(0); err != nil {\n\t\treturn failed, 0, err\n\t}\n\tif err := l.awaitBinds(local); err != nil {",
		new:      "if err := l.awaitBinds(local); err != nil {",
		catchers: []catcher{stress(60 * time.Second), model("leaving the flag set")},
	},
	{
		name:     "connects before the lookup",
		file:     "control_udp.go",
		old:      "s, err := l.whoReceives(local)",
		new:      "if o, seen, err := l.finish(); err != nil {\n\t\treturn o, seen, err\n\t}\n\ts, err := l.whoReceives(local)",
		catchers: []catcher{stress(20 * time.Second), model("connecting before the lookup")},
	},
	{
		name:     "leaves out the lookup before the bind",
		file:     "control_udp.go",
		old:      "switch s, err := l.conn.UDP(local, l.remote, l.device); {",
		new:      "switch s, err := (lookup.Socket{}), lookup.ErrNotFound; {",
		catchers: []catcher{in(".", "TestUnconnectedSocketIsNeverStolenFrom"), stress(20 * time.Second), model("no first lookup")},
	},
	{
		name:     "does not wait for binds that have read the flag",
		file:     "control_udp.go",
		old:      "if err := l.awaitBinds(local); err != nil {",
		new:      "if err := error(nil); err != nil {",
		catchers: []catcher{in(".", "TestOneOfTwoDialsFailsOnACrowdedPort").times(5), model("not waiting for binds that have read the flag")},
	},
	{
		name:     "does not set the flag in the end",
		file:     "control_udp.go",
		old:      "if err := l.setShared(1); err != nil {\n\t\treturn failed, 0, err\n\t}\n\tl.drain()",
		new:      "l.drain()",
		catchers: []catcher{in(".", "TestPickedAndExplicitPortsShare"), stress(20 * time.Second), model("not setting the flag in the end")},
	},
	{
		name:     "takes a connected socket elsewhere for a conflict",
		file:     "control_udp.go",
		old:      "if s.Remote == l.remote {",
		new:      "if s.Connected() {",
		catchers: []catcher{in(".", "TestContentionForOnePortNeverFails"), model("taking any connected socket for a conflict")},
	},
	{
		name:     "gives up at the first contention for a chosen port",
		file:     "control_udp.go",
		old:      "unchanged > patience && looks > patienceTries && unchanged > loadedPatience() ||",
		new:      "unchanged >= 0 ||",
		catchers: []catcher{in(".", "TestContentionForOnePortNeverFails"), stress(20 * time.Second)},
	},
	{
		name:     "never gives up on a port that is not shared",
		file:     "control_udp.go",
		old:      "unchanged > patience && looks > patienceTries && unchanged > loadedPatience() || now.Sub(start) > maxWait {",
		new:      "unchanged < 0 || now.Before(start) {",
		catchers: []catcher{in(".", "TestPortOfASocketThatDoesNotShare").orHang(20 * time.Second)},
	},
	{
		name:     "does not try again the ports that were locked",
		file:     "search_udp_linux.go",
		old:      "o, err := s.tryLocked()",
		new:      "o, err := conflict, error(nil)",
		catchers: []catcher{in(".", "TestContentionForAllPortsNeverExhausts"), stress(20 * time.Second)},
	},
	{
		name:     "keeps a port locked that was bound in vain",
		file:     "control_udp.go",
		old:      "l.bound, l.maybeShared = false, l.hook.hasUserControl()\n\tif err := l.renew(); err != nil {",
		new:      "l.bound, l.maybeShared = false, l.hook.hasUserControl()\n\tif kept, err := unix.Dup(l.fd); kept < 0 || l.renew() != nil {",
		catchers: []catcher{stress(20 * time.Second)},
	},
	{
		name:     "binds the next port with the flag that is still set",
		file:     "control_udp.go",
		old:      "l.maybeShared = on != 0",
		new:      "",
		catchers: []catcher{stress(20 * time.Second)},
	},
	{
		name:     "goes on to the next of SourceAddrs with the flag that is still set",
		file:     "dialer_linux.go",
		old:      "a.dirty = true",
		new:      "",
		catchers: []catcher{in(".", "TestSourceAddrsDoNotOvershadow"), stress(20 * time.Second)},
	},
	{
		name:     "leaves SO_REUSEPORT as the caller's hook has set it",
		file:     "control_udp.go",
		old:      "_ = sys.SetInt(a.fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 0)",
		new:      "",
		catchers: []catcher{in(".", "TestOptionsDoNotDefeatTheLock")},
	},
	{
		name:     "leaves SO_INCOMING_CPU as the caller's hook has set it",
		file:     "control_udp.go",
		old:      "_ = sys.SetInt(a.fd, unix.SOL_SOCKET, unix.SO_INCOMING_CPU, -1)",
		new:      "",
		catchers: []catcher{in(".", "TestIncomingCPUDoesNotDefeatTheLock").times(5)},
	},
	{
		name:     "does not name the interface of the route in the lookup",
		file:     "control_udp.go",
		old:      "return false\n\t\t}\n\t\tl.device = route.Interface",
		new:      "return false\n\t\t}\n\t\t_ = route",
		catchers: []catcher{in(".", "TestOptionsDoNotDefeatTheLock")},
	},
	{
		name:     "asks once only who receives, although a socket is just being closed",
		file:     "control_udp.go",
		old:      "for range 8 {",
		new:      "for range 1 {",
		catchers: []catcher{in(".", "TestFaultsOfSystemCalls")},
	},
}
