//go:build linux

package main

import (
	"context"
	"fmt"
	"net"
	"net/rpc"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/program"
)

// workerEnv tells a process that it is one of a crew. Its arguments are a role
// and what belongs to that.
const workerEnv = "CONNECTX_SCALE_WORKER"

const (
	roleDial    = "dial"
	roleEchoTCP = "echo-tcp" // number of sockets, most connections
	roleEchoUDP = "echo-udp" // the same, of which only the first matters
)

func isWorker() bool { return os.Getenv(workerEnv) != "" }

// work is the main function of a process of a crew. It returns the exit code.
func work(args []string) int {
	// An interrupt from the terminal is the parent's business.
	signal.Ignore(os.Interrupt)
	if err := play(args); err != nil {
		fmt.Fprintf(os.Stderr, "scale: %v: %v\n", args, err)
		return program.Failed
	}
	return program.OK
}

func play(args []string) error {
	if len(args) == 1 && args[0] == roleDial {
		return serveDialer()
	}
	if len(args) != 3 {
		return fmt.Errorf("%s is for this program's own use", workerEnv)
	}
	sockets, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	capacity, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	switch args[0] {
	case roleEchoTCP:
		return echoTCP(sockets, capacity)
	case roleEchoUDP:
		return echoUDP(sockets)
	default:
		return fmt.Errorf("no such role: %s", args[0])
	}
}

// firstInherited is the descriptor of the first file that a process inherits.
const firstInherited = 3

func serveDialer() error {
	file := os.NewFile(firstInherited, "parent")
	defer file.Close()
	conn, err := net.FileConn(file)
	if err != nil {
		return err
	}
	server := rpc.NewServer()
	if err := server.Register(new(Worker)); err != nil {
		return err
	}
	server.ServeConn(conn) // until the parent hangs up
	return nil
}

// A Worker holds the connections of one process. The parent calls its methods,
// one at a time. Between the calls nothing runs here: no connection has a
// goroutine of its own.
type Worker struct {
	network string
	dial    func(ctx context.Context, network, address string) (net.Conn, error)
	conns   []net.Conn
	took    []time.Duration // by each dial
	first   uint64
	tokens  []token
}

// A Config says how a Worker is to dial.
type Config struct {
	Network  string
	Connectx bool // with connectx.Dialer, not net.Dialer

	// First is the number of the first connection. Those of all processes are
	// different.
	First uint64
}

// Start is to be called first.
func (w *Worker) Start(c Config, _ *struct{}) error {
	var local net.Addr = &net.UDPAddr{IP: source.AsSlice()}
	if c.Network == "tcp4" {
		local = &net.TCPAddr{IP: source.AsSlice()}
	}
	inner := net.Dialer{LocalAddr: local}
	w.dial = inner.DialContext
	if c.Connectx {
		d := connectx.Dialer{Dialer: inner}
		w.dial = d.DialContext
	}
	w.network, w.first = c.Network, c.First
	return nil
}

// A DialJob is so many dials to one destination.
type DialJob struct {
	Destination string
	Count       int
}

// A DialReply says how many connections were opened, and what ended that if they
// are fewer than they should be.
type DialReply struct {
	Opened  int
	Failure string
}

// Dial opens connections, until one fails.
func (w *Worker) Dial(job DialJob, reply *DialReply) error {
	for range job.Count {
		start := time.Now()
		conn, err := w.dial(context.Background(), w.network, job.Destination)
		took := time.Since(start)
		if err != nil {
			reply.Failure = err.Error()
			break
		}
		w.conns = append(w.conns, conn)
		w.took = append(w.took, took)
		reply.Opened++
	}
	return nil
}

// Latencies hands over how long each dial took.
func (w *Worker) Latencies(_ struct{}, reply *[]time.Duration) error {
	*reply, w.took = w.took, nil
	return nil
}

// Collect gives memory that is not in use back to the kernel.
func (w *Worker) Collect(struct{}, *struct{}) error {
	debug.FreeOSMemory()
	return nil
}

// Echo sends a token of its own on every connection, and counts those that come
// back.
func (w *Worker) Echo(window int, reply *Tally) error {
	w.tokens = newTokens(w.first, len(w.conns))
	e := echoes{window: window, patience: echoPatience, datagrams: w.network == "udp4"}
	*reply = e.verify(w.conns, w.tokens)
	return nil
}

// Strays counts the connections on which there is something else to read after
// Echo has ended everywhere.
func (w *Worker) Strays(_ struct{}, reply *int) (err error) {
	*reply, err = strays(w.conns, w.tokens)
	return err
}

// Close closes all connections. Those of TCP are reset, which leaves no
// TIME_WAIT.
func (w *Worker) Close(struct{}, *struct{}) error {
	closeAll(w.conns)
	w.conns = nil
	return nil
}

func closeAll(conns []net.Conn) {
	for _, conn := range conns {
		if tcp, ok := conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
		conn.Close()
	}
}

const (
	// mostDescriptors is how many a process uses even if it may have more, so
	// that there are always many processes.
	mostDescriptors = 20_000

	// otherDescriptors is what the Go runtime, the dialers and the standard
	// streams have open.
	otherDescriptors = 64
)

// connectionsPerProcess is how many connections a process can hold, by its limit
// of descriptors.
func connectionsPerProcess() (int, error) {
	const least = 1000
	// The runtime has raised the soft limit to the hard one.
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, os.NewSyscallError("getrlimit", err)
	}
	if limit.Cur < least {
		return 0, fmt.Errorf("RLIMIT_NOFILE is %d descriptors a process: at least %d are needed (ulimit -n)", limit.Cur, least)
	}
	return int(min(limit.Cur, mostDescriptors)) - otherDescriptors, nil
}
