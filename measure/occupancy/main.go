//go:build linux

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/seed22601231/connectx/internal/holders"
	"github.com/seed22601231/connectx/internal/netns"
)

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

func main() {
	holders.Main()
	os.Exit(run(os.Args[1:], os.Stderr))
}

func run(args []string, stderr io.Writer) int {
	complain := func(err error) { fmt.Fprintf(stderr, "occupancy: %v\n", err) }
	var o options
	switch err := o.parse(args, stderr); {
	case errors.Is(err, flag.ErrHelp):
		return exitOK
	case err != nil:
		complain(err)
		return exitUsage
	}
	if !o.plot {
		if !netns.Inside() {
			code, err := netns.Reexec()
			if err != nil {
				complain(err)
				return exitFailed
			}
			return code
		}
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		err := measureAll(ctx, o, stderr)
		if ctx.Err() != nil {
			err = errors.New("interrupted")
		}
		if err != nil {
			complain(err)
			return exitFailed
		}
	}
	for _, network := range networks {
		if err := drawPicture(o.file(network, "csv"), o.file(network, "svg"), network); err != nil {
			complain(err)
			return exitFailed
		}
	}
	return exitOK
}

var networks = []string{"tcp", "udp"}

// options are the flags.
type options struct {
	dir         string
	plot, quick bool
}

// file is the path of a result.
func (o *options) file(network, extension string) string {
	return filepath.Join(o.dir, "occupancy-"+network+"."+extension)
}

const help = `Usage: occupancy [flags]

Measures how long dials to one destination take, from 0 to 100 % of the default
ephemeral port range taken, and writes occupancy-tcp.csv, occupancy-udp.csv and
a picture of each. It works in a network namespace of its own.

Flags:
`

// parse returns flag.ErrHelp if the help was asked for and has been written.
func (o *options) parse(args []string, stderr io.Writer) error {
	flags := flag.NewFlagSet("occupancy", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // parse returns what is wrong
	flags.StringVar(&o.dir, "o", "docs", "`directory` to write to")
	flags.BoolVar(&o.plot, "plot", false, "do not measure, only draw the pictures from the CSV files that are there")
	flags.BoolVar(&o.quick, "quick", false, "measure a range of 2,000 ports with few dials, to see whether it works")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			fmt.Fprint(stderr, help)
			flags.SetOutput(stderr)
			flags.PrintDefaults()
		}
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	if o.plot && o.quick {
		return errors.New("-plot and -quick do not go together: nothing is measured with -plot")
	}
	if info, err := os.Stat(o.dir); err != nil {
		return fmt.Errorf("-o %q: %w", o.dir, err)
	} else if !info.IsDir() {
		return fmt.Errorf("-o %q: not a directory", o.dir)
	}
	return nil
}
