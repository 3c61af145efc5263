//go:build !linux

package main

import (
	"fmt"
	"io"
	"runtime"
)

func ports(_ []string, _, stderr io.Writer) int {
	fmt.Fprintf(stderr, "connectx ports: needs Linux, whose sock_diag tells who is on which port; this is %s\n", runtime.GOOS)
	return exitFailed
}
