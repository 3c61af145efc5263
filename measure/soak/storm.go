//go:build linux

package main

import (
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A storm changes the routing table again and again, in a place that nobody's
// route depends on, by so much that the netlink sockets which are told of it cannot
// hold all that they are told.
type storm struct {
	lo      netlink.Link
	netlink *netlink.Handle // for the whole run
	changes int
}

func newStorm() (*storm, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	lo, err := h.LinkByName("lo")
	if err != nil {
		h.Close()
		return nil, err
	}
	return &storm{lo: lo, netlink: h}, nil
}

// burst is more changes than the default receive buffer holds notifications of.
const burst = 200

func (r *run) runStorm(random *rand.Rand) {
	prefix := netip.MustParsePrefix("10.99.0.0/24")
	route := localRoute(r.storm.lo, prefix, sourceAddr(0, mainSource))
	for !r.stopped() {
		for range burst {
			// No dial depends on whether they fail.
			if r.storm.netlink.RouteAdd(route) == nil {
				r.storm.changes++
			}
			if r.storm.netlink.RouteDel(route) == nil {
				r.storm.changes++
			}
		}
		moment(random, 500*time.Millisecond)
	}
}
