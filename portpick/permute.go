package portpick

import "math/bits"

// permute returns the place of i in a permutation of 0 … n-1 that key chooses.
// i must be below n.
//
// It is a Feistel network over the smallest power of two that is not below n,
// and walks its cycle until it is back below n: on average less than two steps.
// The rounds need not withstand somebody who sees one order whole, who has
// nothing left to guess then; key, which is a SipHash value, is what keeps the
// orders of different destinations apart.
func permute(key uint64, i, n uint32) uint32 {
	if n < 2 {
		return 0
	}
	width := max(bits.Len32(n-1), 2)
	for {
		i = feistel(key, i, width)
		if i < n {
			return i
		}
	}
}

// feistelRounds is even, so that halves of unequal width end as they began.
const feistelRounds = 8

func feistel(key uint64, x uint32, width int) uint32 {
	low := width / 2 // width of the right half
	high := width - low
	left, right := x>>low, x&(1<<low-1)
	for round := range uint64(feistelRounds) {
		f := uint32(mix(key+round*0x9e3779b97f4a7c15+uint64(right)<<32) >> 32)
		left, right = right, (left^f)&(1<<high-1)
		low, high = high, low
	}
	return left<<low | right
}

// mix spreads every bit of x over the result (the finalizer of SplitMix64).
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
