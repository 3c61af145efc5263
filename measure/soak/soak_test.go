//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/netns"
	"github.com/seed22601231/connectx/internal/program"
	"github.com/seed22601231/connectx/measure/internal/echo"
)

// programEnv tells a process of the test to be the program. What is in use in the
// process of the tests is not all its own.
const programEnv = "CONNECTX_SOAK_PROGRAM"

func TestMain(m *testing.M) {
	switch {
	case isServer():
		os.Exit(serve())
	case os.Getenv(programEnv) != "":
		os.Exit(runCommand(os.Args[1:], os.Stdout, os.Stderr))
	}
	os.Exit(netns.Main(m.Run))
}

// ownNamespace gives the test a network namespace.
func ownNamespace(t *testing.T) {
	t.Helper()
	netns.Need(t)
	if err := netns.Enter(); err != nil {
		t.Fatal(err)
	}
}

// start starts the program in the calling thread's namespace, and returns where its
// output goes.
func start(t *testing.T, args ...string) (*exec.Cmd, *output) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), programEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out := &output{begun: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, out
}

// An output is what the program writes. Its first line is there once an interrupt
// does not end it any more where it is.
type output struct {
	text  strings.Builder
	begun chan struct{}
}

func (o *output) Write(b []byte) (int, error) {
	if o.text.Len() == 0 {
		close(o.begun)
	}
	return o.text.Write(b)
}

func (o *output) String() string { return o.text.String() }

// The whole program.
func TestLineIsFlat(t *testing.T) {
	ownNamespace(t)
	cmd, out := start(t, "-duration", "4s", "-seed", "1")
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	t.Log(out.String())
	for _, want := range []string{
		"connections of udp", "connections of tcp", "echoes", "route changes", "foreign sockets tried",
		"threads on which a system call failed", "namespaces", "4-tuples had at the end",
		"dials that failed because: " + string(failedCall), "dials that failed because: " + string(cancelled),
		"dials that failed because: " + string(conflict), "dials that failed because: " + string(noAnswer),
	} {
		if !regexp.MustCompile(regexp.QuoteMeta(want) + ` +[1-9]`).MatchString(out.String()) {
			t.Errorf("no %q", want)
		}
	}
	if !strings.HasSuffix(out.String(), "\nflat\n") {
		t.Error("no verdict")
	}
}

func TestInterruptEndsARunWithAReport(t *testing.T) {
	ownNamespace(t)
	cmd, out := start(t, "-duration", "1h")
	<-out.begun
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	if !strings.Contains(out.String(), "too few to compare") || !regexp.MustCompile(`had at the end +800\n`).MatchString(out.String()) {
		t.Errorf("no report:\n%s", out.String())
	}
}

// Each fault does happen, is seen by those who dial, and passes.
func TestFaultsForAllExplainWhatFollows(t *testing.T) {
	for _, tt := range []struct {
		name   string
		fault  func(*run, *rand.Rand) error
		source int
		want   reason
	}{
		{"the server is killed", (*run).killServer, mainSource, noServer},
		{"a source address is removed", (*run).removeAddresses, fleetingSource, noSourceNow},
		{"there are no descriptors left", (*run).exhaustDescriptors, mainSource, noFiles},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newTestRun(t)
			random, ended := rand.New(rand.NewPCG(1, 1)), make(chan error)
			go func() {
				var err error
				for r.reasons()[tt.want] == 0 && err == nil {
					err = tt.fault(r, random)
				}
				ended <- err
			}()
			w := r.newWorker(0)
			dial := func() {
				j := job{flow: flow{protocol: tcp, source: tt.source}, kind: sourceAddress}
				if _, ok := r.flows.begin(j.flows()); ok {
					w.dial(j)
				}
				r.closeAll()
			}
			for over := false; !over; {
				dial()
				select {
				case err := <-ended:
					if err != nil {
						t.Fatal(err)
					}
					over = true
				default:
				}
			}
			before := r.connected(tcp)
			dial()
			if r.connected(tcp) != before+1 {
				t.Error("no connection afterwards")
			}
			for _, f := range r.tally.failures {
				t.Error(f)
			}
		})
	}
}

// network is that of the process, for tests whose goroutines all have to be in it.
var network = sync.OnceValue(func() error { return setUpNetwork(options{ports: minPorts}) })

