//go:build linux

package main

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
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
	var program []unix.SockFilter
	for text := range strings.SplitSeq(options, ",") {
		option, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			return err
		}
		for _, call := range []uint32{unix.SYS_SETSOCKOPT, unix.SYS_GETSOCKOPT} {
			program = append(program,
				load32(offsetCall), unless(call, 5),
				load32(offsetArguments+8*1), unless(unix.SOL_IP, 3),
				load32(offsetArguments+8*2), unless(uint32(option), 1),
				ret(unix.SECCOMP_RET_ERRNO|uint32(unix.ENOPROTOOPT)))
		}
	}
	program = append(program, ret(unix.SECCOMP_RET_ALLOW))
	path, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}

	// A filter belongs to a thread, and the one that executes a program keeps it.
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	prog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&prog)), 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	return fmt.Errorf("execve: %w", unix.Exec(path, args, os.Environ()))
}

// Offsets in struct seccomp_data; an argument's low half comes first on
// little-endian machines.
const (
	offsetCall      = 0
	offsetArguments = 16
)

func load32(offset uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
}

// unless skips instructions if what was loaded is not value.
func unless(value uint32, skip uint8) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: value, Jf: skip}
}

func ret(value uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: value}
}
