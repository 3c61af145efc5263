//go:build linux

package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A tuple is a 4-tuple.
type tuple struct{ local, remote netip.AddrPort }

// A socket is one that sock_diag lists.
type socket struct {
	tuple
	cookie    uint64
	connected bool
	inode     uint32
}

// sockets lists those of a protocol that have a port of the layout, and are not
// the other end of one.
func sockets(l layout, p protocol) ([]socket, error) {
	dump := [...]func(uint8) ([]*netlink.Socket, error){netlink.SocketDiagUDP, netlink.SocketDiagTCP}[p]
	var all []socket
	for _, f := range []uint8{unix.AF_INET, unix.AF_INET6} {
		found, err := dump(f)
		for errors.Is(err, netlink.ErrDumpInterrupted) {
			found, err = dump(f)
		}
		if err != nil {
			return nil, fmt.Errorf("list %s sockets: %w", p, err)
		}
		for _, s := range found {
			if l.index(s.ID.SourcePort) < 0 {
				continue
			}
			all = append(all, socket{
				tuple:     tuple{endpoint(s.ID.Source, s.ID.SourcePort), endpoint(s.ID.Destination, s.ID.DestinationPort)},
				cookie:    uint64(s.ID.Cookie[1])<<32 | uint64(s.ID.Cookie[0]),
				connected: s.ID.DestinationPort != 0,
				inode:     s.INode,
			})
		}
	}
	return all, nil
}

func endpoint(ip net.IP, port uint16) netip.AddrPort {
	a, _ := netip.AddrFromSlice(ip)
	return netip.AddrPortFrom(a.Unmap(), port)
}

// tuples lists the TCP connections of the whole machine.
func tuples(l layout) ([]tuple, error) {
	all, err := sockets(l, tcp)
	var list []tuple
	for _, s := range all {
		list = append(list, s.tuple)
	}
	return list, err
}

// A pair is two sockets by their cookies, and the 4-tuple that both have.
type pair struct {
	tuple
	first, second uint64
}

// duplicates returns the pairs of connected sockets with the same 4-tuple.
func duplicates(all []socket) []pair {
	of := make(map[tuple][]uint64)
	for _, s := range all {
		// The kernel may list a socket twice that moves from one hash
		// bucket to the next meanwhile.
		if s.connected && !slices.Contains(of[s.tuple], s.cookie) {
			of[s.tuple] = append(of[s.tuple], s.cookie)
		}
	}
	var pairs []pair
	for t, cookies := range of {
		slices.Sort(cookies)
		for i := 1; i < len(cookies); i++ {
			pairs = append(pairs, pair{t, cookies[i-1], cookies[i]})
		}
	}
	return pairs
}

// A checker lists all sockets again and again.
//
// A dump is no snapshot. The kernel walks its table bucket by bucket, and leaves
// off within one when a message is full (udp_dump in net/ipv4/udp_diag.c,
// inet_diag_dump_icsk in net/ipv4/inet_diag.c): a socket may have been listed, then
// closed, and its 4-tuple rightly taken by one that is listed later. So a pair
// counts only if another dump, begun after that one has ended, has both sockets on
// the 4-tuple still: then both had it in between. Others are counted as passing;
// were they real, wrong answers would show it.
type checker struct {
	layout  layout
	reports *reporter
	known   map[pair]bool
	locks   map[uint64]*lock
}

// A lock is an unconnected UDP socket.
type lock struct {
	since    int64
	dumps    int
	seen     bool // in the latest dump
	reported bool
}

const (
	// checkEvery leaves the processors to the others for the most part.
	checkEvery = 10 * time.Millisecond

	// A port is stuck if it is locked for longer than longestLock, and over
	// more dumps than lockDumps: when the whole machine was at a standstill,
	// time alone says nothing.
	longestLock = time.Second
	lockDumps   = 20
)

func runChecker(c Config, reports *reporter, stop *atomic.Bool) error {
	k := newChecker(c.Layout, reports)
	for !stop.Load() {
		for _, p := range []protocol{udp, tcp} {
			if err := k.check(p); err != nil {
				return err
			}
		}
		time.Sleep(checkEvery)
	}
	return nil
}

func newChecker(l layout, reports *reporter) *checker {
	return &checker{layout: l, reports: reports, known: make(map[pair]bool), locks: make(map[uint64]*lock)}
}

func (k *checker) check(p protocol) error {
	all, err := sockets(k.layout, p)
	if err != nil {
		return err
	}
	k.reports.count(func(t *Tally) { t.Dumps++ })
	if p == udp {
		k.checkLocks(all)
	}
	pairs := duplicates(all)
	if len(pairs) == 0 {
		return nil
	}
	if all, err = sockets(k.layout, p); err != nil {
		return err
	}
	k.reports.count(func(t *Tally) { t.Dumps++ })
	again := duplicates(all)
	for _, d := range pairs {
		switch {
		case k.known[d]:
		case slices.Contains(again, d):
			k.known[d] = true
			k.reports.fail(Failure{Promise: duplicate, What: fmt.Sprintf("%s %s->%s has the sockets %#x and %#x (%s)", p, d.local, d.remote, d.first, d.second, owners(all, d))})
		default:
			k.reports.count(func(t *Tally) { t.Passing++ })
		}
	}
	return nil
}

// checkLocks looks for ports that stay locked. The listeners have ports of their
// own.
func (k *checker) checkLocks(all []socket) {
	t := now()
	for _, s := range all {
		if port := s.local.Port(); s.connected || port == k.layout.listenPort() || port == k.layout.groupPort() {
			continue
		}
		l := k.locks[s.cookie]
		if l == nil {
			l = &lock{since: t}
			k.locks[s.cookie] = l
		}
		l.seen = true
		l.dumps++
		if t-l.since > int64(longestLock) && l.dumps > lockDumps && !l.reported {
			owner := ownerOf(s.inode)
			if owner.stopped {
				continue // not by us
			}
			l.reported = true
			k.reports.fail(Failure{Promise: stuck, What: fmt.Sprintf("%s has been locked for %.1f s by socket %#x of %s", s.local, float64(t-l.since)/1e9, s.cookie, owner.name)})
		}
	}
	for cookie, l := range k.locks {
		if !l.seen {
			delete(k.locks, cookie)
		}
		l.seen = false
	}
}

// owners names the processes that have the two sockets.
func owners(all []socket, d pair) string {
	var names []string
	for _, s := range all {
		if s.tuple == d.tuple {
			names = append(names, ownerOf(s.inode).name)
		}
	}
	return strings.Join(names, ", ")
}

// An owner is the process that has a socket open.
type owner struct {
	name    string
	stopped bool // by SIGSTOP or the like
}

func ownerOf(inode uint32) owner {
	want := fmt.Sprintf("socket:[%d]", inode)
	files, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, file := range files {
		if target, _ := os.Readlink(file); target != want {
			continue
		}
		dir := filepath.Dir(filepath.Dir(file))
		name, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		stat, _ := os.ReadFile(filepath.Join(dir, "stat"))
		_, state, _ := strings.Cut(string(stat), ") ")
		words := strings.Split(strings.TrimRight(string(name), "\x00"), "\x00")
		return owner{
			name:    fmt.Sprintf("process %s %.60q", filepath.Base(dir), words[1:min(2, len(words))]),
			stopped: strings.HasPrefix(state, "T") || strings.HasPrefix(state, "t"),
		}
	}
	return owner{name: "a process that is gone"}
}
