//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/seed22601231/connectx/measure/internal/machine"
)

// What a connection takes, in bytes, rounded up from what this program itself
// reports on Linux 6.18 (x86-64): the kernel's memory (for TCP, of both ends) and
// that of the process which has dialled it.
const (
	bytesTCP = 10_500
	bytesUDP = 4_500
)

// What a process takes without any connections.
const (
	bytesPerProcess   = 12 << 20
	threadsPerProcess = 12
)

// A need is something that the system may have too little of.
type need struct {
	what       string
	need, have int64
	bytes      bool
	where      string // what limits it
}

func (n need) text(value int64) string {
	if n.bytes {
		return fmt.Sprintf("%.1f GiB", float64(value)/(1<<30))
	}
	return group(int(value))
}

// checkNeeds says what the plans need, one after the other, and fails if that is
// not there.
func checkNeeds(plans []plan, w io.Writer) error {
	var errs []error
	for _, p := range plans {
		needs, err := needsOf(p)
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "%s %s connections, in %s processes, need\n", group(p.total), p.protocol(), group(p.processes()))
		for _, n := range needs {
			fmt.Fprintf(w, "  %-24s %12s of %s (%s)\n", n.what, n.text(n.need), n.text(n.have), n.where)
			if n.need > n.have {
				errs = append(errs, fmt.Errorf("%s %s connections need more than there is: %s: %s, and there are %s (%s); fewer with -%s",
					group(p.total), p.protocol(), n.what, n.text(n.need), n.text(n.have), n.where, strings.ToLower(p.protocol())))
			}
		}
	}
	return errors.Join(errs...)
}

// A limit is a number in a file, the last one there.
type limit struct {
	what string
	need int
	path string
}

func needsOf(p plan) ([]need, error) {
	info, err := machine.Kilobytes("/proc/meminfo", "MemAvailable")
	if err != nil {
		return nil, err
	}
	// Those that dial, and for TCP as many that answer.
	processes, sockets, size := p.processes()+1, p.total, bytesUDP
	if p.tcp() {
		processes, sockets, size = 2*p.processes(), 2*p.total, bytesTCP
	}
	needs := []need{
		{"memory", int64(p.total)*int64(size) + int64(processes)*bytesPerProcess, info["MemAvailable"], true, "MemAvailable"},
		{"descriptors a process", int64(ceil(p.total, p.processes()) + otherDescriptors), int64(p.perProcess + otherDescriptors), false,
			"RLIMIT_NOFILE, at most " + group(mostDescriptors)},
	}
	limits := []limit{
		{"open files", sockets, "/proc/sys/fs/file-max"},
		{"epoll watches", sockets, "/proc/sys/fs/epoll/max_user_watches"},
		{"threads", processes * threadsPerProcess, "/proc/sys/kernel/threads-max"},
		{"process numbers", processes * threadsPerProcess, "/proc/sys/kernel/pid_max"},
	}
	if !p.tcp() {
		// A socket that has received anything accounts for a page. The limit
		// cannot be seen from a namespace, as in a container.
		const path = "/proc/sys/net/ipv4/udp_mem"
		if _, err := os.Stat(path); err == nil {
			limits = append(limits, limit{"pages of UDP memory", sockets, path})
		}
	}
	for _, limit := range limits {
		text, err := os.ReadFile(limit.path)
		if err != nil {
			return nil, err
		}
		values := strings.Fields(string(text))
		if len(values) == 0 {
			return nil, fmt.Errorf("%s is empty", limit.path)
		}
		have, err := strconv.ParseInt(values[len(values)-1], 10, 64)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", limit.path, err)
		}
		needs = append(needs, need{what: limit.what, need: int64(limit.need), have: have, where: limit.path})
	}
	return needs, nil
}

// group writes a number with a comma before every three digits.
func group(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}
