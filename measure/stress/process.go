//go:build linux

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/seed22601231/connectx/internal/program"
	"github.com/seed22601231/connectx/measure/internal/echo"
)

// workerEnv tells a process that it is one of a crew. Its arguments are a role
// and its Config.
const workerEnv = "CONNECTX_STRESS_WORKER"

func isWorker() bool { return os.Getenv(workerEnv) != "" }

// A Config is what a process is to know.
type Config struct {
	Layout      layout
	Seed        uint64
	Hold        int   // connections that a goroutine holds, at most
	Start       int64 // of the run
	Process     int
	Incarnation int // how often the process was started again
}

// roles are what processes do until they are told to stop, which is when their
// standard input ends. An echo server does so until it is killed.
var roles = map[string]func(Config, *claims, *reporter, *atomic.Bool) error{
	"dial":   runDialers,
	"plain":  runPlain,
	"python": runFollower,
	"listen": func(c Config, _ *claims, r *reporter, stop *atomic.Bool) error { return runListeners(c, r, stop) },
	"check":  func(c Config, _ *claims, r *reporter, stop *atomic.Bool) error { return runChecker(c, r, stop) },
	"udp":    func(_ Config, _ *claims, r *reporter, _ *atomic.Bool) error { return echo.ServeUDP(r.ready) },
	"tcp":    func(_ Config, _ *claims, r *reporter, _ *atomic.Bool) error { return echo.ServeTCP(r.ready) },
}

// claimsFile is the descriptor that a process inherits.
const claimsFile = 3

// work is the main function of a process of a crew. It returns the exit code.
func work(args []string) int {
	// An interrupt from the terminal is the parent's business.
	signal.Ignore(os.Interrupt)
	if err := play(args); err != nil {
		fmt.Fprintf(os.Stderr, "stress: %v: %v\n", args[:min(1, len(args))], err)
		return program.Failed
	}
	return program.OK
}

func play(args []string) error {
	if len(args) != 2 || roles[args[0]] == nil {
		return fmt.Errorf("%s is for this program's own use", workerEnv)
	}
	var c Config
	if err := json.Unmarshal([]byte(args[1]), &c); err != nil {
		return err
	}
	cl, err := mapClaims(c.Layout, os.NewFile(claimsFile, "claims"))
	if err != nil {
		return err
	}
	var stop atomic.Bool
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		stop.Store(true)
	}()
	reports := newReporter(os.Stdout)
	go reports.run()
	err = roles[args[0]](c, cl, reports, &stop)
	reports.flush()
	return err
}

// A crew is the processes of a run. When one of them ends that should not, the
// context's cause says which it was.
type crew struct {
	ctx     context.Context
	cancel  context.CancelCauseFunc
	claims  *os.File
	collect func(Report)
	waiting sync.WaitGroup
}

// A process is one of the crew.
type process struct {
	role     string
	config   Config
	cmd      *exec.Cmd
	stdin    io.Closer
	ready    chan struct{} // closed when it says that it is
	ended    chan struct{} // closed when it is gone, and all it had to say is collected
	err      error         // how it has ended
	expected atomic.Bool   // it may end
	killed   atomic.Bool   // and in any way
}

// start starts this program again, in a role. The process ends with the calling
// thread.
func (c *crew) start(role string, config Config) (*process, error) {
	text, err := json.Marshal(config)
	if err != nil {
		return nil, err
	}
	p := &process{role: role, config: config, ready: make(chan struct{}), ended: make(chan struct{})}
	p.cmd = exec.Command("/proc/self/exe", role, string(text))
	p.cmd.Args[0] = os.Args[0]
	p.cmd.Env = append(os.Environ(), workerEnv+"=1")
	p.cmd.Stderr = os.Stderr
	p.cmd.ExtraFiles = []*os.File{c.claims}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", role, err)
	}
	c.waiting.Go(func() {
		in := json.NewDecoder(out)
		for ready := false; ; {
			var r Report
			// Of one that is killed, the last report may be a part of one.
			if in.Decode(&r) != nil {
				break
			}
			c.collect(r)
			if r.Ready && !ready {
				ready = true
				close(p.ready)
			}
		}
		p.err = p.cmd.Wait()
		if !p.expected.Load() {
			c.cancel(fmt.Errorf("process %q: %w", role, cmp.Or(p.err, errEndedEarly)))
		}
		close(p.ended)
	})
	return p, nil
}

var errEndedEarly = errors.New("ended early")

// await returns when the process is ready.
func (c *crew) await(p *process) error {
	select {
	case <-p.ready:
		return nil
	case <-c.ctx.Done():
		return context.Cause(c.ctx)
	}
}

// stop tells the process to end.
func (p *process) stop() {
	p.expected.Store(true)
	p.stdin.Close()
}

// kill ends the process where it is.
func (p *process) kill() {
	p.killed.Store(true)
	p.expected.Store(true)
	_ = p.cmd.Process.Kill() // an error means that it has ended
}
