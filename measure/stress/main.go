//go:build linux

package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"time"

	"github.com/seed22601231/connectx/internal/program"
)

func main() {
	if isWorker() {
		os.Exit(work(os.Args[1:]))
	}
	os.Exit(runCommand(os.Args[1:], os.Stdout, os.Stderr))
}

func runCommand(args []string, stdout, stderr io.Writer) int {
	return program.Run("stress", stderr, func() error {
		var o options
		if err := o.parse(args, stdout); err != nil {
			return err
		}
		return program.InNamespace(func(ctx context.Context) error { return stressAndReport(ctx, o, stdout, stderr) })
	})
}

func stressAndReport(ctx context.Context, o options, stdout, stderr io.Writer) error {
	fmt.Fprintf(stderr, "stress %s\n", o.flags())
	r, err := stress(ctx, o, stderr)
	if err != nil {
		return err
	}
	fmt.Fprintln(stdout)
	r.write(stdout)
	if err := r.verdict(); err != nil {
		fmt.Fprintf(stderr, "\n%v\n", err)
		return program.Exit(program.Failed)
	}
	return nil
}

// options are the flags.
type options struct {
	layout                   layout
	duration, kill           time.Duration
	seed                     uint64
	hold                     int
	plain, listeners, python bool
}

const help = `Usage: stress [flags]

Dials from many processes at once so that everything collides, beside neighbours
of all kinds, and checks that no promise of connectx is broken. An interrupt ends
it early, with a report. The exit status is 0 if all promises were kept.

Flags:
`

func (o *options) flagSet() *flag.FlagSet {
	flags := flag.NewFlagSet("stress", flag.ContinueOnError)
	flags.DurationVar(&o.duration, "duration", 10*time.Minute, "how long it takes")
	flags.Uint64Var(&o.seed, "seed", 0, "what the goroutines do depends on it; 0 is one at random")
	flags.IntVar(&o.layout.Ports, "ports", 20, fmt.Sprintf("ephemeral ports, %d to %d", minPorts, maxPorts))
	flags.IntVar(&o.layout.Processes, "processes", 8, fmt.Sprintf("processes that dial, 1 to %d", maxProcesses))
	flags.IntVar(&o.layout.Each, "goroutines", 8, fmt.Sprintf("goroutines of each, 1 to %d", maxGoroutines))
	flags.IntVar(&o.hold, "hold", 16, fmt.Sprintf("connections that a goroutine holds at most, 1 to %d", maxHold))
	flags.DurationVar(&o.kill, "kill", time.Second, "kill a process about so often; 0 kills none")
	flags.BoolVar(&o.plain, "plain", true, "beside sockets that do not share their port")
	flags.BoolVar(&o.listeners, "listeners", true, "beside listeners with SO_REUSEADDR on ports of the range")
	flags.BoolVar(&o.python, "python", true, "beside a process in Python that follows the protocol, if there is "+python)
	return flags
}

// Limits of the flags. Up to maxPorts, a Dialer does not remember that there was
// no port a moment ago, which the claims would have to know.
const (
	minPorts, maxPorts = 8, 200
	maxProcesses       = 100
	maxGoroutines      = 100
	maxHold            = 100
)

// parse returns flag.ErrHelp if the help was asked for and has been written.
func (o *options) parse(args []string, helpTo io.Writer) error {
	err := program.Parse(o.flagSet(), help, args, helpTo, o.check)
	if o.seed == 0 {
		o.seed = uint64(rand.Uint32()) + 1
	}
	return err
}

func (o *options) check() error {
	switch {
	case o.duration <= 0:
		return fmt.Errorf("-duration %v: must be above 0", o.duration)
	case o.kill < 0:
		return fmt.Errorf("-kill %v: must not be below 0", o.kill)
	}
	for _, f := range []struct {
		name             string
		value, low, high int
	}{
		{"ports", o.layout.Ports, minPorts, maxPorts},
		{"processes", o.layout.Processes, 1, maxProcesses},
		{"goroutines", o.layout.Each, 1, maxGoroutines},
		{"hold", o.hold, 1, maxHold},
	} {
		if f.value < f.low || f.value > f.high {
			return fmt.Errorf("-%s %d: must be %d to %d", f.name, f.value, f.low, f.high)
		}
	}
	return nil
}

// flags are the options as arguments.
func (o options) flags() string {
	return fmt.Sprintf("-seed %d -duration %v -ports %d -processes %d -goroutines %d -hold %d -kill %v -plain=%t -listeners=%t -python=%t",
		o.seed, o.duration, o.layout.Ports, o.layout.Processes, o.layout.Each, o.hold, o.kill, o.plain, o.listeners, o.python)
}
