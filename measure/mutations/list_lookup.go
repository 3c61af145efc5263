//go:build linux

package main

// lookupMutations are of the questions to the kernel.
var lookupMutations = []mutation{
	{
		name:     "accepts netlink answers to another request",
		file:     "lookup/lookup_linux.go",
		old:      "binary.NativeEndian.Uint32(b[8:]) != seq || ",
		new:      "",
		catchers: []catcher{in("lookup", "TestParseReply")},
	},
	{
		name:     "takes a notification for the answer",
		file:     "lookup/lookup_linux.go",
		old:      " || binary.NativeEndian.Uint32(b[12:]) != port {",
		new:      " {",
		catchers: []catcher{in("lookup", "TestANotificationIsNotTakenForTheAnswer", "TestParseReply")},
	},
	{
		name:     "does not subscribe to changes of routes",
		file:     "lookup/lookup_linux.go",
		old:      "openNetlink(unix.NETLINK_ROUTE, routeGroups)",
		new:      "openNetlink(unix.NETLINK_ROUTE, 0)",
		catchers: []catcher{in("lookup", "TestSourceFollowsEveryChangeAtOnce")},
	},
	{
		name:     "keeps an answer given right after a change",
		file:     "lookup/lookup_linux.go",
		old:      "if time.Since(c.changed) < settle {",
		new:      "if false {",
		catchers: []catcher{in("lookup", "TestSourceFollowsEveryChangeAtOnce", "TestAnswersAreKeptUntilAChangeAndAgainWhenItHasSettled")},
	},
	{
		name:     "does not name the firewall mark",
		file:     "lookup/lookup_linux.go",
		old:      "if opts.Mark != 0 {",
		new:      "if false {",
		catchers: []catcher{in("lookup", "TestSourceKeepsOptionsApart"), in(".", "TestOptionsThatRoutingDependsOn")},
	},
	{
		name:     "keeps the answers for other destinations when routes change",
		file:     "lookup/lookup_linux.go",
		old:      "c.Forget()\n\tc.changed = time.Now()",
		new:      "c.changed = time.Now()",
		catchers: []catcher{in("lookup", "TestAChangeDropsTheAnswersForAllDestinations")},
	},
}
