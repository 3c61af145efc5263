//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/seed22601231/connectx/kernels/internal/job"
)

// A machineRun is what one machine has reported.
type machineRun struct {
	accel, parameters string
	tasks             []task
	features          []job.Feature
	results           []*result // of the tasks that have ended
	output            strings.Builder
	done              bool
	problem           string // why it has not reported all
	took              time.Duration
}

// A result is that of one task.
type result struct {
	task  task
	end   job.End
	tests []test
	text  string // what the program has printed, as test2json reads it
}

// A test is one that has ended, or a part of one.
type test struct {
	name   string
	action string // pass, skip or fail
	output string
}

// add takes in a line of the report.
func (r *machineRun) add(line job.Line, progress io.Writer) error {
	switch {
	case line.Feature != nil:
		r.features = append(r.features, *line.Feature)
	case line.Done:
		r.done = true
	case line.Job != len(r.results) || line.Job >= len(r.tasks):
		return fmt.Errorf("a report of job %d, while job %d of %d is running", line.Job, len(r.results), len(r.tasks))
	case line.End != nil:
		t := r.tasks[line.Job]
		res := &result{task: t, end: *line.End, text: r.output.String()}
		r.output.Reset()
		tests, err := parseTests(res.text)
		if err != nil {
			return err
		}
		res.tests = tests
		r.results = append(r.results, res)
		fmt.Fprintf(progress, "  %-50s %s\n", t.row, res.cell())
		for _, f := range res.failures() {
			fmt.Fprint(progress, indent(f))
		}
	default:
		r.output.WriteString(line.Output)
	}
	return nil
}

// parseTests has test2json make events of what a test binary prints.
func parseTests(text string) ([]test, error) {
	cmd := exec.Command("go", "tool", "test2json")
	cmd.Stdin = strings.NewReader(text)
	events, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go tool test2json: %w", err)
	}
	return parseEvents(events)
}

// parseEvents reads the events of test2json. A test that was running when the
// program ended has failed.
func parseEvents(events []byte) ([]test, error) {
	var tests []test
	output := make(map[string]string)
	started := make(map[string]bool)
	for decoder := json.NewDecoder(bytes.NewReader(events)); ; {
		var e struct{ Action, Test, Output string }
		if err := decoder.Decode(&e); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
		switch {
		case e.Test == "":
		case e.Action == "run":
			started[e.Test] = true
		case e.Action == "output":
			output[e.Test] += e.Output
		case e.Action == "pass" || e.Action == "skip" || e.Action == "fail":
			tests = append(tests, test{e.Test, e.Action, output[e.Test]})
			delete(started, e.Test)
		}
	}
	for name := range started {
		tests = append(tests, test{name, "fail", output[name]})
	}
	return tests, nil
}

var logged = regexp.MustCompile(`(?m)^\s+\w+\.go:\d+: (.*)$`)

// reason is what the test has said when it was skipped.
func (t *test) reason() string {
	found := logged.FindAllStringSubmatch(t.output, -1)
	if found == nil {
		return "no reason given"
	}
	return found[len(found)-1][1]
}

// count is how many tests have ended so, with their parts.
func (r *result) count(action string) (n int) {
	for _, t := range r.tests {
		if t.action == action {
			n++
		}
	}
	return n
}

// ok reports whether nothing has failed.
func (r *result) ok() bool {
	return r.end.Code == 0 && r.end.Problem == "" && r.count("fail") == 0 && (r.count("pass") > 0 || r.task.some) && !r.lackedNamespace()
}

// lackedNamespace reports whether the system has refused the namespaces without
// which most tests skip themselves.
func (r *result) lackedNamespace() bool {
	return slices.ContainsFunc(r.tests, func(t test) bool {
		return t.action == "skip" && strings.Contains(t.output, "needs a network namespace of its own")
	})
}

// cell is the result in the table.
func (r *result) cell() string {
	s := fmt.Sprintf("%d passed", r.count("pass"))
	if n := r.count("skip"); n > 0 {
		s += fmt.Sprintf(", %d skipped", n)
	}
	if n := r.count("fail"); n > 0 {
		s += fmt.Sprintf(", **%d failed**", n)
	}
	switch {
	case r.end.Problem != "":
		s += ", **" + r.end.Problem + "**"
	case r.end.Code != 0 && r.count("fail") == 0:
		s += fmt.Sprintf(", **exit status %d**", r.end.Code)
	}
	return s + fmt.Sprintf(", %.0f s", r.end.Seconds)
}

// failures are the names of the tests that have failed, with what they printed;
// of those that have parts, the parts.
func (r *result) failures() (all []string) {
	for _, t := range r.tests {
		hasParts := slices.ContainsFunc(r.tests, func(o test) bool {
			return o.action == "fail" && strings.HasPrefix(o.name, t.name+"/")
		})
		if t.action == "fail" && !hasParts {
			all = append(all, t.name+"\n"+indent(t.output))
		}
	}
	if !r.ok() && len(all) == 0 {
		all = []string{"no test, but " + r.cell() + "\n" + indent(string(lastLines([]byte(r.text), 30)))}
	}
	return all
}

func indent(text string) string {
	return "    " + strings.ReplaceAll(strings.TrimRight(text, "\n"), "\n", "\n    ") + "\n"
}

// failed are the failures of all kernels.
func failed(columns []*column) (all []string) {
	for _, c := range columns {
		for _, r := range c.results() {
			for _, f := range r.failures() {
				all = append(all, fmt.Sprintf("%s: %s: %s", c.title(), r.task.row, f))
			}
		}
		for _, r := range c.runs {
			if r.problem != "" {
				all = append(all, fmt.Sprintf("%s %s: %s", c.title(), r.parameters, r.problem))
			}
		}
	}
	return all
}
