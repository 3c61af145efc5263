//go:build linux

// Command kernels runs the tests of the library on Debian's kernels 6.1 and 6.12
// in virtual machines, and on the running kernel, and prints one table.
//
//	kernels -o ../docs/kernels.md
//
// It needs qemu-system-x86_64, apt-get, dpkg-deb and Debian's keys; no root
// except for the tests on the running kernel that are about other users. Kernels
// are fetched once, into a cache; what the machines run is built anew.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/seed22601231/connectx/internal/program"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := program.Run("kernels", os.Stderr, func() error { return run(ctx, os.Args[1:], os.Stdout, os.Stderr) })
	stop()
	os.Exit(code)
}

// options are the flags.
type options struct {
	file, accel, module, cache string
	kernels                    []string
	tests                      string
}

const help = `Usage: kernels [flags]

Runs the library's tests on the running kernel and on Debian's, and prints a table.
The exit status is 0 if every kernel has booted and no test has failed.

Flags:
`

// running is the kernel that is there.
const running = "running"

// parse returns flag.ErrHelp if the help was asked for and has been written.
func (o *options) parse(args []string, helpTo io.Writer) error {
	flags := flag.NewFlagSet("kernels", flag.ContinueOnError)
	flags.StringVar(&o.file, "o", "", "write the table to this `file` as well")
	flags.StringVar(&o.accel, "accel", "", "accelerator of qemu, kvm or tcg (default: kvm where it works, else tcg)")
	flags.StringVar(&o.module, "module", "..", "`directory` of the library")
	flags.StringVar(&o.cache, "cache", "../bin/kernels", "`directory` that kernels are kept in, and logs of the machines")
	flags.StringVar(&o.tests, "run", "", "run only the tests that match this `regexp`")
	kernels := flags.String("kernels", running+",6.1,6.12", "`list` of kernels, the running one first if it is there")
	return program.Parse(flags, help, args, helpTo, func() error {
		o.kernels = strings.Split(*kernels, ",")
		return o.check()
	})
}

func (o *options) check() error {
	if o.accel != "" && o.accel != "kvm" && o.accel != "tcg" {
		return fmt.Errorf("-accel %s: must be kvm or tcg", o.accel)
	}
	if _, err := regexp.Compile(o.tests); err != nil {
		return fmt.Errorf("-run: %w", err)
	}
	for _, k := range o.kernels {
		if _, ok := suites[k]; !ok && k != running {
			return fmt.Errorf("-kernels %s: must be %s, 6.1 or 6.12", k, running)
		}
	}
	return nil
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var o options
	if err := o.parse(args, stdout); err != nil {
		return err
	}
	columns, err := o.runAll(ctx, stderr)
	if err != nil {
		return err
	}
	text := table(columns)
	fmt.Fprint(stdout, text)
	if o.file != "" {
		if err := os.WriteFile(o.file, []byte(text), 0o644); err != nil {
			return err
		}
	}
	if failures := failed(columns); len(failures) > 0 {
		return fmt.Errorf("failed:\n\n%s", strings.Join(failures, "\n"))
	}
	return nil
}

// runAll runs the tests on each kernel.
func (o *options) runAll(ctx context.Context, progress io.Writer) ([]*column, error) {
	guests := slices.DeleteFunc(slices.Clone(o.kernels), func(k string) bool { return k == running })
	if err := checkNeeds(guests, o.cache); err != nil {
		return nil, err
	}
	kernels := make(map[string]*kernel)
	for _, version := range guests {
		var err error
		if kernels[version], err = fetch(ctx, version, o.cache, progress); err != nil {
			return nil, err
		}
	}
	dir, err := os.MkdirTemp("", "connectx-kernels-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	// The tests run as another user as well.
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	logs := filepath.Join(o.cache, "logs")
	if err := os.MkdirAll(logs, 0o755); err != nil {
		return nil, err
	}
	stage := filepath.Join(dir, "stage")
	fmt.Fprintln(progress, "building the tests")
	if err := build(ctx, o.module, stage, o.kernels); err != nil {
		return nil, err
	}
	var columns []*column
	for _, version := range o.kernels {
		started := time.Now()
		c := &column{name: version}
		m := machine{stage: stage, tests: o.tests, kernel: kernels[version], accels: accelerators(o.accel), dir: dir, logs: logs, progress: progress}
		c.runs, err = m.runs(ctx)
		if err != nil {
			return nil, err
		}
		c.took = time.Since(started)
		columns = append(columns, c)
	}
	return columns, nil
}
