package guard

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
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

// linkNames are the names of the links' pins, in the order in which they are
// attached.
var linkNames = []string{"sock_release", "connect4", "connect6", "bind4", "bind6"}

func (g *Guard) pinAll() error {
	if err := os.Mkdir(g.pin, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
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
	// The links come last: where all of them are, everything is.
	for i, l := range g.links {
		if err := pin(l, linkNames[i]); err != nil {
			return err
		}
	}
	return nil
}

// takeOver returns the guard that is pinned, or nil if there is none.
func takeOver(pin string, id uint64) (*Guard, error) {
	g := &Guard{pin: pin}
	err := g.open(id)
	if err == nil {
		return g, nil
	}
	for _, l := range g.links {
		l.Close()
	}
	g.objects.Close()
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
	for _, name := range linkNames {
		l, err := link.LoadPinnedLink(filepath.Join(g.pin, name), nil)
		if err != nil {
			return err
		}
		g.links = append(g.links, l)
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
	// A guard that shares ports has been told of some.
	var ns uint64
	switch err := g.objects.Ports.NextKey(nil, &ns); {
	case err == nil:
		g.share = true
	case !errors.Is(err, ebpf.ErrKeyNotExist):
		return err
	}
	g.objects.Sync, err = ebpf.LoadPinnedProgram(filepath.Join(g.pin, programsProgSync), nil)
	return err
}

// unpinAll removes the folder. What nobody has open ends with that.
func (g *Guard) unpinAll() error {
	for _, name := range linkNames {
		if err := remove(filepath.Join(g.pin, name)); err != nil {
			return err
		}
	}
	for name := range g.maps() {
		if err := remove(filepath.Join(g.pin, name)); err != nil {
			return err
		}
	}
	if err := remove(filepath.Join(g.pin, programsProgSync)); err != nil {
		return err
	}
	return remove(g.pin)
}

// remove is for what may be gone already.
func remove(path string) error {
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
