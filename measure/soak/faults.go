//go:build linux

package main

import (
	"math/rand/v2"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/netns"
)

// maxFaultRest bounds the time from one fault for all dials to the next.
const maxFaultRest = time.Second

// runFaults has one fault after the other that all dials may come upon.
func (r *run) runFaults(random *rand.Rand) {
	for !r.stopped() {
		time.Sleep(time.Duration(random.Int64N(int64(min(maxFaultRest, 10*r.options.interval())))))
		r.quiet.RLock()
		var err error
		switch random.IntN(3) {
		case 0:
			err = r.killServer(random)
		case 1:
			err = r.removeAddresses(random)
		case 2:
			err = r.exhaustDescriptors(random)
		}
		r.quiet.RUnlock()
		if err != nil {
			r.fail("a fault could not be undone: %v", err)
			return
		}
	}
}

// killServer kills the server, and starts it again after a moment.
func (r *run) killServer(random *rand.Rand) error {
	r.faults.server.begin()
	defer r.faults.server.end()
	r.server.kill()
	moment(random, 20*time.Millisecond)
	next, err := startServer()
	if err == nil {
		r.server = next
	}
	return err
}

// removeAddresses removes one of the source addresses of each family, and adds it
// again after a moment.
func (r *run) removeAddresses(random *rand.Rand) error {
	r.faults.address.begin()
	defer r.faults.address.end()
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	var removed []string
	for f := range family(families) {
		prefix := prefixOf(sourceAddr(f, fleetingSource))
		address, err := netlink.ParseAddr(prefix)
		if err == nil {
			err = netlink.AddrDel(lo, address)
		}
		if err != nil {
			return err
		}
		removed = append(removed, prefix)
	}
	moment(random, 20*time.Millisecond)
	for _, prefix := range removed {
		if err := netns.AddAddress(lo, prefix); err != nil {
			return err
		}
	}
	return nil
}

// exhaustDescriptors lowers the limit for descriptors to what is in use, and a few,
// and raises it again after a moment. Those that are closed meanwhile can be had.
func (r *run) exhaustDescriptors(random *rand.Rand) error {
	r.faults.files.begin()
	defer r.faults.files.end()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return os.NewSyscallError("getrlimit", err)
	}
	lowest, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("open", err)
	}
	unix.Close(lowest)
	lowered := unix.Rlimit{Cur: uint64(lowest + random.IntN(8)), Max: limit.Max}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &lowered); err != nil {
		return os.NewSyscallError("setrlimit", err)
	}
	moment(random, 20*time.Millisecond)
	return os.NewSyscallError("setrlimit", unix.Setrlimit(unix.RLIMIT_NOFILE, &limit))
}

// moment waits for a random time.
func moment(random *rand.Rand, most time.Duration) {
	time.Sleep(time.Duration(random.Int64N(int64(most))))
}
