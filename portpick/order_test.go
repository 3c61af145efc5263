package portpick

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
)

var (
	testSource      = netip.MustParseAddr("192.0.2.1")
	testDestination = netip.MustParseAddrPort("198.51.100.7:443")
)

// knownOrder has a secret that is the same in every run, for tests that would
// otherwise fail once in a blue moon.
func knownOrder() *Order {
	o := new(Order)
	o.secret = [2]uint64{0x0706050403020100, 0x0f0e0d0c0b0a0908}
	return o
}

func newPorts(t testing.TB, low, high uint16, reserved func(uint16) bool) *Ports {
	t.Helper()
	p, err := NewPorts(low, high, reserved)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// destination returns one of 65,536 destinations.
func destination(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 443)
}

// differ is cmp.Diff for long lists that are normally the same.
func differ(want, got []uint16) string {
	if slices.Equal(want, got) {
		return ""
	}
	return cmp.Diff(want, got)
}

// rest lists what a walk offers until it has nothing left.
func rest(t testing.TB, w *Walk) []uint16 {
	t.Helper()
	var list []uint16
	for {
		port, ok := w.Next()
		if !ok {
			return list
		}
		list = append(list, port)
		if len(list) > 3<<16 {
			t.Fatal("the walk does not end")
		}
	}
}

// A table is what a program would see of the ports towards one destination:
// which ones are taken.
type table struct {
	order *Order
	ports *Ports
	taken [1 << 16]bool
	free  int
}

func newTable(order *Order, ports *Ports) *table {
	return &table{order: order, ports: ports, free: ports.Len()}
}

// dial takes a port as a dialer does: it calls Next until a port is free.
func (tb *table) dial() (port uint16, offers int, ok bool) {
	w := tb.order.Walk(tb.ports, testSource, testDestination)
	for {
		port, ok := w.Next()
		if !ok {
			return 0, offers, false
		}
		offers++
		if !tb.taken[port] {
			tb.taken[port] = true
			tb.free--
			return port, offers, true
		}
	}
}

func (tb *table) release(port uint16) {
	tb.taken[port] = false
	tb.free++
}

func (tb *table) isOdd(port uint16) bool { return (port-tb.ports.Low())%2 == 1 }

func TestOneWalkOffersEveryPortOnce(t *testing.T) {
	tests := []struct {
		name      string
		low, high uint16
		reserved  func(uint16) bool
	}{
		{"a single port", 40000, 40000, nil},
		{"two ports", 40000, 40001, nil},
		{"three ports", 40000, 40002, nil},
		{"ten ports", 40000, 40009, nil},
		{"as many as both halves are probed for", 40000, 40031, nil},
		{"one more than both halves are probed for", 40000, 40032, nil},
		{"a thousand ports", 40001, 41000, nil},
		{"the range that Linux starts with", DefaultLow, DefaultHigh, nil},
		{"all ports there are", 1, 65535, nil},
		{"a single port that is reserved", 40000, 40000, func(uint16) bool { return true }},
		{"all ports reserved", 40000, 40999, func(uint16) bool { return true }},
		{"all ports of the even half reserved", 40000, 40999, func(p uint16) bool { return p%2 == 0 }},
		{"all ports of the odd half reserved", 40000, 40999, func(p uint16) bool { return p%2 == 1 }},
		{"all ports but one of the even half reserved", 40000, 40999, func(p uint16) bool { return p != 40500 }},
		{"all ports but one of the odd half reserved", 40000, 40999, func(p uint16) bool { return p != 40501 }},
		{"every third port reserved", DefaultLow, DefaultHigh, func(p uint16) bool { return p%3 == 0 }},
		{"a block reserved", 40000, 40999, func(p uint16) bool { return 40100 <= p && p < 40900 }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ports := newPorts(t, tt.low, tt.high, tt.reserved)
			order, want := NewOrder(), all(ports)
			// Again and again, since a walk begins where the one before it
			// has left the shared position.
			for round := range 5 {
				w := order.Walk(ports, testSource, testDestination)
				got := rest(t, &w)
				if _, ok := w.Next(); ok {
					t.Errorf("round %d: a port after the last", round)
				}
				slices.Sort(got)
				if diff := differ(want, got); diff != "" {
					t.Fatalf("round %d (-want +got):\n%s", round, diff)
				}
			}
		})
	}
}

