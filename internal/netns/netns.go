//go:build linux

// Package netns gives a program a network namespace of its own, in which it may
// have addresses and a port range as it likes: the tests and the demo run in
// one. As root that takes CLONE_NEWNET; anybody else gets a user namespace
// around it.
package netns

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// insideEnv tells a process that Reexec has started which namespace that was
// done from.
const insideEnv = "CONNECTX_NETNS"

// Inside reports whether Reexec has started this process, or an ancestor, and
// it therefore is in a namespace of its own. The variable alone does not make it
// believe so.
func Inside() bool {
	from := os.Getenv(insideEnv)
	if from == "" {
		return false
	}
	here, err := current()
	return err == nil && here != from
}

// current identifies the process's network namespace.
func current() (string, error) { return os.Readlink("/proc/self/ns/net") }

// ErrRefused says that the system does not let this user create a namespace.
var ErrRefused = errors.New("network namespaces are not allowed here")

// Reexec runs this program again, with the same arguments, in a new network
// namespace whose loopback interface is up, and returns its exit code. The
// error wraps ErrRefused if there can be no such namespace.
func Reexec() (exitCode int, err error) {
	from, err := current()
	if err != nil {
		return 0, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), insideEnv+"="+from)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}

	// An interrupt from the terminal reaches the child as well; let it end
	// first.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt)
	defer signal.Stop(signals)

	// The parent-death signal is tied to the thread that forks.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
			return 128 + int(status.Signal()), nil
		}
		return exit.ExitCode(), nil
	}
	return 0, err
}

// LoopbackUp brings up the loopback interface of the calling thread's
// namespace, without which not even 127.0.0.1 answers, and gives it further
// addresses ("10.0.0.1/32").
func LoopbackUp(addresses ...string) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	for _, address := range addresses {
		if err := AddAddress(lo, address); err != nil {
			return err
		}
	}
	return nil
}

// AddAddress gives an interface an address ("fd00::1/64"), if it has not got it yet,
// and returns when the kernel delivers to it.
func AddAddress(link netlink.Link, address string) error {
	addr, err := netlink.ParseAddr(address)
	if err != nil {
		return err
	}
	addr.Flags = unix.IFA_F_NODAD
	name := link.Attrs().Name
	if err := netlink.AddrReplace(link, addr); err != nil {
		return fmt.Errorf("add %s to %s: %w", address, name, err)
	}
	// The local route of an IPv6 address is added by a kernel worker some time
	// later; until then datagrams to it are lost.
	for deadline := time.Now().Add(10 * time.Second); ; runtime.Gosched() {
		routes, err := netlink.RouteGetWithOptions(addr.IP, &netlink.RouteGetOptions{Oif: name})
		if err == nil && len(routes) == 1 && routes[0].Type == unix.RTN_LOCAL {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("add %s to %s: there is no local route to it: %v, %v", address, name, routes, err)
		}
	}
}

// SetPortRange sets ip_local_port_range in the calling thread's namespace.
func SetPortRange(low, high uint16) error {
	return writeSysctl("ip_local_port_range", fmt.Sprintf("%d %d", low, high))
}

// SetReservedPorts sets ip_local_reserved_ports in the calling thread's
// namespace, in the kernel's own notation ("8080,9148-9150").
func SetReservedPorts(ports string) error {
	return writeSysctl("ip_local_reserved_ports", ports)
}

func writeSysctl(name, value string) error {
	return os.WriteFile("/proc/sys/net/ipv4/"+name, []byte(strings.TrimSpace(value)+"\n"), 0)
}

// Enter moves the calling goroutine to a new network namespace with its
// loopback interface up, for as long as the goroutine lives: it stays locked to
// its thread, which ends with it.
func Enter() error {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("%w: %w", ErrRefused, os.NewSyscallError("unshare", err))
	}
	return LoopbackUp()
}

// refused is why Main has run in the namespace it was started in.
var refused error

// Main is for a TestMain: it runs the tests in a namespace of their own, or, if
// the system refuses one, where they are. It returns the exit code.
func Main(run func() int) int {
	if Inside() {
		if err := LoopbackUp(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return run()
	}
	code, err := Reexec()
	if errors.Is(err, ErrRefused) {
		refused = err
		return run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// Need skips a test that cannot do without a namespace of its own, and says why
// there is none.
func Need(t interface {
	Helper()
	Skipf(format string, args ...any)
}) {
	t.Helper()
	if refused != nil {
		t.Skipf("needs a network namespace of its own: %v", refused)
	}
}
