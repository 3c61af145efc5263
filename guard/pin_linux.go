package guard

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// pinned returns where something is pinned. The folder may be others' as well.
func (g *Guard) pinned(name string) string { return filepath.Join(g.pin, "connectx_guard_"+name) }

// maps are those that a Guard reads, and writes, by the name of their pin.
func (g *Guard) maps() map[string]**ebpf.Map {
	return map[string]**ebpf.Map{
		programsMapReserved: &g.objects.Reserved,
		programsMapOver:     &g.objects.Over,
		programsMapPorts:    &g.objects.Ports,
		programsMapTaken:    &g.objects.Taken,
		programsMapCounters: &g.objects.Counters,
		programsMapDenials:  &g.objects.Denials,
	}
}

// lockFolder makes the folder for pins if there is none, and waits until no other
// Attach or Close is at it. Closing the file ends that.
func lockFolder(path string) (*os.File, error) {
	for {
		err := os.Mkdir(path, 0o700)
		made := err == nil
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		f, err := os.OpenFile(path, unix.O_DIRECTORY, 0)
		if errors.Is(err, fs.ErrNotExist) {
			// It has been removed meanwhile, or is a link to nowhere.
			if st, err := os.Lstat(path); err != nil || st.Mode()&fs.ModeSymlink == 0 {
				continue
			}
		}
		if err != nil {
			return nil, err
		}
		removed, err := lockBPF(f)
		if err == nil && !removed {
			return f, nil
		}
		f.Close()
		if err != nil {
			if made {
				os.Remove(path)
			}
			return nil, &os.PathError{Op: "lock", Path: path, Err: err}
		}
	}
}

var errNotBPF = errors.New("not a folder of a BPF file system (mount -t bpf none FOLDER)")

// lockBPF waits for the lock on a folder, which may have been removed then.
func lockBPF(folder *os.File) (removed bool, err error) {
	fd := int(folder.Fd())
	var in unix.Statfs_t
	if err := unix.Fstatfs(fd, &in); err != nil {
		return false, err
	}
	if in.Type != unix.BPF_FS_MAGIC {
		return false, errNotBPF
	}
	for {
		switch err := unix.Flock(fd, unix.LOCK_EX); err {
		case nil:
			var st unix.Stat_t
			err := unix.Fstat(fd, &st)
			return st.Nlink == 0, err
		case unix.EINTR:
		default:
			return false, err
		}
	}
}

func (g *Guard) pinAll() error {
	pin := func(what interface{ Pin(string) error }, name string) error {
		if err := what.Pin(g.pinned(name)); err != nil {
			return fmt.Errorf("pin in %s: %w", g.pin, err)
		}
		return nil
	}
	for name, m := range g.maps() {
		if err := pin(*m, name); err != nil {
			return err
		}
	}
	if err := pin(g.objects.Sync, programsProgSync); err != nil {
		return err
	}
	// The links come last: with the last one, which each guard has, it is
	// complete.
	for i, h := range g.hooks() {
		if err := pin(g.links[i], h.name); err != nil {
			return err
		}
	}
	return nil
}

// takeOver returns the guard that is pinned, or nil if there is none. The folder is
// locked.
func takeOver(pin, cgroup string, id uint64) (*Guard, error) {
	g := &Guard{pin: pin}
	err := g.open(cgroup, id)
	if err == nil {
		return g, nil
	}
	g.closeAll()
	if errors.Is(err, fs.ErrNotExist) {
		// There is none, or one that was killed before it was complete, or
		// that has ended with its cgroup.
		return nil, g.removePins()
	}
	return nil, explain(fmt.Errorf("take over %s: %w", pin, err))
}

var (
	errOtherCgroup  = errors.New("the guard there is another cgroup's")
	errOtherVersion = errors.New("the guard there is another version's")
)

func (g *Guard) open(cgroup string, id uint64) error {
	spec, err := loadPrograms()
	if err != nil {
		return err
	}
	for _, h := range hooks {
		l, err := link.LoadPinnedLink(g.pinned(h.name), nil)
		if h.toShare && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		g.links = append(g.links, l)
		g.share = g.share || h.toShare
		switch attached, err := cgroupOf(l); {
		case err != nil:
			return err
		case attached != id && isCgroup(cgroup, attached):
			return errOtherCgroup
		case attached != id:
			return fs.ErrNotExist // its last socket may still be open
		}
	}
	for name, to := range g.maps() {
		m, err := ebpf.LoadPinnedMap(g.pinned(name), nil)
		if errors.Is(err, fs.ErrNotExist) { // links are pinned last
			return errOtherVersion
		}
		if err != nil {
			return err
		}
		*to = m
		want := spec.Maps[name]
		if m.Type() != want.Type || m.KeySize() != want.KeySize || m.ValueSize() != want.ValueSize {
			return errOtherVersion
		}
	}
	g.objects.Sync, err = ebpf.LoadPinnedProgram(g.pinned(programsProgSync), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return errOtherVersion
	}
	return err
}

// cgroupOf returns what a link is attached to, or 0 if that is nothing any more.
func cgroupOf(l link.Link) (id uint64, err error) {
	info, err := l.Info()
	if err != nil {
		return 0, err
	}
	if c := info.Cgroup(); c != nil {
		id = c.CgroupId
	}
	return id, nil
}

// isCgroup reports whether there is a cgroup of that number, in the file system
// that another one is in.
func isCgroup(other string, id uint64) bool {
	mount, err := unix.Open(other, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(mount)
	const kernfs = 0xfe // FILEID_KERNFS, include/linux/exportfs.h
	handle := unix.NewFileHandle(kernfs, binary.NativeEndian.AppendUint64(nil, id))
	fd, err := unix.OpenByHandleAt(mount, handle, unix.O_PATH|unix.O_CLOEXEC)
	if err != nil {
		return err != unix.ESTALE
	}
	unix.Close(fd)
	return true
}

// unpin ends what pins the guard, if that is not another one by now.
func (g *Guard) unpin() error {
	if g.pin == "" || len(g.links) == 0 {
		return nil
	}
	folder, err := lockFolder(g.pin)
	if err != nil {
		return err
	}
	defer folder.Close()
	own, err := g.links[0].Info()
	if err != nil {
		return err
	}
	pinned, err := link.LoadPinnedLink(g.pinned(hooks[0].name), nil)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return g.removeFolder()
	case err != nil:
		return err
	}
	defer pinned.Close()
	if theirs, err := pinned.Info(); err != nil || theirs.ID != own.ID {
		return err
	}
	return g.removeFolder()
}

// removeFolder removes what is pinned, and the folder if there is nothing else in it.
func (g *Guard) removeFolder() error {
	if err := g.removePins(); err != nil {
		return err
	}
	_ = unix.Rmdir(g.pin) // it may have been there before, and have to stay
	return nil
}

// removePins does so in the reverse order: what nobody has open ends with that.
func (g *Guard) removePins() error {
	var names []string
	for _, h := range slices.Backward(hooks) {
		names = append(names, h.name)
	}
	names = append(names, programsProgSync)
	for name := range g.maps() {
		names = append(names, name)
	}
	for _, name := range names {
		if err := os.Remove(g.pinned(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
