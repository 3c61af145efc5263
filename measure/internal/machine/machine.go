//go:build linux

// Package machine names what a measurement depends on.
package machine

import (
	"bytes"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Kernel is the name and release of the kernel ("Linux 6.18.0"), as far as it
// can be found out.
func Kernel() string {
	var name unix.Utsname
	if unix.Uname(&name) != nil {
		return "Linux"
	}
	return unix.ByteSliceToString(name.Sysname[:]) + " " + unix.ByteSliceToString(name.Release[:])
}

// Processor is the name of the processor, or else of the architecture.
func Processor() string {
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return runtime.GOARCH
	}
	for line := range bytes.Lines(text) {
		key, value, _ := bytes.Cut(line, []byte(":"))
		if string(bytes.TrimSpace(key)) == "model name" {
			return string(bytes.TrimSpace(value))
		}
	}
	return runtime.GOARCH
}
