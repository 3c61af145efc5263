package connectx

import (
	"fmt"
	"iter"
	"math/rand/v2"
	"net/netip"
)

// sources are SourceAddrs. There may be hundreds, so a dial does not look at all
// of them unless it has to.
type sources []netip.Addr

// eligible reports whether the address is for destinations of the family. One
// that is not an address is, too, for somebody to find out.
func (s sources) eligible(i int, is4 bool) bool {
	return !s[i].IsValid() || s[i].Unmap().Is4() == is4
}

// draws bounds how many addresses are looked at for one that is eligible, before
// those that are get counted.
const draws = 16

// draw returns the index of one of the eligible addresses at random, or -1 if
// there is none.
func (s sources) draw(is4 bool) int {
	for range draws {
		if i := rand.IntN(len(s)); s.eligible(i, is4) {
			return i
		}
	}
	var all []int
	for i := range s {
		if s.eligible(i, is4) {
			all = append(all, i)
		}
	}
	if len(all) == 0 {
		return -1
	}
	return all[rand.IntN(len(all))]
}

// inTurn yields the eligible addresses in random order. Most dials need no more
// than the first.
func (s sources) inTurn(is4 bool) iter.Seq2[netip.Addr, error] {
	return func(yield func(netip.Addr, error) bool) {
		first := s.draw(is4)
		if first < 0 || !yield(s.at(first)) {
			return
		}
		for _, i := range rand.Perm(len(s)) {
			if i != first && s.eligible(i, is4) && !yield(s.at(i)) {
				return
			}
		}
	}
}

// at returns an address, or an error if nothing can be sent from it.
func (s sources) at(i int) (netip.Addr, error) {
	a := s[i].Unmap()
	if !a.IsValid() || isWildcard(a) {
		return a, &fieldError{field: fmt.Sprintf("SourceAddrs[%d]", i), value: a.String(), problem: "not an address to send from"}
	}
	return a, nil
}

// onlyFamily returns one of the addresses if all are of its family, else the
// zero Addr.
func (s sources) onlyFamily() netip.Addr {
	for i := range s {
		if !s[i].IsValid() || !s.eligible(i, s[0].Unmap().Is4()) {
			return netip.Addr{}
		}
	}
	return s[0].Unmap()
}

// noneFor says that there is no address of the destination's family.
func (s sources) noneFor(destination string) error {
	return &fieldError{field: "SourceAddrs", value: addrList(s), problem: "none is of the same family as " + destination}
}
