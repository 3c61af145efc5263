//go:build linux

package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/cavaliergopher/cpio"
	"github.com/google/go-cmp/cmp"
)

// The kernel unpacks the archive from its beginning to its end, so directories
// have to come before what is in them.
func TestArchive(t *testing.T) {
	stage := t.TempDir()
	for name, text := range map[string]string{"src/lookup/testdata/seed": "0", "tests/a.amd64": "binary", "tests/a.amd64.cgo": "needs libc"} {
		file := filepath.Join(stage, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var b bytes.Buffer
	a := archiver{w: cpio.NewWriter(&b)}
	if err := a.addTree(stage); err != nil {
		t.Fatal(err)
	}
	a.symlink("sbin/modprobe", "/init")
	a.addJSON("plan.json", []int{1, 2})
	if a.err != nil {
		t.Fatal(a.err)
	}
	if err := a.w.Close(); err != nil {
		t.Fatal(err)
	}

	type entry struct{ Name, Content string }
	var got []entry
	for r := cpio.NewReader(&b); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, entry{h.Name, string(content) + h.Linkname})
	}
	want := []entry{
		{"src", ""}, {"src/lookup", ""}, {"src/lookup/testdata", ""}, {"src/lookup/testdata/seed", "0"},
		{"tests", ""}, {"tests/a.amd64", "binary"},
		{"sbin", ""}, {"sbin/modprobe", "/init"},
		{"plan.json", "[1,2]"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
