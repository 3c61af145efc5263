package portpick

import (
	"encoding/json"
	"fmt"
	"math"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// What somebody can tell who sees the ports of connections, but not the secret.
// Each order here has a secret of its own, as in use, so each statistic may be
// beyond its limit once in a million runs.

// onceInAMillion is the value that a chi-square statistic with so many degrees of
// freedom exceeds once in a million times (Wilson and Hilferty; 4.753 is the
// quantile of the normal distribution).
func onceInAMillion(freedom int) float64 {
	k := float64(freedom)
	c := 1 - 2/(9*k) + 4.753*math.Sqrt(2/(9*k))
	return k * c * c * c
}

// mostHits is how many of so many guesses are right by chance, except once in a
// million times (the tail of the Poisson distribution, which is above the
// binomial one).
func mostHits(guesses int, chance float64) int {
	mean := float64(guesses) * chance
	for k, sum := 0, 0.0; ; k++ {
		factorial, _ := math.Lgamma(float64(k + 1))
		sum += math.Exp(float64(k)*math.Log(mean) - mean - factorial)
		if 1-sum < 1e-6 {
			return k
		}
	}
}

func checkUniform(t *testing.T, what string, counts []int) {
	t.Helper()
	if chi, limit := chiSquare(counts), onceInAMillion(len(counts)-1); chi > limit {
		t.Errorf("%s: chi-square %.1f, limit %.1f", what, chi, limit)
	}
}

// A pair is what ports are picked for, and of which.
type pair struct {
	source      netip.Addr
	destination netip.AddrPort
	ports       *Ports
}

// dials returns the places within their half of the first ports that so many dials
// are offered, one each.
func (p pair) dials(t testing.TB, o *Order, n int) []int {
	t.Helper()
	places := make([]int, n)
	for i := range places {
		w := o.Walk(p.ports, p.source, p.destination)
		port, ok := w.Next()
		if !ok {
			t.Fatal("no port")
		}
		places[i] = int(port-p.ports.Low()) / 2
	}
	return places
}

func TestTheFirstPortIsAnyOfItsHalf(t *testing.T) {
	const destinations = 10000
	ports, order := newPorts(t, 40000, 40999, nil), NewOrder()
	var counts [2][]int
	for half := range counts {
		counts[half] = make([]int, ports.half(uint32(half)))
	}
	for i := range destinations {
		w := order.Walk(ports, testSource, destination(i))
		for offer := range probes + 1 { // the last one is the first of the odd half
			port, ok := w.Next()
			if !ok {
				t.Fatal("no port")
			}
			if place := int(port - ports.Low()); offer == 0 || offer == probes {
				if place%2 != offer/probes {
					t.Fatalf("offer %d is port %d", offer, port)
				}
				counts[place%2][place/2]++
			}
		}
	}
	checkUniform(t, "first of the even half", counts[0])
	checkUniform(t, "first of the odd half", counts[1])
}

// relationPlaces is the size of the half whose ports are compared, and
// relationPairs how many times they are.
const relationPlaces, relationPairs = 50, 250

// A relation counts how the ports of one pair lie to those of another.
type relation struct {
	first [relationPlaces]int // from the one's first port to the other's
	agree int                 // after how many ports both have the same one next
}

// add compares two pairs by the ports of a lap, and the one after it.
func (r *relation) add(a, b []int) {
	r.first[(b[0]-a[0]+relationPlaces)%relationPlaces]++
	next := make(map[int]int)
	for i, place := range a[:relationPlaces] {
		next[place] = a[i+1]
	}
	for i, place := range b[:relationPlaces] {
		if next[place] == b[i+1] {
			r.agree++
		}
	}
}

func (r *relation) check(t *testing.T) {
	t.Helper()
	checkUniform(t, "distance of the first ports", r.first[:])
	const all = relationPairs * relationPlaces
	if limit := mostHits(all, 1.0/(relationPlaces-1)); r.agree > limit {
		t.Errorf("after %d of %d ports both have the same one next, at most %d by chance", r.agree, all, limit)
	}
}

func TestThePortsOfOnePairSayNothingOfThoseOfAnother(t *testing.T) {
	ports := newPorts(t, 40000, 40099, nil)
	withPorts := func(low, high uint16) func(pair) pair {
		other := newPorts(t, low, high, nil)
		return func(p pair) pair { return pair{p.source, p.destination, other} }
	}
	tests := []struct {
		name  string
		other func(pair) pair
	}{
		{"the next address", func(p pair) pair {
			return pair{p.source, netip.AddrPortFrom(p.destination.Addr().Next(), p.destination.Port()), ports}
		}},
		{"the next port of the same address", func(p pair) pair {
			return pair{p.source, netip.AddrPortFrom(p.destination.Addr(), p.destination.Port()+1), ports}
		}},
		{"the same destination from the next source", func(p pair) pair { return pair{p.source.Next(), p.destination, ports} }},
		{"the same destination before the source is known", func(p pair) pair { return pair{netip.Addr{}, p.destination, ports} }},
		{"source and destination swapped", func(p pair) pair {
			return pair{p.destination.Addr(), netip.AddrPortFrom(p.source, p.destination.Port()), ports}
		}},
		{"a range that ends elsewhere", withPorts(40000, 40098)},
		{"a range that begins elsewhere", withPorts(40001, 40099)},
		{"another range", withPorts(50000, 50099)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			order := NewOrder()
			var r relation
			for i := range relationPairs {
				p := pair{testSource, destination(2 * i), ports}
				r.add(p.dials(t, order, relationPlaces+1), tt.other(p).dials(t, order, relationPlaces+1))
			}
			r.check(t)
		})
	}
}

