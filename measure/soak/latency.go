//go:build linux

package main

import (
	"math"
	"time"
)

// A latency counts how many dials have taken how long, by steps of some 4 %. It
// does not grow.
type latency struct {
	counts [512]uint32
	n      uint32
}

const (
	latencyUnit = time.Microsecond
	latencyStep = 0.04 // of a natural logarithm
)

func (l *latency) add(d time.Duration) {
	at := 0
	if d > latencyUnit {
		at = int(math.Log(float64(d)/float64(latencyUnit)) / latencyStep)
	}
	l.counts[min(at, len(l.counts)-1)]++
	l.n++
}

// quantile is the time that a part of the dials has not exceeded, or 0 if there were
// none.
func (l *latency) quantile(part float64) time.Duration {
	if l.n == 0 {
		return 0
	}
	rank := uint32(math.Ceil(part * float64(l.n)))
	sum := uint32(0)
	for at, n := range l.counts {
		if sum += n; sum >= rank {
			return time.Duration(float64(latencyUnit) * math.Exp((float64(at)+0.5)*latencyStep))
		}
	}
	return math.MaxInt64
}
