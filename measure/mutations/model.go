//go:build linux

package main

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// model is a mutation that the model of the lock has as well, by its name in
// model/check. That runs once and tells of all of them.
type model string

func (c model) String() string { return "model" }

func (c model) run(ctx context.Context, t *tree, m *mutation, _ string) (outcome, error) {
	if t.model == nil {
		out, err := t.command(ctx, t.root, filepath.Join(t.root, "model", "check")).CombinedOutput()
		if err != nil {
			return outcome{}, fmt.Errorf("model/check: %w: %s", err, out)
		}
		t.model = parseModel(string(out))
	}
	states, ok := t.model[string(c)]
	switch {
	case !ok:
		return outcome{}, fmt.Errorf("the list is out of date: model/check has no mutation %q", string(c))
	case m == nil:
		return outcome{}, nil // the model without mutations holds, or check had failed
	}
	return outcome{red: "model", after: states + " states"}, nil
}

var counterexample = regexp.MustCompile(`(?m)^ *(\d+) states  counterexample found, as it must: (.*)$`)

// parseModel returns how many states it took to find a counterexample, of each
// that model/check tells of.
func parseModel(out string) map[string]string {
	states := make(map[string]string)
	for _, found := range counterexample.FindAllStringSubmatch(out, -1) {
		states[found[2]] = found[1]
	}
	return states
}

// withoutModel says why the model cannot be checked here, if it cannot.
func withoutModel() string {
	var missing []string
	for _, tool := range []string{"spin", "gcc"} {
		if _, err := exec.LookPath(tool); err != nil {
			missing = append(missing, tool)
		}
	}
	if missing == nil {
		return ""
	}
	return "Without the model, because there is no " + strings.Join(missing, " and no ") + "."
}

// leaveOutModel returns the mutations without the model among their catchers, and
// without those that nothing else would catch.
func leaveOutModel(mutations []*mutation) []*mutation {
	var rest []*mutation
	for _, m := range mutations {
		without := *m
		without.catchers = slices.DeleteFunc(slices.Clone(m.catchers), func(c catcher) bool { _, ok := c.(model); return ok })
		if len(without.catchers) > 0 {
			rest = append(rest, &without)
		}
	}
	return rest
}
