//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/seed22601231/connectx/kernels/internal/job"
)

// run runs a job to its end.
func run(root string, j job.Job, output func(string) error) (end job.End) {
	started := time.Now()
	defer func() { end.Seconds = time.Since(started).Seconds() }()
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(j.Seconds)*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(root, j.Binary), j.Args...)
	if len(j.Refuse) > 0 {
		args := append([]string{"refuse", optionNumbers(j.Refuse), cmd.Path}, j.Args...)
		cmd = exec.CommandContext(ctx, "/proc/self/exe", args...)
	}
	cmd.Dir = filepath.Join(root, j.Dir)
	cmd.Env = append(os.Environ(), "HOME=/tmp", "TMPDIR=/tmp")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if j.UID != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(j.UID), Gid: uint32(j.UID)}
	}
	// The tests are a child of the process, which would outlive it.
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 10 * time.Second
	cmd.Stdout = writerFunc(output)
	cmd.Stderr = cmd.Stdout
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return job.End{Code: -1, Problem: fmt.Sprintf("still running after %d s", j.Seconds)}
	case errors.As(err, &exit):
		return job.End{Code: exit.ExitCode()}
	case err != nil:
		return job.End{Code: -1, Problem: err.Error()}
	}
	return job.End{}
}

// A writerFunc passes on what is written.
type writerFunc func(string) error

var _ io.Writer = writerFunc(nil)

func (f writerFunc) Write(p []byte) (int, error) { return len(p), f(string(p)) }
