//go:build linux

package main

import (
	"fmt"
	"math"
	"net/netip"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
)

// A protocol is 0 for UDP and 1 for TCP.
type protocol int

const (
	udp protocol = iota
	tcp
)

func (p protocol) String() string  { return [...]string{"UDP", "TCP"}[p] }
func (p protocol) network() string { return [...]string{"udp", "tcp"}[p] }

// claims are, in memory shared by all processes, which 4-tuples may be taken.
// They err on one side only: a 4-tuple without a claim is free, but one with a
// claim may be free as well.
//
// A flow is a protocol, a family, a source and a destination. A connection's claim
// begins before the dial, when its port is not known yet, as one dial more that
// was begun for the flow; from the moment it is connected until after it is
// closed, or until TIME_WAIT must be over, it is for the one port. Sockets that do
// not share their port have flows of their own.
type claims struct {
	layout
	until        []atomic.Int64 // by flow and port: when the 4-tuple is free again
	begun, ended []atomic.Int64 // by process and flow: dials
}

// forever is how long a connection has its 4-tuple that is not closed yet. Each
// goroutine has a value of its own, for it must not give up somebody else's claim.
func forever(process, goroutine int) int64 {
	return math.MaxInt64 - int64(process)<<16 - int64(goroutine)
}

// lingers is longer than TIME_WAIT (TCP_TIMEWAIT_LEN, 60 s) and what comes before
// it on a busy machine.
const lingers = 70 * time.Second

// flows is how many there are: those of the sockets that share their port come
// first, by protocol.
func (l layout) flows() int { return l.sharing() + 2*l.plainEach() }

func (l layout) sharing() int { return 2 * 2 * l.destinations() * len(sources[0]) }

func flowOf(l layout, p protocol, f family, destination, source int) int {
	return ((int(p)*2+int(f))*l.destinations()+destination)*len(sources[0]) + source
}

// plainFlow is a flow of sockets that do not share. They only dial the
// destinations that all do.
func plainFlow(l layout, p protocol, f family, destination, source int) int {
	return l.sharing() + ((int(p)*2+int(f))*sharedDestinations+destination)*len(sources[0]) + source
}

// plainFlows are all of them, of one protocol.
func plainFlows(l layout, p protocol) (all []int) {
	for i := range l.plainEach() {
		all = append(all, plainFlow(l, p, 0, 0, 0)+i)
	}
	return all
}

func (l layout) plainEach() int { return 2 * sharedDestinations * len(sources[0]) }

// The processes that have claims besides those that dial.
func (l layout) plainProcess() int  { return l.Processes }
func (l layout) pythonProcess() int { return l.Processes + 1 }
func (l layout) processes() int     { return l.Processes + 2 }

// newClaims makes the shared memory.
func newClaims(l layout) (*claims, *os.File, error) {
	fd, err := unix.MemfdCreate("claims", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, nil, os.NewSyscallError("memfd_create", err)
	}
	file := os.NewFile(uintptr(fd), "claims")
	if err := file.Truncate(int64(8 * l.words())); err != nil {
		file.Close()
		return nil, nil, err
	}
	c, err := mapClaims(l, file)
	if err != nil {
		file.Close()
		return nil, nil, err
	}
	return c, file, nil
}

func (l layout) words() int { return l.flows()*l.rows() + 2*l.processes()*l.flows() }

func mapClaims(l layout, file *os.File) (*claims, error) {
	memory, err := unix.Mmap(int(file.Fd()), 0, 8*l.words(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	words := unsafe.Slice((*atomic.Int64)(unsafe.Pointer(unsafe.SliceData(memory))), l.words())
	c := &claims{layout: l}
	n := l.flows() * l.rows()
	c.until, words = words[:n], words[n:]
	n = l.processes() * l.flows()
	c.begun, c.ended = words[:n], words[n:]
	return c, nil
}

// now is the same clock for all processes.
func now() int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) // never fails
	return ts.Nano()
}

func (c *claims) at(flow int, port uint16) *atomic.Int64 {
	return &c.until[flow*c.rows()+c.index(port)]
}

func (c *claims) begin(process, flow int) { c.begun[process*c.flows()+flow].Add(1) }
func (c *claims) end(process, flow int)   { c.ended[process*c.flows()+flow].Add(1) }

// inTimeWait is how many 4-tuples of a flow may be in TIME_WAIT.
func (c *claims) inTimeWait(flow int) int {
	n, t := 0, now()
	for i := range c.rows() {
		if until := c.at(flow, c.port(i)).Load(); until > t && until < t+int64(time.Hour) {
			n++
		}
	}
	return n
}

