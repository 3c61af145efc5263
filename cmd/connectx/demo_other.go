//go:build !linux

package main

import (
	"fmt"
	"io"
	"runtime"
)

func demo(_ []string, _, stderr io.Writer) int {
	fmt.Fprintf(stderr, "connectx demo: needs Linux; on %s connectx.Dialer does what net.Dialer does\n", runtime.GOOS)
	return exitFailed
}
