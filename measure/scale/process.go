//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/rpc"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// A crew is the processes of one measurement. When one of them ends before it
// is told to, all others are killed, and the context's cause says which it was.
type crew struct {
	ctx     context.Context
	cancel  context.CancelCauseFunc
	waiting sync.WaitGroup
	pids    []int
}

func newCrew(ctx context.Context) *crew {
	c := new(crew)
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	return c
}

// stop kills all processes, and returns when they are gone.
func (c *crew) stop() {
	c.cancel(nil)
	c.waiting.Wait()
}

// A process is one of the crew.
type process struct {
	name  string
	ended chan struct{}
	mu    sync.Mutex  // one call at a time
	rpc   *rpc.Client // nil for a server
}

// start starts this program again, to do what args say. It inherits files as
// descriptors 3 and up. The process ends with the calling thread.
func (c *crew) start(name string, files []*os.File, args ...string) (*process, error) {
	cmd := exec.CommandContext(c.ctx, "/proc/self/exe", args...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), workerEnv+"=1")
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = files
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	p := &process{name: name, ended: make(chan struct{})}
	c.pids = append(c.pids, cmd.Process.Pid)
	c.waiting.Go(func() {
		err := cmd.Wait()
		if err == nil {
			err = errors.New("ended early")
		}
		c.cancel(fmt.Errorf("%s: %w", name, err)) // unless it is cancelled already
		close(p.ended)
	})
	return p, nil
}

// startDialers starts processes that dial when told to.
func (c *crew) startDialers(n int, config Config) ([]*process, error) {
	var all []*process
	for i := range n {
		p, err := c.startDialer(fmt.Sprintf("dial process %d of %d", i+1, n))
		if err != nil {
			return nil, err
		}
		all = append(all, p)
		config.First = uint64(i) << 32
		if err := c.call(p, "Start", config, new(struct{})); err != nil {
			return nil, err
		}
	}
	return all, nil
}

func (c *crew) startDialer(name string) (*process, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	here, there := os.NewFile(uintptr(pair[0]), "parent"), os.NewFile(uintptr(pair[1]), "child")
	defer here.Close()
	defer there.Close()
	conn, err := net.FileConn(here)
	if err != nil {
		return nil, err
	}
	p, err := c.start(name, []*os.File{there}, roleDial)
	if err != nil {
		conn.Close()
		return nil, err
	}
	p.rpc = rpc.NewClient(conn)
	context.AfterFunc(c.ctx, func() { p.rpc.Close() })
	return p, nil
}

// startServers starts processes that echo what comes to the destinations of a
// plan. A single one is enough for UDP; those for TCP have as many descriptors as
// those that dial.
func (c *crew) startServers(p plan, processes int) error {
	var sockets []*os.File
	defer func() {
		for _, s := range sockets {
			s.Close()
		}
	}()
	for _, d := range p.destinations() {
		s, err := serverSocket(p.tcp(), d)
		if err != nil {
			return fmt.Errorf("echo server on %s: %w", d, err)
		}
		sockets = append(sockets, s)
	}
	capacity := strconv.Itoa(p.perProcess - len(sockets))
	role, n := roleEchoUDP, 1
	if p.tcp() {
		role, n = roleEchoTCP, processes
	}
	for i := range n {
		name := fmt.Sprintf("echo process %d of %d", i+1, n)
		if _, err := c.start(name, sockets, role, strconv.Itoa(len(sockets)), capacity); err != nil {
			return err
		}
	}
	return nil
}

// call calls a method of the Worker in a process.
func (c *crew) call(p *process, method string, args, reply any) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	err := p.rpc.Call("Worker."+method, args, reply)
	var own rpc.ServerError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &own):
		return fmt.Errorf("%s: %w", p.name, err)
	}
	// The process is gone, and why that is comes with its end.
	<-p.ended
	return context.Cause(c.ctx)
}

// atOnce calls f for each of all, so many of them at a time, and returns the
// first error, after which it calls no more.
func atOnce[T any](n int, all []T, f func(T) error) error {
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		next  int
		first error
	)
	take := func() (t T, ok bool) {
		mu.Lock()
		defer mu.Unlock()
		if first != nil || next == len(all) {
			return t, false
		}
		next++
		return all[next-1], true
	}
	for range min(n, len(all)) {
		wg.Go(func() {
			for t, ok := take(); ok; t, ok = take() {
				if err := f(t); err != nil {
					mu.Lock()
					if first == nil {
						first = err
					}
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	return first
}