// newTestRun is a run with a server, in which nothing goes on.
func newTestRun(t *testing.T) *run {
	t.Helper()
	netns.Need(t)
	if err := network(); err != nil {
		t.Fatal(err)
	}
	r := newRun(options{duration: time.Second, seed: 1, ports: minPorts, workers: 1})
	var err error
	if r.server, err = startServer(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.server.kill() })
	return r
}

func (r *run) reasons() map[reason]int {
	r.tally.mu.Lock()
	defer r.tally.mu.Unlock()
	all := make(map[reason]int)
	for why, n := range r.tally.reasons {
		all[why] = n
	}
	return all
}

func (r *run) connected(p protocol) int {
	r.tally.mu.Lock()
	defer r.tally.mu.Unlock()
	return r.tally.connected[p]
}

// Each system call that is to fail is one that dials make.
func TestBrokenCallsAreFelt(t *testing.T) {
	// These do not fail a dial, of some kinds only, or not any more.
	unfelt := []string{
		"socket, netlink", "socket, a look at new ones", "bind, netlink", "recvmmsg, netlink", "getsockname",
		"setsockopt, IP_LOCAL_PORT_RANGE", "setsockopt, IP_BIND_ADDRESS_NO_PORT", "getsockopt, SO_NETNS_COOKIE",
	}
	r := newTestRun(t)
	for _, b := range brokenCalls {
		if slices.Contains(unfelt, b.name) {
			continue
		}
		random := rand.New(rand.NewPCG(1, 1))
		felt := func() int { return r.reasons()[failedCall] }
		before := felt()
		for range 50 {
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				runtime.LockOSThread()
				r.dialBroken(b, random)
			}()
			<-ended
			if felt() > before {
				break
			}
		}
		if felt() == before {
			t.Errorf("%s: no dial fails", b.name)
		}
	}
	for _, f := range r.tally.failures {
		t.Error(f)
	}
}

// Samples of a healthy run, in which a quantity has some noise.
func healthy(n int) []sample {
	random := rand.New(rand.NewPCG(1, 1))
	all := make([]sample, n)
	for i := range all {
		s := &all[i]
		s.at = time.Duration(i+1) * time.Second
		s.heap, s.resident = 3<<20+random.Int64N(64<<10), 14<<20+random.Int64N(1<<20)
		for p := range protocols {
			// The machine is busy with something else half of the time.
			busy := 1 + 4*time.Duration(random.IntN(2))
			s.reference[p] = busy * (20 + time.Duration(random.IntN(10))) * time.Microsecond
			s.p50[p] = busy * (60 + time.Duration(random.IntN(30))) * time.Microsecond
			s.counted[p], s.compared[p] = 100, 30
			s.cpu[p] = (50 + time.Duration(random.IntN(10))) * time.Microsecond
			s.referenceCPU[p] = (20 + time.Duration(random.IntN(4))) * time.Microsecond
		}
	}
	return all
}

func TestVerdictOnSeries(t *testing.T) {
	const n = 120
	for _, tt := range []struct {
		name   string
		change func(i int, s *sample)
		want   string // in the verdict, or empty if the line is flat
	}{
		{"flat but noisy", func(int, *sample) {}, ""},
		{"busy in the last quarter", func(i int, s *sample) {
			if i >= n*3/4 {
				s.p50[tcp], s.reference[tcp] = 4*s.p50[tcp], 4*s.reference[tcp]
			}
		}, ""},
		{"memory that is taken once", func(i int, s *sample) {
			if i >= n/8 {
				s.heap += 20 << 20
			}
		}, ""},
		{"some samples without dials", func(i int, s *sample) {
			if i%3 == 0 {
				s.p50[udp], s.cpu[udp], s.reference[udp], s.counted[udp], s.compared[udp] = 0, 0, 0, 0, 0
			}
		}, ""},
		{"too few dials to tell", func(i int, s *sample) {
			s.counted[tcp], s.p50[tcp] = 2, s.p50[tcp]*(1+time.Duration(i))
		}, ""},
		{"a short run", func(i int, s *sample) { s.at /= 4; s.p50[tcp] *= 1 + time.Duration(i)/10 }, ""},
		{"100 bytes for each of 1000 dials", func(i int, s *sample) { s.heap += 100_000 * int64(i) }, "live heap: "},
		{"resident memory that grows", func(i int, s *sample) { s.resident += 300_000 * int64(i) }, "resident memory: "},
		{"UDP dials that wait longer and longer", func(i int, s *sample) { s.p50[udp] *= 1 + time.Duration(i)/10 }, "p50 of udp dials"},
		{"TCP dials that wait longer and longer", func(i int, s *sample) { s.p50[tcp] *= 1 + time.Duration(i)/10 }, "p50 of tcp dials"},
		{"dials that have more and more to do", func(i int, s *sample) { s.cpu[tcp] *= 1 + time.Duration(i)/10 }, "p50 of what tcp dials take of the processor"},
	} {
		r := newRun(options{duration: time.Minute})
		r.samples = healthy(n)
		for i := range r.samples {
			tt.change(i, &r.samples[i])
		}
		err := r.verdict()
		if (err != nil) != (tt.want != "") || err != nil && !strings.HasPrefix(err.Error(), tt.want) {
			t.Errorf("%s: verdict %v, want %q", tt.name, err, tt.want)
		}
	}
}

