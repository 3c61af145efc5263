//go:build linux

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestImagePackage(t *testing.T) {
	got, err := imagePackage([]byte("linux-image-cloud-amd64\n  Depends: linux-image-6.12.107+deb13-cloud-amd64\n"))
	if want := "linux-image-6.12.107+deb13-cloud-amd64"; err != nil || got != want {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
	if got, err := imagePackage([]byte("linux-image-cloud-amd64\n")); err == nil {
		t.Errorf("got %q for a package that depends on nothing", got)
	}
}

func TestAKernelInTheCacheIsNotFetched(t *testing.T) {
	cache := t.TempDir()
	if _, err := cached("6.1", cache); err == nil {
		t.Fatal("there is a kernel in an empty cache")
	}
	boot := filepath.Join(cache, "6.1", "boot")
	if err := os.MkdirAll(boot, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(boot, "vmlinuz-6.1.0-9-cloud-amd64"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", "") // no apt
	k, err := fetch(t.Context(), "6.1", cache, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := k.release(), "6.1.0-9-cloud-amd64"; got != want {
		t.Errorf("release %q, want %q", got, want)
	}
}

func TestWhatIsMissingIsNamedWithItsPackage(t *testing.T) {
	t.Setenv("PATH", "")
	err := checkNeeds([]string{"6.1"}, t.TempDir())
	if err == nil || !strings.Contains(err.Error(), "needs qemu-system-x86_64: apt-get install --no-install-recommends qemu-system-x86\n") {
		t.Errorf("got %v", err)
	}
	if err := checkNeeds(nil, t.TempDir()); err != nil {
		t.Errorf("the running kernel alone needs %v", err)
	}
}
