//go:build linux

package program

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/seed22601231/connectx/internal/netns"
)

func TestMain(m *testing.M) { os.Exit(netns.Main(m.Run)) }

func TestExitCodes(t *testing.T) {
	parse := func(args ...string) func() error {
		return func() error {
			flags := flag.NewFlagSet("weigh", flag.ContinueOnError)
			n := flags.Int("n", 1, "")
			return Parse(flags, "", args, io.Discard, func() error {
				if *n < 1 {
					return errors.New("-n: must be above 0")
				}
				return nil
			})
		}
	}
	for _, tt := range []struct {
		name string
		run  func() error
		code int
		said string
	}{
		{"nothing went wrong", parse("-n", "2"), OK, ""},
		{"the help was asked for", parse("-help"), OK, ""},
		{"a flag that there is not", parse("-m"), Usage, "weigh: flag provided but not defined: -m\n"},
		{"a value that is out of range", parse("-n", "0"), Usage, "weigh: -n: must be above 0\n"},
		{"an argument too many", parse("2"), Usage, "weigh: unexpected argument \"2\"\n"},
		{"an error", func() error { return errors.New("broken") }, Failed, "weigh: broken\n"},
		{"an error that has been said", func() error { return fmt.Errorf("%w", Exit(130)) }, 130, ""},
	} {
		var stderr strings.Builder
		if code := Run("weigh", &stderr, tt.run); code != tt.code || stderr.String() != tt.said {
			t.Errorf("%s: exit code %d, %q; want %d, %q", tt.name, code, &stderr, tt.code, tt.said)
		}
	}
}

func TestHelpHasTheFlags(t *testing.T) {
	flags := flag.NewFlagSet("weigh", flag.ContinueOnError)
	flags.Int("n", 1, "how many")
	var help strings.Builder
	check := func() error { t.Error("checks flags that are not to be used"); return nil }
	if err := Parse(flags, "Usage: weigh\n", []string{"-h"}, &help, check); !errors.Is(err, flag.ErrHelp) {
		t.Error(err)
	}
	if !strings.HasPrefix(help.String(), "Usage: weigh\n") || !strings.Contains(help.String(), "how many") {
		t.Errorf("help %q", &help)
	}
}

func TestInterruptEndsTheContext(t *testing.T) {
	netns.Need(t)
	err := InNamespace(func(ctx context.Context) error {
		if err := syscall.Kill(os.Getpid(), syscall.SIGTERM); err != nil {
			return err
		}
		<-ctx.Done()
		return ErrInterrupted
	})
	if !errors.Is(err, ErrInterrupted) {
		t.Errorf("%v, want %v", err, ErrInterrupted)
	}
}