// reap gives up the claims of a process with connectx that is dead, but for the
// TCP connections it has left behind. They are in the list, which is of after its
// death.
func (c *claims) reap(process int, left []tuple) {
	t := now()
	lingering := make(map[int]bool) // in until
	for _, tuple := range left {
		flow, ok := c.find(tcp, tuple.local, tuple.remote)
		if !ok {
			continue
		}
		i := flow*c.rows() + c.index(tuple.local.Port())
		lingering[i] = true
		// It may have been connecting.
		if until := c.until[i].Load(); until < t {
			c.until[i].CompareAndSwap(until, t+int64(lingers))
		}
	}
	for i := range c.until {
		until := c.until[i].Load()
		if until <= math.MaxInt64-int64(process+1)<<16 || until > math.MaxInt64-int64(process)<<16 {
			continue
		}
		free := t
		if lingering[i] {
			free += int64(lingers)
		}
		c.until[i].CompareAndSwap(until, free)
	}
	for flow := range c.flows() {
		i := process*c.flows() + flow
		c.ended[i].Store(c.begun[i].Load())
	}
}

// find returns the flow of a 4-tuple.
func (l layout) find(p protocol, local, remote netip.AddrPort) (flow int, ok bool) {
	f := family(0)
	if local.Addr().Is6() {
		f = 1
	}
	b := remote.Addr().AsSlice()
	n := int(b[len(b)-2])<<8 + int(b[len(b)-1]) - 1
	if n < 0 || n >= l.destinations() || destination(f, n) != remote {
		return 0, false
	}
	for i, source := range sources[f] {
		if local.Addr() == source {
			return flowOf(l, p, f, n, i), true
		}
	}
	return 0, false
}

// A window is the time of one dial, in which claims are looked at.
type window struct {
	*claims
	protocol protocol
	start    int64
	before   map[int]int64 // dials that had ended, by flow
}

// open is to be called before the claim of the dial itself begins.
func (c *claims) open(p protocol, flows []int) *window {
	w := &window{claims: c, protocol: p, before: make(map[int]int64)}
	for _, flow := range append(plainFlows(c.layout, p), flows...) {
		w.before[flow] = c.total(c.ended, flow)
	}
	w.start = now()
	return w
}

func (c *claims) total(counts []atomic.Int64, flow int) (n int64) {
	for process := range c.processes() {
		n += counts[process*c.flows()+flow].Load()
	}
	return n
}

// dialling is how many dials of a flow there were at any time in the window.
func (w *window) dialling(flow int) int64 { return w.total(w.begun, flow) - w.before[flow] }

// plainDialling is the same for sockets that do not share.
func (w *window) plainDialling() (n int64) {
	for _, flow := range plainFlows(w.layout, w.protocol) {
		n += w.dialling(flow)
	}
	return n
}

// mayBeTaken reports whether the 4-tuple may have been taken at some time in the
// window by something other than the dial itself.
func (w *window) mayBeTaken(flow int, port uint16) bool {
	return w.at(flow, port).Load() >= w.start || w.dialling(flow) > 1
}

// mayBeHeld reports whether a socket that does not share may have been on the
// port at some time in the window.
func (w *window) mayBeHeld(port uint16) bool {
	return w.isHeld(port) || w.plain().Contains(port) && w.plainDialling() > 0
}

// isHeld leaves out sockets that are not connected yet.
func (w *window) isHeld(port uint16) bool {
	for _, flow := range plainFlows(w.layout, w.protocol) {
		if w.at(flow, port).Load() >= w.start {
			return true
		}
	}
	return false
}

// mayBeExhausted reports whether all ports may have been taken.
func (w *window) mayBeExhausted(flow int, ports connectx.PortRange) bool {
	free := int64(0)
	for port := ports.Low; port <= ports.High; port++ {
		if w.at(flow, port).Load() < w.start && !w.isHeld(port) {
			free++
		}
	}
	return free <= w.dialling(flow)-1+w.plainDialling()
}

// explain says what the claims are, for an error that they do not justify.
func (w *window) explain(flow int, ports connectx.PortRange) string {
	s := fmt.Sprintf("within %.1f ms %d dials of the same flow and %d of sockets that do not share; free:",
		float64(now()-w.start)/1e6, w.dialling(flow)-1, w.plainDialling())
	for port := ports.Low; port <= ports.High; port++ {
		if w.at(flow, port).Load() < w.start && !w.isHeld(port) {
			s += fmt.Sprintf(" %d", port)
		}
	}
	return s
}