// Dials that succeed at the first port they are offered, as is normal, must
// have been through all of them before one comes back.
func TestConsecutiveDialsGoThroughTheEvenPortsBeforeAnyComesAgain(t *testing.T) {
	for _, size := range []int{1, 2, 3, 10, 33, 1000, 28232} {
		t.Run(fmt.Sprintf("%d ports", size), func(t *testing.T) {
			ports := newPorts(t, 32768, uint16(32768+size-1), nil)
			order := NewOrder()
			even := int(ports.half(0))
			last := map[uint16]int{}
			for dial := range 3 * even {
				w := order.Walk(ports, testSource, testDestination)
				port, ok := w.Next()
				if !ok {
					t.Fatalf("dial %d got no port", dial)
				}
				if port%2 != 0 {
					t.Fatalf("dial %d got the odd port %d", dial, port)
				}
				if before, ok := last[port]; ok && dial-before != even {
					t.Fatalf("dial %d got port %d, which dial %d of %d had", dial, port, before, even)
				}
				last[port] = dial
			}
		})
	}
}

func TestReservedPortsLeaveNoGapInTheTurnsOfTheOthers(t *testing.T) {
	ports := newPorts(t, 40000, 40999, func(p uint16) bool { return p%10 < 6 })
	order := NewOrder()
	seen := map[uint16]bool{}
	for dial := range 200 { // of 500 even offsets, two in five
		w := order.Walk(ports, testSource, testDestination)
		port, ok := w.Next()
		if !ok || !ports.Contains(port) || port%2 != 0 || seen[port] {
			t.Fatalf("dial %d got %d, %v, and before it %d others", dial, port, ok, len(seen))
		}
		seen[port] = true
	}
}

// The promise that the dialer's speed rests on: filling a range takes one try
// per dial right up to the last port.
func TestFillingTheRange(t *testing.T) {
	tests := []struct {
		size int

		// most is how many offers per dial there may be on average. The even
		// half takes one each. In the odd half, one dial in credit + 1 looks
		// at `probes` even ports first; credit is a 16th of the even half,
		// at most 255: with 28,232 ports, 1 + (16/256)/2 = 1.0313 overall,
		// and 1.0317 because the last run of 256 is not a whole one. Small
		// ranges have a small credit and pay more. There is no chance in it.
		most float64
	}{
		{2, 1.5},
		{10, 2.5},
		{1000, 1.26},
		{28232, 1.032},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%d ports", tt.size), func(t *testing.T) {
			tb := newTable(NewOrder(), newPorts(t, 32768, uint16(32768+tt.size-1), nil))
			even := int(tb.ports.half(0))
			total := 0
			for dial := range tt.size {
				port, offers, ok := tb.dial()
				if !ok {
					t.Fatalf("dial %d found no port, though %d are free", dial, tb.free)
				}
				if tb.isOdd(port) != (dial >= even) {
					t.Fatalf("dial %d got port %d, with %d even ports", dial, port, even)
				}
				if dial < even && offers != 1 {
					t.Fatalf("dial %d of the first lap took %d offers", dial, offers)
				}
				total += offers
			}
			if tb.free != 0 {
				t.Errorf("%d ports are left", tb.free)
			}
			average := float64(total) / float64(tt.size)
			t.Logf("%.4f offers per dial", average)
			if average > tt.most {
				t.Errorf("%.4f offers per dial, want at most %.4f", average, tt.most)
			}

			for range 3 {
				if port, offers, ok := tb.dial(); ok || offers != tt.size {
					t.Errorf("a dial with all ports taken: port %d, %v, after %d offers; want none after %d", port, ok, offers, tt.size)
				}
			}
		})
	}
}

func TestTheLastFreePortIsFoundWhereverItIs(t *testing.T) {
	const size = 1000
	tb := newTable(NewOrder(), newPorts(t, 40000, 40000+size-1, nil))
	for tb.free > 0 {
		tb.dial()
	}
	for port := uint16(40000); port < 40000+size; port++ {
		tb.release(port)
		got, offers, ok := tb.dial()
		if !ok || got != port {
			t.Fatalf("with %d free the dial got %d, %v", port, got, ok)
		}
		if offers > size {
			t.Errorf("port %d was found after %d offers", port, offers)
		}
	}
}

