//go:build linux

package main

import (
	"fmt"
	"io"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/seed22601231/connectx/internal/terminal"
)

// A progress shows how far the measurement is: on a terminal as a bar, elsewhere
// as a line for each step.
type progress struct {
	w   io.Writer
	bar *progressbar.ProgressBar // nil if w is not a terminal
}

func newProgress(w io.Writer, steps int) *progress {
	p := &progress{w: w}
	if terminal.Is(w) {
		p.bar = progressbar.NewOptions(steps,
			progressbar.OptionSetWriter(w),
			progressbar.OptionSetWidth(30),
			progressbar.OptionSetPredictTime(false),
			progressbar.OptionThrottle(50*time.Millisecond),
			progressbar.OptionClearOnFinish(),
		)
	}
	return p
}

// step says that one occupancy has been measured.
func (p *progress) step(what string, occupancy float64) {
	if p.bar == nil {
		fmt.Fprintf(p.w, "%s: %g %%\n", what, occupancy)
		return
	}
	p.bar.Describe(fmt.Sprintf("%-36s", fmt.Sprintf("%s: %g %%", what, occupancy)))
	_ = p.bar.Add(1)
}

// end leaves the line of the bar.
func (p *progress) end() {
	if p.bar != nil {
		_ = p.bar.Finish()
	}
}
