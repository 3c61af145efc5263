//go:build linux

package main

import (
	"encoding/json"
	"io"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/seed22601231/connectx/kernels/internal/job"
)

// printed is the output of a test binary that a machine stopped in the middle of.
const printed = "\x16=== RUN   TestOne\n    one_test.go:7: needs two users\n\x16--- SKIP: TestOne (0.00s)\n" +
	"\x16=== RUN   TestTwo\n\x16=== RUN   TestTwo/udp4\n    two_test.go:9: no\n" +
	"\x16--- FAIL: TestTwo (0.01s)\n    \x16--- FAIL: TestTwo/udp4 (0.01s)\n" +
	"\x16=== RUN   TestThree\n\x16--- PASS: TestThree (0.00s)\n" +
	"\x16=== RUN   TestFour\n"

func TestReport(t *testing.T) {
	r := &machineRun{tasks: []task{{row: "connectx"}, {row: "lookup"}}}
	half := len(printed) / 2
	for _, line := range []job.Line{
		{Feature: &job.Feature{Name: "MPTCP", Value: "yes"}},
		{Job: 0, Output: printed[:half]},
		{Job: 0, Output: printed[half:]},
		{Job: 0, End: &job.End{Code: 2, Seconds: 3}},
		{Job: 1, Output: "\x16=== RUN   TestFive\n\x16--- PASS: TestFive (0.00s)\n\x16PASS\n"},
		{Job: 1, End: &job.End{}},
		{Done: true},
	} {
		if err := r.add(line, io.Discard); err != nil {
			t.Fatal(err)
		}
	}
	if !r.done {
		t.Error("not done")
	}
	if diff := cmp.Diff([]job.Feature{{Name: "MPTCP", Value: "yes"}}, r.features); diff != "" {
		t.Error(diff)
	}
	var cells []string
	for _, res := range r.results {
		cells = append(cells, res.cell())
	}
	want := []string{"1 passed, 1 skipped, **3 failed**, 3 s", "1 passed, 0 s"}
	if diff := cmp.Diff(want, cells); diff != "" {
		t.Error(diff)
	}
	if r.results[0].ok() || !r.results[1].ok() {
		t.Errorf("ok: %v, %v", r.results[0].ok(), r.results[1].ok())
	}
	failures := r.results[0].failures()
	if len(failures) != 2 || !strings.HasPrefix(failures[0], "TestTwo/udp4\n") || !strings.HasPrefix(failures[1], "TestFour\n") {
		t.Errorf("failures %q", failures)
	}
	if got := r.results[0].tests[0].reason(); got != "needs two users" {
		t.Errorf("reason %q", got)
	}
	if err := r.add(job.Line{Job: 2, Output: "x"}, io.Discard); err == nil {
		t.Error("took in a job that there is not")
	}
}

func TestAProgramThatFailsWithoutAFailedTestHasFailed(t *testing.T) {
	for name, r := range map[string]*result{
		"exit status":     {end: job.End{Code: 1}, tests: []test{{"TestA", "pass", ""}}},
		"deadline":        {end: job.End{Code: -1, Problem: "still running after 600 s"}, tests: []test{{"TestA", "pass", ""}}},
		"no test was run": {},
		"no namespace":    {tests: []test{{"TestA", "pass", ""}, {"TestB", "skip", "    a_test.go:1: needs a network namespace of its own: refused\n"}}},
	} {
		t.Run(name, func(t *testing.T) {
			if r.ok() || len(r.failures()) != 1 {
				t.Errorf("ok %v, failures %q", r.ok(), r.failures())
			}
		})
	}
}

// A machine can end before it has reported anything, and before it has reported
// all.
func TestAMachineThatEndsEarlyHasFailed(t *testing.T) {
	feature, _ := json.Marshal(job.Line{Feature: &job.Feature{Name: "release"}})
	done, _ := json.Marshal(job.Line{Done: true})
	for _, c := range []struct {
		name, prints string
		want         error
	}{
		{"nothing", "", errSilent},
		{"no end", string(feature), errUnfinished},
		{"all", string(feature) + "\n" + string(done), nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := new(machineRun)
			err := r.collect(exec.CommandContext(t.Context(), "printf", "%s", c.prints), nil, io.Discard, io.Discard)
			if (err == nil) != (c.want == nil) || c.want != nil && !strings.Contains(err.Error(), c.want.Error()) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
}
