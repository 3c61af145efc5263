//go:build linux

package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// A row is what has come of one mutation.
type row struct {
	*mutation
	caught []outcome
	missed []catcher // ran, and were green
	err    error     // why the mutation says nothing
}

// checkGreen runs all catchers with nothing broken.
func (t *tree) checkGreen(ctx context.Context, mutations []*mutation, progress io.Writer) error {
	all := unbroken(mutations)
	for i, c := range all {
		start := time.Now()
		o, err := c.run(ctx, t, nil, "")
		if err == nil && o.red != "" {
			err = fmt.Errorf("%s is red: %s", o.red, o.said)
		}
		if err != nil {
			return fmt.Errorf("with nothing broken: %s: %w", c, err)
		}
		fmt.Fprintf(progress, "nothing broken %d/%d: %s: green, %s\n", i+1, len(all), c, seconds(time.Since(start)))
	}
	return nil
}

// unbroken returns what runs all catchers once, with as few builds as it takes.
func unbroken(mutations []*mutation) []catcher {
	type key struct {
		dir   string
		count int
		race  bool
	}
	names := make(map[key][]string)
	var (
		all     []catcher
		longest stress
	)
	for _, m := range mutations {
		for _, c := range m.catchers {
			switch c := c.(type) {
			case tests:
				k := key{c.dir, c.count, c.race}
				names[k] = append(names[k], strings.Split(c.names, "|")...)
			case stress:
				longest = max(longest, c)
			default:
				if !slices.Contains(all, catcher(c)) {
					all = append(all, c)
				}
			}
		}
	}
	if longest > 0 {
		all = append(all, longest)
	}
	for k, n := range names {
		slices.Sort(n)
		all = append(all, tests{dir: k.dir, names: strings.Join(slices.Compact(n), "|"), count: k.count, race: k.race})
	}
	slices.SortFunc(all, func(a, b catcher) int { return cmp.Compare(a.String(), b.String()) })
	return all
}

// breakAll runs the catchers of each mutation.
func (t *tree) breakAll(ctx context.Context, mutations []*mutation, progress io.Writer) ([]row, error) {
	var rows []row
	for i, m := range mutations {
		fmt.Fprintf(progress, "%d/%d: %s: ", i+1, len(mutations), m.name)
		r, err := t.catch(ctx, m)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err != nil {
			return nil, err
		}
		fmt.Fprintln(progress, r.String())
		rows = append(rows, r)
	}
	return rows, nil
}

// catch runs the catchers of one mutation.
func (t *tree) catch(ctx context.Context, m *mutation) (row, error) {
	overlay, err := t.overlay(m)
	if err != nil {
		return row{}, err
	}
	r := row{mutation: m}
	for _, c := range m.catchers {
		switch o, err := c.run(ctx, t, m, overlay); {
		case err != nil:
			r.err = err
			return r, nil
		case o.red == "":
			r.missed = append(r.missed, c)
		default:
			r.caught = append(r.caught, o)
		}
	}
	return r, nil
}

// String is the row as a line.
func (r *row) String() string {
	if r.err != nil {
		return r.err.Error()
	}
	var parts []string
	for _, o := range r.caught {
		parts = append(parts, o.red+" after "+o.after)
	}
	for _, c := range r.missed {
		parts = append(parts, "not "+c.String())
	}
	if len(r.caught) == 0 {
		return "SURVIVES: " + strings.Join(parts, "; ")
	}
	return strings.Join(parts, "; ")
}

// verdict is nil if every mutation was caught.
func verdict(rows []row) error {
	var bad []string
	for _, r := range rows {
		if r.err != nil || len(r.caught) == 0 {
			bad = append(bad, "\n"+r.name+": "+r.String())
		}
	}
	if bad == nil {
		return nil
	}
	return fmt.Errorf("%d of %d mutations were not caught:%s", len(bad), len(rows), strings.Join(bad, ""))
}
