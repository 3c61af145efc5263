//go:build linux

package main

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
)

// kilobytes reads fields of a file of the form of /proc/meminfo, and returns
// them in bytes.
func kilobytes(path string, fields ...string) (map[string]int64, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	values := make(map[string]int64)
	for line := range bytes.Lines(text) {
		name, rest, ok := bytes.Cut(line, []byte(":"))
		words := bytes.Fields(rest)
		if !ok || len(words) != 2 || string(words[1]) != "kB" {
			continue
		}
		n, err := strconv.ParseInt(string(words[0]), 10, 64)
		if err != nil {
			return nil, fmt.Errorf("%s: %s: %w", path, name, err)
		}
		values[string(name)] = n << 10
	}
	for _, f := range fields {
		if _, ok := values[f]; !ok {
			return nil, fmt.Errorf("%s: no %s", path, f)
		}
	}
	return values, nil
}

// memory is what is in use, in bytes.
type memory struct {
	kernel  int64 // by the kernel's objects, of which sockets are some
	dialers int64 // by the processes that dial
}

// memoryInUse looks at the processes' proportional set size, so that pages which
// several share are counted once.
func memoryInUse(dialers []int) (m memory, err error) {
	info, err := kilobytes("/proc/meminfo", "Slab")
	if err != nil {
		return m, err
	}
	m.kernel = info["Slab"]
	m.dialers, err = proportional(dialers)
	return m, err
}

func proportional(pids []int) (sum int64, err error) {
	for _, pid := range pids {
		rollup, err := kilobytes(fmt.Sprintf("/proc/%d/smaps_rollup", pid), "Pss")
		if err != nil {
			return 0, err
		}
		sum += rollup["Pss"]
	}
	return sum, nil
}
