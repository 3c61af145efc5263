package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"time"

	"github.com/seed22601231/connectx/internal/terminal"
)

// ports shows who uses the ephemeral ports, and what fails for want of them.
func ports(args []string, stdout, stderr io.Writer) int {
	complain := func(err error) { fmt.Fprintf(stderr, "connectx ports: %v\n", err) }
	var o portsOptions
	if code, done := parsed("ports", o.parse(args, stdout), stderr); done {
		return code
	}
	ctx := context.Background()
	if o.watch {
		var stop func()
		ctx, stop = signal.NotifyContext(ctx, os.Interrupt)
		defer stop()
	}
	if err := showPorts(ctx, o, stdout); err != nil && ctx.Err() == nil {
		complain(err)
		return exitFailed
	}
	return exitOK
}

// showPorts writes one report, or with -watch one each interval until the context
// is over.
func showPorts(ctx context.Context, o portsOptions, stdout io.Writer) error {
	towards, err := o.lookUp(ctx)
	if err != nil {
		return err
	}
	ticks := time.NewTicker(o.interval)
	defer ticks.Stop()
	for {
		r, err := gatherPorts(o, towards)
		if err != nil {
			return err
		}
		if err := o.write(stdout, r); err != nil || !o.watch {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticks.C:
		}
	}
}

// write writes one report with one system call, so that a terminal does not
// flicker.
func (o *portsOptions) write(stdout io.Writer, r *portsReport) error {
	var b bytes.Buffer
	switch {
	case o.json && o.watch:
		if err := json.NewEncoder(&b).Encode(r); err != nil {
			return err
		}
	case o.json:
		e := json.NewEncoder(&b)
		e.SetIndent("", "  ")
		if err := e.Encode(r); err != nil {
			return err
		}
	default:
		if o.watch && terminal.Is(stdout) {
			b.WriteString("\x1b[H\x1b[2J") // cursor home, clear
		}
		if o.watch {
			fmt.Fprintf(&b, "%s\n", r.Time.Format(time.DateTime))
		}
		writePorts(&b, r)
		if o.watch {
			fmt.Fprintln(&b)
		}
	}
	_, err := stdout.Write(b.Bytes())
	return err
}
