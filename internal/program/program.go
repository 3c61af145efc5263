//go:build linux

// Package program is what the programs that measure and test the library have in
// common: flags, a network namespace of their own, an end by interrupt, and exit
// codes.
package program

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/seed22601231/connectx/internal/netns"
)

// Exit codes.
const (
	OK     = 0
	Failed = 1
	Usage  = 2
)

// An Exit is an error about which everything has been said. It is the exit code.
type Exit int

func (e Exit) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// ErrInterrupted is for a measurement that an interrupt leaves incomplete.
var ErrInterrupted = errors.New("interrupted")

// A usageError is one of the flags.
type usageError struct{ error }

// Run runs a program of that name, and returns its exit code. It writes to stderr
// what goes wrong.
func Run(name string, stderr io.Writer, run func() error) int {
	err := run()
	var exit Exit
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return OK
	case errors.As(err, &exit):
		return int(exit)
	}
	fmt.Fprintf(stderr, "%s: %v\n", name, err)
	if _, ok := errors.AsType[usageError](err); ok {
		return Usage
	}
	return Failed
}

// Parse parses flags, after which there must be no more arguments, and has check
// look at their values. The error is flag.ErrHelp if the help was asked for and
// has been written to helpTo, or else makes Run return Usage.
func Parse(flags *flag.FlagSet, help string, args []string, helpTo io.Writer, check func() error) error {
	flags.SetOutput(io.Discard) // Run reports errors
	err := flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(helpTo, help)
		flags.SetOutput(helpTo)
		flags.PrintDefaults()
		return err
	case err == nil && flags.NArg() > 0:
		err = fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case err == nil:
		err = check()
	}
	if err != nil {
		return usageError{err}
	}
	return nil
}

// InNamespace calls measure in a process that has a network namespace for itself:
// in this one, or in one that it starts with the same arguments. The context ends
// with an interrupt.
func InNamespace(measure func(ctx context.Context) error) error {
	if !netns.Inside() {
		code, err := netns.Reexec()
		if err == nil && code != OK {
			err = Exit(code)
		}
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return measure(ctx)
}
