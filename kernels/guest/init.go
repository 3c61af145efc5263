//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/kernels/internal/job"
)

// mounts are those of a Debian system that the tests look at.
var mounts = []struct{ kind, at, options string }{
	{"proc", "/proc", ""},
	{"sysfs", "/sys", ""},
	{"devtmpfs", "/dev", ""},
	{"devpts", "/dev/pts", ""},
	{"tmpfs", "/dev/shm", "mode=1777"},
	{"tmpfs", "/tmp", "mode=1777"},
	{"tmpfs", "/run", "mode=755"},
	{"cgroup2", "/sys/fs/cgroup", ""},
	{"bpf", "/sys/fs/bpf", "mode=700"},
}

// descriptors is the limit that systemd gives a service.
const descriptors = 524288

// initialize makes a system of the kernel, and reports from it.
func initialize() error {
	for _, m := range mounts {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.at, m.kind, 0, m.options); err != nil {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	// What devtmpfs leaves to udev.
	if err := os.Symlink("/proc/self/fd", "/dev/fd"); err != nil {
		return err
	}
	limit := unix.Rlimit{Cur: descriptors, Max: descriptors}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return os.NewSyscallError("setrlimit", err)
	}
	if err := os.Setenv("PATH", "/sbin:/bin"); err != nil {
		return err
	}
	text, err := os.ReadFile("/" + planFile)
	if err != nil {
		return err
	}
	var plan job.Plan
	if err := json.Unmarshal(text, &plan); err != nil {
		return fmt.Errorf("%s: %w", planFile, err)
	}
	if err := load(plan.Modules...); err != nil {
		return err
	}
	port, err := openPort()
	if err != nil {
		return err
	}
	defer port.Close()
	return report("/", port)
}

// openPort opens the one port of virtio-serial, which takes a moment to appear.
func openPort() (*os.File, error) {
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		ports, err := filepath.Glob("/dev/vport*")
		switch {
		case err != nil:
			return nil, err
		case len(ports) == 1:
			return os.OpenFile(ports[0], os.O_WRONLY, 0)
		case time.Now().After(deadline):
			return nil, errors.New("there is no virtio-serial port")
		}
	}
}

// powerOff ends the virtual machine, with all that is still running in it.
func powerOff() {
	unix.Sync()
	err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	fmt.Fprintln(os.Stderr, "guest: power off:", err)
}
