//go:build linux

package main

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A refusal makes a system call fail, for real: the kernel returns errno where the
// argument has that value.
type refusal struct {
	call     uint32
	argument uint32 // its index
	value    uint32
	errno    unix.Errno
}

// Offsets in struct seccomp_data; an argument's low half comes first on
// little-endian machines.
const (
	offsetCall      = 0
	offsetArguments = 16
)

// refuse installs a seccomp filter on the calling thread, for good.
func refuse(r refusal) error {
	load := func(offset uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
	}
	unless := func(value uint32, skip uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: value, Jf: skip}
	}
	ret := func(value uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: value}
	}
	program := []unix.SockFilter{
		load(offsetCall), unless(r.call, 3),
		load(offsetArguments + 8*r.argument), unless(r.value, 1),
		ret(unix.SECCOMP_RET_ERRNO | uint32(r.errno)),
		ret(unix.SECCOMP_RET_ALLOW),
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("prctl: %w", err)
	}
	prog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	return nil
}
