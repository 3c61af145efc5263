//go:build linux

package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// modprobe is what the kernel runs when it needs a module: modprobe -q -- name.
func modprobe(args []string) error {
	if len(args) == 0 {
		return errors.New("usage: modprobe [-q] [--] name")
	}
	return load(args[len(args)-1])
}

// load loads modules, and before each those that it depends on.
func load(names ...string) error {
	text, err := os.ReadFile("/" + modulesFile)
	if err != nil {
		return err
	}
	var index map[string][]string // by name and alias, the files to load, in order
	if err := json.Unmarshal(text, &index); err != nil {
		return fmt.Errorf("%s: %w", modulesFile, err)
	}
	for _, name := range names {
		files, ok := index[name]
		if !ok {
			return fmt.Errorf("module %s not found", name)
		}
		for _, file := range files {
			if err := loadFile(file); err != nil {
				return err
			}
		}
	}
	return nil
}

func loadFile(name string) error {
	file, err := os.Open("/" + name)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := unix.FinitModule(int(file.Fd()), "", 0); err != nil && err != unix.EEXIST {
		return fmt.Errorf("finit_module %s: %w", name, err)
	}
	return nil
}

// onDemand lists the modules that are loaded, and were not loaded beforehand.
func onDemand(beforehand []string) string {
	if os.Getpid() != 1 {
		return "-"
	}
	file, err := os.Open("/proc/modules")
	if err != nil {
		return err.Error()
	}
	defer file.Close()
	var names []string
	for lines := bufio.NewScanner(file); lines.Scan(); {
		name, _, _ := strings.Cut(lines.Text(), " ")
		if !slices.Contains(beforehand, name) && !strings.HasPrefix(name, "virtio") {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return strings.Join(names, ", ")
}
