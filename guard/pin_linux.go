package guard

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// maps are those that a Guard reads, and writes, by the name of their pin.
func (g *Guard) maps() map[string]**ebpf.Map {
	return map[string]**ebpf.Map{
		programsMapReserved: &g.objects.Reserved,
		programsMapOver:     &g.objects.Over,
		programsMapPorts:    &g.objects.Ports,
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
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			if _, err := os.Lstat(path); err != nil {
				continue // it has been removed meanwhile
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
		if err := what.Pin(filepath.Join(g.pin, name)); err != nil {
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
func takeOver(pin string, id uint64) (*Guard, error) {
	g := &Guard{pin: pin}
	err := g.open(id)
	if err == nil {
		return g, nil
	}
	g.closeAll()
	if errors.Is(err, fs.ErrNotExist) {
		// There is none, or one that was killed before it was complete, or
		// that has ended with its cgroup.
		return nil, unpin(pin)
	}
	return nil, explain(fmt.Errorf("take over %s: %w", pin, err))
}

var (
	errOtherCgroup  = errors.New("the guard there is another cgroup's")
	errOtherVersion = errors.New("the guard there is another version's")
)

func (g *Guard) open(id uint64) error {
	spec, err := loadPrograms()
	if err != nil {
		return err
	}
	for _, h := range hooks {
		l, err := link.LoadPinnedLink(filepath.Join(g.pin, h.name), nil)
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
		case attached == 0:
			return fs.ErrNotExist
		case attached != id:
			return errOtherCgroup
		}
	}
	for name, to := range g.maps() {
		m, err := ebpf.LoadPinnedMap(filepath.Join(g.pin, name), nil)
		if err != nil {
			return err
		}
		*to = m
		want := spec.Maps[name]
		if m.Type() != want.Type || m.KeySize() != want.KeySize || m.ValueSize() != want.ValueSize {
			return errOtherVersion
		}
	}
	g.objects.Sync, err = ebpf.LoadPinnedProgram(filepath.Join(g.pin, programsProgSync), nil)
	return err
}

// cgroupOf returns what a link is attached to, or 0 if the cgroup has been removed.
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

// unpin ends what pins the guard, if that is not another one by now.
func (g *Guard) unpin() error {
	if g.pin == "" || len(g.links) == 0 {
		return nil
	}
	folder, err := lockFolder(g.pin)
	if err != nil {
		return explain(err)
	}
	defer folder.Close()
	pinned, err := link.LoadPinnedLink(filepath.Join(g.pin, hooks[0].name), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return unpinAll(g.pin)
	}
	if err != nil {
		return err
	}
	defer pinned.Close()
	theirs, err := pinned.Info()
	if err != nil {
		return err
	}
	own, err := g.links[0].Info()
	if err != nil || own.ID != theirs.ID {
		return err
	}
	return unpinAll(g.pin)
}

// unpinAll removes the folder, and what is pinned there. What nobody has open ends
// with that.
func unpinAll(folder string) error {
	if err := unpin(folder); err != nil {
		return err
	}
	// It may have been there before.
	if err := os.Remove(folder); err != nil && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	return nil
}

// unpin leaves the folder, which is locked.
func unpin(folder string) error {
	names := []string{programsProgSync}
	for name := range new(Guard).maps() {
		names = append(names, name)
	}
	for _, h := range hooks {
		names = append(names, h.name)
	}
	for _, name := range names {
		if err := os.Remove(filepath.Join(folder, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
