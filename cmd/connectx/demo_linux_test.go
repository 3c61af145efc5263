package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"unicode"

	"golang.org/x/sys/unix"
)

func TestDemoUsage(t *testing.T) {
	tests := []struct {
		name           string
		args           []string
		code           int
		stdout, stderr string
	}{
		{"help", []string{"demo", "-h"}, exitOK, "Examples:", ""},
		{"help by the subcommand", []string{"help", "demo"}, exitOK, "-destinations", ""},
		{"not a number", []string{"demo", "-ports", "many"}, exitUsage, "", `"many" for flag -ports`},
		{"no ports", []string{"demo", "-ports", "0"}, exitUsage, "", "-ports 0: must be 1 to"},
		{"too many ports", []string{"demo", "-ports", "65536"}, exitUsage, "", "-ports 65536: must be 1 to"},
		{"no destinations", []string{"demo", "-destinations", "-1"}, exitUsage, "", "-destinations -1: must be 1 to"},
		{"too many destinations", []string{"demo", "-destinations", "255"}, exitUsage, "", "-destinations 255: must be 1 to"},
		{"more connections than descriptors", []string{"demo", "-ports", "20000", "-destinations", "254"}, exitUsage, "", "RLIMIT_NOFILE is"},
		{"unknown flag", []string{"demo", "-port", "10"}, exitUsage, "", "-port"},
		{"an argument", []string{"demo", "10"}, exitUsage, "", `unexpected argument "10"`},
	}
	limit := unix.Rlimit{}
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if strings.Contains(tt.stderr, "RLIMIT_NOFILE") && limit.Cur > 2*20000*254 {
				t.Skipf("RLIMIT_NOFILE is %d", limit.Cur)
			}
			checkRun(t, tt.args, tt.code, tt.stdout, tt.stderr)
		})
	}
}

// demoCommand builds the program, since the demo starts it again.
func demoCommand(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "connectx")
	if out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return exec.Command(binary, append([]string{"demo"}, args...)...)
}

func TestDemo(t *testing.T) {
	tests := []struct {
		name string
		args []string
	}{
		{"in a namespace", []string{"-ports", "10", "-destinations", "2"}},
		{"without a namespace", []string{"-ports", "10", "-destinations", "2", "-no-namespace"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cmd := demoCommand(t, tt.args...)
			var stderr strings.Builder
			cmd.Stderr = &stderr
			stdout, err := cmd.Output()
			if err != nil {
				t.Fatalf("%v\n%s%s", err, stdout, stderr.String())
			}
			if i := bytes.IndexFunc(stdout, func(r rune) bool { return unicode.IsControl(r) && r != '\n' }); i >= 0 {
				t.Errorf("control character %q in what is no terminal", stdout[i])
			}
			table := parseTable(t, string(stdout))
			for _, technique := range []string{"connectx.Dialer", "connectx.Dialer + source"} {
				cells := table[technique]
				for _, column := range []string{"TCP/IPv4", "TCP/IPv6", "UDP/IPv4", "UDP/IPv6"} {
					if got := cells[column]; got != "20/20" && got != "no IPv6" {
						t.Errorf("%s, %s: held %q, want 20/20", technique, column, got)
					}
				}
				if got := cells["misdelivered"]; got != "0" {
					t.Errorf("%s: %q misdelivered, want 0", technique, got)
				}
			}
			// What the demo is about: UDP ports are used up by all
			// destinations together.
			if got := table["bind-before-connect"]["UDP/IPv4"]; got != "10/20" {
				t.Errorf("bind-before-connect, UDP/IPv4: held %q, want 10/20", got)
			}
			if t.Failed() {
				t.Logf("%s%s", stdout, stderr.String())
			}
		})
	}
}

