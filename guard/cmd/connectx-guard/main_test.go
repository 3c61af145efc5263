//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/guard"
)

func TestItSaysWhatIsWrong(t *testing.T) {
	for _, test := range []struct {
		name string
		args []string
		code int
		want string
	}{
		{"without a cgroup", nil, exitUsage, "Usage: connectx-guard -cgroup"},
		{"with an argument too many", []string{"-cgroup", "/", "x"}, exitUsage, "Usage: connectx-guard -cgroup"},
		{"with a folder that is no cgroup", []string{"-cgroup", "/"}, exitFailed, guard.ErrNotCgroup2.Error()},
		{"asked for help", []string{"-h"}, exitOK, "folder of the cgroup"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var out, errs bytes.Buffer
			if code := run(t.Context(), test.args, &out, &errs); code != test.code {
				t.Errorf("exit code %d, want %d", code, test.code)
			}
			if !strings.Contains(errs.String(), test.want) || out.Len() > 0 {
				t.Errorf("%q, %q; want %q", &out, &errs, test.want)
			}
		})
	}
}

func TestOnlyChangesArePrinted(t *testing.T) {
	denied := &guard.Denial{PID: 7, Command: "python3", Errno: unix.EADDRINUSE}
	for _, test := range []struct {
		name   string
		asJSON bool
		want   string
	}{
		{"as text", false, "allowed 0, denied 0\n" +
			"allowed 1, denied 2, allowed without room 3, seen too late 4; the last one denied: python3 (7), invalid AddrPort->invalid AddrPort, address already in use\n"},
		{"as JSON", true, `{"Allowed":0,"Denied":0,"FailedOpen":0,"Overlapping":0}` + "\n" +
			`{"Allowed":1,"Denied":2,"FailedOpen":3,"Overlapping":4,"LastDenied":{"PID":7,"Command":"python3","Local":"","Remote":"","NetNS":0,"Cookie":0,"Errno":98,"SinceBoot":0}}` + "\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var out bytes.Buffer
			print := printer(&out, test.asJSON)
			for range 2 {
				if err := print(guard.Stats{}); err != nil {
					t.Fatal(err)
				}
			}
			for range 2 {
				if err := print(guard.Stats{Allowed: 1, Denied: 2, FailedOpen: 3, Overlapping: 4, LastDenied: denied}); err != nil {
					t.Fatal(err)
				}
			}
			if got := out.String(); got != test.want {
				t.Errorf("%s\nwant\n%s", got, test.want)
			}
		})
	}
}

// tempCgroup makes a cgroup.
func tempCgroup(t *testing.T) string {
	t.Helper()
	mount := t.TempDir()
	if err := unix.Mount("none", mount, "cgroup2", 0, ""); err != nil {
		t.Skipf("needs a cgroup v2: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mount, 0); err != nil {
			t.Error(err)
		}
	})
	cgroup := filepath.Join(mount, "connectx-guard-"+strconv.Itoa(os.Getpid()))
	if err := os.Mkdir(cgroup, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(cgroup); err != nil && !os.IsNotExist(err) {
			t.Error(err)
		}
	})
	return cgroup
}

func TestItGuardsUntil(t *testing.T) {
	for _, test := range []struct {
		name string
		end  func(t *testing.T, cgroup string, interrupt func())
		code int
		want string // of the standard error
	}{
		{"it is interrupted", func(_ *testing.T, _ string, interrupt func()) { interrupt() }, exitOK, ""},
		{"the cgroup is removed", func(t *testing.T, cgroup string, _ func()) {
			if err := os.Remove(cgroup); err != nil {
				t.Error(err)
			}
		}, exitFailed, "guard: " + guard.ErrEnded.Error() + "\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			cgroup := tempCgroup(t)
			ctx, interrupt := context.WithCancel(t.Context())
			defer interrupt()
			r, w := io.Pipe()
			var errs bytes.Buffer
			code := make(chan int)
			go func() { code <- run(ctx, []string{"-cgroup", cgroup, "-share"}, w, &errs) }()
			line := make(chan string, 1)
			go func() {
				text, _ := bufio.NewReader(r).ReadString('\n')
				line <- text
			}()
			select {
			case got := <-line:
				if want := "allowed 0, denied 0\n"; got != want {
					t.Errorf("%q, want %q", got, want)
				}
			case <-code:
				if strings.Contains(errs.String(), "needs root") {
					t.Skip(&errs)
				}
				t.Fatal(&errs)
			}
			test.end(t, cgroup, interrupt)
			if got := <-code; got != test.code {
				t.Errorf("exit code %d, want %d", got, test.code)
			}
			if got := errs.String(); got != test.want {
				t.Errorf("%q, want %q", got, test.want)
			}
		})
	}
}
