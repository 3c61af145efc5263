//go:build linux

package main

import (
	"fmt"
	"runtime"
	"time"

	"github.com/seed22601231/connectx/measure/internal/machine"
)

// A usage is what the process has in use, at a time when nothing is under way.
type usage struct {
	descriptors
	goroutines int
	heap       int64 // bytes that are reachable
	resident   int64 // bytes
}

// A demand is what the process should have in use.
type demand struct {
	inet, other                 int // exactly
	goroutines, netlink, sysctl int // at most
}

// again is the demand that as much is in use.
func (u usage) again() demand {
	return demand{inet: u.inet, other: u.other, goroutines: u.goroutines, netlink: u.netlink, sysctl: u.sysctl}
}

// meets says what there is too much of, or too little.
func (u usage) meets(d demand) (what string) {
	for _, c := range []struct {
		name      string
		got, want int
		exact     bool
	}{
		{"descriptors of IPv4 and IPv6 sockets", u.inet, d.inet, true},
		{"descriptors of netlink sockets", u.netlink, d.netlink, false},
		{"descriptors of sysctl files", u.sysctl, d.sysctl, false},
		{"other descriptors", u.other, d.other, true},
		{"goroutines", u.goroutines, d.goroutines, false},
	} {
		if c.got > c.want || c.exact && c.got < c.want {
			most := map[bool]string{true: "", false: "at most "}[c.exact]
			what += fmt.Sprintf("%d %s, want %s%d; ", c.got, c.name, most, c.want)
		}
	}
	return what
}

// inUse finds out what is in use, when the garbage is collected.
func inUse() (u usage, err error) {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	u.heap = int64(m.HeapAlloc)
	status, err := machine.Kilobytes("/proc/self/status", "VmRSS")
	if err != nil {
		return u, err
	}
	u.resident = status["VmRSS"]
	u.goroutines = runtime.NumGoroutine()
	u.descriptors, err = openDescriptors()
	return u, err
}

// awaitUsage is inUse when the demand is met, or else when it has not been for so
// long: timers of the library and goroutines that have done their work may take a
// moment, and idle namespaces take ten seconds. It looks again after each pause.
func awaitUsage(d demand, patience, pause time.Duration) (u usage, what string, err error) {
	for deadline := time.Now().Add(patience); ; time.Sleep(pause) {
		u, err = inUse()
		if err != nil {
			return u, "", err
		}
		if what = u.meets(d); what == "" || time.Now().After(deadline) {
			return u, what, nil
		}
	}
}

// A sample is what was in use at one time, and what the dials since the sample
// before have come to.
type sample struct {
	at time.Duration // since the start
	usage
	held          int
	dials, failed int
	p50, p99      [protocols]time.Duration
	cpu           [protocols]time.Duration // the p50 of the thread's
	counted       [protocols]int           // dials that these are of
	compared      [protocols]int           // dials of net.Dialer
	reference     [protocols]time.Duration // the p50 of net.Dialer
	referenceCPU  [protocols]time.Duration
}

const (
	// samplePatience is long for a goroutine that only has to end.
	samplePatience = 5 * time.Second

	// staysWrong is enough when there was too much in the sample before.
	staysWrong = 10 * time.Millisecond
)

// sample waits until no dial is under way and takes a sample.
func (r *run) sample() (s sample, err error) {
	r.quiet.Lock()
	defer r.quiet.Unlock()
	s.at, s.held = time.Since(r.start), r.flows.held()
	d := r.before.demand(r.goroutines, s.held+int(r.foreign.Load()), r.options.workers, r.namespaces.kept())
	patience := samplePatience
	if r.wrong {
		patience = staysWrong
	}
	var what string
	if s.usage, what, err = awaitUsage(d, patience, time.Millisecond); err != nil {
		return s, err
	}
	if r.wrong = what != ""; r.wrong {
		r.fail("after %v: %s", s.at.Round(time.Second/10), what)
	}
	t := &r.tally
	t.mu.Lock()
	defer t.mu.Unlock()
	s.dials, s.failed = t.dials, t.failed
	t.dials, t.failed = 0, 0
	for p := range protocols {
		s.p50[p], s.p99[p] = t.latencies[p].quantile(0.5), t.latencies[p].quantile(0.99)
		s.reference[p] = t.references[p].quantile(0.5)
		s.counted[p], s.compared[p] = int(t.latencies[p].n), int(t.references[p].n)
		s.cpu[p], s.referenceCPU[p] = t.cpu[p].quantile(0.5), t.referenceCPU[p].quantile(0.5)
		for _, l := range []*latency{&t.latencies[p], &t.references[p], &t.cpu[p], &t.referenceCPU[p]} {
			*l = latency{}
		}
	}
	return s, nil
}

// demand is what the process should have in use, given what it has had before the
// first dial. The library may have two netlink sockets for each dial at a time, of
// which there are the workers' and those with broken calls in one namespace, and one
// in each of the others; and two sysctl files for each namespace. One more
// namespace is that of the process by another name, when the kernel does not tell
// the cookie.
func (u usage) demand(goroutines, sockets, workers, fleeting int) demand {
	return demand{
		inet: u.inet + sockets, other: u.other, goroutines: u.goroutines + goroutines,
		netlink: u.netlink + 2*(workers+1) + 2*(1+fleeting),
		sysctl:  u.sysctl + 2*(2+fleeting),
	}
}
