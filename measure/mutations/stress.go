//go:build linux

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"regexp"
	"time"
)

// stress is a run of the stress program, of at most so long.
type stress time.Duration

// stressSeed settles what the goroutines do, if not how they interleave.
const stressSeed = 1

// stressEnd is what a run may take beyond its duration: a process that does not
// end has a minute, and some may have one after the other.
const stressEnd = 5 * time.Minute

func (c stress) String() string { return fmt.Sprintf("stress for %.0f s", time.Duration(c).Seconds()) }

func (c stress) run(ctx context.Context, t *tree, _ *mutation, overlay string) (outcome, error) {
	program := filepath.Join(t.temp, "stress")
	build := t.command(ctx, t.measure, "go", "build", "-overlay="+overlay, "-o", program, "./stress")
	if out, err := build.CombinedOutput(); err != nil {
		if ctx.Err() != nil {
			return outcome{}, ctx.Err()
		}
		return outcome{}, fmt.Errorf("%w: %s", errNotCompiled, out)
	}

	ctx, cancel := context.WithTimeout(ctx, time.Duration(c)+stressEnd)
	defer cancel()
	cmd := t.command(ctx, t.measure, program, "-duration", time.Duration(c).String(), "-seed", fmt.Sprint(stressSeed))
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return outcome{}, err
	}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return outcome{}, err
	}
	red, last := readStress(stderr)
	after := time.Since(start)
	if red != "" {
		cancel() // what else goes wrong is of no interest
	}
	err = cmd.Wait()
	if red != "" {
		return outcome{red: "stress: " + red, after: seconds(after), said: last}, nil
	}
	if ctx.Err() != nil {
		return outcome{}, fmt.Errorf("%s: %w", c, ctx.Err())
	}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.ExitCode() == 1 {
		// A process has crashed, or does not end.
		return outcome{red: "stress: " + last, after: seconds(after)}, nil
	}
	if err != nil {
		return outcome{}, fmt.Errorf("%s: %w: %s", c, err, last)
	}
	return outcome{}, nil
}

// brokenPromise is a line in which the stress program says what is broken.
var brokenPromise = regexp.MustCompile(`^(duplicates|misdelivered|spurious failures|stuck ports): `)

// readStress reads what the stress program says, until it says that a promise is
// broken: which one, if any, and the last line.
func readStress(r io.Reader) (promise, last string) {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		if found := brokenPromise.FindStringSubmatch(lines.Text()); found != nil {
			return found[1], lines.Text()
		}
		if lines.Text() != "" {
			last = lines.Text()
		}
	}
	return "", last
}
