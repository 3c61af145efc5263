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
		if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it has been removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		var st unix.Stat_t
		for err = unix.EINTR; err == unix.EINTR; {
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		}
		if err == nil {
			err = unix.Fstat(int(f.Fd()), &st)
		}
		if err == nil && st.Nlink > 0 {
			return f, nil
		}
		f.Close()
		if err != nil {
			return nil, &os.PathError{Op: "lock", Path: path, Err: err}
		}
	}
}

func (g *Guard) pinAll() error {
	pin := func(what interface{ Pin(string) error }, name string) error {
		if err := what.Pin(filepath.Join(g.pin, name)); err != nil {
			return fmt.Errorf("pin in %s (has to be a folder of a BPF file system): %w", g.pin, err)
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
	// The links come last, and those that each guard has last of all: where
	// these are, everything is.
	for i := len(g.links) - 1; i >= 0; i-- {
		if err := pin(g.links[i], hooks[i].name); err != nil {
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
		// There is none, or one that was killed before it was complete.
		return nil, g.unpinAll()
	}
	return nil, fmt.Errorf("guard: take over %s: %w", pin, err)
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
		info, err := l.Info()
		if err != nil {
			return err
		}
		if c := info.Cgroup(); c == nil || c.CgroupId != id {
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

// unpinAll leaves the folder empty. What nobody has open ends with that.
func (g *Guard) unpinAll() error {
	names := []string{programsProgSync}
	for name := range g.maps() {
		names = append(names, name)
	}
	for _, h := range hooks {
		names = append(names, h.name)
	}
	for _, name := range names {
		if err := os.Remove(filepath.Join(g.pin, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
