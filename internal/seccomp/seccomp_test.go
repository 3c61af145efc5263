//go:build linux

package seccomp_test

import (
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/seccomp"
)

// Each rule is about what it says, and nothing else.
func TestRules(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	get := func(level, option int) func() error {
		return func() error {
			_, err := unix.GetsockoptInt(fd, level, option)
			return err
		}
	}
	rules := []seccomp.Rule{
		seccomp.Fail(unix.SYS_GETSOCKOPT, 2, unix.SO_RCVBUF, unix.ENOMEM),
		seccomp.FailOption(unix.SOL_IP, unix.IP_TOS),
		seccomp.Fail(unix.SYS_DUP, 0, uint32(fd), 0),
	}
	for _, test := range []struct {
		name          string
		call          func() error
		before, after error
	}{
		{"an argument of one call", get(unix.SOL_SOCKET, unix.SO_RCVBUF), nil, unix.ENOMEM},
		{"the same of another call", func() error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4096) }, nil, nil},
		{"another option", get(unix.SOL_SOCKET, unix.SO_SNDBUF), nil, nil},
		{"an option of a level", get(unix.SOL_IP, unix.IP_TOS), nil, unix.ENOPROTOOPT},
		{"another one of it", get(unix.SOL_IP, unix.IP_TTL), nil, nil},
		{"the same number of another level", get(unix.SOL_SOCKET, unix.IP_TOS), nil, nil},
		{"setting it", func() error { return unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TOS, 0) }, nil, unix.ENOPROTOOPT},
		{"a call that does nothing", func() error {
			copied, err := unix.Dup(fd)
			if err == nil && copied == 0 {
				return os.ErrInvalid
			}
			unix.Close(copied)
			return err
		}, nil, os.ErrInvalid},
	} {
		if err := test.call(); err != test.before {
			t.Errorf("%s: %v, want %v", test.name, err, test.before)
		}
		var err error
		onThread(t, rules, func() { err = test.call() })
		if err != test.after {
			t.Errorf("%s with the rules: %v, want %v", test.name, err, test.after)
		}
	}
}

// onThread runs f on a thread that ends with it, as filters do not.
func onThread(t *testing.T, rules []seccomp.Rule, f func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		_, err := seccomp.Install(0, rules...)
		if err == nil {
			f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
