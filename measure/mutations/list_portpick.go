//go:build linux

package main

// portpickMutations are of the order of ports.
var portpickMutations = []mutation{
	{
		name:     "has an order of ports without a secret",
		file:     "portpick/order.go",
		old:      "rand.Read(key[:]) // never fails",
		new:      "_ = rand.Read",
		catchers: []catcher{in("portpick", "TestThePortsOfOneProcessSayNothingOfThoseOfAnother"), in(".", "TestWhatAnotherUserCanDo")},
	},
	{
		name:     "has the same order of ports for all destination addresses",
		file:     "portpick/order.go",
		old:      "copy(message[16:], a[:])",
		new:      "_ = a",
		catchers: []catcher{in("portpick", "TestWhatAnOrderDependsOn", "TestOrdersOfDifferentDestinationsAreUnrelated")},
	},
	{
		name:     "offers reserved ports",
		file:     "portpick/ports.go",
		old:      "return p.reserved != nil && p.reserved.contains(port)",
		new:      "return p.reserved == nil && p.reserved.contains(port)",
		catchers: []catcher{in("portpick", "TestReservedPortsLeaveNoGapInTheTurnsOfTheOthers", "TestOneWalkOffersEveryPortOnce"), in(".", "TestReservedPortsAreSkipped")},
	},
	{
		name:     "offers the odd half before the even one",
		file:     "portpick/order.go",
		old:      "slot: o.slot(mix(key))}",
		new:      "slot: o.slot(mix(key)), parity: 1}",
		catchers: []catcher{in("portpick", "TestOddPortsAreLeftToOthersWhileHalfOfTheEvenOnesAreFree", "TestTheFirstPortIsAnyEvenPort"), in(".", "TestPlainSocketsStillFindAPort")},
	},
	{
		name:     "searches the even half over and over where it is full",
		file:     "portpick/order.go",
		old:      "w.grantCredit()",
		new:      "",
		catchers: []catcher{in("portpick", "TestASearchIsNotRepeatedByTheNextDial", "TestFillingTheRange")},
	},
}
