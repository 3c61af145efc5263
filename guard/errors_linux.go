package guard

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// ErrNotCgroup2 says that a folder is not a cgroup v2.
var ErrNotCgroup2 = errors.New("not in a cgroup v2 file system (mount -t cgroup2 none FOLDER)")

// ErrEnded says that a guard has ended by itself.
var ErrEnded = errors.New("the guard has ended: its cgroup has been removed, or somebody has detached it")

// explain says what the system lacks, if that is why Attach has failed.
func explain(err error) error {
	if missing := missingCapabilities(); len(missing) > 0 {
		return fmt.Errorf("guard: needs root, or also %s: %w", strings.Join(missing, " and "), err)
	}
	if _, statErr := os.Stat("/sys/kernel/btf/vmlinux"); errors.Is(statErr, fs.ErrNotExist) {
		return fmt.Errorf("guard: the kernel has no BTF (CONFIG_DEBUG_INFO_BTF): %w", err)
	}
	switch {
	case errors.Is(err, btf.ErrNotFound):
		return fmt.Errorf("guard: the kernel has not what the programs attach to: %w", err)
	case errors.Is(err, ebpf.ErrNotSupported):
		return fmt.Errorf("guard: the kernel is too old, or built without CONFIG_BPF_SYSCALL or CONFIG_CGROUP_BPF: %w", err)
	}
	return fmt.Errorf("guard: %w", err)
}

// missingCapabilities names those that the process lacks of what Attach needs.
func missingCapabilities() (names []string) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var has [2]unix.CapUserData
	if unix.Capget(&header, &has[0]) != nil {
		return nil
	}
	effective := uint64(has[1].Effective)<<32 | uint64(has[0].Effective)
	if effective&(1<<unix.CAP_SYS_ADMIN) != 0 {
		effective |= 1<<unix.CAP_BPF | 1<<unix.CAP_PERFMON // as the kernel has it
	}
	for _, c := range []struct {
		bit  int
		name string
	}{
		{unix.CAP_BPF, "CAP_BPF"},
		{unix.CAP_PERFMON, "CAP_PERFMON"},
		{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"},
	} {
		if effective&(1<<c.bit) == 0 {
			names = append(names, c.name)
		}
	}
	return names
}
