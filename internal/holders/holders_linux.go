package holders

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Holders are processes that hold sockets. They end with Close, or with this
// process. All methods are safe for concurrent use.
type Holders struct {
	mu        sync.Mutex
	processes []*process
	sinks     []*process
}

// A process is one holder, as its parent sees it.
type process struct {
	cmd     *exec.Cmd
	control *net.UnixConn
	held    int
}

// A request is what a holder is asked to do. With opKeep come descriptors.
type request struct {
	Op      string
	Count   int              `json:",omitempty"` // of descriptors
	Network string           `json:",omitempty"`
	Source  netip.Addr       `json:",omitzero"`
	To      []netip.AddrPort `json:",omitempty"` // one for opTake, any number for opSink
	Ports   []uint16         `json:",omitempty"`
}

const (
	opKeep    = "keep"
	opTake    = "take"
	opRelease = "release"
	opSink    = "sink"
)

// A reply is empty where all went well.
type reply struct {
	Error string        `json:",omitempty"`
	Errno syscall.Errno `json:",omitempty"` // 0 if there is none in the error
}

// A holderError is the error of a holder, and wraps its errno.
type holderError struct{ reply }

func (e *holderError) Error() string { return e.reply.Error }

func (e *holderError) Unwrap() error {
	if e.Errno != 0 {
		return e.Errno
	}
	return nil
}

const (
	maxMessage = 1 << 16

	// maxPorts is how many ports go into one request.
	maxPorts = 2000

	// maxRights is how many descriptors go into one request: the kernel takes
	// 253 (SCM_MAX_FD).
	maxRights = 250
)

// Start starts n processes that hold sockets, in the network namespace of the
// calling thread. Each can have as many sockets as RLIMIT_NOFILE says, less a
// dozen. The program has to call Main first.
func Start(n int) (*Holders, error) {
	h := new(Holders)
	for range n {
		p, err := start()
		if err != nil {
			return nil, errors.Join(err, h.Close())
		}
		h.processes = append(h.processes, p)
	}
	return h, nil
}

// start starts a holder. That one ends when the other end of its control socket
// is closed, by whatever means; a parent-death signal would come with the end
// of this thread already.
func start() (*process, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "control"), os.NewFile(uintptr(fds[1]), "control")
	defer ours.Close() // FileConn duplicates it
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		return nil, err
	}

	cmd := exec.Command("/proc/self/exe")
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), holderEnv+"=1", "GOMAXPROCS=1")
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Stderr = os.Stderr
	// The child is in the namespace of the thread that forks it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		conn.Close()
		return nil, fmt.Errorf("start a holder: %w", err)
	}
	return &process{cmd: cmd, control: conn.(*net.UnixConn)}, nil
}

// do has the holder do something, and waits until it is done.
func (p *process) do(r request, fds ...int) error {
	message, err := json.Marshal(r)
	if err != nil {
		return err
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	if _, _, err := p.control.WriteMsgUnix(message, rights, nil); err != nil {
		return fmt.Errorf("%s: no word to holder %d: %w", r.Op, p.cmd.Process.Pid, err)
	}
	b := make([]byte, maxMessage)
	n, err := p.control.Read(b)
	if err == nil && n == 0 {
		err = io.EOF
	}
	if err != nil {
		return fmt.Errorf("%s: no word from holder %d: %w", r.Op, p.cmd.Process.Pid, err)
	}
	var answer reply
	if err := json.Unmarshal(b[:n], &answer); err != nil {
		return fmt.Errorf("%s: holder %d: %w", r.Op, p.cmd.Process.Pid, err)
	}
	if answer != (reply{}) {
		return &holderError{answer}
	}
	return nil
}

// emptiest is the process that holds the fewest sockets. There is none if h has
// been closed, or started with 0.
func (h *Holders) emptiest() (*process, error) {
	if len(h.processes) == 0 {
		return nil, errors.New("there are no holders")
	}
	least := h.processes[0]
	for _, p := range h.processes {
		if p.held < least.held {
			least = p
		}
	}
	return least, nil
}

// Keep hands connections to the holders, and closes them here: their 4-tuples
// stay taken. TCP connections have no keepalives from then on, and are reset
// when they are released, so that no TIME_WAIT stays behind. If there is an
// error, those connections that no holder has stay open here.
func (h *Holders) Keep(conns ...syscall.Conn) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for len(conns) > 0 {
		n := min(len(conns), maxRights)
		if err := h.keep(conns[:n]); err != nil {
			return err
		}
		conns = conns[n:]
	}
	return nil
}

