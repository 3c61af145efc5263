//go:build linux

package main

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/seed22601231/connectx/kernels/internal/job"
)

// A column is what a kernel has done.
type column struct {
	name string // as on the command line
	runs []*machineRun
	took time.Duration
}

// title is the kernel's name in the table.
func (c *column) title() string {
	if c.name == running {
		return running
	}
	return "Debian " + suites[c.name]
}

func (c *column) results() (all []*result) {
	for _, r := range c.runs {
		all = append(all, r.results...)
	}
	return all
}

func (c *column) features() (all []job.Feature) {
	all = append(all, c.runs[0].features...)
	all = append(all, job.Feature{Name: "accelerator", Value: c.runs[0].accel},
		job.Feature{Name: "time", Value: c.took.Round(time.Second).String()})
	return all
}

const about = `# Kernels

What ` + "`make kernels`" + ` has printed: the tests of the library on the running kernel, and in
virtual machines on those of Debian, with as many modules as Debian loads. "none"
is no virtual machine; under tcg the processor is emulated, and slow. Features are
found out by trying, except for the hash table, which is a function in kallsyms.
Tests are counted with their parts.

`

// table writes down, in Markdown, what all kernels have done.
func table(columns []*column) string {
	var b strings.Builder
	b.WriteString(about)
	row := func(name string, cell func(*column) string) {
		fmt.Fprintf(&b, "| %s |", name)
		for _, c := range columns {
			fmt.Fprintf(&b, " %s |", cell(c))
		}
		b.WriteString("\n")
	}
	row("", (*column).title)
	fmt.Fprintf(&b, "|---|%s\n", strings.Repeat("---|", len(columns)))
	for _, name := range featureNames(columns) {
		row(name, func(c *column) string { return c.feature(name) })
	}
	for _, name := range rowNames(columns) {
		row(name, func(c *column) string { return c.cell(name) })
	}
	writeList(&b, "Skipped", "the tests that have skipped themselves, and why", skipped(columns))
	writeList(&b, "Left out", "the tests that were not run, and why", leftOutTests(columns))
	b.WriteString("\n## Techniques\n\nWhat the kernels do with other ways to connect (TestTechniques).\n\n")
	b.WriteString(techniqueDifferences(columns))
	return b.String()
}

// featureNames and rowNames are in the order in which the first kernel that has
// each of them has it.
func featureNames(columns []*column) (names []string) {
	for _, c := range columns {
		for _, f := range c.features() {
			if !slices.Contains(names, f.Name) {
				names = append(names, f.Name)
			}
		}
	}
	return names
}

func rowNames(columns []*column) (names []string) {
	for _, c := range columns {
		for _, r := range c.results() {
			if !slices.Contains(names, r.task.row) {
				names = append(names, r.task.row)
			}
		}
	}
	return names
}

func (c *column) feature(name string) string {
	for _, f := range c.features() {
		if f.Name == name {
			return f.Value
		}
	}
	return "-"
}

func (c *column) cell(name string) string {
	for _, r := range c.results() {
		if r.task.row == name {
			return r.cell()
		}
	}
	return "-"
}

// A where says in which rows of which kernels something holds.
type where map[string][]string // titles of kernels by row

// skipped are the tests that have skipped themselves, with the reason.
func skipped(columns []*column) map[string]where {
	all := make(map[string]where)
	for _, c := range columns {
		for _, r := range c.results() {
			for _, t := range r.tests {
				if t.action == "skip" {
					note(all, fmt.Sprintf("%s: %s", t.name, t.reason()), r.task.row, c.title())
				}
			}
		}
	}
	return all
}

// leftOutTests are those that were not run, with the reason.
func leftOutTests(columns []*column) map[string]where {
	all := make(map[string]where)
	for _, c := range columns {
		for _, r := range c.results() {
			for _, l := range r.task.leftOut {
				note(all, fmt.Sprintf("%s: %s", l.tests, l.reason), r.task.row, c.title())
			}
		}
	}
	return all
}

func note(all map[string]where, what, row, kernel string) {
	if all[what] == nil {
		all[what] = make(where)
	}
	all[what][row] = append(all[what][row], kernel)
}

func writeList(b *strings.Builder, title, what string, all map[string]where) {
	fmt.Fprintf(b, "\n## %s\n\nThese are %s.\n\n", title, what)
	if len(all) == 0 {
		b.WriteString("None.\n")
	}
	for _, line := range slices.Sorted(maps.Keys(all)) {
		var places []string
		for _, row := range slices.Sorted(maps.Keys(all[line])) {
			places = append(places, fmt.Sprintf("%s (%s)", row, strings.Join(all[line][row], ", ")))
		}
		fmt.Fprintf(b, "- %s. In %s.\n", line, strings.Join(places, "; "))
	}
}

// techniqueLine is one of the table that TestTechniques logs.
var techniqueLine = regexp.MustCompile(`(?m)^\s*((?:tcp|udp)[46]  .*\S)\s*$`)

// techniques are the lines of that table.
func (c *column) techniques() (lines []string) {
	for _, r := range c.results() {
		if r.task.row != "connectx" {
			continue
		}
		for _, t := range r.tests {
			if t.name != "TestTechniques" {
				continue
			}
			for _, found := range techniqueLine.FindAllStringSubmatch(t.output, -1) {
				lines = append(lines, found[1])
			}
		}
	}
	return lines
}

// techniqueDifferences compares the kernels with the first one.
func techniqueDifferences(columns []*column) string {
	var b strings.Builder
	first := columns[0].techniques()
	if len(first) == 0 {
		return "TestTechniques was not run.\n"
	}
	fmt.Fprintf(&b, "%d lines on %s:\n\n```\n%s\n```\n", len(first), columns[0].title(), strings.Join(first, "\n"))
	for _, c := range columns[1:] {
		lines := c.techniques()
		var other []string
		for _, line := range lines {
			if !slices.Contains(first, line) {
				other = append(other, line)
			}
		}
		switch {
		case len(lines) != len(first):
			fmt.Fprintf(&b, "\n%s has %d lines.\n", c.title(), len(lines))
		case len(other) == 0:
			fmt.Fprintf(&b, "\n%s does the same.\n", c.title())
		default:
			fmt.Fprintf(&b, "\n%s does otherwise:\n\n```\n%s\n```\n", c.title(), strings.Join(other, "\n"))
		}
	}
	return b.String()
}
