package portpick

import (
	"math"
	"testing"
)

func TestPermuteReachesEveryPlaceOnce(t *testing.T) {
	sizes := []uint32{1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 33, 50, 64, 500, 1000, 4097, 14116, 32767, 32768}
	for _, n := range sizes {
		for _, key := range []uint64{0, 1, 0x0123456789abcdef, math.MaxUint64} {
			seen := make([]bool, n)
			for i := range n {
				at := permute(key, i, n)
				if at >= n {
					t.Fatalf("permute(%#x, %d, %d) = %d: outside", key, i, n, at)
				}
				if seen[at] {
					t.Fatalf("permute(%#x, %d, %d) = %d: was there before", key, i, n, at)
				}
				seen[at] = true
			}
		}
	}
}

// The key is what keeps destinations apart, so each of its bits must matter,
// and where an element goes must not depend on where it comes from.
func TestPermuteScattersEveryElementEvenly(t *testing.T) {
	const keys = 20000
	for _, n := range []uint32{3, 5, 32, 50, 64} {
		for _, i := range []uint32{0, 1, n - 1} {
			counts := make([]int, n)
			for key := range uint64(keys) {
				// The keys in use are SipHash values, which these stand for.
				counts[permute(mix(key+1), i, n)]++
			}
			if chi, limit := chiSquare(counts), chiSquareLimit(int(n)-1); chi > limit {
				t.Errorf("element %d of %d: chi-square %.1f over %d keys, limit %.1f", i, n, chi, keys, limit)
			}
		}
	}
}

func TestPermuteDependsOnEveryBitOfTheKey(t *testing.T) {
	const n = 1000
	const key = 0x0123456789abcdef
	for bit := range 64 {
		same := 0
		for i := range uint32(n) {
			if permute(key, i, n) == permute(key^1<<bit, i, n) {
				same++
			}
		}
		// Two unrelated permutations agree in one place on average; 20 or more
		// happen once in 10^18.
		if same > 20 {
			t.Errorf("bit %d of the key: %d of %d elements stay where they are", bit, same, n)
		}
	}
}

// chiSquare measures how far the counts are from all being the same.
func chiSquare(counts []int) float64 {
	total := 0
	for _, n := range counts {
		total += n
	}
	expected := float64(total) / float64(len(counts))
	sum := 0.0
	for _, n := range counts {
		d := float64(n) - expected
		sum += d * d / expected
	}
	return sum
}

// chiSquareLimit is the value that a chi-square statistic with so many degrees
// of freedom exceeds once in 10^9 times (by the approximation of Wilson and
// Hilferty; 5.998 is the quantile of the normal distribution).
func chiSquareLimit(freedom int) float64 {
	k := float64(freedom)
	c := 1 - 2/(9*k) + 5.998*math.Sqrt(2/(9*k))
	return k * c * c * c
}
