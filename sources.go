package connectx

import (
	"fmt"
	"iter"
	"math/rand/v2"
	"net/netip"
)

// sources are SourceAddrs, and what one look at each of them has shown.
type sources struct {
	addrs  []netip.Addr
	n4, n6 int // how many are of which family
	bad    int // which is the first that nothing can be sent from, counted from 1
}

// readSources takes about a nanosecond per address.
func readSources(addrs []netip.Addr) sources {
	s := sources{addrs: addrs}
	for i, a := range addrs {
		switch a = a.Unmap(); {
		case !a.IsValid() || a.IsUnspecified():
			if s.bad == 0 {
				s.bad = i + 1
			}
		case a.Is4():
			s.n4++
		default:
			s.n6++
		}
	}
	return s
}

// check returns an error for an address that nothing can be sent from.
func (s *sources) check() error {
	if s.bad == 0 {
		return nil
	}
	i := s.bad - 1
	return &fieldError{field: fmt.Sprintf("SourceAddrs[%d]", i), value: s.addrs[i].String(), problem: "not an address to send from"}
}

// onlyFamily returns one of the addresses if all are of its family, else the
// zero Addr.
func (s *sources) onlyFamily() netip.Addr {
	if len(s.addrs) > 0 && (s.n4 == len(s.addrs) || s.n6 == len(s.addrs)) {
		return s.addrs[0].Unmap()
	}
	return netip.Addr{}
}

// inTurn yields the addresses of one family in random order. Most dials need no
// more than the first.
func (s *sources) inTurn(is4 bool) iter.Seq[netip.Addr] {
	return func(yield func(netip.Addr) bool) {
		n := s.n6
		if is4 {
			n = s.n4
		}
		if n == 0 {
			return
		}
		first := s.nth(is4, rand.IntN(n))
		if !yield(s.addrs[first].Unmap()) {
			return
		}
		for _, i := range rand.Perm(len(s.addrs)) {
			if a := s.addrs[i].Unmap(); i != first && a.Is4() == is4 && !yield(a) {
				return
			}
		}
	}
}

// noneFor says that there is no address of the destination's family.
func (s *sources) noneFor(destination string) error {
	return &fieldError{field: "SourceAddrs", value: fmt.Sprint(s.addrs), problem: "none is of the same family as " + destination}
}

// nth returns the index of the nth address of a family, counted from 0.
func (s *sources) nth(is4 bool, n int) int {
	if s.onlyFamily().IsValid() {
		return n
	}
	for i, a := range s.addrs {
		if a.Unmap().Is4() == is4 {
			if n == 0 {
				return i
			}
			n--
		}
	}
	return -1 // there are as many as were counted
}