// parseTable returns the cells of the table by technique and column.
func parseTable(t *testing.T, output string) map[string]map[string]string {
	t.Helper()
	_, text, ok := strings.Cut(output, "\ntechnique ")
	if !ok {
		t.Fatalf("no table in %q", output)
	}
	text, _, _ = strings.Cut("technique "+text, "\n\n")
	gap := regexp.MustCompile(" {2,}")
	var heads []string
	table := make(map[string]map[string]string)
	for line := range strings.Lines(text) {
		cells := gap.Split(strings.TrimSpace(line), -1)
		if heads == nil {
			heads = cells
			continue
		}
		if len(cells) != len(heads) {
			t.Fatalf("%d cells in %q, want %d", len(cells), line, len(heads))
		}
		table[cells[0]] = make(map[string]string)
		for i, cell := range cells {
			table[cells[0]][heads[i]] = cell
		}
	}
	return table
}

func TestDemoEndsAtAnInterrupt(t *testing.T) {
	cmd := demoCommand(t, "-ports", "1000", "-destinations", "5")
	// A process group of its own gets the signal as if from the terminal.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(stdout)
	for lines.Scan() && !strings.Contains(lines.Text(), "held") {
	}
	if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	io.Copy(io.Discard, stdout)
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != exitFailed {
		t.Errorf("ended with %v, want exit status %d", err, exitFailed)
	}
	if got := stderr.String(); !strings.HasSuffix(got, "connectx demo: interrupted\n") {
		t.Errorf("stderr is %q", got)
	}
}

func TestVerifyCounts(t *testing.T) {
	// The echoes of the first connection come to the second, and nothing can be
	// sent on the third.
	first, firstPeer := net.Pipe()
	second, secondPeer := net.Pipe()
	third, thirdPeer := net.Pipe()
	thirdPeer.Close()
	conns := []net.Conn{first, second, third}
	defer closeAll(conns)
	go io.Copy(secondPeer, firstPeer)
	go io.Copy(secondPeer, secondPeer)

	got, err := verify(context.Background(), conns, newProgress(io.Discard))
	if want := (tally{echoed: 1, misdelivered: 1, missing: 2}); err != nil || got != want {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
}

func TestVerdict(t *testing.T) {
	four, six := netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()
	st := &stage{low: 100, high: 109, destinations: 2, columns: []column{
		{title: "UDP/IPv4", network: "udp4", source: four},
		{title: "UDP/IPv6", network: "udp6", source: six, unavailable: true},
	}}
	connectx := technique{name: "connectx.Dialer", ours: true}
	other := technique{name: "net.Dialer"}
	full := &result{held: 20, tally: tally{echoed: 20}}
	tests := []struct {
		name string
		rows []row
		want string // in the error; none if empty
	}{
		{"all held", []row{{other, []*result{{held: 10}, nil}}, {connectx, []*result{full, nil}}}, ""},
		{"one too few", []row{{connectx, []*result{{held: 19, tally: tally{echoed: 19}}, nil}}}, "UDP/IPv4: held 19 of 20"},
		{"one too many", []row{{connectx, []*result{{held: 21, tally: tally{echoed: 21}}, nil}}}, "UDP/IPv4: held 21 of 20"},
		{"an echo at the wrong socket", []row{{connectx, []*result{{held: 20, tally: tally{19, 1, 1}}, nil}}}, "1 misdelivered"},
		{"an echo lost", []row{{connectx, []*result{{held: 20, tally: tally{19, 0, 1}}, nil}}}, "1 echoes missing"},
		{"no family at all", []row{{connectx, []*result{nil, nil}}}, "neither IPv4 nor IPv6"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := verdict(st, tt.rows)
			if tt.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q in it", err, tt.want)
			}
		})
	}
}

func TestProgressOnATerminal(t *testing.T) {
	var b strings.Builder
	p := newProgress(&b)
	p.terminal = true
	p.begin("net.Dialer", "UDP/IPv4")
	p.update("%d held, and more", 1)
	p.line("done")
	p.end()
	lines := strings.Split(b.String(), "\r")
	if len(lines) != 3 || lines[0] != "" || !strings.HasSuffix(lines[2], "\n") {
		t.Fatalf("%q", b.String())
	}
	if len(lines[2]) != len(lines[1])+1 || strings.Contains(lines[2], "more") {
		t.Errorf("%q does not blank out %q", lines[2], lines[1])
	}
}