// processEnv makes the test below print ports in place of what it does.
const processEnv = "CONNECTX_TEST_PORTS"

func TestThePortsOfOneProcessSayNothingOfThoseOfAnother(t *testing.T) {
	ports := newPorts(t, 40000, 40099, nil)
	if os.Getenv(processEnv) != "" {
		order := NewOrder()
		for i := range relationPairs {
			fmt.Println("places", pair{testSource, destination(i), ports}.dials(t, order, relationPlaces+1))
		}
		return
	}
	var processes [2][][]int
	for i := range processes {
		cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
		cmd.Env = append(os.Environ(), processEnv+"=1")
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		for line := range strings.Lines(string(out)) {
			list, ok := strings.CutPrefix(line, "places ")
			if !ok {
				continue
			}
			var places []int
			if err := json.Unmarshal([]byte(strings.ReplaceAll(list, " ", ",")), &places); err != nil {
				t.Fatalf("%v: %q", err, line)
			}
			processes[i] = append(processes[i], places)
		}
		if len(processes[i]) != relationPairs {
			t.Fatalf("%d destinations, want %d:\n%.1000s", len(processes[i]), relationPairs, out)
		}
	}
	var r relation
	for i := range relationPairs {
		r.add(processes[0][i], processes[1][i])
	}
	r.check(t)
}

func TestConsecutivePortsAreUnrelated(t *testing.T) {
	const (
		destinations = 2000
		each         = 10 // dials to each
		width        = 25 // of a bucket
	)
	ports, order := newPorts(t, 40000, 40999, nil), NewOrder()
	n := int(ports.half(0))
	steps := make([]int, n-1)
	buckets := n / width
	pairs := make([]float64, buckets*buckets)
	total := 0.0
	for i := range destinations {
		p := pair{testSource, destination(i), ports}.dials(t, order, each)
		for k := 0; k < each; k += 2 { // pairs that have nothing in common
			steps[(p[k+1]-p[k]+n)%n-1]++
			pairs[p[k]/width*buckets+p[k+1]/width]++
			total++
		}
	}
	checkUniform(t, "step from one port to the next", steps)

	chi := 0.0
	for at, got := range pairs {
		second := width // how many ports of the bucket the next one can be
		if at/buckets == at%buckets {
			second--
		}
		want := total * width * float64(second) / float64(n*(n-1))
		chi += (got - want) * (got - want) / want
	}
	if limit := onceInAMillion(len(pairs) - 1); chi > limit {
		t.Errorf("buckets of one port and the next: chi-square %.1f, limit %.1f", chi, limit)
	}
}

