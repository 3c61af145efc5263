//go:build linux

package connectx_test

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// childEnv names the function of children that a process started by a test
// runs in place of the tests.
const childEnv = "CONNECTX_TEST_CHILD"

var children = map[string]func() int{}

// child returns the command that runs a function of children in a process of
// its own, in the network namespace of the calling thread.
func child(t testing.TB, name string, env ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(append(os.Environ(), childEnv+"="+name), env...)
	cmd.Stderr = os.Stderr
	return cmd
}

// startChild starts a child, which is to run until its standard input ends with
// the test, and returns the lines that it prints.
func startChild(t testing.TB, name string, env ...string) *bufio.Scanner {
	t.Helper()
	cmd := child(t, name, env...)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	})
	return bufio.NewScanner(stdout)
}

// runChild runs a child to its end and returns what it printed.
func runChild(t testing.TB, name string, env ...string) string {
	t.Helper()
	out, err := child(t, name, env...).Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
	return strings.TrimSpace(string(out))
}

// failChild ends a child with a message.
func failChild(format string, args ...any) int {
	fmt.Fprintf(os.Stderr, format+"\n", args...)
	return 1
}
