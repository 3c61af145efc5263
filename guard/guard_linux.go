package guard

import (
	"errors"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Options are for Attach. The zero value is good for most machines.
type Options struct {
	// Max is the number of sockets that there can be at a time that have
	// connected, or tried to, or share a port that they have bound. Zero means
	// 262,144. Each takes 448 bytes of the kernel's memory (640 as its
	// allocator rounds them up), and the room for one takes 80.
	Max int

	// DenyWhenFull says that a connect fails with ENOBUFS where there are Max
	// already. If false it is let through, and counted in Stats.FailedOpen,
	// unless another socket is seen on the 4-tuple: two that connect at the
	// same time do not see each other then.
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
	// it began with. The folder is made if there is none, and Close removes it
	// if it is empty. If Pin is empty the guard ends with its process.
	Pin string
}

const (
	defaultMax = 1 << 18
	largestMax = 1 << 23 // of what a word of the groups can count (NUMBER)
	// groupsPerSocket makes it unlikely that there is no place within reach
	// in the table of groups.
	groupsPerSocket = 4
)

// A Guard watches over the sockets of a cgroup. Its methods can be called by several
// goroutines.
type Guard struct {
	mu      sync.Mutex
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
	g := &Guard{share: o.Share}
	if o.Pin != "" {
		if g.pin, err = filepath.Abs(o.Pin); err != nil {
			return nil, explain(err)
		}
		folder, err := lockFolder(g.pin)
		if err != nil {
			return nil, explain(err)
		}
		defer folder.Close()
		if g, err := takeOver(g.pin, cgroup, id); g != nil || err != nil {
			return g, err
		}
	}
	if err := g.attach(cgroup, id, o); err != nil {
		errs := []error{explain(err)}
		if g.pin != "" {
			errs = append(errs, g.removeFolder())
		}
		return nil, errors.Join(append(errs, g.closeAll())...)
	}
	return g, nil
}

// A hook is where a program is attached.
type hook struct {
	name    string // of the pin
	to      ebpf.AttachType
	program func(*programsObjects) *ebpf.Program
	toShare bool // of use only to share ports
}

// hooks are attached, and pinned, in this order: nothing is reserved before there
// is something to take it back.
var hooks = []hook{
	{"sock_release", ebpf.AttachCgroupInetSockRelease, func(o *programsObjects) *ebpf.Program { return o.Released }, false},
	{"bind4", ebpf.AttachCGroupInet4Bind, func(o *programsObjects) *ebpf.Program { return o.Bind4 }, true},
	{"bind6", ebpf.AttachCGroupInet6Bind, func(o *programsObjects) *ebpf.Program { return o.Bind6 }, true},
	{"connect4", ebpf.AttachCGroupInet4Connect, func(o *programsObjects) *ebpf.Program { return o.Connect4 }, false},
	{"connect6", ebpf.AttachCGroupInet6Connect, func(o *programsObjects) *ebpf.Program { return o.Connect6 }, false},
}

// hooks are those that the guard makes use of.
func (g *Guard) hooks() []hook {
	return slices.DeleteFunc(slices.Clone(hooks), func(h hook) bool { return h.toShare && !g.share })
}

func (g *Guard) attach(cgroup string, id uint64, o Options) error {
	if err := g.load(id, o); err != nil {
		return err
	}
	if err := g.setPorts(); err != nil {
		return err
	}
	for _, h := range g.hooks() {
		l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: h.to, Program: h.program(&g.objects)})
		if err != nil {
			return fmt.Errorf("attach to %s of %s: %w", h.to, cgroup, err)
		}
		g.links = append(g.links, l)
	}
	if err := g.sync(); err != nil {
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

// Close ends the guard, pinned or not. If another Guard has taken it over, that goes
// on, but is no longer pinned. Connections stay as they are.
func (g *Guard) Close() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	var errs []error
	if err := g.unpin(); err != nil {
		errs = append(errs, fmt.Errorf("guard: unpin from %s: %w", g.pin, err))
	}
	return errors.Join(append(errs, g.closeAll())...)
}

func (g *Guard) closeAll() error {
	var errs []error
	for _, l := range slices.Backward(g.links) {
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