func TestWalksReturnToTheEvenPortsOnceTheseAreFree(t *testing.T) {
	tb := newTable(NewOrder(), newPorts(t, DefaultLow, DefaultHigh, nil))
	for range tb.ports.half(0) + 500 {
		tb.dial() // all even ports, and 500 of the odd ones
	}
	for port := DefaultLow; port <= DefaultHigh; port += 2 {
		tb.release(uint16(port))
	}
	// The credit of the odd half, at most 255 dials, has to run out first.
	odd := 0
	for range 256 {
		if port, _, _ := tb.dial(); tb.isOdd(port) {
			odd++
		}
	}
	if odd > 255 {
		t.Errorf("%d of 256 dials still used odd ports", odd)
	}
	for dial := range 5000 {
		if port, offers, _ := tb.dial(); tb.isOdd(port) || offers != 1 {
			t.Fatalf("dial %d after that got port %d after %d offers", dial, port, offers)
		}
	}
}

// While the odd half still has its credit, a dial that finds it full looks at
// the even half's next ports before it goes through all the rest.
func TestADialThatBeginsWithAFullOddHalfSoonLooksAtTheEvenOnes(t *testing.T) {
	tb := newTable(NewOrder(), newPorts(t, 40000, 40999, nil))
	for tb.free > 0 {
		tb.dial()
	}
	tb.dial() // in vain, which renews the credit
	for port := uint16(40000); port < 41000; port += 2 {
		tb.release(port)
	}
	for dial := range 500 {
		port, offers, ok := tb.dial()
		if !ok || tb.isOdd(port) || offers > probes+1 {
			t.Fatalf("dial %d got port %d, %v, after %d offers", dial, port, ok, offers)
		}
	}
}

// When free ports are far away from where the dials are, the first one has to
// search for them. The next ones must profit from that.
func TestASearchIsNotRepeatedByTheNextDial(t *testing.T) {
	tb := newTable(NewOrder(), newPorts(t, 40000, 40999, nil))
	after := next(t, tb.order, tb.ports, testSource, testDestination)
	for tb.free > 0 {
		tb.dial()
	}
	const run = 50
	port := uint16(40000)
	for range run { // in the order in which they are offered
		tb.release(port)
		port = after[port]
	}
	searches := 0
	for dial := range run {
		_, offers, ok := tb.dial()
		if !ok {
			t.Fatalf("dial %d found no port, though %d are free", dial, tb.free)
		}
		if offers > probes+1 { // the odd half may have its turn first
			searches++
		}
	}
	// One search finds the run, and another its beginning if the dials have
	// come upon its middle.
	if searches > 2 {
		t.Errorf("%d of %d dials had to search", searches, run)
	}
}

// With half of the even ports taken at random, 16 taken ones in a row come
// once in 65,536 dials, and cost 256 dials on the odd half: 0.4 % of all.
func TestOddPortsAreLeftToOthersWhileHalfOfTheEvenOnesAreFree(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	odd, dials, total := 0, 0, 0
	for range 10 {
		tb := newTable(knownOrder(), newPorts(t, DefaultLow, DefaultHigh, nil))
		tb.order.secret[0] += random.Uint64()
		for port := DefaultLow; port <= DefaultHigh; port += 2 {
			tb.taken[port] = random.IntN(2) == 0
		}
		for range tb.ports.half(0) / 2 {
			port, offers, ok := tb.dial()
			if !ok {
				t.Fatal("no port")
			}
			if tb.isOdd(port) {
				odd++
			}
			dials++
			total += offers
			tb.release(port)
		}
	}
	share, average := float64(odd)/float64(dials), float64(total)/float64(dials)
	t.Logf("%d of %d dials used an odd port (%.2f %%), %.2f offers per dial", odd, dials, 100*share, average)
	if share > 0.02 {
		t.Errorf("%d of %d dials used an odd port", odd, dials)
	}
	// Half of the ports are taken, so two offers are what it takes.
	if average > 2.1 {
		t.Errorf("%.2f offers per dial", average)
	}
}

