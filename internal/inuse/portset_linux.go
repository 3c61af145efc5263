package inuse

import "math/bits"

// A portSet has one bit for each port.
type portSet [1 << 16 / 64]uint64

func (s *portSet) add(port uint16) { s[port/64] |= 1 << (port % 64) }

func (s *portSet) has(port uint16) bool { return s[port/64]&(1<<(port%64)) != 0 }

func (s *portSet) len() int {
	n := 0
	for _, word := range s {
		n += bits.OnesCount64(word)
	}
	return n
}

func (s *portSet) remove(port uint16) { s[port/64] &^= 1 << (port % 64) }
