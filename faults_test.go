//go:build linux && (amd64 || arm64)

package connectx_test

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/netns"
)

// faultsEnv names a file that the table of faults is written to.
const faultsEnv = "CONNECTX_FAULTS"

// Whatever fails, a dial ends soon, with an error that says what has failed or
// with what the documentation promises in its place, and leaves nothing behind.
func TestFaultsOfSystemCalls(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some 20 s")
	}
	netns.Need(t)
	cells := faultCells()
	results := make([]faultResult, len(cells))
	const processes = 4
	var all sync.WaitGroup
	for i := range processes {
		all.Go(func() {
			if err := runFaults(t, fmt.Sprintf("%d/%d", i, processes), cells, results); err != nil {
				t.Errorf("process %d: %v", i, err)
			}
		})
	}
	all.Wait()
	for i, cell := range cells {
		for _, problem := range cell.problems(&results[i]) {
			t.Errorf("%v: %s", &cell, problem)
		}
	}
	table := printFaults()
	t.Logf("%d cells\n%s", len(cells), table)
	if b, err := os.ReadFile("docs/faults.md"); err != nil {
		t.Error(err)
	} else if !strings.Contains(string(b), table) {
		t.Error("docs/faults.md has another table")
	}
	if name := os.Getenv(faultsEnv); name != "" {
		if err := os.WriteFile(name, []byte(table), 0o666); err != nil {
			t.Error(err)
		}
	}
}

// problems are what is wrong with the result of a cell.
func (c *faultCell) problems(r *faultResult) (problems []string) {
	if r.Outcome == "" {
		return []string{"was not run"}
	}
	problems = r.Problems
	if r.Outcome != c.want {
		problems = append(problems, fmt.Sprintf("%s, want %s (%s)", r.Outcome, c.want, r.Error))
	}
	scene := c.scene()
	wantReason := c.row.reason
	if wantReason == "" && c.errno != 0 {
		wantReason = c.errno.Error()
	}
	traced := r.Outcome == "not shared" || r.Outcome == "fallback" || r.Outcome == "own port" && scene.port == 0
	if traced && !c.row.untold && (r.Reason == "" || !strings.Contains(r.Reason, wantReason)) {
		problems = append(problems, fmt.Sprintf("the reason of the fallback is %q, want %q", r.Reason, wantReason))
	}
	next := cmp.Or(c.row.next, scene.next, scene.clean, "ignored")
	if !slices.Contains(strings.Split(next, " or "), r.Next) {
		problems = append(problems, fmt.Sprintf("the next dial: %s, want %s", r.Next, next))
	}
	return problems
}

// runFaults runs some of the cells in a process of their own, and makes its
// system calls fail.
func runFaults(t *testing.T, which string, cells []faultCell, results []faultResult) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socketpair", err)
	}
	defer unix.Close(fds[0])
	theirs := os.NewFile(uintptr(fds[1]), "listener")
	defer theirs.Close()
	// A call that a signal interrupts would be caught, and counted, twice.
	cmd := child(t, "faults", "CELLS="+which, "GODEBUG=asyncpreemptoff=1")
	cmd.ExtraFiles = []*os.File{theirs}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	theirs.Close()
	pidfd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		return os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(pidfd)
	decided := make(chan error, 1)
	go func() {
		i := injector{cells: cells}
		decided <- decideOnEach(fds[0], pidfd, i.decide)
	}()
	for decoder := json.NewDecoder(stdout); ; {
		var r faultResult
		if err := decoder.Decode(&r); err == io.EOF {
			break
		} else if err != nil {
			return err
		}
		results[r.Cell] = r
	}
	if err := cmd.Wait(); err != nil {
		return err
	}
	return <-decided
}

// An injector puts the faults of one cell after the other into a process.
type injector struct {
	cells  []faultCell
	faults []fault
	seen   []int // calls at the place of each fault
	done   int   // how often there was the first
}

func (i *injector) decide(c *caughtCall) decision {
	if c.number == armCall {
		done := i.done
		i.faults, i.done = nil, 0
		if cell := int(c.args[0]); cell > 0 {
			i.faults = i.cells[cell-1].faults()
		}
		i.seen = make([]int, len(i.faults))
		return decision{value: int64(done)}
	}
	d := decision{made: true}
	for n, f := range i.faults {
		if f.number != c.number || f.is == nil || !f.is(c) {
			continue
		}
		i.seen[n]++
		if !d.made || i.seen[n] != f.nth && !(f.andRest && i.seen[n] > f.nth) {
			continue
		}
		if n == 0 {
			i.done++
		}
		if f.answer != nil {
			d = f.answer(c)
		} else {
			d = decision{errno: f.errno}
		}
	}
	return d
}

// printFaults prints the table in Markdown, a line for each place and outcome.
func printFaults() string {
	var b strings.Builder
	b.WriteString("| system call | which | fails with | dials | outcome |\n|---|---|---|---|---|\n")
	for i := range faultTable {
		row := &faultTable[i]
		for _, want := range row.want {
			what := row.what
			for _, errno := range want.errnos {
				what += " " + errnoName(errno)
			}
			fmt.Fprintf(&b, "| %s | %s | %s | %s | %s |\n",
				row.call, row.where, strings.TrimSpace(what), strings.Join(row.dials, "; "), want.outcome)
		}
	}
	return b.String()
}

// errnoName is the name that manual pages have for an errno.
func errnoName(errno unix.Errno) string {
	if errno == unix.EOPNOTSUPP {
		return "EOPNOTSUPP" // ENOTSUP is the same number
	}
	return unix.ErrnoName(errno)
}
