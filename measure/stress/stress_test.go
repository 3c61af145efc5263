//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/netns"
	"github.com/seed22601231/connectx/internal/program"
	"github.com/seed22601231/connectx/measure/internal/echo"
)

func TestMain(m *testing.M) {
	switch {
	case isWorker():
		os.Exit(work(os.Args[1:]))
	case os.Getenv(rogueEnv) != "":
		os.Exit(rogue())
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

// short is a run of a few seconds for a busy machine.
func short(d time.Duration) options {
	return options{
		layout: layout{Ports: 12, Processes: 3, Each: 4}, duration: d, kill: time.Second, seed: 1, hold: 12,
		plain: true, listeners: true, python: true,
	}
}

// The whole program, with all neighbours.
func TestNoPromiseIsBroken(t *testing.T) {
	ownNamespace(t)
	var log bytes.Buffer
	r, err := stress(t.Context(), short(3*time.Second), &log)
	if err != nil {
		t.Fatal(err)
	}
	var report bytes.Buffer
	r.write(&report)
	t.Log(report.String())
	if err := r.verdict(); err != nil {
		t.Error(err)
	}
	for what, n := range map[string]int{
		"echoes": r.tally.Echoes, "dials that nothing may stop": r.tally.Certain, "kills": len(r.deaths), "dumps": r.tally.Dumps,
		"conflicts": r.tally.total().Conflict, "exhausted dials": r.tally.total().Exhausted,
		"datagrams to listeners": r.tally.Sent, "4-tuples had at the end": r.regained,
	} {
		if n == 0 {
			t.Errorf("no %s", what)
		}
	}
	for _, p := range []protocol{udp, tcp} {
		for k := range kinds {
			if kind := fmt.Sprintf("%s, %s", p, k); r.tally.Dials[kind].Connected == 0 {
				t.Errorf("no connection of the kind %q", kind)
			}
		}
	}
	if _, err := exec.LookPath(python); err != nil {
		t.Logf("without %s: no %s", python, python)
	} else if r.tally.Dials["UDP, Python, picked port"].Connected == 0 {
		t.Error("no connection of the follower in Python")
	}
	if r.tally.Sent != r.tally.Received {
		t.Errorf("%d datagrams were sent to listeners, and %d received", r.tally.Sent, r.tally.Received)
	}
}

func TestNeighboursCanBeLeftOut(t *testing.T) {
	ownNamespace(t)
	o := short(500 * time.Millisecond)
	o.plain, o.listeners, o.python, o.kill = false, false, false, 0
	r, err := stress(t.Context(), o, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.verdict(); err != nil {
		t.Error(err)
	}
	for kind := range r.tally.Dials {
		if strings.Contains(kind, "Python") || strings.Contains(kind, "net.Dialer") {
			t.Errorf("dials of the kind %q", kind)
		}
	}
	if r.tally.Sent != 0 {
		t.Errorf("%d datagrams to listeners", r.tally.Sent)
	}
	if held := r.tally.total().Held; held != 0 {
		t.Errorf("%d dials came upon a socket that does not share its port, and there was none", held)
	}
}

func TestInterruptEndsARunWithAReport(t *testing.T) {
	ownNamespace(t)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	r, err := stress(ctx, short(time.Hour), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.verdict(); err != nil {
		t.Error(err)
	}
	if r.regained == 0 || r.elapsed > time.Minute {
		t.Errorf("%d 4-tuples had at the end, after %v", r.regained, r.elapsed)
	}
}

// rogueEnv tells a process of the test to be one that does not follow the
// protocol.
const rogueEnv = "CONNECTX_STRESS_ROGUE"

// rogue connects from all ports in turn, with nothing but SO_REUSEADDR, until
// standard input ends.
func rogue() int {
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(ended)
	}()
	ports, err := strconv.Atoi(os.Getenv(rogueEnv))
	if err != nil {
		return program.Failed
	}
	l := layout{Ports: ports}
	for {
		var conns []net.Conn
		for i := range l.rows() {
			if conn, err := overshadow(netip.AddrPortFrom(sources[0][0], l.port(i)), destination(0, 0)); err == nil {
				conns = append(conns, conn)
			}
		}
		select {
		case <-ended:
			return program.OK
		case <-time.After(50 * time.Millisecond):
		}
		for _, conn := range conns {
			conn.Close()
		}
	}
}

// overshadow connects a socket that asks nobody.
func overshadow(from, to netip.AddrPort) (net.Conn, error) {
	d := net.Dialer{LocalAddr: netAddr(udp, from), Control: func(_, _ string, c syscall.RawConn) error {
		return onSocket(c, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	}}
	return d.Dial("udp", to.String())
}

// A process that only sets the flag takes what belongs to others, and that does
// not go unseen.
func TestProcessThatDoesNotFollowTheProtocolIsFound(t *testing.T) {
	ownNamespace(t)
	o := short(time.Minute)
	o.python, o.plain, o.listeners = false, false, false
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), rogueEnv+"="+strconv.Itoa(o.layout.Ports))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r, err := stress(ctx, o, writerFunc(func(b []byte) {
		if bytes.Contains(b, []byte(duplicate)) {
			cancel() // enough
		}
	}))
	stdin.Close()
	cmd.Wait()
	if err != nil {
		t.Fatal(err)
	}
	if r.count(duplicate) == 0 {
		t.Error("no duplicates")
	}
	verdict := r.verdict()
	if verdict == nil || !strings.Contains(verdict.Error(), "has the sockets") || !strings.Contains(verdict.Error(), "repeat with: stress -seed 1 ") {
		t.Errorf("verdict: %v; want the sockets and the seed", verdict)
	}
}

type writerFunc func([]byte)

func (f writerFunc) Write(b []byte) (int, error) {
	f(b)
	return len(b), nil
}

// reported reads what a reporter has written.
func reported(t *testing.T, b *bytes.Buffer) (all Report) {
	t.Helper()
	in := json.NewDecoder(b)
	for {
		var r Report
		err := in.Decode(&r)
		if err == io.EOF {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all.Tally.add(r.Tally)
		all.Failures = append(all.Failures, r.Failures...)
	}
}

var small = layout{Ports: 12, Processes: 2, Each: 2}

// bindTo binds an unconnected UDP socket that lives as long as the test.
func bindTo(t *testing.T, address string, reuse bool) net.PacketConn {
	t.Helper()
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return onSocket(c, func(fd int) error {
			if !reuse {
				return nil
			}
			return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		})
	}}
	conn, err := config.ListenPacket(context.Background(), "udp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func TestPortThatStaysLockedIsFound(t *testing.T) {
	ownNamespace(t)
	conn := bindTo(t, fmt.Sprintf("127.0.0.1:%d", small.port(3)), false)
	// Neither a listener nor a port of somebody else is a locked one.
	bindTo(t, fmt.Sprintf("127.0.0.1:%d", small.listenPort()), true)
	bindTo(t, fmt.Sprintf("127.0.0.1:%d", small.whole().High+1), false)
	var b bytes.Buffer
	k := newChecker(small, newReporter(&b))
	check := func(dumps int) []Failure {
		for range dumps {
			if err := k.check(udp); err != nil {
				t.Fatal(err)
			}
		}
		return reported(t, &b).Failures
	}
	if failures := check(lockDumps + 1); len(failures) != 0 {
		t.Errorf("a lock of a moment: %v", failures)
	}
	if len(k.locks) != 1 {
		t.Fatalf("%d sockets seem to lock a port, want 1", len(k.locks))
	}
	for _, l := range k.locks {
		l.since -= 2 * int64(longestLock) // as if it had been there
		l.dumps = 0
	}
	if failures := check(lockDumps); len(failures) != 0 {
		t.Errorf("a lock in few dumps: %v", failures)
	}
	failures := check(5)
	if want := "127.0.0.1:40003 has been locked"; len(failures) != 1 || failures[0].Promise != stuck || !strings.HasPrefix(failures[0].What, want) ||
		!strings.Contains(failures[0].What, fmt.Sprintf("process %d ", os.Getpid())) {
		t.Errorf("failures %v; want one %q with this process", failures, want)
	}
	conn.Close()
	check(1)
	if len(k.locks) != 0 {
		t.Errorf("a closed socket still locks its port")
	}
}

func TestLateAnswerIsNoFailure(t *testing.T) {
	ownNamespace(t)
	server, err := echo.ListenUDP("udp4")
	if err != nil {
		t.Fatal(err)
	}
	go echo.AnswerUDP(server)
	defer server.Close()
	var conns [2]*goConn
	for i := range conns {
		conn, err := overshadow(netip.AddrPortFrom(sources[0][0], small.port(0)), destination(0, 0))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conns[i] = &goConn{Conn: conn}
	}
	random := rand.New(rand.NewPCG(1, 1))
	// The newer one gets what is meant for the older one.
	if _, err := conns[0].Write(sliceOf(newToken(7, 2, 1, random))); err != nil {
		t.Fatal(err)
	}
	failures := verify(conns[1], newToken(1, 0, 1, random))
	if len(failures) != 1 || failures[0].Promise != misdelivered || failures[0].Sender == nil || *failures[0].Sender != (Sender{7, 2}) {
		t.Fatalf("failures %+v; want one answer to process 7 in its third incarnation", failures)
	}
	at := failures[0].At
	for _, tt := range []struct {
		name   string
		deaths []death
		late   bool
	}{
		{"its sender is alive", nil, false},
		{"its sender was killed before", []death{{sender: Sender{7, 2}, killed: at - 1}}, true},
		{"its sender was killed later", []death{{sender: Sender{7, 2}, killed: at + 1}}, false},
		{"another incarnation was killed before", []death{{sender: Sender{7, 1}, killed: at - 1}}, false},
	} {
		r := newResult(options{})
		r.deaths = tt.deaths
		r.collect(Report{Failures: failures}, io.Discard)
		if late := r.late == 1; late != tt.late || r.count(misdelivered) != 1-r.late {
			t.Errorf("%s: %d late answers, %d misdelivered", tt.name, r.late, r.count(misdelivered))
		}
	}
}

func sliceOf(t token) []byte { return t[:] }

func TestAnswers(t *testing.T) {
	own := newToken(1, 2, 3, rand.New(rand.NewPCG(1, 1)))
	other := newToken(1, 2, 4, rand.New(rand.NewPCG(2, 2)))
	local := netip.MustParseAddrPort("127.0.0.1:40000")
	for _, tt := range []struct {
		name   string
		answer []byte
		want   string // part of the failure, if any
	}{
		{"its own", echo.Answer(own[:], local), ""},
		{"somebody else's", echo.Answer(other[:], local), "got the answer to"},
		{"its own, from another port", echo.Answer(own[:], netip.MustParseAddrPort("127.0.0.1:40001")), "has come from 127.0.0.1:40001"},
		{"its own, from another address", echo.Answer(own[:], netip.MustParseAddrPort("[fd00::1]:40000")), "has come from [fd00::1]:40000"},
		{"something else", []byte("hello"), "got 68656c6c6f"},
	} {
		failure := checkAnswer(tt.answer, own, local, "conn")
		if (failure == nil) != (tt.want == "") || failure != nil && !strings.Contains(failure.What, tt.want) {
			t.Errorf("%s: %+v, want %q", tt.name, failure, tt.want)
		}
	}
}

// What the claims justify.
func TestJudgement(t *testing.T) {
	explicit := job{protocol: udp, kind: sourceAddressAndPort, port: firstPort + 8}
	explicitTCP := explicit
	explicitTCP.protocol = tcp
	held := explicit
	held.port = small.plain().Low
	picked := job{protocol: udp, kind: sourceAddress}
	several := job{protocol: udp, kind: sourceAddrs}
	flow := flowOf(small, udp, 0, 0, 0)
	doesNotShare := fmt.Errorf("held by a socket that does not share it: %w", unix.EADDRINUSE)
	exhausted := fmt.Errorf("all of them: %w", connectx.ErrPortsExhausted)
	take := func(flow int, ports connectx.PortRange) func(*claims) {
		return func(c *claims) {
			for port := ports.Low; port <= ports.High; port++ {
				c.at(flow, port).Store(forever(0, 0))
			}
		}
	}
	one := func(port uint16) connectx.PortRange { return connectx.PortRange{Low: port, High: port} }
	allButOne := connectx.PortRange{Low: small.whole().Low, High: small.whole().High - 1}
	dial := func(flow int) func(*claims) { return func(c *claims) { c.begin(1, flow) } }
	both := func(f, g func(*claims)) func(*claims) { return func(c *claims) { f(c); g(c) } }
	for _, tt := range []struct {
		name   string
		job    job
		err    error
		before func(*claims) // what others have done
		want   Outcomes
	}{
		{"connected", explicit, nil, nil, Outcomes{Connected: 1}},
		{"another error", explicit, unix.EPERM, nil, Outcomes{Spurious: 1}},
		{"conflict with nobody", explicit, unix.EADDRINUSE, nil, Outcomes{Spurious: 1}},
		{"conflict with a connection", explicit, unix.EADDRINUSE, take(flow, one(explicit.port)), Outcomes{Conflict: 1}},
		{"conflict with a connection of another source", explicit, unix.EADDRINUSE, take(flow+1, one(explicit.port)), Outcomes{Spurious: 1}},
		{"conflict with a connection from another port", explicit, unix.EADDRINUSE, take(flow, one(explicit.port+1)), Outcomes{Spurious: 1}},
		{"conflict with a dial", explicit, unix.EADDRINUSE, dial(flow), Outcomes{Conflict: 1}},
		{"conflict with a dial to elsewhere", explicit, unix.EADDRINUSE, dial(flow + 2), Outcomes{Spurious: 1}},
		{"conflict of TCP", explicitTCP, unix.EADDRNOTAVAIL, take(flowOf(small, tcp, 0, 0, 0), one(explicit.port)), Outcomes{Conflict: 1}},
		{"conflict of TCP with UDP", explicitTCP, unix.EADDRNOTAVAIL, take(flow, one(explicit.port)), Outcomes{Spurious: 1}},
		{"a port that nobody holds", explicit, doesNotShare, nil, Outcomes{Spurious: 1}},
		{"a port that is shared", explicit, doesNotShare, take(flow, one(explicit.port)), Outcomes{Spurious: 1}},
		{"a port that is held", held, doesNotShare, take(plainFlow(small, udp, 1, 1, 1), one(held.port)), Outcomes{Held: 1}},
		{"a port that may be about to be held", held, doesNotShare, dial(plainFlow(small, udp, 0, 0, 0)), Outcomes{Held: 1}},
		{"a port that is never held", explicit, doesNotShare, dial(plainFlow(small, udp, 0, 0, 0)), Outcomes{Spurious: 1}},
		{"exhausted with all ports free", picked, exhausted, nil, Outcomes{Spurious: 1}},
		{"exhausted with all ports taken", picked, exhausted, take(flow, small.whole()), Outcomes{Exhausted: 1}},
		{"exhausted with one port free", picked, exhausted, take(flow, allButOne), Outcomes{Spurious: 1}},
		{"exhausted with one port free and one dial", picked, exhausted, both(take(flow, allButOne), dial(flow)), Outcomes{Exhausted: 1}},
		{"exhausted with one port held", picked, exhausted,
			both(take(flow, allButOne), take(plainFlow(small, udp, 0, 0, 0), one(small.whole().High))), Outcomes{Exhausted: 1}},
		{"exhausted from one source of two", several, exhausted, take(flow, small.whole()), Outcomes{Spurious: 1}},
		{"exhausted from both", several, exhausted, both(take(flow, small.whole()), take(flow+1, small.whole())), Outcomes{Exhausted: 1}},
		{"exhausted with an explicit port", explicit, exhausted, take(flow, small.whole()), Outcomes{Spurious: 1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, file, err := newClaims(small)
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			if tt.before != nil {
				tt.before(c)
			}
			flows := tt.job.flows(small)
			w := c.open(tt.job.protocol, flows)
			for _, flow := range flows {
				c.begin(0, flow)
			}
			got, failure := tt.job.judge(tt.err, w)
			tt.want.Dials = 1
			if got != tt.want {
				t.Errorf("%+v, want %+v", got, tt.want)
			}
			if (failure != "") != (tt.want.Spurious == 1) {
				t.Errorf("failure %q", failure)
			}
		})
	}
}

func TestClaimsOfTheDeadAreGivenUp(t *testing.T) {
	c, file, err := newClaims(small)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	ofUDP, ofTCP, port := flowOf(small, udp, 0, 0, 0), flowOf(small, tcp, 1, 0, 1), small.port(5)
	c.at(ofUDP, port).Store(forever(1, 3))
	c.at(ofTCP, port).Store(forever(1, 0))
	c.at(ofUDP, port+1).Store(forever(0, 3))
	c.begin(1, ofUDP)
	c.begin(0, ofUDP)
	c.at(ofTCP, port+1).Store(forever(1, 1))
	c.reap(1, []tuple{
		{netip.AddrPortFrom(sources[1][1], port), destination(1, 0)},
		{netip.AddrPortFrom(sources[0][1], port), destination(0, 1)},
	})
	for t := now(); now() == t; {
		// A claim that ends now does not end before a window that begins now.
	}
	w := c.open(udp, []int{ofUDP})
	for _, tt := range []struct {
		name string
		flow int
		port uint16
		want bool
	}{
		{"UDP connection of the dead", ofUDP, port, false},
		{"UDP connection of the living", ofUDP, port + 1, true},
		{"TCP connection of the dead, in TIME_WAIT", ofTCP, port, true},
		{"TCP connection of the dead, which is gone", ofTCP, port + 1, false},
		{"TCP connection that the dead had not claimed yet", flowOf(small, tcp, 0, 1, 1), port, true},
		{"TCP connection that never was", flowOf(small, tcp, 0, 1, 1), port + 1, false},
	} {
		if got := c.at(tt.flow, tt.port).Load() >= w.start; got != tt.want {
			t.Errorf("%s: taken %t, want %t", tt.name, got, tt.want)
		}
	}
	if got := w.dialling(ofUDP); got != 1 {
		t.Errorf("%d dials, want that of the living", got)
	}
	if got := c.inTimeWait(ofTCP); got != 1 {
		t.Errorf("%d 4-tuples in TIME_WAIT, want 1", got)
	}
}

// Ports that are not free at the end are named.
func TestPortThatDoesNotComeBackIsFound(t *testing.T) {
	ownNamespace(t)
	if err := setUpNetwork(small); err != nil {
		t.Fatal(err)
	}
	for _, f := range []family{0, 1} {
		listener, err := net.Listen("tcp"+f.suffix(), fmt.Sprintf(":%d", echo.Port))
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
	}
	regain := func() (*run, []string) {
		r := &run{result: newResult(options{layout: small}), progress: io.Discard}
		r.regain()
		var all []string
		for _, f := range r.failures {
			all = append(all, f.What)
		}
		return r, all
	}
	r, failures := regain()
	if want := 4 * small.rows(); len(failures) != 0 || r.regained != want {
		t.Errorf("%d 4-tuples, failures %q; want %d and none", r.regained, failures, want)
	}
	bindTo(t, fmt.Sprintf("127.0.0.1:%d", small.port(3)), false)
	r, failures = regain()
	if want := 4*small.rows() - 1; len(failures) != 2 || r.regained != want || r.count(stuck) != 2 {
		t.Errorf("%d 4-tuples, failures %q; want %d, and two: one of bind, one of dials", r.regained, failures, want)
	}
}

func TestDatagramThatAListenerDoesNotGetIsFound(t *testing.T) {
	ownNamespace(t)
	to := netip.AddrPortFrom(sources[0][0], small.listenPort())
	l := listening{network: "udp4", address: fmt.Sprintf(":%d", to.Port()), to: []netip.AddrPort{to}, patience: 50 * time.Millisecond}
	listener, err := l.listen()
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	sender, err := l.sender()
	if err != nil {
		t.Fatal(err)
	}
	defer sender.Close()
	bindTo(t, to.String(), true) // takes them
	var b bytes.Buffer
	reports := newReporter(&b)
	var stop atomic.Bool
	time.AfterFunc(100*time.Millisecond, func() { stop.Store(true) })
	l.run(listener, sender, reports, &stop)
	reports.flush()
	got := reported(t, &b)
	if n := len(got.Failures); n == 0 || n != got.Tally.Sent || got.Tally.Received != 0 || got.Failures[0].Promise != misdelivered {
		t.Errorf("%d datagrams sent, %d received, failures %v; want one for each", got.Tally.Sent, got.Tally.Received, got.Failures)
	}
}

func TestJobsOfASeedAreTheSame(t *testing.T) {
	jobs := func(seed uint64) (all []job) {
		h := newHolder(Config{Layout: small, Seed: seed, Process: 1}, nil, 1, nil, nil)
		for range 100 {
			all = append(all, newJob(small, small.own(1, 1), h.random))
		}
		return all
	}
	if !slices.Equal(jobs(1), jobs(1)) {
		t.Error("two runs differ")
	}
	if slices.Equal(jobs(1), jobs(2)) {
		t.Error("two seeds do not differ")
	}
	for _, j := range jobs(3) {
		if j.destination >= sharedDestinations && j.destination != small.own(1, 1) {
			t.Errorf("a dial to the destination of somebody else: %v", j)
		}
	}
}

func TestPortsHaveAnIndex(t *testing.T) {
	for i := range small.rows() {
		if got := small.index(small.port(i)); got != i {
			t.Errorf("port %d has the index %d, want %d", small.port(i), got, i)
		}
	}
	for _, port := range []uint16{firstPort - 1, small.whole().High + 1, firstOutside - 1, small.outside().High + 1, echo.Port} {
		if got := small.index(port); got != -1 {
			t.Errorf("port %d has the index %d, want none", port, got)
		}
	}
}

func TestFlags(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"-duration", "0s"}, program.Usage, "-duration 0s: must be above 0"},
		{[]string{"-kill", "-1s"}, program.Usage, "-kill -1s: must not be below 0"},
		{[]string{"-ports", "7"}, program.Usage, "-ports 7: must be 8 to 200"},
		{[]string{"-processes", "0"}, program.Usage, "-processes 0: must be 1 to 100"},
		{[]string{"-hold", "many"}, program.Usage, `invalid value "many" for flag -hold`},
		{[]string{"5"}, program.Usage, `unexpected argument "5"`},
		{[]string{"-help"}, program.OK, "Usage: stress"},
	} {
		var out bytes.Buffer
		if code := runCommand(c.args, &out, &out); code != c.code || !strings.Contains(out.String(), c.want) {
			t.Errorf("%q: exit code %d, %q; want %d, %q", c.args, code, out.String(), c.code, c.want)
		}
	}
	var o, again options
	if err := o.parse([]string{"-ports", "30", "-plain=false"}, io.Discard); err != nil {
		t.Fatal(err)
	}
	if err := again.parse(strings.Fields(o.flags()), io.Discard); err != nil || again != o {
		t.Errorf("the flags %q make %+v, %v; want %+v", o.flags(), again, err, o)
	}
	if o.seed == 0 {
		t.Error("no seed")
	}
}