// Somebody who knows all of this package but the secret, makes us dial to their own
// destination, and learns of each port towards another one a moment later, predicts
// the next one no better than by guessing.
func TestAnObserverOfOneDestinationCannotPredictThePortsTowardsAnother(t *testing.T) {
	const (
		observers = 200
		seen      = 400 // ports towards the observer's own destination
		turns     = 50  // towards the other one
	)
	ports := newPorts(t, 40000, 40999, nil)
	n := int(ports.half(0))

	// Each guesses where the port of a turn is, from own ports, those of the
	// other's turns before this one, and the order of ports, whole, that the
	// observer has worked out. -1 is no guess.
	type view struct {
		own, others  []int
		follows, odd []int // of each place, the next in the even and in the odd half
	}
	followers := func(key uint64) []int {
		follows := make([]int, n)
		for i := range uint32(n) {
			follows[permute(key, i, uint32(n))] = int(permute(key, (i+1)%uint32(n), uint32(n)))
		}
		return follows
	}
	mod := func(i int) int { return (i%n + n) % n }
	predictors := []struct {
		name  string
		guess func(v view, turn int) int
	}{
		{"the same port", func(v view, turn int) int { return v.own[turn] }},
		{"the same distance as at first", func(v view, turn int) int { return mod(v.others[0] + v.own[turn] - v.own[0]) }},
		{"the same step as own ports make", func(v view, turn int) int { return mod(v.others[turn-1] + v.own[turn] - v.own[turn-1]) }},
		{"the same step as before", func(v view, turn int) int {
			if turn < 2 {
				return -1
			}
			return mod(2*v.others[turn-1] - v.others[turn-2])
		}},
		{"the same bits differ as at first", func(v view, turn int) int { return v.own[turn] ^ v.own[0] ^ v.others[0] }},
		{"the one that follows in the own order", func(v view, turn int) int { return v.follows[v.others[turn-1]] }},
		{"the one that follows in the own order of the odd half", func(v view, turn int) int { return v.odd[v.others[turn-1]] }},
		{"the one that came after it in the own turns", func(v view, turn int) int {
			for i, place := range v.own[:len(v.own)-1] {
				if place == v.others[turn-1] {
					return v.own[i+1]
				}
			}
			return -1
		}},
	}
	hits, guesses := make([]int, len(predictors)), make([]int, len(predictors))
	order := NewOrder()
	for i := range observers {
		own, other := pair{testSource, destination(2 * i), ports}, pair{testSource, destination(2*i + 1), ports}
		w := order.Walk(ports, own.source, own.destination)
		v := view{
			own: own.dials(t, order, seen), others: other.dials(t, order, turns),
			follows: followers(w.key), odd: followers(w.key + 1),
		}
		for turn := 1; turn < turns; turn++ {
			for j, p := range predictors {
				guess := p.guess(v, turn)
				if guess >= 0 {
					guesses[j]++
				}
				if guess == v.others[turn] {
					hits[j]++
				}
			}
		}
	}
	for j, p := range predictors {
		// A port that had its turn does not come again, so somebody who leaves
		// those out has one chance in what is left.
		limit := mostHits(guesses[j], 1/float64(n-turns))
		t.Logf("%s: %d of %d guesses are right, at most %d by chance", p.name, hits[j], guesses[j], limit)
		if hits[j] > limit {
			t.Errorf("%s: %d of %d guesses are right, at most %d by chance", p.name, hits[j], guesses[j], limit)
		}
	}
}
