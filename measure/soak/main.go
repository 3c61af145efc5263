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
	if isServer() {
		os.Exit(serve())
	}
	os.Exit(runCommand(os.Args[1:], os.Stdout, os.Stderr))
}

func runCommand(args []string, stdout, stderr io.Writer) int {
	return program.Run("soak", stderr, func() error {
		var o options
		if err := o.parse(args, stdout); err != nil {
			return err
		}
		return program.InNamespace(func(ctx context.Context) error { return soakAndReport(ctx, o, stdout, stderr) })
	})
}

func soakAndReport(ctx context.Context, o options, stdout, stderr io.Writer) error {
	fmt.Fprintf(stderr, "soak %s\n", o.flags())
	r, err := soak(ctx, o, stderr)
	if err != nil {
		return err
	}
	fmt.Fprintln(stdout)
	r.write(stdout)
	if err := r.verdict(); err != nil {
		fmt.Fprintf(stderr, "\nnot flat:\n%v\nrepeat with: soak %s\n", err, o.flags())
		return program.Exit(program.Failed)
	}
	fmt.Fprintln(stdout, "\nflat")
	return nil
}

// options are the flags.
type options struct {
	duration time.Duration
	seed     uint64
	ports    int
	workers  int
}

var help = fmt.Sprintf(`Usage: soak [flags]

Keeps 90 %% of the 4-tuples of a few destinations taken while connections come and
go and faults happen, and samples what the process has in use: each second, or each
tenth of one if it takes less than %v. An interrupt ends it early, with a
report. The exit status is 0 if the line is flat:

  - In each sample, while no dial is under way: descriptors of sockets are as many
    as connections are held, netlink sockets and sysctl files not more than the
    dials at a time and the namespaces of the last %v need, all others as many
    and goroutines not more than at the start.
  - From the second to the last quarter of the samples, the median of the live heap
    has not grown by more than %.0f %% and %d KiB, that of the resident memory
    not by more than %.0f %% and %d MiB, that of the p50 of TCP and of UDP dials,
    as multiples of net.Dialer's at the same time, not by more than %.0f %%, and
    that of the p50 of what they take of the processor, as such multiples, not by
    more than %.0f %% (times are not compared if a quarter has fewer than %d of
    them, nor in a run of less than %v).
  - At the end, all 4-tuples can be had, each once; and when they are closed and
    the library is idle, there are no more descriptors, netlink sockets and
    goroutines than before the first dial.
  - Every error of a dial is explained by a fault that was on, and no connection
    gets what is not its own or has the 4-tuple of another.

Flags:
`, shortRun, lingers, 100*(heapLimit.factor-1), int(heapLimit.slack)>>10,
	100*(residentLimit.factor-1), int(residentLimit.slack)>>20, 100*(latencyLimit.factor-1), 100*(cpuLimit.factor-1), minDials, shortRun)

func (o *options) flagSet() *flag.FlagSet {
	flags := flag.NewFlagSet("soak", flag.ContinueOnError)
	flags.DurationVar(&o.duration, "duration", 10*time.Minute, "how long it takes, without the end of about 15 s")
	flags.Uint64Var(&o.seed, "seed", 0, "what the goroutines do depends on it; 0 is one at random")
	flags.IntVar(&o.ports, "ports", 50, fmt.Sprintf("ephemeral ports, %d to %d", minPorts, maxPorts))
	flags.IntVar(&o.workers, "workers", 8, fmt.Sprintf("goroutines that dial, 1 to %d", maxWorkers))
	return flags
}

// Limits of the flags. Fewer than minPorts would not leave a free port for each of
// maxWorkers; more than maxPorts would take more descriptors than a process has on
// many machines.
const (
	minPorts, maxPorts = 50, 200
	maxWorkers         = 16
	minDuration        = 2 * time.Second

	// shortRun is the duration below which samples are taken every tenth of a
	// second.
	shortRun = time.Minute
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
	case o.duration < minDuration:
		return fmt.Errorf("-duration %v: must be at least %v", o.duration, minDuration)
	case o.ports < minPorts || o.ports > maxPorts:
		return fmt.Errorf("-ports %d: must be %d to %d", o.ports, minPorts, maxPorts)
	case o.workers < 1 || o.workers > maxWorkers:
		return fmt.Errorf("-workers %d: must be 1 to %d", o.workers, maxWorkers)
	}
	return nil
}

// flags are the options as arguments.
func (o *options) flags() string {
	return fmt.Sprintf("-seed %d -duration %v -ports %d -workers %d", o.seed, o.duration, o.ports, o.workers)
}

// interval is the time from one sample to the next.
func (o *options) interval() time.Duration {
	if o.duration < shortRun {
		return time.Second / 10
	}
	return time.Second
}
