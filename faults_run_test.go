//go:build linux && (amd64 || arm64)

package connectx_test

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// armCall is a system call that does not exist: by it the process that dials
// tells the other one that a cell begins (its number, counted from 1) or ends (0),
// and learns how many faults there were in the one before.
const armCall = 1 << 20

// A faultResult is what became of a cell.
type faultResult struct {
	Cell     int
	Outcome  string   // of the dial
	Next     string   // of the one after it
	Reason   string   // of a fallback
	Error    string   // of the dial
	Problems []string // what must not be, whatever the outcome
}

func init() { children["faults"] = faultsChild }

// faultsChild runs every nth cell on one thread, whose system calls the parent
// decides on.
func faultsChild() int {
	runtime.LockOSThread()
	var turn, of int
	if _, err := fmt.Sscanf(os.Getenv("CELLS"), "%d/%d", &turn, &of); err != nil {
		return failChild("CELLS: %v", err)
	}
	if err := catchEach(append([]uint32{armCall}, faultCalls...), 3); err != nil {
		return failChild("%v", err)
	}
	results := json.NewEncoder(os.Stdout)
	for i, cell := range faultCells() {
		if i%of != turn {
			continue
		}
		hangs := time.AfterFunc(3*faultDeadline, func() { os.Exit(failChild("cell %d hangs: %v", i, &cell)) })
		r, err := cell.run(i)
		hangs.Stop()
		if err != nil {
			return failChild("cell %d, %v: %v", i, &cell, err)
		}
		if err := results.Encode(r); err != nil {
			return failChild("%v", err)
		}
	}
	return 0
}

// arm begins a cell, or with 0 ends it, and returns how many faults there were
// since the last time.
func arm(cell int) int {
	n, _, _ := unix.RawSyscall(armCall, uintptr(cell), 0, 0)
	return int(n)
}

// run runs a cell. An error means that it could not be run.
func (c *faultCell) run(i int) (r faultResult, err error) {
	r.Cell = i
	scene := c.scene()
	stage, err := scene.enter()
	if err != nil {
		return r, err
	}
	problem := func(format string, args ...any) { r.Problems = append(r.Problems, fmt.Sprintf(format, args...)) }
	before, goroutines := openDescriptors(), runtime.NumGoroutine()
	if c.row.meanwhile != nil {
		if err := c.row.meanwhile(stage); err != nil {
			return r, err
		}
	}
	if c.row.anew {
		before.netlink = max(before.netlink, 2) + 2
	}
	arm(i + 1)
	d := stage.dial(c.errno)
	faults := arm(0)
	if faults == 0 && c.row.meanwhile == nil {
		problem("there was no fault")
	}
	r.Outcome, r.Reason = d.outcome, d.reason
	if d.err != nil {
		r.Error = d.err.Error()
	}
	if d.took > faultDeadline/2 {
		problem("the dial took %v", d.took)
	}
	if d.conn != nil {
		if err := stage.checkConn(d.conn); err != nil {
			problem("%v", err)
		}
	}
	if err := stage.checkUnique(); err != nil {
		problem("%v", err)
	}
	if d.conn != nil {
		hangUp(d.conn)
	}

	if scene.tcp() && scene.port != 0 && scene.neighbour == nobody {
		if err := soon(stage.portLeft); err != nil {
			problem("%v", err)
		}
	}

	next := stage.dial(0)
	r.Next = next.outcome
	if next.conn != nil {
		if err := stage.checkConn(next.conn); err != nil {
			problem("the next dial: %v", err)
		}
		hangUp(next.conn)
	} else if scene.clean == "" && c.row.next == "" {
		problem("the next dial: %v", next.err)
	}
	err = soon(func() error {
		if now := runtime.NumGoroutine(); now > goroutines {
			return fmt.Errorf("%d goroutines more than before", now-goroutines)
		}
		return openDescriptors().leaked(before)
	})
	if err != nil {
		problem("%v", err)
	}
	if err := stage.leave(); err != nil {
		problem("%v", err)
	}
	return r, nil
}

// openFiles are the open descriptors of the process.
type openFiles struct {
	netlink int // in the thread's namespace
	sysctl  int
	others  []string
}

// openDescriptors lists the descriptors, those apart that dials keep.
func openDescriptors() (files openFiles) {
	here, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return files
	}
	defer unix.Close(here)
	namespace, _ := unix.GetsockoptUint64(here, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, entry := range entries {
		target, err := os.Readlink("/proc/self/fd/" + entry.Name())
		if err != nil {
			continue // it was that of the list
		}
		fd, _ := strconv.Atoi(entry.Name())
		switch domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); {
		case fd == here:
		case err == nil && domain == unix.AF_NETLINK:
			if cookie, _ := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE); cookie == namespace {
				files.netlink++
			}
		case strings.HasPrefix(target, "/proc/sys/net"):
			files.sysctl++
		default:
			files.others = append(files.others, target)
		}
	}
	slices.Sort(files.others)
	return files
}

// leaked returns an error if there is more open than there should be: a namespace
// keeps two netlink sockets and two sysctl files, once.
func (f openFiles) leaked(before openFiles) error {
	// What was there before may be gone: sockets of an earlier dial, whose peers
	// have closed theirs in the meantime.
	isNew := func(target string) bool { return !slices.Contains(before.others, target) }
	switch {
	case slices.ContainsFunc(f.others, isNew), len(f.others) > len(before.others):
		return fmt.Errorf("%d descriptors %v, before: %d %v", len(f.others), f.others, len(before.others), before.others)
	case f.netlink > max(before.netlink, 2):
		return fmt.Errorf("%d netlink sockets, before: %d", f.netlink, before.netlink)
	case f.sysctl > before.sysctl+2:
		return fmt.Errorf("%d sysctl files, before: %d", f.sysctl, before.sysctl)
	}
	return nil
}

// netlinkDescriptors are those that dials have open in the thread's namespace.
func netlinkDescriptors(protocol int) (fds []int) {
	entries, _ := os.ReadDir("/proc/self/fd")
	var namespace uint64
	if here, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err == nil {
		namespace, _ = unix.GetsockoptUint64(here, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		unix.Close(here)
	}
	for _, entry := range entries {
		fd, _ := strconv.Atoi(entry.Name())
		if domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err != nil || domain != unix.AF_NETLINK {
			continue
		}
		cookie, _ := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		if of, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); err == nil && of == protocol && cookie == namespace {
			fds = append(fds, fd)
		}
	}
	return fds
}

// replaceNetlink puts something else in the place of the netlink sockets that
// dials keep.
func replaceNetlink(protocol int, open func() (fd int, err error)) func(*faultStage) error {
	return func(*faultStage) error {
		fds := netlinkDescriptors(protocol)
		if len(fds) == 0 {
			return fmt.Errorf("no netlink socket of protocol %d", protocol)
		}
		for _, fd := range fds {
			other, err := open()
			if err != nil {
				return err
			}
			if err := unix.Dup3(other, fd, unix.O_CLOEXEC); err != nil {
				return os.NewSyscallError("dup3", err)
			}
			unix.Close(other)
		}
		return nil
	}
}

// aFile is no socket at all.
func aFile() (int, error) { return unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0) }

// aDeadSocket is one whose other end is closed.
func aDeadSocket() (int, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	unix.Close(fds[1])
	return fds[0], nil
}
