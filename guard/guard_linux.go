package guard

import (
	"errors"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Options are for Attach. The zero value is good for most machines.
type Options struct {
	// Max is the number of sockets that can be connected, or be connecting, at
	// a time. Zero means 262,144. Each takes some 460 bytes of the kernel's
	// memory, and the room for one takes 80.
	Max int

	// DenyWhenFull says that a connect fails with ENOBUFS where there are Max
	// already. If false it is let through, with no more protection than
	// without a guard, and counted in Stats.FailedOpen.
	DenyWhenFull bool

	// Share gives a socket that connects and has no port yet a port of the
	// ephemeral range that it shares with sockets that have other
	// destinations: what the kernel picks it would have for itself. Reserved
	// ports are left out. It applies to the network namespaces that Attach and
	// Sync are called in.
	//
	// A socket that binds port 0 first, as dig does, shares one only when
	// there are hardly any left that nobody is on, since its destination is
	// not known at that time.
	Share bool

	// Pin is a folder of a BPF file system (/sys/fs/bpf/connectx) in which the
	// guard outlives its process: killed, it goes on working, and the next
	// Attach with the same Pin takes it over as it is, with the Options that
	// it began with. If empty the guard ends with its process.
	Pin string
}

const (
	defaultMax = 1 << 18
	largestMax = 1 << 23 // of what a word of the groups can count (NUMBER)
	// groupsPerSocket makes it unlikely that there is no place within reach
	// in the table of groups.
	groupsPerSocket = 4
)

// A Guard watches over the sockets of a cgroup.
type Guard struct {
	objects programsObjects // of what has been pinned, the maps only
	links   []link.Link
	pin     string
	share   bool
}

// Attach starts a guard over the processes of a cgroup and those below it. Of
// their sockets, those in the caller's network namespace that are connected
// already are taken in.
//
// cgroup is a folder in a cgroup v2 file system. The error says what is missing:
// a privilege, the file system, or a feature of the kernel.
func Attach(cgroup string, o Options) (*Guard, error) {
	id, err := cgroupID(cgroup)
	if err != nil {
		return nil, err
	}
	g := &Guard{pin: o.Pin, share: o.Share}
	if g.pin != "" {
		folder, err := lockFolder(g.pin)
		if err != nil {
			return nil, fmt.Errorf("guard: %w", err)
		}
		defer folder.Close()
		if g, err := takeOver(g.pin, id); g != nil || err != nil {
			return g, err
		}
	}
	if err := g.attach(cgroup, id, o); err != nil {
		return nil, errors.Join(explain(err), g.end())
	}
	return g, nil
}

// hooks are where the programs are attached, in this order: nothing is reserved
// before there is something to take it back.
var hooks = []struct {
	name    string // of the pin
	to      ebpf.AttachType
	program func(*programsObjects) *ebpf.Program
	toShare bool // of use only to share ports
}{
	{"sock_release", ebpf.AttachCgroupInetSockRelease, func(o *programsObjects) *ebpf.Program { return o.Released }, false},
	{"connect4", ebpf.AttachCGroupInet4Connect, func(o *programsObjects) *ebpf.Program { return o.Connect4 }, false},
	{"connect6", ebpf.AttachCGroupInet6Connect, func(o *programsObjects) *ebpf.Program { return o.Connect6 }, false},
	{"bind4", ebpf.AttachCGroupInet4Bind, func(o *programsObjects) *ebpf.Program { return o.Bind4 }, true},
	{"bind6", ebpf.AttachCGroupInet6Bind, func(o *programsObjects) *ebpf.Program { return o.Bind6 }, true},
}

func (g *Guard) attach(cgroup string, id uint64, o Options) error {
	if err := g.load(id, o); err != nil {
		return err
	}
	if err := g.setPorts(); err != nil {
		return err
	}
	for _, h := range hooks {
		if h.toShare && !o.Share {
			continue
		}
		l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: h.to, Program: h.program(&g.objects)})
		if err != nil {
			return fmt.Errorf("attach to %s of %s: %w", h.to, cgroup, err)
		}
		g.links = append(g.links, l)
	}
	if err := g.Sync(); err != nil {
		return err
	}
	if err := g.objects.Adopting.Set(false); err != nil {
		return fmt.Errorf("set %s: %w", programsVarAdopting, err)
	}
	if g.pin != "" {
		return g.pinAll()
	}
	return nil
}

func (g *Guard) load(id uint64, o Options) error {
	spec, err := loadPrograms()
	if err != nil {
		return err
	}
	limit := uint32(defaultMax)
	if o.Max != 0 {
		if o.Max < 0 || o.Max > largestMax {
			return fmt.Errorf("option Max is %d, not between 1 and %d", o.Max, largestMax)
		}
		limit = uint32(o.Max)
	}
	groups := uint32(1) << bits.Len32(limit*groupsPerSocket-1)
	spec.Maps[programsMapReserved].MaxEntries = limit
	spec.Maps[programsMapHolders].MaxEntries = limit
	spec.Maps[programsMapOver].MaxEntries = limit
	spec.Maps[programsMapGroups].MaxEntries = groups
	for name, value := range map[string]any{
		programsVarFailOpen:   !o.DenyWhenFull,
		programsVarShare:      o.Share,
		programsVarAdopting:   true,
		programsVarGroupsMask: groups - 1,
		programsVarSeed:       rand.Uint64(),
		programsVarCgroupId:   id,
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return spec.LoadAndAssign(&g.objects, nil)
}

// Close ends the guard, pinned or not. If another Guard has taken it over, it ends
// with the last of them. Connections stay as they are.
func (g *Guard) Close() error {
	if g.pin != "" {
		folder, err := lockFolder(g.pin)
		if err != nil {
			return errors.Join(fmt.Errorf("guard: %w", err), g.closeAll())
		}
		defer folder.Close()
	}
	return g.end()
}

// end closes a guard whose folder is locked, if it has one.
func (g *Guard) end() error {
	var errs []error
	if g.pin != "" {
		errs = append(errs, g.unpinAll(), os.Remove(g.pin))
	}
	return errors.Join(append(errs, g.closeAll())...)
}

func (g *Guard) closeAll() error {
	var errs []error
	for _, l := range g.links {
		errs = append(errs, l.Close())
	}
	g.links = nil
	return errors.Join(append(errs, g.objects.Close())...)
}

// cgroupID returns the kernel's number of a cgroup.
func cgroupID(path string) (uint64, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return 0, &os.PathError{Op: "guard", Path: path, Err: err}
	}
	if fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return 0, &os.PathError{Op: "guard", Path: path, Err: ErrNotCgroup2}
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, &os.PathError{Op: "guard", Path: path, Err: err}
	}
	return st.Ino, nil
}
