package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/netns"
)

// demoTimeout bounds the whole demo, which takes seconds.
const demoTimeout = time.Minute

// exitNoStage tells the parent process that the namespace it has made is of no
// use, as where a security policy takes the rights in it away or /proc/sys is
// read-only.
const exitNoStage = 3

// demo holds as many connections as each way of dialling allows, and shows how
// many that are.
func demo(args []string, stdout, stderr io.Writer) int {
	complain := func(err error) {
		for line := range strings.Lines(err.Error()) {
			fmt.Fprintf(stderr, "connectx demo: %s\n", strings.TrimSuffix(line, "\n"))
		}
	}
	var o demoOptions
	if code, done := parsed("demo", o.parse(args, stdout), stderr); done {
		return code
	}

	st, code, err := setUp(o, complain)
	switch {
	case err != nil:
		complain(err)
		return code
	case st == nil:
		return code
	}
	if err := play(st, stdout); err != nil {
		complain(err)
		return exitFailed
	}
	return exitOK
}

// setUp prepares the network that the demo takes place in. It returns a nil stage
// and the exit code if the demo is over, because another process had it.
func setUp(o demoOptions, complain func(error)) (st *stage, code int, err error) {
	switch {
	case o.noNamespace:
	case netns.Inside():
		st, err := namespaceStage(o)
		return st, exitNoStage, err
	default:
		code, err := netns.Reexec()
		switch {
		case errors.Is(err, netns.ErrRefused):
			complain(err)
		case err != nil || code != exitNoStage:
			return nil, code, err
		}
	}
	st, err = hostStage(o)
	return st, exitFailed, err
}

// play runs the demo to its end, an interrupt, or its timeout.
func play(st *stage, stdout io.Writer) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, demoTimeout)
	defer cancel()

	fmt.Fprintf(stdout, "%v\n\n", st)
	p := newProgress(stdout)
	rows, err := runAll(ctx, st, p)
	p.end()
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return fmt.Errorf("not finished after %v", demoTimeout)
	case ctx.Err() != nil:
		return errors.New("interrupted")
	case err != nil:
		return err
	}
	fmt.Fprintln(stdout)
	if err := writeTable(stdout, st, rows); err != nil {
		return err
	}
	writeSummary(stdout, st, rows)
	return verdict(st, rows)
}

// demoOptions are the flags.
type demoOptions struct {
	ports, destinations int
	noNamespace         bool
}

const demoHelp = `Usage: connectx demo [flags]

Opens connections to echo servers on this host, in every way of dialling until
it fails, counts them, and checks each of them with an echo. It runs in a network
namespace of its own with a small ephemeral port range. Where that is refused,
the range is a socket option instead.

The exit status is 0 if connectx.Dialer held as many connections as there are
ports × destinations, and each echo came back to its own socket.

Flags:
`

const demoExamples = `
Examples:
  connectx demo
  connectx demo -ports 10 -destinations 2
  connectx demo -no-namespace
`

// The limits of the flags. A destination is a host of 10.64.0.0/24.
const (
	maxPorts        = 20000
	maxDestinations = 254
)

// parse returns flag.ErrHelp if the help was asked for and has been written.
func (o *demoOptions) parse(args []string, help io.Writer) error {
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // the caller reports errors
	flags.IntVar(&o.ports, "ports", 500, fmt.Sprintf("size of the ephemeral port range, 1 to %d", maxPorts))
	flags.IntVar(&o.destinations, "destinations", 5, fmt.Sprintf("number of destinations, 1 to %d", maxDestinations))
	flags.BoolVar(&o.noNamespace, "no-namespace", false, "use a socket option for the range, as where namespaces are refused")
	err := flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(help, demoHelp)
		flags.SetOutput(help)
		flags.PrintDefaults()
		fmt.Fprint(help, demoExamples)
		return err
	case err != nil:
		return err
	case flags.NArg() > 0:
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case o.ports < 1 || o.ports > maxPorts:
		return fmt.Errorf("-ports %d: must be 1 to %d", o.ports, maxPorts)
	case o.destinations < 1 || o.destinations > maxDestinations:
		return fmt.Errorf("-destinations %d: must be 1 to %d", o.destinations, maxDestinations)
	}
	return o.checkDescriptors()
}

// checkDescriptors refuses numbers that would end in EMFILE and not for want of
// ports.
func (o *demoOptions) checkDescriptors() error {
	// What the Go runtime, the dialers and the standard streams have open.
	const others = 50
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return os.NewSyscallError("getrlimit", err)
	}
	// Both ends of a TCP connection, one dial too many and a listening socket
	// to each destination.
	need := uint64(2*o.ports*o.destinations + 3*o.destinations + others)
	if need > limit.Cur {
		return fmt.Errorf("-ports %d -destinations %d: takes %d file descriptors, since both ends of each connection are in this process, and RLIMIT_NOFILE is %d",
			o.ports, o.destinations, need, limit.Cur)
	}
	return nil
}
