//go:build linux

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/seed22601231/connectx/internal/netns"
	"github.com/seed22601231/connectx/internal/program"
)

func main() {
	if isWorker() {
		os.Exit(work(os.Args[1:]))
	}
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

func run(args []string, stdout, stderr io.Writer) int {
	return program.Run("scale", stderr, func() error {
		var o options
		if err := o.parse(args, stdout); err != nil {
			return err
		}
		plans, err := o.plans()
		if err != nil {
			return err
		}
		if !netns.Inside() {
			if err := checkNeeds(plans, stdout); err != nil {
				return err
			}
		}
		return program.InNamespace(func(ctx context.Context) error {
			err := measure(ctx, plans, o.file, stdout, stderr)
			if ctx.Err() != nil {
				return program.ErrInterrupted
			}
			return err
		})
	})
}

// options are the flags.
type options struct {
	tcp, udp int
	file     string
}

const help = `Usage: scale [flags]

Holds many connections at once, from one source address and the default
ephemeral port range, and checks each of them. It says beforehand what it needs.
The exit status is 0 if all were held, each got its own bytes back, and no 4-tuple
was there twice.

Flags:
`

// parse returns flag.ErrHelp if the help was asked for and has been written.
func (o *options) parse(args []string, helpTo io.Writer) error {
	flags := flag.NewFlagSet("scale", flag.ContinueOnError)
	flags.IntVar(&o.udp, "udp", 1_000_000, fmt.Sprintf("UDP connections, 0 to %d", maxConnections))
	flags.IntVar(&o.tcp, "tcp", 250_000, fmt.Sprintf("TCP connections, 0 to %d", maxConnections))
	flags.StringVar(&o.file, "o", "", "write the report to this `file` as well")
	return program.Parse(flags, help, args, helpTo, o.check)
}

func (o *options) check() error {
	switch {
	case o.udp < 0 || o.udp > maxConnections:
		return fmt.Errorf("-udp %d: must be 0 to %d", o.udp, maxConnections)
	case o.tcp < 0 || o.tcp > maxConnections:
		return fmt.Errorf("-tcp %d: must be 0 to %d", o.tcp, maxConnections)
	case o.udp == 0 && o.tcp == 0:
		return errors.New("-udp 0 -tcp 0: nothing to do")
	}
	return nil
}

// plans are what the flags ask for.
func (o *options) plans() ([]plan, error) {
	perProcess, err := connectionsPerProcess()
	if err != nil {
		return nil, err
	}
	var all []plan
	for _, p := range []plan{
		{network: "tcp4", total: o.tcp, ports: defaultPorts, perProcess: perProcess},
		{network: "udp4", total: o.udp, ports: defaultPorts, perProcess: perProcess},
	} {
		if p.total > 0 {
			all = append(all, p)
		}
	}
	return all, nil
}

// measure carries out the plans, and reports, to a file as well unless its name
// is empty.
func measure(ctx context.Context, plans []plan, report string, stdout, stderr io.Writer) error {
	// Not being able to write the report should not be found out at the end.
	var file *os.File
	if report != "" {
		var err error
		if file, err = os.CreateTemp(filepath.Dir(report), filepath.Base(report)+".*"); err != nil {
			return fmt.Errorf("-o %s: %w", report, err)
		}
		defer os.Remove(file.Name())
		defer file.Close()
	}

	if err := setUpNetwork(defaultPorts); err != nil {
		return err
	}
	atRest, err := memoryInUse(nil)
	if err != nil {
		return err
	}
	var results []*result
	for _, p := range plans {
		r, err := hold(ctx, p, atRest, stderr)
		if err != nil {
			return err
		}
		results = append(results, r)
	}
	text := newReport(results)
	if _, err := fmt.Fprint(stdout, "\n", text); err != nil {
		return err
	}
	if file != nil {
		_, err := io.WriteString(file, text)
		if err := errors.Join(err, file.Chmod(0o644), os.Rename(file.Name(), report)); err != nil {
			return fmt.Errorf("-o %s: %w", report, err)
		}
	}
	return verdict(results)
}
