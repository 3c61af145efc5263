//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
)

// build makes the tree that the tests run in: their binaries, the files that they
// read, and the program that runs them.
func build(ctx context.Context, module, stage string, kernels []string) error {
	stage, err := filepath.Abs(stage)
	if err != nil {
		return err
	}
	if err := goBuild(ctx, ".", false, "amd64", "build", "-o", filepath.Join(stage, "guest"), "./guest"); err != nil {
		return err
	}
	for _, b := range binaries(kernels) {
		err := goBuild(ctx, filepath.Join(module, b.pkg), b.cgo, b.arch, "test", "-c", "-ldflags=-s -w", "-o", filepath.Join(stage, b.file()), ".")
		if err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Join(stage, "src", b.pkg), 0o755); err != nil {
			return err
		}
		for _, name := range b.data {
			if err := copyTree(filepath.Join(module, b.pkg, name), filepath.Join(stage, "src", b.pkg, name)); err != nil {
				return err
			}
		}
	}
	return nil
}

// binaries are all that some machine with one of these kernels runs.
func binaries(kernels []string) (all []binary) {
	for _, boot := range boots() {
		for _, kernel := range kernels {
			for _, t := range tasks(kernel, false, boot, "") {
				if !slices.ContainsFunc(all, func(b binary) bool { return b.file() == t.binary.file() }) {
					all = append(all, t.binary)
				}
			}
		}
	}
	return all
}

func goBuild(ctx context.Context, dir string, cgo bool, arch string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	enabled := "CGO_ENABLED=0"
	if cgo {
		enabled = "CGO_ENABLED=1"
	}
	cmd.Env = append(os.Environ(), enabled, "GOOS=linux", "GOARCH="+arch)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w\n%s", cmd, err, out)
	}
	return nil
}

// copyTree copies a file, or a directory, for everybody to read.
func copyTree(from, to string) error {
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return copyFile(from, to)
	}
	return filepath.WalkDir(from, func(path string, entry fs.DirEntry, err error) error {
		name, relErr := filepath.Rel(from, path)
		switch {
		case errors.Join(err, relErr) != nil:
			return errors.Join(err, relErr)
		case entry.IsDir():
			return nil
		}
		return copyFile(path, filepath.Join(to, name))
	})
}

func copyFile(from, to string) error {
	text, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	return os.WriteFile(to, text, 0o644)
}
