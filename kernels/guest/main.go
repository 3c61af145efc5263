//go:build linux

// Command guest runs test binaries on a kernel and reports what became of them.
// It is the only program of a virtual machine: its init, which mounts what the
// tests need, and its modprobe, by which modules are loaded as on Debian, when the
// kernel asks for one. On the running kernel it is an ordinary program.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/seed22601231/connectx/kernels/internal/job"
)

// Files of the tree that the tests are run in.
const (
	planFile    = "plan.json"
	modulesFile = "lib/modules/index.json"
)

func main() {
	var err error
	switch {
	case filepath.Base(os.Args[0]) == "modprobe":
		err = modprobe(os.Args[1:])
	case os.Getpid() == 1:
		err = initialize()
		if err != nil {
			fmt.Fprintln(os.Stderr, "guest:", err)
		}
		powerOff()
	case len(os.Args) > 2 && os.Args[1] == "refuse":
		err = refuseAndExec(os.Args[2], os.Args[3:])
	case len(os.Args) == 2:
		err = report(os.Args[1], os.Stdout)
	default:
		err = fmt.Errorf("usage: guest directory")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
		os.Exit(1)
	}
}

// report runs the jobs of the tree at root.
func report(root string, to *os.File) error {
	lines := json.NewEncoder(to)
	text, err := os.ReadFile(filepath.Join(root, planFile))
	if err != nil {
		return err
	}
	var plan job.Plan
	if err := json.Unmarshal(text, &plan); err != nil {
		return fmt.Errorf("%s: %w", planFile, err)
	}
	for _, f := range features() {
		if err := lines.Encode(job.Line{Feature: &f}); err != nil {
			return err
		}
	}
	for i, j := range plan.Jobs {
		end := run(root, j, func(output string) error { return lines.Encode(job.Line{Job: i, Output: output}) })
		if err := lines.Encode(job.Line{Job: i, End: &end}); err != nil {
			return err
		}
	}
	loaded := job.Feature{Name: "modules loaded on demand", Value: onDemand(plan.Modules)}
	if err := lines.Encode(job.Line{Feature: &loaded}); err != nil {
		return err
	}
	return lines.Encode(job.Line{Done: true})
}