func TestConcurrentDialsAreOfferedDifferentPorts(t *testing.T) {
	const goroutines, each = 8, 400
	ports := newPorts(t, DefaultLow, DefaultHigh, nil)
	order := NewOrder()

	got := make([][]uint16, goroutines)
	var wg sync.WaitGroup
	start := make(chan struct{})
	for g := range goroutines {
		wg.Go(func() {
			<-start
			for range each {
				w := order.Walk(ports, testSource, testDestination)
				// Every second dial is unlucky with its first port.
				for range 1 + len(got[g])%2 {
					port, ok := w.Next()
					if !ok {
						t.Error("no port")
						return
					}
					got[g] = append(got[g], port)
				}
			}
		})
	}
	close(start)
	wg.Wait()

	seen := map[uint16]bool{}
	for _, list := range got {
		for _, port := range list {
			if seen[port] {
				t.Fatalf("port %d was offered twice", port)
			}
			seen[port] = true
		}
	}
}

// Two dials that are the first ones of a pair must settle on one place for it.
func TestTheFirstTwoDialsOfAPairAreOfferedDifferentPorts(t *testing.T) {
	const rounds, pairs = 4, 500 // few enough that no pair has to make room
	// Two even ports: dials that do not share agree in every second case.
	ports := newPorts(t, 40000, 40003, nil)
	for range rounds {
		order := knownOrder()
		var got [2][pairs]uint16
		var arrived atomic.Int64
		var wg sync.WaitGroup
		for g := range got {
			wg.Go(func() {
				for i := range pairs {
					// Both set out together, as nearly as that can be had: a
					// short spin, since a goroutine that sleeps comes too late.
					arrived.Add(1)
					for spin := 0; arrived.Load() < int64(2*(i+1)); spin++ {
						if spin > 1000 {
							runtime.Gosched()
						}
					}
					w := order.Walk(ports, testSource, destination(i))
					got[g][i], _ = w.Next()
				}
			})
		}
		wg.Wait()
		for i := range pairs {
			if got[0][i] == got[1][i] {
				t.Errorf("pair %d: both were offered %d", i, got[0][i])
			}
		}
	}
}

func TestConcurrentWalksAreEachOfferedAllPorts(t *testing.T) {
	const goroutines = 8
	for _, size := range []int{1, 2, 10, 31, 40, 1000} {
		t.Run(fmt.Sprintf("%d ports", size), func(t *testing.T) {
			ports := newPorts(t, 40000, uint16(40000+size-1), func(p uint16) bool { return size >= 10 && p%7 == 0 })
			order, want := NewOrder(), all(ports)
			var wg sync.WaitGroup
			start := make(chan struct{})
			for range goroutines {
				wg.Go(func() {
					<-start
					for range 20 {
						w := order.Walk(ports, testSource, testDestination)
						got := rest(t, &w)
						slices.Sort(got)
						if diff := differ(want, slices.Compact(got)); diff != "" {
							t.Errorf("offered (-want +got):\n%s", diff)
							return
						}
					}
				})
			}
			close(start)
			wg.Wait()
		})
	}
}

// Between the calls of one walk, others take positions out of its way.
func TestAWalkThatOthersInterruptIsStillOfferedAllPorts(t *testing.T) {
	for _, size := range []int{1, 2, 3, 10, 33, 100} {
		for between := range 40 {
			ports := newPorts(t, 40000, uint16(40000+size-1), nil)
			order := NewOrder()
			w := order.Walk(ports, testSource, testDestination)
			var got []uint16
			for {
				port, ok := w.Next()
				if !ok {
					break
				}
				got = append(got, port)
				for range between {
					other := order.Walk(ports, testSource, testDestination)
					other.Next()
				}
			}
			if len(got) > 2*size {
				t.Errorf("%d ports, %d dials in between: %d offers", size, between, len(got))
			}
			slices.Sort(got)
			if diff := differ(all(ports), slices.Compact(got)); diff != "" {
				t.Errorf("%d ports, %d dials in between (-want +got):\n%s", size, between, diff)
			}
		}
	}
}

// next maps every even port of the range to the one that is offered after it.
// Other than the order itself, this does not depend on where a walk begins.
func next(t testing.TB, o *Order, ports *Ports, source netip.Addr, destination netip.AddrPort) map[uint16]uint16 {
	t.Helper()
	var even []uint16
	w := o.Walk(ports, source, destination)
	for _, port := range rest(t, &w) {
		if (port-ports.Low())%2 == 0 {
			even = append(even, port)
		}
	}
	after := make(map[uint16]uint16, len(even))
	for i, port := range even {
		after[port] = even[(i+1)%len(even)]
	}
	return after
}

