//go:build !linux

package main

import (
	"fmt"
	"io"
	"runtime"
)

func guard(_ []string, _, stderr io.Writer) int {
	fmt.Fprintf(stderr, "connectx guard: needs Linux, and its eBPF; this is %s\n", runtime.GOOS)
	return exitFailed
}
