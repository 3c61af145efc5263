//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"
)

// A catcher is something that goes red when the library is broken.
type catcher interface {
	fmt.Stringer

	// run runs it until it is red or done. The mutation is nil, and overlay
	// empty, when nothing is broken. An error says that it could not be found
	// out whether it is red.
	run(ctx context.Context, t *tree, m *mutation, overlay string) (outcome, error)
}

// An outcome is what has come of a catcher.
type outcome struct {
	red   string // what has gone red; empty if nothing has
	after string // how long that took, or how many states of the model
	said  string // what it had to say about it
}

// seconds is a time in the form of the table.
func seconds(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }

// command is one that ends with the context, together with all that it has
// started. What it leaves behind then is removed with temp.
func (t *tree) command(ctx context.Context, dir, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "TMPDIR="+t.temp, "GOTMPDIR="+t.temp)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 10 * time.Second
	return cmd
}
