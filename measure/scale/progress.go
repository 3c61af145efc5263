//go:build linux

package main

import (
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/seed22601231/connectx/internal/terminal"
)

// A progress shows how far one step has come: on a terminal as a bar, elsewhere
// as a line now and then.
type progress struct {
	bar *progressbar.ProgressBar // nil if not on a terminal

	w     io.Writer
	title string
	total int

	mu   sync.Mutex
	done int
	last time.Time
}

func newProgress(w io.Writer, title string, total int) *progress {
	p := &progress{w: w, title: title, total: total, last: time.Now()}
	if terminal.Is(w) {
		p.bar = progressbar.NewOptions(total,
			progressbar.OptionSetWriter(w),
			progressbar.OptionSetDescription(fmt.Sprintf("%-28s", title)),
			progressbar.OptionShowCount(),
			progressbar.OptionShowIts(),
			progressbar.OptionSetWidth(20),
			progressbar.OptionThrottle(100*time.Millisecond),
		)
	}
	return p
}

func (p *progress) add(n int) {
	const interval = 5 * time.Second
	if p.bar != nil {
		_ = p.bar.Add(n)
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done += n
	if now := time.Now(); now.Sub(p.last) >= interval {
		p.last = now
		p.line()
	}
}

// end is to be called when the step is over, done or not.
func (p *progress) end() {
	if p.bar != nil {
		_ = p.bar.Exit()
		fmt.Fprintln(p.w)
		return
	}
	p.line()
}

func (p *progress) line() {
	fmt.Fprintf(p.w, "%-28s %9d of %d\n", p.title, p.done, p.total)
}
