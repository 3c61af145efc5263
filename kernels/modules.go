//go:build linux

package main

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/ulikunitz/xz"
)

// A moduleTree has the modules of a kernel, as Debian's package has them: without
// the indexes that depmod makes when it is installed.
type moduleTree struct {
	files   map[string]string // by name
	builtin map[string]bool
}

// A module is one that is put into a machine.
type module struct {
	name    string
	content []byte
	depends []string
	aliases []string
}

// openModules looks for the modules of a kernel.
func openModules(k *kernel) (*moduleTree, error) {
	root := filepath.Join(k.dir, "lib", "modules", k.release())
	if _, err := os.Stat(root); err != nil {
		root = filepath.Join(k.dir, "usr", "lib", "modules", k.release())
	}
	t := &moduleTree{files: make(map[string]string), builtin: make(map[string]bool)}
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() && strings.Contains(entry.Name(), ".ko") {
			t.files[moduleName(path)] = path
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	builtin, err := os.ReadFile(filepath.Join(root, "modules.builtin"))
	if err != nil {
		return nil, err
	}
	for name := range strings.Lines(string(builtin)) {
		t.builtin[moduleName(strings.TrimSpace(name))] = true
	}
	return t, nil
}

// moduleName is what the kernel calls the module of a file.
func moduleName(file string) string {
	name, _, _ := strings.Cut(filepath.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// closure reads modules and those that they depend on, each after those.
func (t *moduleTree) closure(names ...string) (all []module, err error) {
	var add func(name string) error
	add = func(name string) error {
		if t.builtin[name] || slices.ContainsFunc(all, func(m module) bool { return m.name == name }) {
			return nil
		}
		file, ok := t.files[name]
		if !ok {
			return fmt.Errorf("the kernel has no module %s", name)
		}
		m, err := readModule(file)
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		for _, d := range m.depends {
			if err := add(d); err != nil {
				return err
			}
		}
		all = append(all, m)
		return nil
	}
	for _, name := range names {
		if err := add(name); err != nil {
			return nil, err
		}
	}
	return all, nil
}

func readModule(file string) (m module, err error) {
	m.name = moduleName(file)
	if m.content, err = os.ReadFile(file); err != nil {
		return m, err
	}
	if strings.HasSuffix(file, ".xz") {
		r, err := xz.NewReader(bytes.NewReader(m.content))
		if err != nil {
			return m, err
		}
		if m.content, err = io.ReadAll(r); err != nil {
			return m, err
		}
	}
	object, err := elf.NewFile(bytes.NewReader(m.content))
	if err != nil {
		return m, err
	}
	section := object.Section(".modinfo")
	if section == nil {
		return m, fmt.Errorf("no section .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return m, err
	}
	m.depends, m.aliases = parseModinfo(info)
	return m, nil
}

// parseModinfo finds in a section .modinfo what depmod makes its indexes of.
func parseModinfo(info []byte) (depends, aliases []string) {
	for field := range bytes.SplitSeq(info, []byte{0}) {
		key, value, _ := strings.Cut(string(field), "=")
		switch {
		case value == "":
		case key == "depends":
			for name := range strings.SplitSeq(value, ",") {
				depends = append(depends, moduleName(name))
			}
		case key == "alias":
			aliases = append(aliases, value)
		}
	}
	return depends, aliases
}

// index says, for each name and alias that may be asked for, which files to load
// in which order. Modules that are in the kernel itself need none.
func (t *moduleTree) index(names []string, file func(name string) string) (map[string][]string, []module, error) {
	all, err := t.closure(names...)
	if err != nil {
		return nil, nil, err
	}
	index := make(map[string][]string)
	for _, name := range names {
		index[name] = []string{}
	}
	for _, m := range all {
		needed, err := t.closure(m.name)
		if err != nil {
			return nil, nil, err
		}
		var files []string
		for _, n := range needed {
			files = append(files, file(n.name))
		}
		for _, name := range append(m.aliases, m.name) {
			index[name] = append(index[name], files...)
		}
	}
	return index, all, nil
}