func (h *Holders) keep(conns []syscall.Conn) error {
	fds := make([]int, len(conns))
	for i, conn := range conns {
		raw, err := conn.SyscallConn()
		if err == nil {
			err = raw.Control(func(fd uintptr) { fds[i] = int(fd) })
		}
		if err != nil {
			return fmt.Errorf("keep: %w", err)
		}
	}
	p, err := h.emptiest()
	if err != nil {
		return err
	}
	// The descriptors are good for as long as the connections are not closed.
	if err := p.do(request{Op: opKeep, Count: len(fds)}, fds...); err != nil {
		return err
	}
	p.held += len(conns)
	var errs []error
	for _, conn := range conns {
		if c, ok := conn.(io.Closer); ok {
			errs = append(errs, c.Close())
		} else {
			errs = append(errs, fmt.Errorf("keep: %T cannot be closed here", conn))
		}
	}
	return errors.Join(errs...)
}

// Take has the holders open a socket from each of the ports of source, as a
// program does that knows nothing of sharing ports: without SO_REUSEADDR. UDP
// sockets are bound to the port and connected; TCP sockets find it by connect,
// which leaves it to other destinations as well. If a port is taken already,
// that is an error which names it, and which wraps the errno; the ports
// before it stay taken.
//
// TCP destinations have to answer within 10 s; see [Holders.Sink].
func (h *Holders) Take(network string, source netip.Addr, destination netip.AddrPort, ports []uint16) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for len(ports) > 0 {
		n := min(len(ports), maxPorts)
		p, err := h.emptiest()
		if err != nil {
			return err
		}
		r := request{Op: opTake, Network: network, Source: source, To: []netip.AddrPort{destination}, Ports: ports[:n]}
		if err := p.do(r); err != nil {
			return err
		}
		p.held += n
		ports = ports[n:]
	}
	return nil
}

// Release closes everything that is held.
func (h *Holders) Release() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	var errs []error
	for _, p := range h.processes {
		errs = append(errs, p.do(request{Op: opRelease}))
		p.held = 0
	}
	return errors.Join(errs...)
}

// Sink starts a process of its own that is a server on these addresses, and says
// nothing on any of them. It stays until Close.
//
// TCP connections are complete without it doing anything: the kernel keeps them,
// and they take neither a descriptor nor, while others are being dialled, a
// processor. When there are too many it closes most of those that came first;
// for their clients that is CLOSE_WAIT, and a minute later the kernel has
// forgotten about their other end, so those that stay open must have no
// keepalives. It raises net.core.somaxconn of the namespace, where that is
// allowed.
func (h *Holders) Sink(network string, addresses ...netip.AddrPort) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	p, err := start()
	if err != nil {
		return err
	}
	h.sinks = append(h.sinks, p)
	return p.do(request{Op: opSink, Network: network, To: addresses})
}

// Close closes everything that is held and ends the processes.
func (h *Holders) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	var errs []error
	all := append(h.processes, h.sinks...)
	h.processes, h.sinks = nil, nil
	for _, p := range all {
		errs = append(errs, p.control.Close())
	}
	for _, p := range all {
		if err := p.cmd.Wait(); err != nil {
			errs = append(errs, fmt.Errorf("holder %d: %w", p.cmd.Process.Pid, err))
		}
	}
	return errors.Join(errs...)
}
