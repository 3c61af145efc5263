//go:build linux

// Package seccomp makes system calls of a process fail, for real, or wait until
// another one has decided what becomes of them (seccomp(2)).
package seccomp

import (
	"fmt"
	"os"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Rule is what becomes of some system calls: a part of a filter. Those that no
// Rule is about are made.
type Rule []unix.SockFilter

// Fail has a system call fail with errno (or return 0 without having done
// anything, if that is 0) where the argument of that index has the value, as far
// as its lower 32 bits go.
func Fail(call, argument, value uint32, errno unix.Errno) Rule {
	return where(call, unix.SECCOMP_RET_ERRNO|uint32(errno), condition{argument, value})
}

// FailOption has the kernel not know an option of sockets.
func FailOption(level, option uint32) Rule {
	var rule Rule
	for _, call := range []uint32{unix.SYS_SETSOCKOPT, unix.SYS_GETSOCKOPT} {
		rule = append(rule, where(call, unix.SECCOMP_RET_ERRNO|uint32(unix.ENOPROTOOPT), condition{1, level}, condition{2, option})...)
	}
	return rule
}

// Notify has system calls wait for what is decided at the listener that Install
// returns.
func Notify(calls ...uint32) Rule {
	var rule Rule
	for _, call := range calls {
		rule = append(rule, where(call, unix.SECCOMP_RET_USER_NOTIF)...)
	}
	return rule
}

// OffsetArguments is where the arguments are in struct seccomp_data, after the
// number of the call. The lower half of one comes first on little-endian machines.
const OffsetArguments = 16

// A condition is the value of an argument.
type condition struct{ argument, value uint32 }

func where(call, action uint32, conditions ...condition) Rule {
	skip := uint8(2*len(conditions) + 1) // to what comes after the rule
	rule := Rule{load(0), unless(call, skip)}
	for _, c := range conditions {
		skip -= 2
		rule = append(rule, load(OffsetArguments+8*c.argument), unless(c.value, skip))
	}
	return append(rule, ret(action))
}

func load(offset uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
}

// unless skips instructions if what was loaded is not value.
func unless(value uint32, skip uint8) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: value, Jf: skip}
}

func ret(action uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: action}
}

// Install installs a filter on the calling thread, for good, and returns what
// seccomp(2) does: a listener with SECCOMP_FILTER_FLAG_NEW_LISTENER.
func Install(flags uintptr, rules ...Rule) (int, error) {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return -1, os.NewSyscallError("prctl", err)
	}
	program := append(slices.Concat(rules...), ret(unix.SECCOMP_RET_ALLOW))
	prog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return -1, fmt.Errorf("seccomp: %w", errno)
	}
	return int(fd), nil
}
