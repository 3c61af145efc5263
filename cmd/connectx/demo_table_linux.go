package main

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// writeTable writes one line a technique: the connections held in each column,
// and of all columns together the errors and the misdelivered echoes.
func writeTable(w io.Writer, st *stage, rows []row) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	heads := []string{"technique"}
	for _, c := range st.columns {
		heads = append(heads, c.title)
	}
	heads = append(heads, "TCP stopped by", "UDP stopped by", "misdelivered")
	fmt.Fprintln(tw, strings.Join(heads, "\t"))
	for _, r := range rows {
		cells := []string{r.technique.name}
		for i, c := range st.columns {
			cells = append(cells, heldCell(st, &c, r.results[i]))
		}
		cells = append(cells, r.stopsCell(st, true), r.stopsCell(st, false), fmt.Sprint(r.total().misdelivered))
		fmt.Fprintln(tw, strings.Join(cells, "\t"))
	}
	return tw.Flush()
}

// heldCell is "held/possible", or the reason why there is no such number.
func heldCell(st *stage, c *column, r *result) string {
	switch {
	case c.unavailable:
		return "no " + c.family()
	case r == nil:
		return "-"
	default:
		return fmt.Sprintf("%d/%d", r.held, st.possible())
	}
}

// stopsCell is what stopped a technique in the TCP or the UDP columns.
func (r *row) stopsCell(st *stage, tcp bool) string {
	var names []string
	for i, res := range r.results {
		if res == nil || st.columns[i].tcp() != tcp {
			continue
		}
		names = append(names, res.stops...)
		if len(res.stops) == 0 {
			names = append(names, "no error")
		}
	}
	if len(names) == 0 {
		return "-"
	}
	slices.Sort(names)
	return strings.Join(slices.Compact(names), ", ")
}

// columns is how many columns the technique was tried in.
func (r *row) columns() int {
	n := 0
	for _, res := range r.results {
		if res != nil {
			n++
		}
	}
	return n
}

// total is the tally of all columns.
func (r *row) total() tally {
	var t tally
	for _, res := range r.results {
		if res != nil {
			t.add(res.tally)
		}
	}
	return t
}

// writeSummary says in words what there is to see in the table.
func writeSummary(w io.Writer, st *stage, rows []row) {
	var held []string
	var ours, unlocked tally
	tuples := 0 // of the columns without the lock
	for _, r := range rows {
		switch {
		case r.technique.udpOnly:
			unlocked.add(r.total())
			tuples += r.columns() * st.possible()
			continue
		case r.technique.ours:
			ours.add(r.total())
		}
		held = append(held, r.technique.name+" "+r.fewest(st))
	}
	fmt.Fprintf(w, "\nOf %d connections to %d destinations, %s.\n", st.possible(), st.destinations, strings.Join(held, ", "))
	fmt.Fprintf(w, "Without the lock, %d UDP sockets were on %d 4-tuples, and %d echoes came to the wrong one; with connectx, %d of %d did.\n",
		unlocked.sent(), tuples, unlocked.misdelivered, ours.misdelivered, ours.sent())
}

// fewest says how many connections were held in the worst column.
func (r *row) fewest(st *stage) string {
	worst := -1
	for i, res := range r.results {
		if res != nil && (worst < 0 || res.held < r.results[worst].held) {
			worst = i
		}
	}
	switch {
	case worst < 0:
		return "was not tried"
	case r.results[worst].held == st.possible():
		return "held all"
	default:
		return fmt.Sprintf("held as few as %d (%s)", r.results[worst].held, st.columns[worst].title)
	}
}

// verdict returns an error that names everything that connectx has not held to.
func verdict(st *stage, rows []row) error {
	var broken []error
	checked := 0
	for _, r := range rows {
		for i, res := range r.results {
			if !r.technique.ours || res == nil {
				continue
			}
			checked++
			if res.held != st.possible() || res.misdelivered != 0 || res.missing != 0 {
				broken = append(broken, fmt.Errorf("%s, %s: held %d of %d, %d echoes missing, %d misdelivered",
					r.technique.name, st.columns[i].title, res.held, st.possible(), res.missing, res.misdelivered))
				if res.example != nil {
					broken = append(broken, fmt.Errorf("the last error of it: %w", res.example))
				}
			}
		}
	}
	if checked == 0 {
		return errors.New("neither IPv4 nor IPv6 is available")
	}
	return errors.Join(broken...)
}
