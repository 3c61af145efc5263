package main

import (
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/seed22601231/connectx/internal/terminal"
)

// A progress shows the round that is running: on a terminal as a line that
// changes, elsewhere only its result.
type progress struct {
	w        io.Writer
	terminal bool
	prefix   string
	shown    int // length of what is on the terminal's line
	last     time.Time
}

func newProgress(w io.Writer) *progress {
	return &progress{w: w, terminal: terminal.Is(w)}
}

func (p *progress) begin(technique, column string) {
	p.prefix = fmt.Sprintf("%-24s %s  ", technique, column)
}

// update replaces the line, not more often than one can see.
func (p *progress) update(format string, args ...any) {
	const interval = 40 * time.Millisecond
	if now := time.Now(); p.terminal && now.Sub(p.last) >= interval {
		p.last = now
		p.show(fmt.Sprintf(format, args...))
	}
}

// line shows the line for good.
func (p *progress) line(format string, args ...any) {
	p.show(fmt.Sprintf(format, args...))
	p.shown = 0
	fmt.Fprintln(p.w)
}

// end leaves a line that was not finished.
func (p *progress) end() {
	if p.shown > 0 {
		p.shown = 0
		fmt.Fprintln(p.w)
	}
}

func (p *progress) show(s string) {
	s = p.prefix + s
	if !p.terminal {
		fmt.Fprint(p.w, s)
		return
	}
	n := utf8.RuneCountInString(s)
	fmt.Fprintf(p.w, "\r%s%s", s, strings.Repeat(" ", max(0, p.shown-n)))
	p.shown = n
}
