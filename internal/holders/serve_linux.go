package holders

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// holderEnv tells a process that it is a holder.
const holderEnv = "CONNECTX_HOLDER"

// Main has to be called before anything else in main, or in TestMain. If this
// process is a holder, that is all that it does: Main does not return.
func Main() {
	if os.Getenv(holderEnv) == "" {
		return
	}
	if err := serve(); err != nil {
		fmt.Fprintln(os.Stderr, "holder:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// A holder is this process, if it is one.
type holder struct {
	control *net.UnixConn
	held    []int // descriptors
}

func serve() error {
	// An interrupt from the terminal is the parent's business.
	signal.Ignore(os.Interrupt)
	file := os.NewFile(3, "control")
	conn, err := net.FileConn(file)
	if err != nil {
		return err
	}
	file.Close()
	control, ok := conn.(*net.UnixConn)
	if !ok {
		return fmt.Errorf("descriptor 3 is a %T", conn)
	}
	h := &holder{control: control}
	b, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*maxRights))
	for {
		n, oobn, _, _, err := h.control.ReadMsgUnix(b, oob)
		if n == 0 || errors.Is(err, unix.ECONNRESET) {
			return nil // the parent is done, or gone
		}
		if err != nil {
			return err
		}
		var answer reply
		if err := h.do(b[:n], oob[:oobn]); err != nil {
			answer.Error = err.Error()
			errors.As(err, &answer.Errno)
		}
		message, err := json.Marshal(answer)
		if err != nil {
			return err
		}
		if _, err := h.control.Write(message); errors.Is(err, unix.EPIPE) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

func (h *holder) do(message, oob []byte) error {
	var r request
	if err := json.Unmarshal(message, &r); err != nil {
		return err
	}
	switch r.Op {
	case opKeep:
		return h.keep(r.Count, oob)
	case opTake:
		for _, port := range r.Ports {
			fd, err := take(r.Network, netip.AddrPortFrom(r.Source, port), r.To[0])
			if err != nil {
				return fmt.Errorf("take %s %v:%d->%v: %w", r.Network, r.Source, port, r.To[0], err)
			}
			h.held = append(h.held, fd)
		}
	case opRelease:
		var errs []error
		for _, fd := range h.held {
			errs = append(errs, os.NewSyscallError("close", unix.Close(fd)))
		}
		h.held = h.held[:0]
		return errors.Join(errs...)
	case opSink:
		for _, address := range r.To {
			if err := sink(r.Network, address); err != nil {
				return fmt.Errorf("sink on %s %v: %w", r.Network, address, err)
			}
		}
	default:
		return fmt.Errorf("unknown request %q", r.Op)
	}
	return nil
}

func (h *holder) keep(count int, oob []byte) (err error) {
	var fds []int
	defer func() {
		if err != nil {
			err = fmt.Errorf("keep: %w", err)
			for _, fd := range fds {
				unix.Close(fd)
			}
		}
	}()
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return err
	}
	for _, message := range messages {
		if fds, err = unix.ParseUnixRights(&message); err != nil {
			return err
		}
	}
	if len(fds) != count {
		// The kernel leaves out what there is no number for.
		return fmt.Errorf("%d of %d descriptors came, beside %d held: %w", len(fds), count, len(h.held), unix.EMFILE)
	}
	for _, fd := range fds {
		if err := hold(fd); err != nil {
			return err
		}
	}
	h.held = append(h.held, fds...)
	return nil
}

// hold makes a TCP socket one that can be held for any time, and leaves no
// TIME_WAIT when it is closed. To a UDP socket it means nothing.
func hold(fd int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 0); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	return os.NewSyscallError("setsockopt", unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
}

// take connects a socket from local, plainly.
func take(network string, local, remote netip.AddrPort) (int, error) {
	fd, err := socket(network, local.Addr())
	if err != nil {
		return -1, err
	}
	if err := connect(fd, network, local, remote); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func connect(fd int, network string, local, remote netip.AddrPort) error {
	if err := hold(fd); err != nil {
		return err
	}
	from := local
	if isTCP(network) {
		// connect finds the port, and so leaves it to other destinations.
		ports := int(uint32(local.Port())<<16 | uint32(local.Port()))
		if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_LOCAL_PORT_RANGE, ports); err != nil {
			return fmt.Errorf("setsockopt IP_LOCAL_PORT_RANGE: %w", err)
		}
		from = netip.AddrPortFrom(local.Addr(), 0)
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: 10}); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	if err := unix.Bind(fd, sockaddr(from)); err != nil {
		return os.NewSyscallError("bind", err)
	}
	// A signal of the Go runtime may interrupt it where it has to wait.
	err := error(unix.EINTR)
	for err == unix.EINTR {
		err = unix.Connect(fd, sockaddr(remote))
	}
	if err == unix.EINPROGRESS || err == unix.EALREADY {
		err = unix.ETIMEDOUT
	}
	return os.NewSyscallError("connect", err)
}

// sink is a server on the address until this process ends.
func sink(network string, address netip.AddrPort) error {
	fd, err := socket(network, address.Addr())
	if err != nil {
		return err
	}
	if err := unix.Bind(fd, sockaddr(address)); err != nil {
		unix.Close(fd)
		return os.NewSyscallError("bind", err)
	}
	if !isTCP(network) {
		return nil
	}
	// Without leave to do this there are 4,096, and more to do.
	_ = os.WriteFile("/proc/sys/net/core/somaxconn", fmt.Append(nil, backlog), 0)
	if err := unix.Listen(fd, backlog); err != nil {
		unix.Close(fd)
		return os.NewSyscallError("listen", err)
	}
	go func() {
		if err := drain(fd); err != nil {
			fmt.Fprintf(os.Stderr, "holder: sink on %s %v: %v\n", network, address, err)
			os.Exit(1)
		}
	}()
	return nil
}

// backlog is the length of the queue of a sink: more than there are ports.
const backlog = 131072

// drain closes connections when half of the listener's queue is full, down to a
// few: accepting them as they come would disturb those who dial.
func drain(listener int) error {
	if err := unix.SetNonblock(listener, true); err != nil {
		return os.NewSyscallError("fcntl", err)
	}
	for range time.Tick(10 * time.Millisecond) {
		info, err := unix.GetsockoptTCPInfo(listener, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			return os.NewSyscallError("getsockopt", err)
		}
		// For a listener these are the length of the queue and its limit.
		queued, limit := info.Unacked, info.Sacked
		if queued < limit/2 {
			continue
		}
		for ; queued > limit/16; queued-- {
			fd, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
			if err == unix.EINTR || err == unix.ECONNABORTED {
				continue
			}
			if err != nil {
				return os.NewSyscallError("accept", err)
			}
			unix.Close(fd)
		}
	}
	return nil
}

func socket(network string, of netip.Addr) (int, error) {
	family, kind := unix.AF_INET6, unix.SOCK_DGRAM
	if of.Is4() {
		family = unix.AF_INET
	}
	if isTCP(network) {
		kind = unix.SOCK_STREAM
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0)
	return fd, os.NewSyscallError("socket", err)
}

func isTCP(network string) bool { return strings.HasPrefix(network, "tcp") }

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}
