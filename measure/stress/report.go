//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/seed22601231/connectx/measure/internal/machine"
)

// write writes down what has come of the run, and on which machine.
func (r *result) write(w io.Writer) {
	l := r.options.layout
	whole, outside := l.whole(), l.outside()
	fmt.Fprintf(w, "%d processes of %d goroutines for %v, on the ports %v and, with PortRange, %v;\n", l.Processes, l.Each, r.elapsed, whole, outside)
	fmt.Fprintf(w, "%d destinations of each family that all dial, and one for each goroutine. Seed %d.\n", sharedDestinations, r.options.seed)
	fmt.Fprintf(w, "%s, %d cores of %s, %s, %s\n", machine.Kernel(), runtime.NumCPU(), machine.Processor(), runtime.Version(), time.Now().UTC().Format(time.DateOnly))
	if r.missing != "" {
		fmt.Fprintf(w, "Without %s.\n", r.missing)
	}
	fmt.Fprintln(w)

	fmt.Fprintf(w, "%-38s %9s %9s %9s %9s %9s %9s\n", "", "dials", "connected", "exhausted", "conflict", "held", "spurious")
	for _, kind := range slices.Sorted(maps.Keys(r.tally.Dials)) {
		writeOutcomes(w, kind, r.tally.Dials[kind])
	}
	writeOutcomes(w, "all", r.tally.total())
	fmt.Fprintln(w)

	line := func(title string, n int) { fmt.Fprintf(w, "%-48s %9d\n", title, n) }
	line("dials that nothing may stop", r.tally.Certain)
	line("echoes", r.tally.Echoes)
	line("datagrams sent to listeners", r.tally.Sent)
	line("  received", r.tally.Received)
	line("processes killed", len(r.deaths))
	line("  answers to them that came to their successors", r.late)
	line("dumps of all sockets", r.tally.Dumps)
	line("  4-tuples that seemed to be there twice", r.tally.Passing)
	line("4-tuples had at the end", r.regained)
	fmt.Fprintln(w)
	for _, p := range promises {
		line(string(p), r.count(p))
	}
}

func writeOutcomes(w io.Writer, kind string, o Outcomes) {
	fmt.Fprintf(w, "%-38s %9d %9d %9d %9d %9d %9d\n", kind, o.Dials, o.Connected, o.Exhausted, o.Conflict, o.Held, o.Spurious)
}

// maxDetails bounds how many failures the verdict names, of each promise.
const maxDetails = 10

// verdict is nil if all promises were kept, and everybody has done something. Else
// it has the details, and how to repeat the run.
func (r *result) verdict() error {
	var b strings.Builder
	for _, p := range promises {
		n := 0
		for _, f := range r.failures {
			if f.Promise != p {
				continue
			}
			if n++; n <= maxDetails {
				fmt.Fprintf(&b, "%s: %s%s\n", p, f.What, r.deathBefore(f.At))
			}
		}
		if n > maxDetails {
			fmt.Fprintf(&b, "%s: and %d more\n", p, n-maxDetails)
		}
	}
	if b.Len() == 0 {
		return nil
	}
	fmt.Fprintf(&b, "repeat with: stress %s", r.options.flags())
	return errors.New(b.String())
}
