//go:build linux

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/seed22601231/connectx/internal/netns"
)

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

func main() {
	if isWorker() {
		os.Exit(work(os.Args[1:]))
	}
	os.Exit(runCommand(os.Args[1:], os.Stdout, os.Stderr))
}

func runCommand(args []string, stdout, stderr io.Writer) int {
	complain := func(err error) { fmt.Fprintf(stderr, "stress: %v\n", err) }
	var o options
	switch err := o.parse(args, stdout); {
	case errors.Is(err, flag.ErrHelp):
		return exitOK
	case err != nil:
		complain(err)
		return exitUsage
	}
	if !netns.Inside() {
		code, err := netns.Reexec()
		if err != nil {
			complain(err)
			return exitFailed
		}
		return code
	}
	fmt.Fprintf(stderr, "stress %s\n", o.flags())
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	r, err := stress(ctx, o, stderr)
	if err != nil {
		complain(err)
		return exitFailed
	}
	fmt.Fprintln(stdout)
	r.write(stdout)
	if err := r.verdict(); err != nil {
		fmt.Fprintf(stderr, "\n%v\n", err)
		return exitFailed
	}
	return exitOK
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
	flags.SetOutput(io.Discard) // the caller reports errors
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
	flags := o.flagSet()
	err := flags.Parse(args)
	between := func(name string, value, low, high int) {
		if err == nil && (value < low || value > high) {
			err = fmt.Errorf("-%s %d: must be %d to %d", name, value, low, high)
		}
	}
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(helpTo, help)
		flags.SetOutput(helpTo)
		flags.PrintDefaults()
		return err
	case err != nil:
		return err
	case flags.NArg() > 0:
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case o.duration <= 0:
		return fmt.Errorf("-duration %v: must be above 0", o.duration)
	case o.kill < 0:
		return fmt.Errorf("-kill %v: must not be below 0", o.kill)
	}
	between("ports", o.layout.Ports, minPorts, maxPorts)
	between("processes", o.layout.Processes, 1, maxProcesses)
	between("goroutines", o.layout.Each, 1, maxGoroutines)
	between("hold", o.hold, 1, maxHold)
	if o.seed == 0 {
		o.seed = uint64(rand.Uint32()) + 1
	}
	return err
}

// flags are the options as arguments.
func (o options) flags() string {
	return fmt.Sprintf("-seed %d -duration %v -ports %d -processes %d -goroutines %d -hold %d -kill %v -plain=%t -listeners=%t -python=%t",
		o.seed, o.duration, o.layout.Ports, o.layout.Processes, o.layout.Each, o.hold, o.kill, o.plain, o.listeners, o.python)
}