func TestWhatAnOrderDependsOn(t *testing.T) {
	ports := newPorts(t, 40000, 40199, nil)
	addr, addrPort := netip.MustParseAddr, netip.MustParseAddrPort
	order := knownOrder()
	otherSecret := knownOrder()
	otherSecret.secret[1] ^= 1 << 63
	base := next(t, order, ports, addr("192.0.2.1"), addrPort("198.51.100.7:443"))

	tests := []struct {
		name        string
		order       *Order
		source      netip.Addr
		destination netip.AddrPort
		same        bool
	}{
		{"the same pair", order, addr("192.0.2.1"), addrPort("198.51.100.7:443"), true},
		{"the same pair as IPv4-mapped IPv6", order, addr("::ffff:192.0.2.1"), addrPort("[::ffff:198.51.100.7]:443"), true},
		{"another destination port", order, addr("192.0.2.1"), addrPort("198.51.100.7:444"), false},
		{"another byte of the destination port", order, addr("192.0.2.1"), addrPort("198.51.100.7:699"), false},
		{"another destination address", order, addr("192.0.2.1"), addrPort("198.51.100.6:443"), false},
		{"another source", order, addr("192.0.2.2"), addrPort("198.51.100.7:443"), false},
		{"source and destination the other way round", order, addr("198.51.100.7"), addrPort("192.0.2.1:443"), false},
		{"a source that is not known yet", order, netip.Addr{}, addrPort("198.51.100.7:443"), false},
		{"the wildcard source", order, addr("::"), addrPort("198.51.100.7:443"), false},
		{"another secret", otherSecret, addr("192.0.2.1"), addrPort("198.51.100.7:443"), false},
		{"an order of its own", NewOrder(), addr("192.0.2.1"), addrPort("198.51.100.7:443"), false},
		{"another order of its own", NewOrder(), addr("192.0.2.1"), addrPort("198.51.100.7:443"), false},
	}
	seen := []map[uint16]uint16{}
	for _, tt := range tests {
		after := next(t, tt.order, ports, tt.source, tt.destination)
		if got := cmp.Equal(base, after); got != tt.same {
			t.Errorf("%s: the order is the same: %v, want %v", tt.name, got, tt.same)
		}
		if tt.same {
			continue
		}
		for i, other := range seen {
			if cmp.Equal(other, after) {
				t.Errorf("%s: the order is that of case %d", tt.name, i)
			}
		}
		seen = append(seen, after)
	}

	zoned := netip.MustParseAddrPort("[fe80::1%eth0]:443")
	plain := netip.MustParseAddrPort("[fe80::1]:443")
	if !cmp.Equal(next(t, order, ports, netip.Addr{}, zoned), next(t, order, ports, netip.Addr{}, plain)) {
		t.Error("the zone has a say in the order")
	}
	unknown := next(t, order, ports, netip.Addr{}, testDestination)
	if cmp.Equal(unknown, next(t, order, ports, addr("::"), testDestination)) {
		t.Error("the order without a source is that of the wildcard")
	}
}

// An observer of one destination must learn nothing about another, not even a
// neighbouring one: which port follows which is as good as drawn anew.
func TestOrdersOfDifferentDestinationsAreUnrelated(t *testing.T) {
	const destinations = 3000
	ports := newPorts(t, 40000, 40099, nil)
	n := int(ports.half(0))
	order := knownOrder()

	follows := make([]int, n-1)  // how far behind port 40000 its follower lies
	relation := make([]int, n-1) // that, relative to the destination before
	agree := 0                   // followers that two neighbours share
	var before map[uint16]uint16
	for i := range destinations {
		after := next(t, order, ports, testSource, destination(i))
		distance := func(m map[uint16]uint16) int { return int(m[40000]-40000)/2 - 1 } // 0 … n-2
		follows[distance(after)]++
		if before != nil {
			relation[(distance(after)-distance(before)+n-1)%(n-1)]++
			for port, follower := range after {
				if before[port] == follower {
					agree++
				}
			}
		}
		before = after
	}
	limit := chiSquareLimit(n - 2)
	if chi := chiSquare(follows); chi > limit {
		t.Errorf("the port after 40000: chi-square %.1f, limit %.1f", chi, limit)
	}
	if chi := chiSquare(relation); chi > limit {
		t.Errorf("the port after 40000, relative to the neighbour's: chi-square %.1f, limit %.1f", chi, limit)
	}
	// One follower in n-1 agrees by chance, so about one per pair: 3,000 with
	// a standard deviation of 55.
	expected := float64(destinations-1) * float64(n) / float64(n-1)
	if d := float64(agree) - expected; d < -400 || d > 400 {
		t.Errorf("neighbours share %d followers, want about %.0f", agree, expected)
	}
}

