//go:build linux

// Connectx-guard keeps any two UDP sockets of the programs in a cgroup from being
// connected to the same 4-tuple, until it is interrupted.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/seed22601231/connectx/guard"
)

const usage = `Usage: connectx-guard -cgroup FOLDER [flags]

Keeps any two UDP sockets of the programs in a cgroup (v2) from being connected to
the same 4-tuple: the connect that would be the second one fails with EADDRINUSE.
It runs until it is interrupted, and prints counters once a second if they have
changed. It needs root, or CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN.

`

// Exit codes.
const (
	exitOK = iota
	exitFailed
	exitUsage
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("connectx-guard", flag.ContinueOnError)
	flags.SetOutput(stderr)
	var o guard.Options
	cgroup := flags.String("cgroup", "", "`folder` of the cgroup")
	asJSON := flags.Bool("json", false, "print counters as JSON, an object a line")
	flags.BoolVar(&o.Share, "share", false, "let sockets that connect without a port share theirs")
	flags.IntVar(&o.Max, "max", 0, "room for so many `sockets` (default 262144)")
	flags.BoolVar(&o.DenyWhenFull, "deny-when-full", false, "let no socket connect for which there is no room")
	flags.StringVar(&o.Pin, "pin", "", "`folder` of a BPF file system in which the guard goes on if this program is killed")
	flags.Usage = func() {
		fmt.Fprint(stderr, usage)
		flags.PrintDefaults()
	}
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return exitOK
	case err != nil:
		return exitUsage
	case *cgroup == "" || flags.NArg() > 0:
		flags.Usage()
		return exitUsage
	}
	if err := watch(ctx, *cgroup, o, printer(stdout, *asJSON)); err != nil {
		fmt.Fprintln(stderr, err)
		return exitFailed
	}
	return exitOK
}

// watch keeps a guard until the context is over.
func watch(ctx context.Context, cgroup string, o guard.Options, print func(guard.Stats) error) (err error) {
	g, err := guard.Attach(cgroup, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, g.Close()) }()
	var sync time.Duration
	for {
		s, err := g.Stats()
		if err != nil {
			return err
		}
		if err := print(s); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(max(time.Second, sync*share)):
		}
		before := time.Now()
		if err := g.Sync(); err != nil {
			return err
		}
		sync = time.Since(before)
	}
}

// share is the part of the time, 1/share, that may go into Sync, which goes through
// all UDP sockets.
const share = 20

// printer prints counters that have changed.
func printer(w io.Writer, asJSON bool) func(guard.Stats) error {
	var last guard.Stats
	first := true
	return func(s guard.Stats) error {
		now, before := s, last
		now.LastDenied, before.LastDenied = nil, nil
		if !first && now == before {
			return nil
		}
		first, last = false, s
		if asJSON {
			return json.NewEncoder(w).Encode(s)
		}
		_, err := fmt.Fprintln(w, text(s))
		return err
	}
}

func text(s guard.Stats) string {
	t := fmt.Sprintf("allowed %d, denied %d", s.Allowed, s.Denied)
	if s.FailedOpen > 0 {
		t += fmt.Sprintf(", allowed without room %d", s.FailedOpen)
	}
	if s.Overlapping > 0 {
		t += fmt.Sprintf(", seen too late %d", s.Overlapping)
	}
	if d := s.LastDenied; d != nil {
		t += fmt.Sprintf("; the last one denied: %s (%d), %s->%s, %v", d.Command, d.PID, d.Local, d.Remote, d.Errno)
	}
	return t
}
