//go:build linux

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// A mutation is a line of the library, broken on purpose.
type mutation struct {
	name     string // what the library does then
	file     string // below the root of the library
	old, new string // old is once in the file, and new takes its place
	catchers []catcher
}

// list is all of them.
var list = slices.Concat(lockMutations, udpMutations, tcpMutations, dialMutations, lookupMutations, portpickMutations)

// broken returns the content of the file with the mutation.
func (m *mutation) broken(root string) (string, error) {
	content, err := os.ReadFile(filepath.Join(root, m.file))
	if err != nil {
		return "", err
	}
	if n := strings.Count(string(content), m.old); n != 1 {
		return "", fmt.Errorf("the list is out of date: %q: %s has %d times, not once: %s", m.name, m.file, n, m.old)
	}
	return strings.Replace(string(content), m.old, m.new, 1), nil
}
