//go:build linux

package connectx_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A refusal makes a system call fail, for real: the kernel returns errno (0 for
// success without having done anything) where the argument has that value.
type refusal struct {
	call     uint32
	argument uint32 // its index
	value    uint32
	errno    unix.Errno
}

// refuse installs a seccomp filter in this process, for good.
func refuse(refusals ...refusal) error {
	var program []unix.SockFilter
	for _, r := range refusals {
		program = append(program,
			load(offsetCall), unless(r.call, 3),
			load(offsetArguments+8*r.argument), unless(r.value, 1),
			ret(unix.SECCOMP_RET_ERRNO|uint32(r.errno)))
	}
	_, err := install(unix.SECCOMP_FILTER_FLAG_TSYNC, append(program, ret(unix.SECCOMP_RET_ALLOW)))
	return err
}

// beforeEach has f called before each system call of those numbers that the
// calling thread makes, which must be locked and end soon. f gets the call's
// struct seccomp_data. While it runs the thread is in the kernel, and with it a
// processor of the Go scheduler: so there are several from now on, and no
// collections, which would wait for the thread.
func beforeEach(calls []uint32, f func(data []byte)) error {
	runtime.GOMAXPROCS(4)
	debug.SetGCPercent(-1)
	program := []unix.SockFilter{load(offsetCall)}
	for _, call := range calls {
		program = append(program, unless(call, 1), ret(unix.SECCOMP_RET_USER_NOTIF))
	}
	program = append(program, ret(unix.SECCOMP_RET_ALLOW))
	// A call that the runtime's preemption signals interrupt would be made, and
	// seen, a second time. Before Linux 5.19 there is nothing against that.
	listener, err := install(unix.SECCOMP_FILTER_FLAG_NEW_LISTENER|unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, program)
	if errors.Is(err, unix.EINVAL) {
		listener, err = install(unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, program)
	}
	if err != nil {
		return err
	}
	go func() {
		defer unix.Close(listener)
		var notification [80]byte // struct seccomp_notif
		var response [24]byte     // struct seccomp_notif_resp
		for {
			clear(notification[:])
			if errno := ioctl(listener, unix.SECCOMP_IOCTL_NOTIF_RECV, notification[:]); errno != 0 {
				if ended(listener) {
					return
				}
				continue // a signal came before the call was received
			}
			f(notification[16:])
			copy(response[:8], notification[:8]) // id
			response[20] = unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE
			ioctl(listener, unix.SECCOMP_IOCTL_NOTIF_SEND, response[:])
		}
	}()
	return nil
}

// catchEach has the process at the other end of a Unix socket decide on each
// system call of those numbers that the calling thread makes, which must be
// locked. What beforeEach has to make do with does not trouble this: while the
// call waits, no code of this process has to run.
func catchEach(calls []uint32, socket int) error {
	program := []unix.SockFilter{load(offsetCall)}
	for _, call := range calls {
		program = append(program, unless(call, 1), ret(unix.SECCOMP_RET_USER_NOTIF))
	}
	program = append(program, ret(unix.SECCOMP_RET_ALLOW))
	listener, err := install(unix.SECCOMP_FILTER_FLAG_NEW_LISTENER|unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, program)
	if errors.Is(err, unix.EINVAL) { // as in beforeEach; the child may do without the signals
		listener, err = install(unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, program)
	}
	if err != nil {
		return err
	}
	defer unix.Close(listener)
	return unix.Sendmsg(socket, []byte{0}, unix.UnixRights(listener), nil, 0)
}

// A caughtCall is a system call that waits for a decision.
type caughtCall struct {
	number uint32
	args   [6]uint64
	pid    int // of the thread
	pidfd  int // of its process
}

// A decision is what becomes of a caughtCall: it fails with errno, or is made, or
// returns value without being made.
type decision struct {
	value int64
	errno unix.Errno
	made  bool
}

// decideOnEach receives a listener on socket, and decides on each call that is
// caught until the thread which makes them has ended.
func decideOnEach(socket, pidfd int, decide func(c *caughtCall) decision) error {
	room := make([]byte, unix.CmsgSpace(4))
	var b [1]byte
	_, n, _, _, err := unix.Recvmsg(socket, b[:], room, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("recvmsg", err)
	}
	messages, err := unix.ParseSocketControlMessage(room[:n])
	if err != nil || len(messages) != 1 {
		return fmt.Errorf("no listener was sent: %d messages, %v", len(messages), err)
	}
	listeners, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return err
	}
	listener := listeners[0]
	defer unix.Close(listener)
	for {
		// RECV does not end with the thread on all kernels, but poll does.
		fds := []unix.PollFd{{Fd: int32(listener), Events: unix.POLLIN}}
		switch n, err := unix.Poll(fds, -1); {
		case err == unix.EINTR:
			continue
		case err != nil:
			return os.NewSyscallError("poll", err)
		case n == 1 && fds[0].Revents&unix.POLLIN == 0:
			return nil
		}
		var notification [80]byte // struct seccomp_notif
		if errno := ioctl(listener, unix.SECCOMP_IOCTL_NOTIF_RECV, notification[:]); errno != 0 {
			continue // a signal came before the call was received
		}
		data := notification[16:]
		c := caughtCall{
			number: binary.NativeEndian.Uint32(data),
			pid:    int(binary.NativeEndian.Uint32(notification[8:])),
			pidfd:  pidfd,
		}
		for i := range c.args {
			c.args[i] = binary.NativeEndian.Uint64(data[offsetArguments+8*i:])
		}
		d := decide(&c)
		var response [24]byte // struct seccomp_notif_resp
		copy(response[:8], notification[:8])
		binary.NativeEndian.PutUint64(response[8:], uint64(d.value))
		binary.NativeEndian.PutUint32(response[16:], uint32(-int32(d.errno)))
		if d.made {
			binary.NativeEndian.PutUint32(response[20:], unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE)
		}
		ioctl(listener, unix.SECCOMP_IOCTL_NOTIF_SEND, response[:])
	}
}

