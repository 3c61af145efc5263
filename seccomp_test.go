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

	"github.com/seed22601231/connectx/internal/seccomp"
)

// refuse installs a seccomp filter in this process, for good.
func refuse(rules ...seccomp.Rule) error {
	_, err := seccomp.Install(unix.SECCOMP_FILTER_FLAG_TSYNC, rules...)
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
	listener, err := listen(calls)
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
	listener, err := listen(calls)
	if err != nil {
		return err
	}
	defer unix.Close(listener)
	return unix.Sendmsg(socket, []byte{0}, unix.UnixRights(listener), nil, 0)
}

// listen has those system calls of the calling thread wait for what is decided at
// the listener. One that the runtime's preemption signals interrupt would be made,
// and seen, a second time; before Linux 5.19 there is nothing against that.
func listen(calls []uint32) (listener int, err error) {
	rule := seccomp.Notify(calls...)
	listener, err = seccomp.Install(unix.SECCOMP_FILTER_FLAG_NEW_LISTENER|unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, rule)
	if errors.Is(err, unix.EINVAL) {
		listener, err = seccomp.Install(unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, rule)
	}
	return listener, err
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
			c.args[i] = binary.NativeEndian.Uint64(data[seccomp.OffsetArguments+8*i:])
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
