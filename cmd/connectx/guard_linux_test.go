package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestGuardSaysWhatItNeeds(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	checkRun(t, []string{"guard", "-cgroup", "/"}, exitFailed, "", "needs connectx-guard, in PATH or beside connectx")
}

// The process becomes connectx-guard, with its arguments and its exit code.
func TestGuardIsAnotherProgram(t *testing.T) {
	const child = "CONNECTX_TEST_GUARD"
	if os.Getenv(child) != "" {
		os.Exit(run([]string{"guard", "-cgroup", "a b"}, os.Stdout, os.Stderr))
	}
	path := t.TempDir()
	script := "#!/bin/sh\necho \"$#: $1 $2\"; exit 7\n"
	if err := os.WriteFile(filepath.Join(path, guardCommand), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestGuardIsAnotherProgram$")
	cmd.Env = append(os.Environ(), child+"=1", "PATH="+path)
	out, err := cmd.CombinedOutput()
	if want := "2: -cgroup a b\n"; string(out) != want || cmd.ProcessState.ExitCode() != 7 {
		t.Errorf("%q, %v; want %q, exit status 7", out, err, want)
	}
}
