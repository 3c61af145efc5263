//go:build linux

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
)

// A tree is where the library is, and where files can be put for a while.
type tree struct {
	root    string // of the library's module
	measure string // root of the module that the stress program is in
	temp    string

	model map[string]string // see parseModel; nil until the model was checked
}

// overlay writes the file that tells the go command to read a broken copy (see
// "go help build", -overlay), and returns its name.
func (t *tree) overlay(m *mutation) (string, error) {
	content, err := m.broken(t.root)
	if err != nil {
		return "", err
	}
	broken := filepath.Join(t.temp, "broken.go")
	if err := os.WriteFile(broken, []byte(content), 0o644); err != nil {
		return "", err
	}
	replace := map[string]map[string]string{"Replace": {filepath.Join(t.root, m.file): broken}}
	b, err := json.Marshal(replace)
	if err != nil {
		return "", err
	}
	name := filepath.Join(t.temp, "overlay.json")
	return name, os.WriteFile(name, b, 0o644)
}
