//go:build linux

package main

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"
)

// A limit is how much more the median of the last quarter of the samples may be
// than that of the second: the first is for what is made once. Medians, because a
// machine may be busy with something else for some of them; and times as multiples
// of net.Dialer's, because it may be for all of them.
type limit struct{ factor, slack float64 }

// In healthy runs of half a minute, on a machine of two processors that others use as
// well, the live heap grows by 1 % at most, the time of a dial as a multiple of
// net.Dialer's by up to 40 %, and what it takes of the processor by up to 20 %. What
// is lost with each dial adds up to megabytes in a minute.
var (
	heapLimit     = limit{factor: 1.05, slack: 256 << 10}
	residentLimit = limit{factor: 1.25, slack: 8 << 20}
	latencyLimit  = limit{factor: 2}
	cpuLimit      = limit{factor: 1.3}
)

const (
	// minSamples is how many it takes to compare quarters of them.
	minSamples = 8

	// minDials is how many dials of a quarter, and of net.Dialer, their times can
	// be compared of.
	minDials = 200
)

// A growth is what became of a quantity from the second quarter to the last.
type growth struct {
	name         string
	second, last float64
	limit        limit
	text         func(float64) string
}

// exceeds reports whether it is more than it may be.
func (g growth) exceeds() bool { return g.last > g.second*g.limit.factor+g.limit.slack }

func (g growth) String() string {
	return fmt.Sprintf("%s: %s in the second quarter, %s in the last", g.name, g.text(g.second), g.text(g.last))
}

// growths compares quarters of the samples. There are none if there are too few.
func growths(samples []sample) []growth {
	if len(samples) < minSamples {
		return nil
	}
	n := len(samples)
	second, last := samples[n/4:n/2], samples[n*3/4:]
	bytes := func(v float64) string { return fmt.Sprintf("%.0f KiB", v/(1<<10)) }
	times := func(v float64) string { return fmt.Sprintf("%.2f", v) }
	once := func(sample) int { return 1 }
	heap := func(of []sample) float64 {
		return medianOf(of, once, func(s sample) float64 { return float64(s.heap) })
	}
	resident := func(of []sample) float64 {
		return medianOf(of, once, func(s sample) float64 { return float64(s.resident) })
	}
	all := []growth{
		{"live heap", heap(second), heap(last), heapLimit, bytes},
		{"resident memory", resident(second), resident(last), residentLimit, bytes},
	}
	if samples[n-1].at < shortRun {
		return all
	}
	for p := range protocols {
		if !enoughDials(second, p) || !enoughDials(last, p) {
			continue
		}
		counted := func(s sample) int { return s.counted[p] }
		compared := func(s sample) int { return s.compared[p] }
		ratio := func(of []sample, dial, reference func(sample) time.Duration) float64 {
			return medianOf(of, counted, func(s sample) float64 { return float64(dial(s)) }) /
				medianOf(of, compared, func(s sample) float64 { return float64(reference(s)) })
		}
		latency := func(of []sample) float64 {
			return ratio(of, func(s sample) time.Duration { return s.p50[p] }, func(s sample) time.Duration { return s.reference[p] })
		}
		cpu := func(of []sample) float64 {
			return ratio(of, func(s sample) time.Duration { return s.cpu[p] }, func(s sample) time.Duration { return s.referenceCPU[p] })
		}
		all = append(all,
			growth{fmt.Sprintf("p50 of %s dials, as a multiple of net.Dialer's", p), latency(second), latency(last), latencyLimit, times},
			growth{fmt.Sprintf("p50 of what %s dials take of the processor, as such a multiple", p), cpu(second), cpu(last), cpuLimit, times})
	}
	return all
}

// enoughDials reports whether the times of dials tell anything.
func enoughDials(samples []sample, p protocol) bool {
	counted, compared := 0, 0
	for _, s := range samples {
		counted += s.counted[p]
		compared += s.compared[p]
	}
	return min(counted, compared) >= minDials
}

// medianOf is the median where each value is there as often as it counts.
func medianOf(samples []sample, counts func(sample) int, value func(sample) float64) float64 {
	sorted := slices.SortedFunc(slices.Values(samples), func(a, b sample) int { return cmp.Compare(value(a), value(b)) })
	all := 0
	for _, s := range sorted {
		all += counts(s)
	}
	sum := 0
	for _, s := range sorted {
		if sum += counts(s); 2*sum >= all {
			return value(s)
		}
	}
	return 0
}

// verdict is nil if the line was flat. Else it has everything that says it was not.
func (r *run) verdict() error {
	var errs []error
	for _, g := range growths(r.samples) {
		if g.exceeds() {
			errs = append(errs, errors.New(g.String()))
		}
	}
	for _, f := range r.tally.failures {
		errs = append(errs, errors.New(f))
	}
	if r.tally.more > 0 {
		errs = append(errs, fmt.Errorf("and %d more", r.tally.more))
	}
	return errors.Join(errs...)
}
