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

	"github.com/seed22601231/connectx/internal/holders"
	"github.com/seed22601231/connectx/internal/program"
)

func main() {
	holders.Main()
	os.Exit(run(os.Args[1:], os.Stderr))
}

func run(args []string, stderr io.Writer) int {
	return program.Run("occupancy", stderr, func() error {
		var o options
		if err := o.parse(args, stderr); err != nil {
			return err
		}
		if o.plot {
			return o.draw()
		}
		return program.InNamespace(func(ctx context.Context) error {
			err := measureAll(ctx, o, stderr)
			if ctx.Err() != nil {
				return program.ErrInterrupted
			}
			if err != nil {
				return err
			}
			return o.draw()
		})
	})
}

// draw draws the pictures of the tables.
func (o *options) draw() error {
	for _, network := range networks {
		if err := drawPicture(o.file(network, "csv"), o.file(network, "svg"), network); err != nil {
			return err
		}
	}
	return nil
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
	flags.StringVar(&o.dir, "o", "docs", "`directory` to write to")
	flags.BoolVar(&o.plot, "plot", false, "do not measure, only draw the pictures from the CSV files that are there")
	flags.BoolVar(&o.quick, "quick", false, "measure a range of 2,000 ports with few dials, to see whether it works")
	return program.Parse(flags, help, args, stderr, o.check)
}

func (o *options) check() error {
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
