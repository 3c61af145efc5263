package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const guardCommand = "connectx-guard"

// guard becomes connectx-guard, which is in a module of its own: what it depends on
// is no concern of the others.
func guard(args []string, _, stderr io.Writer) int {
	path, err := findGuard()
	if err != nil {
		fmt.Fprintf(stderr, "connectx guard: needs %s, in PATH or beside connectx: go build ./cmd/%[1]s in the folder guard of the source makes it (%v)\n", guardCommand, err)
		return exitFailed
	}
	err = unix.Exec(path, append([]string{guardCommand}, args...), os.Environ())
	fmt.Fprintf(stderr, "connectx guard: %s: %v\n", path, err)
	return exitFailed
}

func findGuard() (string, error) {
	if self, err := os.Executable(); err == nil {
		if path, err := exec.LookPath(filepath.Join(filepath.Dir(self), guardCommand)); err == nil {
			return path, nil
		}
	}
	return exec.LookPath(guardCommand)
}
