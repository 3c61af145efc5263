//go:build linux

package main

import (
	"fmt"
	"regexp"
	"runtime"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/seed22601231/connectx/measure/internal/machine"
)

// newReport writes down what was measured, and on which machine.
func newReport(results []*result) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Connections held at once from one source address, %s, in the ephemeral port\n", source)
	fmt.Fprintf(&b, "range %d-%d of %s ports.\n%s\n\n", defaultPorts.low, defaultPorts.high, group(defaultPorts.size()), describe())

	w := tabwriter.NewWriter(&b, 0, 0, 3, ' ', 0)
	row := func(title string, cell func(*result) string) {
		fmt.Fprint(w, title)
		for _, r := range results {
			fmt.Fprint(w, "\t", cell(r))
		}
		fmt.Fprintln(w)
	}
	count := func(title string, n func(*result) int) {
		row(title, func(r *result) string { return group(n(r)) })
	}
	row("", func(r *result) string { return r.plan.protocol() })
	count("connections", func(r *result) int { return r.plan.total })
	row("net.Dialer stops at", func(r *result) string {
		if r.net.failure == "" {
			return "not up to " + group(r.net.opened)
		}
		return group(r.net.opened)
	})
	row("", func(*result) string { return "" })
	count("destinations", func(r *result) int { return len(r.plan.destinations()) })
	count("  with every port taken", (*result).full)
	count("processes", func(r *result) int { return r.processes })
	count("  dialling at a time", func(r *result) int { return r.atOnce })
	count("dials per second", func(r *result) int { return int(float64(r.plan.total) / r.elapsed.Seconds()) })
	row("  p50 of a dial", func(r *result) string { return micros(r.p50) })
	row("  p99 of a dial", func(r *result) string { return micros(r.p99) })
	row("  longest", func(r *result) string { return micros(r.max) })
	row("", func(*result) string { return "" })
	count("in sock_diag", func(r *result) int { return r.tuples.total })
	count("  4-tuple there already", func(r *result) int { return r.tuples.duplicates })
	count("got their own bytes", func(r *result) int { return r.tally.Own })
	count("  got wrong bytes", func(r *result) int { return r.tally.Wrong })
	count("  got none", func(r *result) int { return r.tally.Missing })
	count("  sent again", func(r *result) int { return r.tally.Again })
	row("", func(*result) string { return "" })
	row("kernel memory, each", func(r *result) string {
		if r.plan.tcp() {
			return fmt.Sprintf("%.0f B for both ends", r.kernelBytes)
		}
		return fmt.Sprintf("%.0f B", r.kernelBytes)
	})
	row("process memory, each", func(r *result) string { return fmt.Sprintf("%.0f B", r.processBytes) })
	w.Flush()

	fmt.Fprintln(&b, "\nnet.Dialer, with the same LocalAddr:")
	for _, r := range results {
		failure := r.net.failure
		if failure == "" {
			failure = "no error"
		}
		fmt.Fprintf(&b, "  %s after %s: %s\n", r.plan.protocol(), group(r.net.opened), failure)
	}
	fmt.Fprint(&b, notes)
	return trailing.ReplaceAllString(b.String(), "")
}

// trailing is what tabwriter leaves in the last column.
var trailing = regexp.MustCompile(`(?m) +$`)

const notes = `
All processes dial every destination; none knows which ports the others have.
The bytes went over the connections once all were open. Kernel memory is what
Slab in /proc/meminfo had grown by once they were: an upper limit, since there is
also what other programs leave there, such as those that list /proc/*/fd. Process
memory is what the processes that dial had grown by, after a garbage collection.
`

func micros(d time.Duration) string {
	return group(int(d.Round(time.Microsecond)/time.Microsecond)) + " µs"
}

// describe names the kernel, the processor, the date and the like, as far as they
// can be found out.
func describe() string {
	memory := ""
	if info, err := machine.Kilobytes("/proc/meminfo", "MemTotal"); err == nil {
		memory = fmt.Sprintf(", %.0f GiB", float64(info["MemTotal"])/(1<<30))
	}
	return fmt.Sprintf("%s, %d cores of %s%s, %s, %s", machine.Kernel(), runtime.NumCPU(), machine.Processor(), memory,
		runtime.Version(), time.Now().UTC().Format(time.DateOnly))
}
