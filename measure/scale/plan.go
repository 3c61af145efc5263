//go:build linux

package main

import (
	"fmt"
	"net/netip"
	"os"

	"github.com/seed22601231/connectx/internal/netns"
)

// The network: one source address, and destinations that are the hosts of one
// subnet, on a port below the ephemeral range. All are on the loopback interface.
const (
	sourceNet       = "10.0.0.1/32"
	destinationNet  = "10.1.0.1/24"
	serverPort      = 7007
	maxDestinations = 254
)

var (
	source           = netip.MustParsePrefix(sourceNet).Addr()
	firstDestination = netip.MustParsePrefix(destinationNet).Addr()
)

// A portRange is an ephemeral port range, both ends included.
type portRange struct{ low, high uint16 }

func (r portRange) size() int { return int(r.high) - int(r.low) + 1 }

// defaultPorts is the kernel's default.
var defaultPorts = portRange{32768, 60999}

// maxConnections is how many 4-tuples there are.
var maxConnections = maxDestinations * defaultPorts.size()

func setUpNetwork(ports portRange) error {
	if err := netns.LoopbackUp(sourceNet, destinationNet); err != nil {
		return err
	}
	if err := netns.SetPortRange(ports.low, ports.high); err != nil {
		return fmt.Errorf("set the ephemeral port range: %w", err)
	}
	if err := os.WriteFile("/proc/sys/net/ipv4/udp_rmem_min", fmt.Append(nil, rmemMin), 0); err != nil {
		return fmt.Errorf("set the least receive buffer of a UDP socket: %w", err)
	}
	return nil
}

// rmemMin is what a UDP socket may have in its receive queue even when all of them
// together have more than the first value of udp_mem. By default that is 4096
// bytes, or five datagrams, and the servers would lose the others: every socket
// that has received anything accounts for a page from then on, and it is fewer
// than a million sockets that reach the first value.
const rmemMin = 1 << 20

// A plan says which connections there are to be.
type plan struct {
	network    string // as package net calls it
	total      int
	ports      portRange
	perProcess int // the most that one process can hold
}

func (p plan) tcp() bool { return p.network == "tcp4" }

func (p plan) protocol() string {
	if p.tcp() {
		return "TCP"
	}
	return "UDP"
}

// destinations are as few as possible: all but the last one are full.
func (p plan) destinations() []netip.AddrPort {
	var all []netip.AddrPort
	address := firstDestination
	for range ceil(p.total, p.ports.size()) {
		all = append(all, netip.AddrPortFrom(address, serverPort))
		address = address.Next()
	}
	return all
}

// processes is how many it takes to hold the connections. Shares are rounded, so
// that a process may come to hold one more to each destination than the average.
func (p plan) processes() int {
	return ceil(p.total, p.perProcess-len(p.destinations()))
}

// A share is a part of the connections that one process has to one destination.
type share struct {
	process     int
	destination netip.AddrPort
	count       int
}

// maxShare is small enough to see progress, and for the processes to take turns.
const maxShare = 1000

// shares divides the connections evenly among the processes, one destination
// after the other.
func (p plan) shares() []share {
	var all []share
	processes, rest := p.processes(), p.total
	for _, destination := range p.destinations() {
		here := min(rest, p.ports.size())
		rest -= here
		parts := make([]int, processes)
		for i := range parts {
			parts[i] = here*(i+1)/processes - here*i/processes
		}
		for here > 0 {
			for i, part := range parts {
				if count := min(part, maxShare); count > 0 {
					all = append(all, share{i, destination, count})
					parts[i] -= count
					here -= count
				}
			}
		}
	}
	return all
}

func ceil(a, b int) int { return (a + b - 1) / b }
