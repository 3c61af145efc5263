package connectx

import (
	"testing"
	"time"
)

// The more there is to run on each processor, the longer a holder of the lock may have
// to wait for one.
func TestPatienceGrowsWithTheLoad(t *testing.T) {
	for _, tt := range []struct {
		load       float64
		processors int
		want       time.Duration
	}{
		{0, 2, 40 * time.Millisecond},
		{2, 2, 40 * time.Millisecond},
		{3, 2, 60 * time.Millisecond},
		{3, 64, 40 * time.Millisecond},
		{20, 2, 400 * time.Millisecond},
		{1000, 1, 400 * time.Millisecond},
	} {
		if got := patienceAt(tt.load, tt.processors); got != tt.want {
			t.Errorf("a load of %v on %d processors: %v, want %v", tt.load, tt.processors, got, tt.want)
		}
	}
	if got := loadedPatience(); got < patience || got > maxPatience {
		t.Errorf("on this machine: %v", got)
	}
}
