package connectx

import (
	"errors"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/sys"
	"github.com/seed22601231/connectx/lookup"
	"github.com/seed22601231/connectx/portpick"
)

const (
	// maxNamespaces bounds how many namespaces are kept in mind; the one that
	// was not dialled in for longest makes room.
	maxNamespaces = 64

	// refreshEvery is how long a change of the port range may go unnoticed.
	// A dial that finds the range full looks again at once.
	refreshEvery = time.Second

	// idleTicks × refreshEvery without a dial, and a namespace's descriptors
	// are closed: an open one would keep a deleted namespace alive.
	idleTicks = 10

	// maxIdleConns bounds the descriptors that are kept between dials.
	maxIdleConns = 16
)

// A namespace is what the dials of one network namespace share.
type namespace struct {
	key   uint64
	turn  uint64 // of the last findNamespace, under namespaces.mu
	order *portpick.Order
	ports atomic.Pointer[portpick.Ports]
	full  fullTable

	// What a new socket has before anybody sets it: 0, unless a program of
	// the control group says otherwise.
	device, mark atomic.Uint32

	// blind says that the kernel did not find a socket which was there. It is
	// believed until the next refresh: each question may make the kernel run
	// modprobe.
	blind atomic.Bool

	uses  atomic.Uint64 // dials so far
	stale atomic.Bool   // ports should be read again

	mu     sync.Mutex
	sysctl *portpick.Sysctl // nil while idle
	idle   []*lookup.Conn   // not in use by any dial
	timer  *time.Timer      // runs tick; nil while idle
	last   uint64           // uses at the last tick
	quiet  int              // ticks without a dial
	closed bool             // made room for another
}

// namespaces are all that were dialled in lately.
var namespaces struct {
	latest atomic.Pointer[namespace] // saves the lock in a process with one

	mu   sync.Mutex
	all  map[uint64]*namespace
	turn uint64 // counts the calls of findNamespace
}

// errNamespace says that the socket belongs to another network namespace than
// the calling thread.
var errNamespace = errors.New("the socket is not in the calling thread's network namespace")

// namespaceOf returns the namespace that the socket belongs to, which is not
// necessarily that of the process.
func namespaceOf(fd int) (*namespace, error) {
	key, err := namespaceKey(fd)
	if err != nil {
		return nil, err
	}
	ns := namespaces.latest.Load()
	if ns == nil || ns.key != key {
		ns = findNamespace(key)
	}
	ns.uses.Add(1)
	if ns.stale.Load() {
		ns.refresh()
	}
	return ns, nil
}

// namespaceKey identifies the network namespace of a socket.
func namespaceKey(fd int) (uint64, error) {
	cookie, err := sys.Cookie(fd, unix.SO_NETNS_COOKIE)
	if err == nil {
		return cookie, nil
	}
	// Before Linux 5.14. The socket was made on this thread a moment ago.
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		return 0, err
	}
	return st.Ino, nil
}

func findNamespace(key uint64) *namespace {
	n := &namespaces
	n.mu.Lock()
	defer n.mu.Unlock()
	ns := n.all[key]
	if ns == nil {
		if n.all == nil {
			n.all = make(map[uint64]*namespace)
		}
		if len(n.all) >= maxNamespaces {
			oldest := ns
			for _, other := range n.all {
				if oldest == nil || other.turn < oldest.turn {
					oldest = other
				}
			}
			delete(n.all, oldest.key)
			oldest.retire()
		}
		ns = &namespace{key: key, order: portpick.NewOrder()}
		ns.stale.Store(true)
		n.all[key] = ns
	}
	n.turn++
	ns.turn = n.turn
	n.latest.Store(ns)
	return ns
}

// onThread returns nil if the calling thread, which must be locked, is in the
// namespace: what it opens belongs there then. It takes the opportunity to see
// what a new socket is like.
func (ns *namespace) onThread() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	switch key, err := namespaceKey(fd); {
	case err != nil:
		return os.NewSyscallError("getsockopt", err)
	case key != ns.key:
		return errNamespace
	}
	ns.device.Store(boundDevice(fd))
	ns.mark.Store(markOf(fd))
	return nil
}

// boundDevice is the interface that a socket is bound to, else 0. An error
// means a kernel before 5.0, which tells the name only.
func boundDevice(fd int) uint32 {
	index, _ := sys.Int(fd, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX)
	return uint32(index)
}

// markOf is the firewall mark of a socket, else 0.
func markOf(fd int) uint32 {
	mark, _ := sys.Int(fd, unix.SOL_SOCKET, unix.SO_MARK)
	return uint32(mark)
}

// conn returns a netlink connection for the use of one dial, which gives it
// back with release.
func (ns *namespace) conn() (*lookup.Conn, error) {
	ns.mu.Lock()
	if n := len(ns.idle); n > 0 {
		conn := ns.idle[n-1]
		ns.idle = ns.idle[:n-1]
		ns.mu.Unlock()
		return conn, nil
	}
	ns.mu.Unlock()

	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := ns.onThread(); err != nil {
		return nil, err
	}
	return lookup.Open()
}

// release takes a connection back. One that failed is closed, since an answer
// may still be under way on it.
func (ns *namespace) release(conn *lookup.Conn, failed bool) {
	ns.mu.Lock()
	keep := !failed && !ns.closed && ns.timer != nil && len(ns.idle) < maxIdleConns
	if keep {
		ns.idle = append(ns.idle, conn)
	}
	ns.mu.Unlock()
	if !keep {
		conn.Close()
	}
}

// refresh reads the port range again, and sees to it that this is repeated
// while there are dials.
func (ns *namespace) refresh() *portpick.Ports {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	defer ns.stale.Store(false)
	ns.blind.Store(false)
	if ns.timer == nil && !ns.closed {
		ns.quiet = 0
		ns.timer = time.AfterFunc(refreshEvery, ns.tick)
	}
	for _, conn := range ns.idle {
		conn.Forget()
	}
	ns.look()
	old := ns.ports.Load()
	if ns.sysctl != nil {
		if ports, err := ns.sysctl.Ports(old); err == nil {
			ns.ports.Store(ports)
			return ports
		}
	}
	if old == nil {
		// No /proc. Guess what Linux starts with.
		old, _ = portpick.NewPorts(portpick.DefaultLow, portpick.DefaultHigh, nil)
		ns.ports.Store(old)
	}
	return old
}

// look sees to what only a thread of the namespace can: what new sockets are
// like, and, the first time, which files have its port range.
func (ns *namespace) look() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if ns.onThread() != nil || ns.sysctl != nil || ns.closed {
		return
	}
	if sysctl, err := portpick.OpenSysctl(); err == nil {
		ns.sysctl = sysctl
	}
}

// tick runs every refreshEvery while there are dials.
func (ns *namespace) tick() {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	if ns.timer == nil {
		return // retired meanwhile
	}
	ns.stale.Store(true)
	ns.full.expire()
	if uses := ns.uses.Load(); uses != ns.last {
		ns.last, ns.quiet = uses, 0
	} else if ns.quiet++; ns.quiet >= idleTicks {
		ns.closeLocked()
		return
	}
	ns.timer.Reset(refreshEvery)
}

// retire closes what the namespace holds, for good.
func (ns *namespace) retire() {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	ns.closed = true
	ns.closeLocked()
}

func (ns *namespace) closeLocked() {
	for _, conn := range ns.idle {
		conn.Close()
	}
	ns.idle = nil
	if ns.sysctl != nil {
		ns.sysctl.Close()
		ns.sysctl = nil
	}
	if ns.timer != nil {
		ns.timer.Stop()
		ns.timer = nil
	}
}
