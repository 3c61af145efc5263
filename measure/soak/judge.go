//go:build linux

package main

import (
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
)

// A reason is what explains an error. None of them is empty.
type reason string

const (
	unexplained reason = ""
	cancelled   reason = "context cancelled"
	conflict    reason = "4-tuple in use"
	noPort      reason = "no port left"
	foreignPort reason = "port of a foreign socket"
	noServer    reason = "server killed"
	noSourceNow reason = "source address removed"
	noFiles     reason = "no descriptors left"
	failedCall  reason = "system call failed"
	noAnswer    reason = "no answer"
)

// faults are the windows of what is on for all dials.
type faults struct {
	server, address, files window
}

// What may follow from a fault.
var (
	// What is closed while the next server is started is there until that one has
	// replaced its copies of this process's descriptors (execve).
	afterServer = []error{
		unix.ECONNREFUSED, unix.ECONNRESET, unix.EPIPE, io.EOF, os.ErrDeadlineExceeded, context.DeadlineExceeded,
		unix.EADDRINUSE, unix.EADDRNOTAVAIL,
	}
	afterAddress = []error{
		unix.EADDRNOTAVAIL, unix.EINVAL, unix.ENETUNREACH, unix.EHOSTUNREACH, os.ErrDeadlineExceeded, context.DeadlineExceeded,
	}
	afterDeadline = []error{os.ErrDeadlineExceeded, context.DeadlineExceeded}
	afterCancel   = []error{os.ErrDeadlineExceeded, context.Canceled}

	// A Dialer that cannot ask the kernel makes do with a port of its own. EBADF is
	// what dup3 has for a descriptor that the limit does not allow any more.
	afterFiles = []error{unix.EMFILE, unix.EBADF, connectx.ErrPortsExhausted, unix.EADDRINUSE, unix.EAGAIN}
)

// isOneOf reports whether the error is any of those.
func isOneOf(err error, all []error) bool {
	return slices.ContainsFunc(all, func(e error) bool { return errors.Is(err, e) })
}

// explainDial says why a dial that began at start may have failed as it did.
func (r *run) explainDial(j job, err error, start time.Time) reason {
	explicit := j.kind == sourceAddressAndPort
	exhausted := errors.Is(err, connectx.ErrPortsExhausted)
	switch {
	case j.cancelled != 0 && isOneOf(err, afterCancel):
		return cancelled
	case explicit && isOneOf(err, []error{unix.EADDRINUSE, unix.EADDRNOTAVAIL}) && r.flows.mayBeTaken(j.flow, j.port, start):
		return conflict
	case explicit && errors.Is(err, unix.EADDRINUSE) && r.flows.foreignAt(j.flow, j.port).since(start):
		return foreignPort
	case !explicit && exhausted && r.mayBeFull(j, start):
		return noPort
	}
	return r.explainFaults(err, start, j.mayBeFrom(fleetingSource))
}

func (r *run) mayBeFull(j job, start time.Time) bool {
	return !slices.ContainsFunc(j.flows(), func(f flow) bool { return !r.flows.mayBeFull(f, start, r.options.workers) })
}

// explainFaults says what may have been the reason of an error, of the faults that
// are on for all.
func (r *run) explainFaults(err error, start time.Time, fleeting bool) reason {
	switch {
	case isOneOf(err, afterServer) && r.faults.server.since(start):
		return noServer
	case fleeting && isOneOf(err, afterAddress) && r.faults.address.since(start):
		return noSourceNow
	case isOneOf(err, afterFiles) && r.faults.files.since(start):
		return noFiles
	}
	return unexplained
}

// errnoOf names an error in a few words.
func errnoOf(err error) string {
	var errno syscall.Errno
	switch {
	case errors.Is(err, connectx.ErrPortsExhausted):
		return "ErrPortsExhausted"
	case errors.As(err, &errno):
		return unix.ErrnoName(errno)
	case errors.Is(err, context.Canceled):
		return "canceled"
	case isOneOf(err, afterDeadline):
		return "timeout"
	case errors.Is(err, io.EOF):
		return "EOF"
	}
	return "other"
}
