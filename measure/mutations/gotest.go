//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

// tests are unit tests of one package.
type tests struct {
	dir   string // of the package, below the root of the library
	names string // "TestA|TestB"
	count int    // runs of each, for what does not go wrong every time; 0 means 1
	race  bool   // under the race detector

	// hangs is how long the tests take at most if the list says that they go on
	// for ever then, else 0: one that hangs is not a catch but a mistake.
	hangs time.Duration
}

// longestTests is what tests may take that are not expected to hang.
const longestTests = 2 * time.Minute

// in returns a catcher for tests of a package, in one run.
func in(dir string, names ...string) tests {
	return tests{dir: dir, names: strings.Join(names, "|")}
}

func (c tests) times(count int) tests              { c.count = count; return c }
func (c tests) underRace() tests                   { c.race = true; return c }
func (c tests) orHang(longest time.Duration) tests { c.hangs = longest; return c }

func (c tests) String() string {
	s := strings.ReplaceAll(c.names, "|", ", ")
	if c.count > 1 {
		s += fmt.Sprintf(" (up to %d times)", c.count)
	}
	if c.race {
		s += " (race detector)"
	}
	return s
}

func (c tests) run(ctx context.Context, t *tree, _ *mutation, overlay string) (outcome, error) {
	timeout := longestTests
	if c.hangs != 0 {
		timeout = c.hangs
	}
	args := []string{"test", "-json", "-vet=off", "-failfast", fmt.Sprintf("-race=%t", c.race), "-overlay=" + overlay,
		fmt.Sprintf("-count=%d", max(c.count, 1)), "-timeout=" + timeout.String(), "-run=^(" + c.names + ")$", "./" + c.dir}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := t.command(ctx, t.root, "go", args...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return outcome{}, err
	}
	var complaints strings.Builder
	cmd.Stderr = &complaints
	if err := cmd.Start(); err != nil {
		return outcome{}, err
	}
	seen, parseErr := parseTests(out)
	if seen.failed != "" {
		cancel() // the rest is of no interest
	}
	waitErr := cmd.Wait()
	if err := context.Cause(ctx); err != nil && seen.failed == "" {
		return outcome{}, err
	}
	if parseErr != nil {
		return outcome{}, parseErr
	}
	return seen.outcome(c, waitErr, complaints.String())
}

// testEvent is one line of go test -json (see "go doc test2json").
type testEvent struct {
	Time        time.Time
	Action      string
	Test        string
	Output      string
	FailedBuild string
}

// A testRun is what the lines have said, up to the first test that failed.
type testRun struct {
	start    time.Time // of the first test
	end      time.Time // of the test that failed
	failed   string    // its name, or the package's result if it failed outside of any test
	timedOut bool
	passed   int
	unbuilt  bool // did not compile
	output   strings.Builder
}

// parseTests reads the output of go test -json, until a test has failed.
func parseTests(r io.Reader) (*testRun, error) {
	var run testRun
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var e testEvent
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return &run, fmt.Errorf("go test -json: %q: %w", lines.Text(), err)
		}
		if run.add(&e); run.failed != "" {
			return &run, nil
		}
	}
	return &run, lines.Err()
}

func (r *testRun) add(e *testEvent) {
	name, _, isSub := strings.Cut(e.Test, "/")
	switch e.Action {
	case "output", "build-output":
		r.output.WriteString(e.Output)
		r.timedOut = r.timedOut || strings.Contains(e.Output, "panic: test timed out after")
	case "run":
		if r.start.IsZero() {
			r.start = e.Time
		}
	case "pass":
		if name != "" && !isSub {
			r.passed++
		}
	case "build-fail":
		r.unbuilt = true
	case "fail":
		if e.FailedBuild != "" {
			r.unbuilt = true
			return
		}
		r.failed, r.end = name, e.Time
		if name == "" {
			r.failed = "the test program"
		}
	}
}

var errNotCompiled = errors.New("does not compile")

// outcome tells what has come of the tests. err is what go test ended with.
func (r *testRun) outcome(c tests, err error, complaints string) (outcome, error) {
	switch {
	case r.unbuilt:
		return outcome{}, fmt.Errorf("%w: %s", errNotCompiled, r.output.String())
	case r.timedOut && c.hangs == 0:
		return outcome{}, fmt.Errorf("%s: timed out, which the list does not expect", c)
	case r.failed != "":
		o := outcome{red: "`" + r.failed + "`", after: seconds(r.end.Sub(r.start)), said: r.output.String()}
		if r.timedOut {
			o.red = "`" + c.names + "` (timed out)"
		}
		return o, nil
	case err != nil:
		return outcome{}, fmt.Errorf("%s: %w: %s", c, err, complaints)
	case r.passed == 0:
		return outcome{}, fmt.Errorf("%s: no test of that name in %q has run", c, "./"+c.dir)
	}
	return outcome{}, nil
}
