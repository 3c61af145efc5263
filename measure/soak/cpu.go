//go:build linux

package main

import (
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// A cpuTime is what the calling goroutine's thread had used when it was started.
// Unlike the time that passes, it does not depend on what else the machine does.
type cpuTime time.Duration

// startCPU keeps the goroutine on its thread until stop.
func startCPU() cpuTime {
	runtime.LockOSThread()
	return threadCPU()
}

// stop returns what the thread has used since.
func (c cpuTime) stop() time.Duration {
	defer runtime.UnlockOSThread()
	return time.Duration(threadCPU() - c)
}

func threadCPU() cpuTime {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts) // does not fail
	return cpuTime(ts.Nano())
}
