package guard

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Sync makes up for what the guard does not see when it happens: a connect that
// has failed, and one to AF_UNSPEC. Until the socket connects again or is closed,
// the 4-tuple stays reserved, and others are denied it. Sync gives up such
// reservations of sockets in the caller's network namespace. Where a thread may
// still be in the middle of a connect, it leaves them.
//
// It also tells the guard what the ephemeral port range is now. A process that
// keeps a guard calls it every second or so, or less often if there are so many
// sockets that this is a burden: it goes through all UDP sockets of the namespace,
// at a microsecond each.
//
// To know which connects are over it looks at what their threads do, with the
// rights of ptrace (CAP_SYS_PTRACE for programs of other users) and in the first PID
// namespace. What it cannot see stays reserved until the thread has ended.
//
// When the cgroup has been removed, and its last socket closed, the error is
// ErrEnded.
func (g *Guard) Sync() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.sync()
}

func (g *Guard) sync() error {
	if len(g.links) == 0 {
		return fmt.Errorf("guard: %w", os.ErrClosed)
	}
	switch attached, err := cgroupOf(g.links[0]); {
	case err != nil:
		return fmt.Errorf("ask what the guard is attached to: %w", err)
	case attached == 0:
		return fmt.Errorf("guard: %w", ErrEnded)
	}
	if err := g.forgetTaken(); err != nil {
		return err
	}
	doubts, err := g.pass()
	if err != nil {
		return err
	}
	if err := g.setPorts(); err != nil || !seesThreads() {
		return err
	}
	var over []programsDoubt
	for _, d := range doubts {
		// By its number in the upper half, the connect in question is told
		// from a later one of the same thread.
		if isOver(uint32(d.By)) {
			over = append(over, d)
		}
	}
	if len(over) == 0 {
		return nil
	}
	defer func() {
		for _, d := range over {
			_ = g.objects.Over.Delete(d)
		}
	}()
	for _, d := range over {
		if err := g.objects.Over.Put(d, uint8(1)); err != nil {
			return fmt.Errorf("note that a connect is over: %w", err)
		}
	}
	_, err = g.pass()
	return err
}

// pass runs sync over all sockets, and returns what that leaves in doubt.
func (g *Guard) pass() ([]programsDoubt, error) {
	it, err := link.AttachIter(link.IterOptions{Program: g.objects.Sync})
	if err != nil {
		return nil, fmt.Errorf("attach the iterator over UDP sockets: %w", err)
	}
	defer it.Close()
	r, err := it.Open()
	if err != nil {
		return nil, fmt.Errorf("open the iterator over UDP sockets: %w", err)
	}
	defer r.Close()
	var doubts []programsDoubt
	for {
		var d programsDoubt
		switch err := binary.Read(r, binary.NativeEndian, &d); {
		case errors.Is(err, io.EOF):
			return doubts, nil
		case errors.Is(err, unix.EAGAIN): // after a million sockets without any
			continue
		case err != nil:
			return nil, fmt.Errorf("run the iterator over UDP sockets: %w", err)
		}
		doubts = append(doubts, d)
	}
}

// isOver reports whether it is certain that a thread is not in the middle of a
// connect. One that runs may be; one that sleeps is in the system call that
// /proc/PID/syscall names (task_current_syscall).
func isOver(thread uint32) bool {
	if unix.Kill(int(thread), 0) == unix.ESRCH {
		return true
	}
	dir := "/proc/" + strconv.FormatUint(uint64(thread), 10)
	name, err := os.ReadFile(dir + "/comm")
	if err != nil || strings.HasPrefix(string(name), "iou-") {
		return false // io_uring's threads make no system calls
	}
	text, err := os.ReadFile(dir + "/syscall")
	if err != nil {
		return false
	}
	first, _, _ := strings.Cut(strings.TrimSpace(string(text)), " ")
	call, err := strconv.Atoi(first)
	return err == nil && !mayConnect(call) // else "running"
}

// connecting are the system calls in which a socket is connected. Those of 32-bit
// programs have other numbers: a few more calls are taken for one.
var connecting = []int{
	unix.SYS_CONNECT, unix.SYS_IO_URING_ENTER,
	102, 362, // socketcall and connect of 386
	283, // connect of arm
}

func mayConnect(call int) bool {
	const x32 = 0x40000000
	return slices.Contains(connecting, call&^x32)
}

// initialPIDs is the inode of the PID namespace whose numbers the programs have
// (PROC_PID_INIT_INO).
const initialPIDs = 0xeffffffc

// seesThreads reports whether the numbers of threads are what the programs mean.
func seesThreads() bool {
	var st unix.Stat_t
	return unix.Stat("/proc/self/ns/pid", &st) == nil && st.Ino == initialPIDs
}
