//go:build linux

package machine

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
)

// Kilobytes reads fields of a file of the form of /proc/meminfo, and returns
// them in bytes.
func Kilobytes(path string, fields ...string) (map[string]int64, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	values := make(map[string]int64)
	for line := range bytes.Lines(text) {
		name, rest, ok := bytes.Cut(line, []byte(":"))
		words := bytes.Fields(rest)
		if !ok || len(words) != 2 || string(words[1]) != "kB" {
			continue
		}
		n, err := strconv.ParseInt(string(words[0]), 10, 64)
		if err != nil {
			return nil, fmt.Errorf("%s: %s: %w", path, name, err)
		}
		values[string(name)] = n << 10
	}
	for _, f := range fields {
		if _, ok := values[f]; !ok {
			return nil, fmt.Errorf("%s: no %s", path, f)
		}
	}
	return values, nil
}
