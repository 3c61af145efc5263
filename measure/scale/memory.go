//go:build linux

package main

import (
	"fmt"

	"github.com/seed22601231/connectx/measure/internal/machine"
)

// memory is what is in use, in bytes.
type memory struct {
	kernel  int64 // by the kernel's objects, of which sockets are some
	dialers int64 // by the processes that dial
}

// memoryInUse looks at the processes' proportional set size, so that pages which
// several share are counted once.
func memoryInUse(dialers []int) (m memory, err error) {
	info, err := machine.Kilobytes("/proc/meminfo", "Slab")
	if err != nil {
		return m, err
	}
	m.kernel = info["Slab"]
	m.dialers, err = proportional(dialers)
	return m, err
}

func proportional(pids []int) (sum int64, err error) {
	for _, pid := range pids {
		rollup, err := machine.Kilobytes(fmt.Sprintf("/proc/%d/smaps_rollup", pid), "Pss")
		if err != nil {
			return 0, err
		}
		sum += rollup["Pss"]
	}
	return sum, nil
}