// read returns up to n bytes of the memory that an argument of the call points to.
func (c *caughtCall) read(address uint64, n int) []byte {
	b := make([]byte, n)
	n, err := unix.ProcessVMReadv(c.pid, []unix.Iovec{iovec(b)}, []unix.RemoteIovec{{Base: uintptr(address), Len: n}}, 0)
	if err != nil {
		return nil
	}
	return b[:n]
}

// write changes the memory that an argument of the call points to.
func (c *caughtCall) write(address uint64, b []byte) error {
	_, err := unix.ProcessVMWritev(c.pid, []unix.Iovec{iovec(b)}, []unix.RemoteIovec{{Base: uintptr(address), Len: len(b)}}, 0)
	return err
}

func iovec(b []byte) unix.Iovec {
	v := unix.Iovec{Base: unsafe.SliceData(b)}
	v.SetLen(len(b))
	return v
}

// onDescriptor has f look at a copy of the descriptor that is the first argument.
func (c *caughtCall) onDescriptor(f func(fd int)) error {
	fd, err := unix.PidfdGetfd(c.pidfd, int(c.args[0]), 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	f(fd)
	return nil
}

// ended reports whether the thread that a listener listens to has ended.
func ended(listener int) bool {
	fds := []unix.PollFd{{Fd: int32(listener), Events: unix.POLLIN}}
	n, _ := unix.Poll(fds, 0)
	return n == 1 && fds[0].Revents&unix.POLLHUP != 0
}

func ioctl(fd int, request uintptr, b []byte) unix.Errno {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(&b[0])))
	return errno
}

// Offsets in struct seccomp_data; an argument's low half comes first on
// little-endian machines.
const (
	offsetCall      = 0
	offsetArguments = 16
)

func load(offset uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
}

// unless skips instructions if what was loaded is not value.
func unless(value uint32, skip uint8) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: value, Jf: skip}
}

func ret(value uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: value}
}

// install installs a filter and returns what seccomp(2) does.
func install(flags uintptr, program []unix.SockFilter) (int, error) {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return -1, fmt.Errorf("prctl: %w", err)
	}
	prog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return -1, fmt.Errorf("seccomp: %w", errno)
	}
	return int(fd), nil
}