// The place where the walk of a destination begins is random as well.
func TestTheFirstPortIsAnyEvenPort(t *testing.T) {
	const destinations = 50000
	ports := newPorts(t, 40000, 40099, nil)
	order := knownOrder()
	counts := make([]int, ports.half(0))
	for i := range destinations {
		w := order.Walk(ports, testSource, destination(i))
		port, ok := w.Next()
		if !ok || port%2 != 0 {
			t.Fatalf("destination %d: %d, %v", i, port, ok)
		}
		counts[(port-40000)/2]++
	}
	if chi, limit := chiSquare(counts), chiSquareLimit(len(counts)-1); chi > limit {
		t.Errorf("chi-square %.1f, limit %.1f", chi, limit)
	}
}

// A pair that was forgotten must not begin where it began last time, which is
// where its connections are.
func TestAPairThatWasForgottenBeginsAnywhere(t *testing.T) {
	ports := newPorts(t, DefaultLow, DefaultHigh, nil)
	first := map[uint16]bool{}
	for range 20 {
		order := knownOrder()
		w := order.Walk(ports, testSource, testDestination)
		port, _ := w.Next()
		first[port] = true
	}
	// 20 draws from 14,116 ports: less than 10 different ones do not happen.
	if len(first) < 10 {
		t.Errorf("only %d different ports in 20 tries", len(first))
	}
}

func TestMemoryIsFixedWhateverTheNumberOfDestinations(t *testing.T) {
	if size := unsafe.Sizeof(Order{}); size > 128<<10+64 {
		t.Errorf("an Order has %d bytes, and the documentation says 128 KiB", size)
	}
	// The size says nothing if there is more behind it. So: no allocation,
	// neither for a new destination nor for an old one.
	ports := newPorts(t, DefaultLow, DefaultHigh, nil)
	order := NewOrder()
	i := 0
	allocs := testing.AllocsPerRun(100000, func() {
		a := [16]byte{0: 0x20, 1: 0x01, 2: 0x0d, 3: 0xb8}
		binary.BigEndian.PutUint64(a[8:], uint64(i))
		i++
		w := order.Walk(ports, testSource, netip.AddrPortFrom(netip.AddrFrom16(a), 443))
		w.Next()
	})
	if allocs != 0 {
		t.Errorf("a new destination: %v allocations", allocs)
	}
	allocs = testing.AllocsPerRun(10, func() {
		w := order.Walk(ports, testSource, testDestination)
		for {
			if _, ok := w.Next(); !ok {
				break
			}
		}
	})
	if allocs != 0 {
		t.Errorf("a walk from the first to the last port: %v allocations", allocs)
	}
}

// More destinations than there is room for: each still gets what one walk
// promises, and only its place in the order is forgotten.
func TestDestinationsThatMakeRoomForOthers(t *testing.T) {
	const destinations = 4 * sets * ways
	ports := newPorts(t, 40000, 40009, nil)
	order := knownOrder()
	for i := range destinations {
		w := order.Walk(ports, testSource, destination(i))
		w.Next()
	}
	free := 0
	for set := range order.table {
		for way := range order.table[set] {
			if order.table[set][way].Load() == 0 {
				free++
			}
		}
	}
	if free > sets*ways/1000 {
		t.Errorf("%d of %d places are free, after %d destinations", free, sets*ways, destinations)
	}
	want := all(ports)
	for i := range 1000 {
		w := order.Walk(ports, testSource, destination(i))
		got := rest(t, &w)
		slices.Sort(got)
		if diff := differ(want, got); diff != "" {
			t.Fatalf("destination %d (-want +got):\n%s", i, diff)
		}
	}
	// Whoever just dialled has its place, whatever was there before: the next
	// dial goes on from it.
	for i := 10000; i < 11000; i++ {
		seen := map[uint16]bool{}
		for range ports.half(0) {
			w := order.Walk(ports, testSource, destination(i))
			port, _ := w.Next()
			if seen[port] {
				t.Fatalf("destination %d: port %d came twice", i, port)
			}
			if port%2 != 0 {
				t.Fatalf("destination %d: the odd port %d", i, port)
			}
			seen[port] = true
		}
	}
}

