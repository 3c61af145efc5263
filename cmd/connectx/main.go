// Command connectx shows what package connectx does on this system.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
)

// Exit codes of every subcommand.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

// A subcommand is called with the arguments after its name.
type subcommand struct {
	name, summary string
	run           func(args []string, stdout, stderr io.Writer) int
}

var subcommands = []subcommand{
	{"demo", "count the connections that net.Dialer and connectx.Dialer can hold", demo},
	{"ports", "show who uses the ephemeral ports, and what fails for want of them", ports},
	{"dial", "do what nc does, from a port that other connections may have as well", dial},
	{"guard", "keep UDP sockets of other programs off each other's 4-tuples (connectx-guard; root)", guard},
}

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

func run(args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		usage(stderr)
		return exitUsage
	}
	name, rest := args[0], args[1:]
	switch name {
	case "help", "-h", "-help", "--help":
		if len(rest) == 0 {
			usage(stdout)
			return exitOK
		}
		name, rest = rest[0], []string{"-h"}
	}
	for _, s := range subcommands {
		if s.name == name {
			return s.run(rest, stdout, stderr)
		}
	}
	fmt.Fprintf(stderr, "connectx: unknown subcommand %q\n\n", name)
	usage(stderr)
	return exitUsage
}

// parsed tells what has come of the flags of a subcommand: whether that is all
// there was to do, and the exit code then.
func parsed(name string, err error, stderr io.Writer) (code int, done bool) {
	switch {
	case err == nil:
		return exitOK, false
	case errors.Is(err, flag.ErrHelp):
		return exitOK, true
	}
	fmt.Fprintf(stderr, "connectx %s: %v\nSee connectx help %s.\n", name, err, name)
	return exitUsage, true
}

func usage(w io.Writer) {
	fmt.Fprint(w, "Usage: connectx <subcommand> [flags]\n\nSubcommands:\n")
	for _, s := range subcommands {
		fmt.Fprintf(w, "  %-8s %s\n", s.name, s.summary)
	}
	fmt.Fprint(w, "\nThe flags of a subcommand: connectx help <subcommand>\n")
}
