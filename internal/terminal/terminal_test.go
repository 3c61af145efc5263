//go:build linux

package terminal

import (
	"os"
	"path/filepath"
	"testing"
)

func TestNoTerminal(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if Is(f) {
		t.Error("a file is taken for a terminal")
	}
}