// A walk may lose its place to another destination half way.
func TestAWalkWhosePlaceIsTakenIsStillOfferedAllPorts(t *testing.T) {
	ports := newPorts(t, 40000, 40099, nil)
	want := all(ports)
	for lost := range 60 {
		order := NewOrder()
		w := order.Walk(ports, testSource, testDestination)
		var got []uint16
		for {
			port, ok := w.Next()
			if !ok {
				break
			}
			got = append(got, port)
			if len(got) == lost {
				for set := range order.table {
					for way := range order.table[set] {
						order.table[set][way].Store(rand.Uint64())
					}
				}
			}
		}
		slices.Sort(got)
		if diff := differ(want, slices.Compact(got)); diff != "" {
			t.Fatalf("lost after %d offers (-want +got):\n%s", lost, diff)
		}
	}
}

// The port range of a namespace can change between two dials.
func TestAWalkThroughAnotherRangeThanTheOneBefore(t *testing.T) {
	order := NewOrder()
	for _, size := range []int{28232, 10, 1, 1000, 2, 28232} {
		ports := newPorts(t, 32768, uint16(32768+size-1), nil)
		w := order.Walk(ports, testSource, testDestination)
		got := rest(t, &w)
		slices.Sort(got)
		if diff := differ(all(ports), got); diff != "" {
			t.Fatalf("%d ports (-want +got):\n%s", size, diff)
		}
	}
}

func BenchmarkWalk(b *testing.B) {
	ports := newPorts(b, DefaultLow, DefaultHigh, nil)
	b.Run("one destination", func(b *testing.B) {
		order := NewOrder()
		b.ReportAllocs()
		for b.Loop() {
			w := order.Walk(ports, testSource, testDestination)
			if _, ok := w.Next(); !ok {
				b.Fatal("no port")
			}
		}
	})
	b.Run("many destinations", func(b *testing.B) {
		order := NewOrder()
		b.ReportAllocs()
		i := 0
		for b.Loop() {
			w := order.Walk(ports, testSource, destination(i))
			i++
			if _, ok := w.Next(); !ok {
				b.Fatal("no port")
			}
		}
	})
	b.Run("one destination from all processors", func(b *testing.B) {
		order := NewOrder()
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				w := order.Walk(ports, testSource, testDestination)
				w.Next()
			}
		})
	})
	b.Run("another port", func(b *testing.B) {
		order := NewOrder()
		b.ReportAllocs()
		w := order.Walk(ports, testSource, testDestination)
		for b.Loop() {
			if _, ok := w.Next(); !ok {
				w = order.Walk(ports, testSource, testDestination)
			}
		}
	})
}

// A walk is crowded once the probes of the even half were of no use, and so are
// those that follow, until that is tried again.
func TestWalkIsCrowdedOnceTheEvenProbesAreUsedUp(t *testing.T) {
	ports := newPorts(t, 40000, 48191, nil)
	o := knownOrder()
	w := o.Walk(ports, testSource, testDestination)
	for i := range probes {
		w.Next()
		if w.Crowded() {
			t.Fatalf("crowded after %d ports", i+1)
		}
	}
	if w.Next(); !w.Crowded() {
		t.Fatalf("not crowded after %d ports", probes+1)
	}
	for i := range 255 {
		w := o.Walk(ports, testSource, testDestination)
		if w.Next(); !w.Crowded() {
			t.Fatalf("walk %d is not crowded", i)
		}
	}
	w = o.Walk(ports, testSource, testDestination)
	if w.Next(); w.Crowded() {
		t.Error("the even half is not tried again")
	}
	other := o.Walk(ports, testSource, destination(1))
	if other.Next(); other.Crowded() {
		t.Error("another destination is crowded as well")
	}
}