func TestVerdictOnUsage(t *testing.T) {
	before := usage{descriptors: descriptors{inet: 4, netlink: 1, other: 10}, goroutines: 3}
	const goroutines, held, workers, fleeting = 13, 700, 8, 5
	most := usage{descriptors: descriptors{inet: 704, netlink: 1 + 2*9 + 2*6, sysctl: 2 * 7, other: 10}, goroutines: 16}
	for _, tt := range []struct {
		name   string
		change func(*usage)
		want   string
	}{
		{"as much as there may be", func(*usage) {}, ""},
		{"an idle library", func(u *usage) { u.netlink, u.sysctl = 1, 0 }, ""},
		{"a connection that was not closed", func(u *usage) { u.inet++ }, "705 descriptors of IPv4 and IPv6 sockets, want 704; "},
		{"a connection that is gone", func(u *usage) { u.inet-- }, "703 descriptors of IPv4 and IPv6 sockets, want 704; "},
		{"a netlink socket too many", func(u *usage) { u.netlink++ }, "32 descriptors of netlink sockets, want at most 31; "},
		{"a file too many", func(u *usage) { u.sysctl++ }, "15 descriptors of sysctl files, want at most 14; "},
		{"another descriptor", func(u *usage) { u.other++ }, "11 other descriptors, want 10; "},
		{"a goroutine that has not ended", func(u *usage) { u.goroutines++ }, "17 goroutines, want at most 16; "},
	} {
		u := most
		tt.change(&u)
		if got := u.meets(before.demand(goroutines, held, workers, fleeting)); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestDescriptorsAreToldApart(t *testing.T) {
	before, err := openDescriptors()
	if err != nil {
		t.Fatal(err)
	}
	open := func(fd int, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
	}
	open(unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0))
	open(unix.Socket(unix.AF_INET6, unix.SOCK_STREAM, 0))
	open(unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE))
	open(unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0))
	open(unix.Open("/proc/sys/net/ipv4/ip_local_port_range", unix.O_RDONLY, 0))
	open(unix.Open("/dev/null", unix.O_RDONLY, 0))
	after, err := openDescriptors()
	if err != nil {
		t.Fatal(err)
	}
	want := descriptors{before.inet + 2, before.netlink + 1, before.sysctl + 1, before.other + 2}
	if after != want {
		t.Errorf("%+v, want %+v", after, want)
	}
}

func TestUsageThatStaysTooHighIsFound(t *testing.T) {
	u, err := inUse()
	if err != nil {
		t.Fatal(err)
	}
	d := u.again()
	end := make(chan struct{})
	go func() { <-end }()
	if _, what, err := awaitUsage(d, 0, 0); err != nil || !strings.Contains(what, "goroutines, want") {
		t.Errorf("%q, %v; want the goroutine", what, err)
	}
	close(end)
	if _, what, err := awaitUsage(d, samplePatience, time.Millisecond); err != nil || what != "" {
		t.Errorf("%q, %v, when the goroutine has ended", what, err)
	}
}

