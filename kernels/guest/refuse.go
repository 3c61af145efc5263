//go:build linux

package main

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/seccomp"
)

func optionNumbers(options []uint32) string {
	numbers := make([]string, len(options))
	for i, o := range options {
		numbers[i] = strconv.FormatUint(uint64(o), 10)
	}
	return strings.Join(numbers, ",")
}

// refuseAndExec becomes another program, for which the kernel does not know some
// options of level SOL_IP.
func refuseAndExec(options string, args []string) error {
	var rules []seccomp.Rule
	for text := range strings.SplitSeq(options, ",") {
		option, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			return err
		}
		rules = append(rules, seccomp.FailOption(unix.SOL_IP, uint32(option)))
	}
	path, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}

	// A filter belongs to a thread, and the one that executes a program keeps it.
	runtime.LockOSThread()
	if _, err := seccomp.Install(0, rules...); err != nil {
		return err
	}
	return fmt.Errorf("execve: %w", unix.Exec(path, args, os.Environ()))
}
