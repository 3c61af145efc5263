//go:build linux

package main

import (
	_ "embed"
	"fmt"
	"io"
	"runtime"
	"strings"
	"time"

	"github.com/seed22601231/connectx/measure/internal/machine"
)

// heading is what comes before the table.
//
//go:embed heading.md
var heading string

// writeTable writes what has come of the mutations, and on which machine. missing
// says what could not be run there.
func writeTable(w io.Writer, rows []row, missing string) {
	fmt.Fprintln(w, heading)
	fmt.Fprintln(w, "| mutation | caught by | after |")
	fmt.Fprintln(w, "|---|---|---|")
	for _, r := range rows {
		by, after := r.cells()
		fmt.Fprintf(w, "| %s | %s | %s |\n", r.name, by, after)
	}
	fmt.Fprintf(w, "\n%s, %d cores of %s, %s, %s.", machine.Kernel(), runtime.NumCPU(), machine.Processor(), runtime.Version(), time.Now().UTC().Format(time.DateOnly))
	if missing != "" {
		fmt.Fprint(w, " "+missing)
	}
	fmt.Fprintln(w)
}

// cells says what has caught the mutation, and after how long.
func (r *row) cells() (by, after string) {
	switch {
	case r.err != nil:
		first, _, _ := strings.Cut(r.err.Error(), "\n")
		return "**error: " + first + "**", ""
	case len(r.caught) == 0:
		return "**nothing**", ""
	}
	var names, times []string
	for _, o := range r.caught {
		names, times = append(names, o.red), append(times, o.after)
	}
	for _, c := range r.missed {
		names = append(names, "not by "+c.String())
	}
	return strings.Join(names, "; "), strings.Join(times, "; ")
}
