// Ratios reads the output of several runs of the benchmarks and prints how
// connectx.Dialer compares: the median of the quotients of each run, beside the
// limit that it should keep.
//
//	ratios bin/bench.txt ...
//
// Both sides of a quotient come from one run, in which they followed each other
// closely; what else the machine was doing affects both.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
)

// results are the values of each benchmark and unit, in the order of the runs.
type results map[quantity][]float64

// A quantity is what a benchmark reports in a unit. The name has no "Benchmark"
// in front and no number of processors behind.
type quantity struct{ name, unit string }

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: ratios file ...")
		os.Exit(2)
	}
	r := results{}
	for _, name := range os.Args[1:] {
		if err := r.readFile(name); err != nil {
			fmt.Fprintln(os.Stderr, "ratios:", err)
			os.Exit(1)
		}
	}
	if err := r.print(os.Stdout, rows(r)); err != nil {
		fmt.Fprintln(os.Stderr, "ratios:", err)
		os.Exit(1)
	}
}

func (r results) readFile(name string) error {
	file, err := os.Open(name)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := r.read(file); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// read takes in benchmark results: lines of a name, a number of iterations, and
// pairs of a value and its unit.
func (r results) read(from io.Reader) error {
	lines := bufio.NewScanner(from)
	for n := 1; lines.Scan(); n++ {
		fields := strings.Fields(lines.Text())
		if len(fields) < 4 || !strings.HasPrefix(fields[0], "Benchmark") {
			continue
		}
		name := strings.TrimPrefix(fields[0], "Benchmark")
		if at := strings.LastIndex(name, "-"); at >= 0 {
			if _, err := strconv.Atoi(name[at+1:]); err == nil {
				name = name[:at]
			}
		}
		for pair := range slices.Chunk(fields[2:], 2) {
			value, err := strconv.ParseFloat(pair[0], 64)
			if err != nil || len(pair) < 2 {
				return fmt.Errorf("line %d is not a benchmark result: %q", n, lines.Text())
			}
			q := quantity{name, pair[1]}
			r[q] = append(r[q], value)
		}
	}
	return lines.Err()
}

// print prints the rows whose benchmarks have been run.
func (r results) print(to io.Writer, rows []row) error {
	w := bufio.NewWriter(to)
	group := ""
	missed, runs := 0, 0
	for _, row := range rows {
		value, low, high, n, err := row.evaluate(r)
		if err != nil {
			return err
		}
		if n == 0 {
			continue
		}
		runs = max(runs, n)
		if row.group != group {
			group = row.group
			fmt.Fprintf(w, "\n%s\n%-58s %8s  %-18s %s\n", group, "", "median", "range of the runs", "limit")
		}
		verdict := ""
		switch {
		case row.limit == 0:
		case row.keeps(value):
			verdict = "kept"
		default:
			verdict = "MISSED"
			missed++
		}
		line := fmt.Sprintf("  %-56s %8s  %-18s %-8s %s", row.name, number(value), number(low)+" to "+number(high), row.limitText(), verdict)
		fmt.Fprintln(w, strings.TrimRight(line, " "))
	}
	if runs == 0 {
		return errors.New("none of the benchmarks has been run")
	}
	fmt.Fprintf(w, "\n%d runs, %d limits missed\n", runs, missed)
	return w.Flush()
}

func number(f float64) string {
	if f < 0.1 && f > -0.1 {
		return strconv.FormatFloat(f, 'f', 3, 64)
	}
	return strconv.FormatFloat(f, 'f', 2, 64)
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}
