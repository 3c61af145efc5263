//go:build linux

package main

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"time"

	"github.com/seed22601231/connectx/measure/internal/machine"
)

const columns = "  held  RSS KiB heap KiB descriptors netlink goroutines  dials errors   udp p50    p99   tcp p50    p99"

func (u usage) row() string {
	return fmt.Sprintf("%8d %8d %11d %7d %10d", u.resident>>10, u.heap>>10, u.all(), u.netlink, u.goroutines)
}

func (s sample) row() string {
	us := func(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
	return fmt.Sprintf("%6d %s %6d %6d %9.0f %6.0f %9.0f %6.0f", s.held, s.usage.row(), s.dials, s.failed,
		us(s.p50[udp]), us(s.p99[udp]), us(s.p50[tcp]), us(s.p99[tcp]))
}

// write writes down what has come of the run, and on which machine.
func (r *run) write(w io.Writer) {
	o := r.options
	fmt.Fprintf(w, "%d goroutines, %d destinations of each family, %d ports, a sample every %v; %s\n", o.workers, destinations, o.ports, o.interval(), o.flags())
	fmt.Fprintf(w, "%s, %d cores of %s, %s, %s\n\n", machine.Kernel(), runtime.NumCPU(), machine.Processor(), runtime.Version(), time.Now().UTC().Format(time.DateOnly))

	fmt.Fprintf(w, "%-10s%s   (dials since the sample before; times in µs)\n", "", columns)
	fmt.Fprintf(w, "%-10s%6d %s\n", "before", 0, r.before.row())
	if n := len(r.samples); n > 0 {
		for i, at := range []int{0, n / 4, n / 2, n * 3 / 4, n - 1} {
			fmt.Fprintf(w, "%-10s%s\n", [...]string{"start", "1/4", "1/2", "3/4", "end"}[i], r.samples[at].row())
		}
	}
	fmt.Fprintf(w, "%-10s%6d %s\n\n", "idle", r.flows.held(), r.after.row())

	for _, g := range growths(r.samples) {
		fmt.Fprintln(w, g)
	}
	switch n := len(r.samples); {
	case n < minSamples:
		fmt.Fprintf(w, "%d samples are too few to compare quarters of them\n", n)
	case len(growths(r.samples)) < 2+2*int(protocols):
		fmt.Fprintf(w, "times are not compared: it takes %d dials a quarter, and a run of %v\n", minDials, shortRun)
	}
	fmt.Fprintln(w)

	line := func(title string, n int) { fmt.Fprintf(w, "%-44s %9d\n", title, n) }
	t := &r.tally
	for p := range protocols {
		line("connections of "+p.String(), t.connected[p])
	}
	line("echoes", t.echoes)
	line("server killed", r.faults.server.count())
	line("source addresses removed", r.faults.address.count())
	line("limit of descriptors reached", r.faults.files.count())
	line("route changes", r.storm.changes)
	line("foreign sockets tried", r.foreignTried())
	line("threads on which a system call failed", int(r.broken.Load()))
	line("namespaces", r.namespaces.n)
	line("4-tuples had at the end", r.regained)
	for _, name := range byCount(t.errors) {
		line("dials that failed with "+name, t.errors[name])
	}
	for _, why := range byCount(t.reasons) {
		line("dials that failed because: "+string(why), t.reasons[why])
	}
	for _, why := range byCount(t.losses) {
		line("connections lost because: "+string(why), t.losses[why])
	}
}

// foreignTried is how many foreign sockets there have been, or have failed to get
// their port.
func (r *run) foreignTried() int {
	n := 0
	for i := range allFlows {
		f := flowOf(i)
		if f.destination > 0 {
			continue
		}
		for port := range r.options.ports {
			n += r.flows.foreignAt(f, port).count()
		}
	}
	return n
}

func byCount[K cmp.Ordered](counts map[K]int) []K {
	return slices.SortedFunc(maps.Keys(counts), func(a, b K) int {
		return cmp.Or(cmp.Compare(counts[b], counts[a]), cmp.Compare(a, b))
	})
}
