//go:build linux

package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"sync"

	"github.com/seed22601231/connectx/internal/program"
	"github.com/seed22601231/connectx/measure/internal/echo"
)

// serverEnv tells a process that it is the server.
const serverEnv = "CONNECTX_SOAK_SERVER"

func isServer() bool { return os.Getenv(serverEnv) != "" }

// serve is the main function of the server. It tells on standard output when it
// can answer, and ends with standard input. It returns the exit code.
func serve() int {
	// An interrupt from the terminal is the parent's business.
	signal.Ignore(os.Interrupt)
	var ready sync.WaitGroup
	ready.Add(2)
	failed := make(chan error)
	go func() { failed <- echo.ServeUDP(ready.Done) }()
	go func() { failed <- echo.ServeTCP(ready.Done) }()
	go func() {
		ready.Wait()
		fmt.Println()
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(program.OK)
	}()
	fmt.Fprintf(os.Stderr, "soak: server: %v\n", <-failed)
	return program.Failed
}

// A server is the process, as its parent sees it. It has no goroutine, and as many
// descriptors each time it is started.
type server struct {
	cmd   *exec.Cmd
	stdin io.Closer
}

// startServer returns when the server can answer.
func startServer() (*server, error) {
	s := &server{cmd: exec.Command("/proc/self/exe")}
	s.cmd.Args[0] = os.Args[0]
	s.cmd.Env = append(os.Environ(), serverEnv+"=1")
	s.cmd.Stderr = os.Stderr
	var err error
	if s.stdin, err = s.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := s.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the server: %w", err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		s.kill()
		return nil, fmt.Errorf("the server has ended: %w", err)
	}
	return s, nil
}

// kill ends the server where it is, and returns when it is gone.
func (s *server) kill() {
	_ = s.cmd.Process.Kill() // an error means that it has ended
	s.stdin.Close()
	_ = s.cmd.Wait()
}
