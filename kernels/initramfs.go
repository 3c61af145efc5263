//go:build linux

package main

import (
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cavaliergopher/cpio"

	"github.com/seed22601231/connectx/kernels/internal/job"
)

// etc is what package net and the tests look up.
var etc = map[string]string{
	"etc/hosts":         "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n",
	"etc/nsswitch.conf": "hosts: files dns\n",
	"etc/resolv.conf":   "nameserver 127.0.0.1\n",
	"etc/passwd":        "root:x:0:0:root:/:/init\nnobody:x:65534:65534:nobody:/:/init\n",
	"etc/group":         "root:x:0:\nnogroup:x:65534:\n",
}

// writeInitramfs writes the file system of a machine: the tree of the tests, the
// kernel's modules, and the program that starts it all.
func writeInitramfs(to io.Writer, stage string, k *kernel, plan job.Plan) error {
	compressed, err := gzip.NewWriterLevel(to, gzip.BestSpeed)
	if err != nil {
		return err
	}
	a := archiver{w: cpio.NewWriter(compressed)}
	if err := a.addTree(stage); err != nil {
		return err
	}
	guest, err := os.ReadFile(filepath.Join(stage, "guest"))
	if err != nil {
		return err
	}
	a.add("init", 0o755, guest)
	a.symlink("sbin/modprobe", "/init")
	for name, text := range etc {
		a.add(name, 0o644, []byte(text))
	}

	tree, err := openModules(k)
	if err != nil {
		return err
	}
	index, all, err := tree.index(slices.Concat(console, modules), moduleFile)
	if err != nil {
		return err
	}
	for _, m := range all {
		a.add(moduleFile(m.name), 0o644, m.content)
	}
	a.addJSON("lib/modules/index.json", index)
	a.addJSON("plan.json", plan)
	if a.err != nil {
		return a.err
	}
	if err := a.w.Close(); err != nil {
		return err
	}
	return compressed.Close()
}

func moduleFile(name string) string { return "lib/modules/" + name + ".ko" }

// An archiver adds files to an archive, and the directories that they are in. It
// keeps the first error.
type archiver struct {
	w           *cpio.Writer
	directories []string
	err         error
}

// addTree adds all files of a directory of this machine, under their names in it.
func (a *archiver) addTree(root string) error {
	return filepath.WalkDir(root, func(file string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, file)
		if err != nil {
			return err
		}
		if entry.IsDir() {
			a.mkdir(name)
			return a.err
		}
		if strings.HasSuffix(name, ".cgo") {
			return nil // needs the C library of this machine
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		content, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		a.add(name, info.Mode().Perm(), content)
		return a.err
	})
}

func (a *archiver) addJSON(name string, value any) {
	text, err := json.Marshal(value)
	if err != nil && a.err == nil {
		a.err = fmt.Errorf("%s: %w", name, err)
	}
	a.add(name, 0o644, text)
}

func (a *archiver) add(name string, mode fs.FileMode, content []byte) {
	a.mkdir(path.Dir(name))
	a.header(&cpio.Header{Name: name, Mode: cpio.TypeReg | cpio.FileMode(mode), Size: int64(len(content))})
	if a.err == nil {
		_, a.err = a.w.Write(content)
	}
}

func (a *archiver) symlink(name, target string) {
	a.mkdir(path.Dir(name))
	a.header(&cpio.Header{Name: name, Mode: cpio.TypeSymlink | 0o777, Size: int64(len(target))})
	if a.err == nil {
		_, a.err = a.w.Write([]byte(target))
	}
}

// mkdir adds a directory unless it is there already.
func (a *archiver) mkdir(name string) {
	if name == "." || slices.Contains(a.directories, name) {
		return
	}
	a.mkdir(path.Dir(name))
	a.directories = append(a.directories, name)
	a.header(&cpio.Header{Name: name, Mode: cpio.TypeDir | 0o755})
}

func (a *archiver) header(h *cpio.Header) {
	if a.err == nil {
		a.err = a.w.WriteHeader(h)
	}
}
