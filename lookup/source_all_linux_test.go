package lookup

import (
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
)

// A change drops what a Conn knows of all destinations, not only of the one that it
// is asked for next.
func TestAChangeDropsTheAnswersForAllDestinations(t *testing.T) {
	enter(t)
	v0, _ := veths(t)
	for _, a := range []string{"10.1.0.1/24", "10.1.0.2/24"} {
		check(t, netlink.AddrAdd(v0, address(t, a)))
	}
	check(t, netlink.RouteAdd(via(t, "192.0.2.0/24", v0, "10.1.0.1")))
	conn := openConn(t)
	probes := []*probe{
		{name: "first", destination: netip.MustParseAddrPort("192.0.2.1:53"), conn: conn},
		{name: "second", destination: netip.MustParseAddrPort("192.0.2.2:53"), conn: conn},
	}
	for _, p := range probes {
		p.remember(t)
	}
	check(t, netlink.RouteReplace(via(t, "192.0.2.0/24", v0, "10.1.0.2")))
	for _, p := range probes {
		if got := p.ask(t); got != "10.1.0.2" {
			t.Errorf("%s: %s", p.name, got)
		}
	}
}
