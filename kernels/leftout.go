//go:build linux

package main

import "slices"

// leftOuts are the tests that are not run, and why.
var leftOuts = slices.Concat(
	in("IP_LOCAL_PORT_RANGE refused",
		leftOut{tests: "TestFaultsOfSystemCalls", reason: "compares with the table of a kernel that has IP_LOCAL_PORT_RANGE"},
		leftOut{tests: "TestSystemCallsOfADial/TCP", reason: "compares with the table of a kernel that has IP_LOCAL_PORT_RANGE"},
		leftOut{tests: "^TestStats$/tcp|^TestStatsAddUp$", reason: "counts fallbacks, and each TCP dial is one without IP_LOCAL_PORT_RANGE"},
		leftOut{tests: "TestWhatPortRangeTakesFromPlainConnect", reason: "ports of PortRange are bound without IP_LOCAL_PORT_RANGE, and not available to plain connect"},
		leftOut{tests: "^TestUsage$/tcp", reason: "the ports that others hold are found with IP_LOCAL_PORT_RANGE"},
	),
	in("IP_BIND_ADDRESS_NO_PORT refused",
		leftOut{tests: "TestFaultsOfSystemCalls", reason: "compares with the table of a kernel that has IP_BIND_ADDRESS_NO_PORT"},
		leftOut{tests: "TestSystemCallsOfADial/TCP,_address", reason: "compares with the table of a kernel that has IP_BIND_ADDRESS_NO_PORT"},
		leftOut{tests: "^TestStats$/tcp|^TestStatsAddUp$", reason: "counts fallbacks, and each TCP dial from an address is one without IP_BIND_ADDRESS_NO_PORT"},
		leftOut{tests: "TestTechniques/tcp/NO_PORT", reason: "is about the option"},
		leftOut{tests: "^TestUsage$/tcp|^TestUsageDisturbsNobody$", reason: "the ports that others hold are found with IP_BIND_ADDRESS_NO_PORT"},
	),
	in("linux/386",
		leftOut{tests: "TestUDPWhenTheKernelDoesNotAnswer/no_netlink|TestStatsAddUp|TestSystemCallsOfADial",
			reason: "on 386 package net makes its calls through socketcall, which the test's filter does not see"},
	),
	in("", leftOut{slow: true, tests: "TestFaultsOfSystemCalls|TestContention|TestPortOfASocketThatDoesNotShare|TestOneProcessAtATimeHoldsA4Tuple",
		reason: "is about milliseconds, of which an emulated processor takes many"}),
	[]leftOut{{pkg: "guard", slow: true, tests: "TestSocketsThatComeAndGoDuringAttach",
		reason: "has the kernel change code (a static key) that another processor is just running, and the emulator has run the breakpoint there after it was gone: Oops in inet_release"}},
)

// in makes them tests of the root package, not run in the variant; in any if it is
// empty.
func in(variant string, all ...leftOut) []leftOut {
	for i := range all {
		all[i].pkg, all[i].variant = "connectx", variant
	}
	return all
}
