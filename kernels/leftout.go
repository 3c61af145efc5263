//go:build linux

package main

import "slices"

// leftOuts are the tests that are not run, and why.
var leftOuts = slices.Concat(
	withoutPortRange("IP_LOCAL_PORT_RANGE refused"),
	withoutAddressNoPort("IP_BIND_ADDRESS_NO_PORT refused"),
	[]leftOut{
		{pkg: "connectx", variant: "linux/386", tests: "TestUDPWhenTheKernelDoesNotAnswer/no_netlink|TestStatsAddUp|TestSystemCallsOfADial",
			reason: "on 386 package net makes its calls through socketcall, which the test's filter does not see"},
		{pkg: "connectx", slow: true, tests: "TestFaultsOfSystemCalls|TestContention|TestPortOfASocketThatDoesNotShare|TestOneProcessAtATimeHoldsA4Tuple",
			reason: "is about milliseconds, of which an emulated processor takes many"},
	},
)

// withoutPortRange are the tests of what IP_LOCAL_PORT_RANGE gives.
func withoutPortRange(variant string) (all []leftOut) {
	for _, l := range []leftOut{
		{tests: "TestFaultsOfSystemCalls", reason: "compares with the table of a kernel that has IP_LOCAL_PORT_RANGE"},
		{tests: "TestSystemCallsOfADial/TCP", reason: "compares with the table of a kernel that has IP_LOCAL_PORT_RANGE"},
		{tests: "^TestStats$/tcp|^TestStatsAddUp$", reason: "counts fallbacks, and each TCP dial is one without IP_LOCAL_PORT_RANGE"},
		{tests: "TestWhatPortRangeTakesFromPlainConnect", reason: "ports of PortRange are bound without IP_LOCAL_PORT_RANGE, and not available to plain connect"},
		{tests: "^TestUsage$/tcp", reason: "the ports that others hold are found with IP_LOCAL_PORT_RANGE"},
	} {
		l.pkg, l.variant = "connectx", variant
		all = append(all, l)
	}
	return all
}

// withoutAddressNoPort are the tests of what IP_BIND_ADDRESS_NO_PORT gives.
func withoutAddressNoPort(variant string) (all []leftOut) {
	for _, l := range []leftOut{
		{tests: "TestFaultsOfSystemCalls", reason: "compares with the table of a kernel that has IP_BIND_ADDRESS_NO_PORT"},
		{tests: "TestSystemCallsOfADial/TCP,_address", reason: "compares with the table of a kernel that has IP_BIND_ADDRESS_NO_PORT"},
		{tests: "^TestStats$/tcp|^TestStatsAddUp$", reason: "counts fallbacks, and each TCP dial from an address is one without IP_BIND_ADDRESS_NO_PORT"},
		{tests: "TestTechniques/tcp/NO_PORT", reason: "is about the option"},
		{tests: "^TestUsage$/tcp|^TestUsageDisturbsNobody$", reason: "the ports that others hold are found with IP_BIND_ADDRESS_NO_PORT"},
	} {
		l.pkg, l.variant = "connectx", variant
		all = append(all, l)
	}
	return all
}
