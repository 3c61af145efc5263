//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/kernels/internal/job"
)

const (
	// silence is how long a machine under kvm may take until it reports. Where kvm
	// is nested, or of a kind of its own, there are machines that never do.
	silence = 30 * time.Second
	// lifetime is how long one may take for all of its tests.
	lifetime = 2 * time.Hour
)

// processor has all that qemu can do, but for cmpxchg16b: under qemu 7.2 and tcg,
// Linux 6.12 has crashed where kmalloc goes by the flags of that instruction, and
// without it has not.
const processor = "max,-cx16"

// accelerators are those of qemu to try, in order.
func accelerators(chosen string) []string {
	if chosen != "" {
		return []string{chosen}
	}
	if unix.Access("/dev/kvm", unix.R_OK|unix.W_OK) == nil {
		return []string{"kvm", "tcg"}
	}
	return []string{"tcg"}
}

// A machine is what runs the tests: a virtual one with a kernel, or this one.
type machine struct {
	kernel   *kernel // nil for the running one
	stage    string  // the tree of the tests
	dir      string  // for files of the machine's own
	logs     string  // what the machines print, as it comes
	accels   []string
	tests    string // regexp
	progress io.Writer
}

// runs carries out all tasks.
func (m *machine) runs(ctx context.Context) ([]*machineRun, error) {
	if m.kernel == nil {
		r, err := m.here(ctx)
		return []*machineRun{r}, err
	}
	var all []*machineRun
	for _, parameters := range boots() {
		r, err := m.boot(ctx, parameters)
		switch {
		case ctx.Err() != nil:
			return nil, errors.New("interrupted")
		case r == nil:
			return nil, err
		case err != nil:
			r.problem = err.Error()
		}
		all = append(all, r)
	}
	return all, nil
}

// here runs the tests on the running kernel.
func (m *machine) here(ctx context.Context) (*machineRun, error) {
	r := &machineRun{accel: "none", tasks: tasks(running, false, "", m.tests)}
	text, err := json.Marshal(r.plan(nil))
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(m.stage, "plan.json"), text, 0o644); err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(m.logs, running+".report"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	fmt.Fprintln(m.progress, "running kernel")
	return r, r.collect(exec.CommandContext(ctx, filepath.Join(m.stage, "guest"), m.stage), nil, log, m.progress)
}

// boot boots the kernel and runs the tests on it, with the first accelerator that
// makes a machine of it.
func (m *machine) boot(ctx context.Context, parameters string) (r *machineRun, err error) {
	for i, accel := range m.accels {
		r, err = m.bootWith(ctx, accel, parameters)
		if !errors.Is(err, errSilent) {
			return r, err
		}
		if i+1 < len(m.accels) {
			fmt.Fprintf(m.progress, "%s does not work here: %v\n", accel, err)
			m.accels = m.accels[i+1:] // neither will it for the next machine
			return m.boot(ctx, parameters)
		}
	}
	return r, err
}

func (m *machine) bootWith(ctx context.Context, accel, parameters string) (*machineRun, error) {
	r := &machineRun{accel: accel, parameters: parameters, tasks: tasks(m.kernel.version, accel == "tcg", parameters, m.tests)}
	initrd := filepath.Join(m.dir, "initrd")
	file, err := os.Create(initrd)
	if err != nil {
		return nil, err
	}
	err = writeInitramfs(file, m.stage, m.kernel, r.plan(console))
	if err := errors.Join(err, file.Close()); err != nil {
		return nil, err
	}
	name := m.kernel.version
	if parameters != "" {
		name += "-" + parameters
	}
	consoleLog := filepath.Join(m.logs, name+".console")
	reportLog, err := os.Create(filepath.Join(m.logs, name+".report"))
	if err != nil {
		return nil, err
	}
	defer reportLog.Close()
	fmt.Fprintf(m.progress, "Linux %s (%s) %s\n", m.kernel.release(), accel, parameters)
	ctx, cancel := context.WithTimeout(ctx, lifetime)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-accel", accel, "-cpu", processor, "-smp", "2", "-m", "2048",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-kernel", m.kernel.image(), "-initrd", initrd,
		// A kernel that panics reboots, which ends qemu.
		"-append", "console=ttyS0 panic=-1 "+parameters,
		"-serial", "file:"+consoleLog,
		"-device", "virtio-serial-pci",
		"-chardev", "stdio,id=report,signal=off", "-device", "virtserialport,chardev=report")
	var speaks func()
	if accel == "kvm" {
		alarm := time.AfterFunc(silence, cancel)
		speaks = func() { alarm.Stop() }
	}
	if err := r.collect(cmd, speaks, reportLog, m.progress); err != nil {
		log, _ := os.ReadFile(consoleLog)
		return r, fmt.Errorf("%w; the end of its console:\n%s", err, lastLines(log, 30))
	}
	return r, nil
}

// lastLines are at most the last n lines of a text.
func lastLines(text []byte, n int) []byte {
	lines := bytes.SplitAfter(text, []byte("\n"))
	return bytes.Join(lines[max(0, len(lines)-n):], nil)
}

// errSilent is that of a machine that has not reported anything.
var errSilent = errors.New("the machine has not reported")

// errUnfinished is that of one that has not reported all.
var errUnfinished = errors.New("the machine has ended before its tests")

// collect runs the program that reports, in a machine or not. The first line calls
// speaks. The report is logged as it comes.
func (r *machineRun) collect(cmd *exec.Cmd, speaks func(), log, progress io.Writer) error {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdin, err := cmd.StdinPipe() // at whose end qemu's character device would end
	if err != nil {
		return err
	}
	defer stdin.Close()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	started := time.Now()
	if err := cmd.Start(); err != nil {
		return err
	}
	lines := json.NewDecoder(io.TeeReader(stdout, log))
	for n := 0; ; n++ {
		var line job.Line
		if err := lines.Decode(&line); err != nil {
			waitErr := cmd.Wait()
			missing := errUnfinished
			switch {
			case n == 0:
				missing = errSilent
			case r.done && err == io.EOF:
				r.took = time.Since(started)
				return nil
			}
			return fmt.Errorf("%w: %v, %v %s", missing, err, waitErr, bytes.TrimSpace(stderr.Bytes()))
		}
		if n == 0 && speaks != nil {
			speaks()
		}
		if err := r.add(line, progress); err != nil {
			return errors.Join(err, cmd.Cancel(), cmd.Wait())
		}
	}
}

// plan is what the machine is told to do.
func (r *machineRun) plan(modules []string) job.Plan {
	p := job.Plan{Modules: slices.Clone(modules)}
	for _, t := range r.tasks {
		p.Jobs = append(p.Jobs, t.job)
	}
	return p
}
