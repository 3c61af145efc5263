//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"strings"
	"syscall"

	"github.com/seed22601231/connectx/internal/program"
)

func main() { os.Exit(runCommand(os.Args[1:], os.Stdout, os.Stderr)) }

func runCommand(args []string, stdout, stderr io.Writer) int {
	return program.Run("mutations", stderr, func() error {
		var o options
		if err := o.parse(args, stdout); err != nil {
			return err
		}
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		err := mutate(ctx, o, stdout, stderr)
		if err != nil && ctx.Err() != nil {
			return program.ErrInterrupted
		}
		return err
	})
}

// options are the flags.
type options struct {
	out string         // empty for standard output
	run *regexp.Regexp // nil for all
}

const help = `Usage: mutations [flags]

Breaks one line of the library at a time, and shows which tests go red, whether
the stress program notices, and the model. The files stay as they are. The exit
status is 0 if something has gone red each time.

Flags:
`

// parse returns flag.ErrHelp if the help was asked for and has been written.
func (o *options) parse(args []string, helpTo io.Writer) error {
	flags := flag.NewFlagSet("mutations", flag.ContinueOnError)
	flags.StringVar(&o.out, "o", "", "`file` to write the table to, in place of standard output")
	run := flags.String("run", "", "only mutations whose name matches the `regexp`")
	return program.Parse(flags, help, args, helpTo, func() (err error) {
		switch {
		case *run == "":
			return nil
		case o.out != "":
			return errors.New("-o and -run do not go together: the file is about all mutations")
		}
		if o.run, err = regexp.Compile(*run); err != nil {
			return fmt.Errorf("-run: %w", err)
		}
		return nil
	})
}

// selected returns the mutations that are to be made.
func (o *options) selected() ([]*mutation, error) {
	var chosen []*mutation
	for i := range list {
		if o.run == nil || o.run.MatchString(list[i].name) {
			chosen = append(chosen, &list[i])
		}
	}
	if len(chosen) == 0 {
		return nil, fmt.Errorf("-run %s: no mutation has such a name", o.run)
	}
	return chosen, nil
}

// mutate makes the mutations and writes the table. The error says what is wrong
// with the library's tests, or with the list.
func mutate(ctx context.Context, o options, stdout, progress io.Writer) error {
	mutations, err := o.selected()
	if err != nil {
		return err
	}
	t, err := newTree(ctx)
	if err != nil {
		return err
	}
	defer os.RemoveAll(t.temp)
	missing := withoutModel()
	if missing != "" {
		mutations = leaveOutModel(mutations)
	}
	for _, m := range mutations {
		if _, err := m.broken(t.root); err != nil {
			return err
		}
	}
	if err := t.checkGreen(ctx, mutations, progress); err != nil {
		return err
	}
	rows, err := t.breakAll(ctx, mutations, progress)
	if err != nil {
		return err
	}
	var table bytes.Buffer
	writeTable(&table, rows, missing)
	if o.out == "" {
		_, err = stdout.Write(table.Bytes())
	} else {
		err = os.WriteFile(o.out, table.Bytes(), 0o644)
	}
	return errors.Join(err, verdict(rows))
}

// newTree finds the library that this module is about, and makes room for files.
func newTree(ctx context.Context) (*tree, error) {
	roots := make([]string, 2)
	for i, module := range []string{"github.com/seed22601231/connectx", "github.com/seed22601231/connectx/measure"} {
		out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", module).Output()
		if err != nil {
			return nil, fmt.Errorf("find the module %s (run it in the folder measure): %w", module, err)
		}
		roots[i] = strings.TrimSpace(string(out))
	}
	temp, err := os.MkdirTemp("", "mutations")
	return &tree{root: roots[0], measure: roots[1], temp: temp}, err
}
