// Package exampletest is what the tests of the examples share.
package exampletest

import (
	"bufio"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/seed22601231/connectx/examples/internal/fewports"
	"github.com/seed22601231/connectx/internal/netns"
)

// SetPorts leaves the test that many ephemeral ports, and sees to it that the
// test leaves them all to the next one: its end is when every socket is closed.
// It skips a test whose process has no namespace of its own.
func SetPorts(t *testing.T, ports int) {
	t.Helper()
	netns.Need(t)
	if err := fewports.SetUp(ports); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// Some are closed by goroutines that nobody waits for.
		for deadline := time.Now().Add(10 * time.Second); ; runtime.Gosched() {
			open := openSockets(t)
			if len(open) == 0 {
				return
			}
			if time.Now().After(deadline) {
				t.Errorf("%d sockets stay open:\n%s", len(open), strings.Join(open, "\n"))
				return
			}
		}
	})
}

// openSockets returns the lines of the kernel's tables of IPv4 sockets in this
// namespace.
func openSockets(t *testing.T) (lines []string) {
	for _, table := range []string{"tcp", "udp"} {
		b, err := os.ReadFile("/proc/self/net/" + table)
		if err != nil {
			t.Fatal(err)
		}
		rows := strings.Split(strings.TrimSpace(string(b)), "\n")
		lines = append(lines, rows[1:]...) // without the header
	}
	return lines
}

// Start starts a server from outside Go, waits for the line on its standard
// error that says that it listens, and stops it when the test ends. It skips the
// test if the program is not installed.
func Start(t *testing.T, ready, program string, args ...string) {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		// Debian has them where an ordinary user's PATH does not look.
		if path, err = exec.LookPath("/usr/sbin/" + program); err != nil {
			t.Skipf("%s is not installed: %v", program, err)
		}
	}
	cmd := exec.Command(path, args...)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}

	// The parent-death signal is tied to the thread that forks, so that thread
	// has to stay until the server is gone.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, exited := make(chan error), make(chan struct{})
	go func() {
		defer close(exited)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_, _ = cmd.Process.Wait()
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}

	listens, output := make(chan struct{}), make(chan string)
	go func() {
		var seen strings.Builder
		listening := sync.OnceFunc(func() { close(listens) })
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			seen.WriteString(lines.Text() + "\n")
			if strings.Contains(lines.Text(), ready) {
				listening()
			}
		}
		output <- seen.String()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-exited
		if log := <-output; t.Failed() {
			t.Logf("%s:\n%s", program, log)
		}
		stderr.Close()
	})
	select {
	case <-listens:
	case <-exited:
		t.Fatalf("%s has ended", program)
	}
}

// Contains fails the test unless each of the texts is in what an example has
// printed.
func Contains(t *testing.T, printed string, texts ...string) {
	t.Helper()
	t.Logf("prints\n%s", printed)
	for _, text := range texts {
		if !strings.Contains(printed, text) {
			t.Errorf("%q is not in it", text)
		}
	}
}
