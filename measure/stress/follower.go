//go:build linux

package main

import (
	"bufio"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
)

// follower is a program that follows the protocol of the UDP lock and shares no
// code with connectx.
//
//go:embed follower.py
var follower string

// python is the name of its interpreter.
const python = "python3"

// A remote is a running follower.
type remote struct {
	in  io.Writer
	out *bufio.Scanner
}

// ask gives it a command and returns its answer.
func (r *remote) ask(format string, args ...any) (string, error) {
	if _, err := fmt.Fprintf(r.in, format+"\n", args...); err != nil {
		return "", err
	}
	if !r.out.Scan() {
		return "", errors.Join(errors.New("the follower in Python has ended"), r.out.Err())
	}
	return r.out.Text(), nil
}

// runFollower runs the follower, and tells it what to do.
func runFollower(c Config, cl *claims, reports *reporter, stop *atomic.Bool) error {
	// The parent-death signal is tied to the thread that forks.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := exec.Command(python, "-c", follower)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	r := &remote{in: in, out: bufio.NewScanner(out)}
	if _, err := r.ask("ready"); err != nil {
		return err
	}
	reports.ready()
	h := newHolder(c, cl, 0, reports, stop)
	var failed error
	h.run(func() {
		if err := h.dialRemote(r); err != nil && failed == nil {
			failed = err
			stop.Store(true)
		}
	})
	in.Close()
	return errors.Join(failed, cmd.Wait())
}

// dialRemote has the follower dial. Whether it fails is its own business; that
// what it gets is its own is not.
func (h *holder) dialRemote(r *remote) error {
	f := family(h.random.IntN(2))
	n, source := h.random.IntN(sharedDestinations), h.random.IntN(len(sources[f]))
	kind := "Python, picked port"
	// The lock as it is described has no first look: it would take the
	// datagrams of a listener on the wildcard address while it is bound.
	var ports []string
	for _, i := range h.random.Perm(h.Layout.rows()) {
		if port := h.Layout.port(i); port != h.Layout.listenPort() {
			ports = append(ports, fmt.Sprint(port))
		}
	}
	if h.random.IntN(2) == 0 {
		kind, ports = "Python, source address and port", ports[:1]
	}
	flow := flowOf(h.Layout, udp, f, n, source)
	h.claims.begin(h.Process, flow)
	defer h.claims.end(h.Process, flow)
	to := destination(f, n)
	answer, err := r.ask("dial %s %s %d %s", sources[f][source], to.Addr(), to.Port(), strings.Join(ports, " "))
	if err != nil {
		return err
	}
	o := Outcomes{Dials: 1}
	switch answer {
	case "exhausted":
		o.Exhausted = 1
	case "conflict":
		o.Conflict = 1
	case "locked":
		o.Held = 1
	default:
		o.Connected = 1
		c := &remoteConn{remote: r, to: to}
		var port uint16
		if _, err := fmt.Sscanf(answer, "connected %d %d", &c.fd, &port); err != nil {
			return fmt.Errorf("the follower in Python: %q: %w", answer, err)
		}
		c.from = netip.AddrPortFrom(sources[f][source], port)
		h.keep(c, udp, flow)
	}
	h.reports.dialled("UDP, "+kind, o)
	return nil
}

// A remoteConn is a connection of the follower.
type remoteConn struct {
	*remote
	fd       int
	from, to netip.AddrPort
}

func (c *remoteConn) echo(t token) ([]byte, error) {
	return c.answer(c.ask("echo %d %x", c.fd, t))
}

func (c *remoteConn) more() ([]byte, error) { return c.answer(c.ask("more %d", c.fd)) }

func (c *remoteConn) answer(line string, err error) ([]byte, error) {
	if err != nil {
		return nil, err
	}
	text, ok := strings.CutPrefix(line, "answer ")
	if !ok {
		return nil, errors.New(line)
	}
	return hex.DecodeString(text)
}

func (c *remoteConn) local() netip.AddrPort { return c.from }
func (c *remoteConn) String() string        { return fmt.Sprintf("udp %s->%s (Python)", c.from, c.to) }
func (c *remoteConn) close(bool)            { _, _ = c.ask("close %d", c.fd) }