// What explains an error of a dial.
func TestExplanations(t *testing.T) {
	picked := job{flow: flow{protocol: udp}, kind: sourceAddress}
	explicit := job{flow: flow{protocol: udp}, kind: sourceAddressAndPort, port: 7}
	fleeting := job{flow: flow{protocol: udp, source: fleetingSource}, kind: sourceAddress}
	several := job{flow: flow{protocol: udp}, kind: sourceAddrs}
	toBeCancelled := picked
	toBeCancelled.cancelled = 1
	exhausted := fmt.Errorf("all of them: %w", connectx.ErrPortsExhausted)
	take := func(f flow, n int) func(*run) {
		return func(r *run) {
			for port := range n {
				r.flows.keep(&connection{flow: f, port: port})
			}
		}
	}
	other := flow{protocol: udp, source: 1}
	passed := func(w func(*run) *window) func(*run) {
		return func(r *run) { w(r).begin(); w(r).end() }
	}
	for _, tt := range []struct {
		name   string
		job    job
		err    error
		before func(*run) // while the dial is under way
		want   reason
	}{
		{"nothing", picked, unix.EPERM, nil, unexplained},
		{"a context that was to be cancelled", toBeCancelled, fmt.Errorf("%w", os.ErrDeadlineExceeded), nil, cancelled},
		{"a context that was not", picked, os.ErrDeadlineExceeded, nil, unexplained},
		{"a port that nobody has", explicit, unix.EADDRINUSE, nil, unexplained},
		{"a port of a connection", explicit, unix.EADDRINUSE, take(explicit.flow, 8), conflict},
		{"a port of a connection to elsewhere", explicit, unix.EADDRINUSE, take(flow{protocol: udp, destination: 1}, 8), unexplained},
		{"another port of a connection", explicit, unix.EADDRINUSE, take(explicit.flow, 7), unexplained},
		{"a dial for the same", explicit, unix.EADDRINUSE, func(r *run) { r.flows.begin(picked.flows()) }, conflict},
		{"a port of a foreign socket", explicit, unix.EADDRINUSE,
			passed(func(r *run) *window { return r.flows.foreignAt(explicit.flow, 7) }), foreignPort},
		{"another port of a foreign socket", explicit, unix.EADDRINUSE,
			passed(func(r *run) *window { return r.flows.foreignAt(explicit.flow, 6) }), unexplained},
		{"no port, with all of them taken", picked, exhausted, take(picked.flow, minPorts-1), noPort},
		{"no port, with one in ten free", picked, exhausted, take(picked.flow, minPorts*9/10), unexplained},
		{"no port from one of two sources", several, exhausted, take(picked.flow, minPorts), unexplained},
		{"no port from both", several, exhausted, func(r *run) { take(picked.flow, minPorts)(r); take(other, minPorts)(r) }, noPort},
		{"a server that was killed", picked, unix.ECONNREFUSED, passed(func(r *run) *window { return &r.faults.server }), noServer},
		{"a server that was killed, and another error", picked, unix.EINVAL, passed(func(r *run) *window { return &r.faults.server }), unexplained},
		{"an address that was removed", fleeting, unix.EADDRNOTAVAIL, passed(func(r *run) *window { return &r.faults.address }), noSourceNow},
		{"an address that another dial uses", picked, unix.EADDRNOTAVAIL, passed(func(r *run) *window { return &r.faults.address }), unexplained},
		{"no descriptors", picked, unix.EMFILE, passed(func(r *run) *window { return &r.faults.files }), noFiles},
	} {
		r := newRun(options{duration: time.Second, ports: minPorts, workers: 1})
		r.faults.files.lasts = 0
		for _, w := range []*window{&r.faults.server, &r.faults.address, &r.faults.files, r.flows.foreignAt(explicit.flow, 7)} {
			w.begin()
			w.end()
		}
		start := afterNow()
		r.flows.begin(tt.job.flows())
		if tt.before != nil {
			tt.before(r)
		}
		if got := r.explainDial(tt.job, tt.err, start); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

// afterNow is a time when all that has ended before has ended.
func afterNow() time.Time {
	now := time.Now()
	for time.Now().Equal(now) {
	}
	return time.Now()
}

func TestSecondConnectionOnA4TupleIsFound(t *testing.T) {
	r := newTestRun(t)
	w := r.newWorker(0)
	j := job{flow: flow{protocol: udp}, kind: sourceAddressAndPort, port: 3}
	for i, want := range []string{"", "has the 4-tuple of another"} {
		d := net.Dialer{LocalAddr: netAddr(udp, j.local()), Control: func(_, _ string, c syscall.RawConn) error {
			return c.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
		}}
		conn, err := d.Dial("udp", j.to().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, what := w.accept(j, conn, time.Now()); !strings.HasPrefix(what, want) || (what == "") != (want == "") {
			t.Errorf("connection %d: %q, want %q", i, what, want)
		}
	}
	plain, err := net.Dial("udp", j.to().String())
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	j.kind = noSource
	if _, what := w.accept(j, plain, time.Now()); !strings.HasPrefix(what, "does not share its port") {
		t.Errorf("a connection that does not share its port: %q", what)
	}
}

func TestAnswers(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 1))
	own, other := newToken(1, 1, random), newToken(1, 2, random)
	local := netip.MustParseAddrPort("10.7.0.1:40000")
	for _, tt := range []struct {
		name   string
		answer []byte
		ok     bool
	}{
		{"its own", echo.Answer(own[:], local), true},
		{"somebody else's", echo.Answer(other[:], local), false},
		{"its own, from another port", echo.Answer(own[:], netip.MustParseAddrPort("10.7.0.1:40001")), false},
		{"something else", []byte("hello"), false},
	} {
		err := checkAnswer(tt.answer, own, local)
		if (err == nil) != tt.ok || err != nil && !errors.Is(err, errWrongBytes) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

func TestQuantiles(t *testing.T) {
	var l latency
	if got := l.quantile(0.5); got != 0 {
		t.Errorf("p50 of nothing is %v", got)
	}
	for i := range 1000 {
		l.add(time.Duration(i) * time.Microsecond)
	}
	for part, want := range map[float64]time.Duration{0.5: 500 * time.Microsecond, 0.99: 990 * time.Microsecond} {
		if got := l.quantile(part); got < want*95/100 || got > want*105/100 {
			t.Errorf("quantile %v is %v, want %v", part, got, want)
		}
	}
}

func TestJobsOfASeedAreTheSame(t *testing.T) {
	jobs := func(seed uint64) (all []job) {
		w := newRun(options{seed: seed, duration: time.Second}).newWorker(3)
		for range 100 {
			all = append(all, newJob(minPorts, w.random))
		}
		return all
	}
	if !slices.Equal(jobs(1), jobs(1)) {
		t.Error("two runs differ")
	}
	if slices.Equal(jobs(1), jobs(2)) {
		t.Error("two seeds do not differ")
	}
}

func TestFlowsHaveAnIndex(t *testing.T) {
	for i := range allFlows {
		if got := flowOf(i).index(); got != i {
			t.Errorf("flow %d has the index %d", i, got)
		}
	}
}

func TestFlags(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"-duration", "1s"}, program.Usage, "soak: -duration 1s: must be at least 2s"},
		{[]string{"-ports", "49"}, program.Usage, "soak: -ports 49: must be 50 to 200"},
		{[]string{"-workers", "0"}, program.Usage, "soak: -workers 0: must be 1 to 16"},
		{[]string{"-workers", "many"}, program.Usage, `invalid value "many" for flag -workers`},
		{[]string{"5"}, program.Usage, `unexpected argument "5"`},
		{[]string{"-help"}, program.OK, "Usage: soak"},
	} {
		var out bytes.Buffer
		if code := runCommand(c.args, &out, &out); code != c.code || !strings.Contains(out.String(), c.want) {
			t.Errorf("%q: exit code %d, %q; want %d, %q", c.args, code, out.String(), c.code, c.want)
		}
	}
	var o, again options
	if err := o.parse([]string{"-ports", "60"}, io.Discard); err != nil {
		t.Fatal(err)
	}
	if err := again.parse(strings.Fields(o.flags()), io.Discard); err != nil || again != o {
		t.Errorf("the flags %q make %+v, %v; want %+v", o.flags(), again, err, o)
	}
	if o.seed == 0 {
		t.Error("no seed")
	}
}
