//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/netns"
	"github.com/seed22601231/connectx/internal/program"
)

func TestMain(m *testing.M) {
	if isWorker() {
		os.Exit(work(os.Args[1:]))
	}
	os.Exit(netns.Main(m.Run))
}

var fewPorts = portRange{40000, 40499}

// ownNetwork gives the test a network of its own, with few ports.
func ownNetwork(t *testing.T) {
	t.Helper()
	netns.Need(t)
	if err := netns.Enter(); err != nil {
		t.Fatal(err)
	}
	if err := setUpNetwork(fewPorts); err != nil {
		t.Fatal(err)
	}
}

func TestManyProcessesHoldConnectionsUpToTheLastPort(t *testing.T) {
	for _, p := range []plan{
		{network: "udp4", total: 3000, ports: fewPorts, perProcess: 900},
		{network: "tcp4", total: 1000, ports: fewPorts, perProcess: 400},
	} {
		t.Run(p.protocol(), func(t *testing.T) {
			ownNetwork(t)
			var log bytes.Buffer
			r, err := hold(t.Context(), p, memory{}, &log)
			if err != nil {
				t.Fatal(err)
			}
			if err := verdict([]*result{r}); err != nil {
				t.Error(err)
			}
			if full := p.total / fewPorts.size(); r.full() != full {
				t.Errorf("%d destinations are full, want %d", r.full(), full)
			}
			if r.processes < 3 {
				t.Errorf("%d processes, want several", r.processes)
			}
			if r.p50 <= 0 || r.p99 < r.p50 || r.max < r.p99 {
				t.Errorf("p50 %v, p99 %v, longest %v", r.p50, r.p99, r.max)
			}
			if r.net.opened != fewPorts.size() || !strings.Contains(r.net.failure, "address already in use") {
				t.Errorf("net.Dialer: %d connections, %q; want %d and EADDRINUSE", r.net.opened, r.net.failure, fewPorts.size())
			}
			if !strings.Contains(log.String(), "connectx.Dialer") {
				t.Errorf("no progress in %q", log.String())
			}
			report := newReport([]*result{r})
			for _, want := range []string{group(p.total), "address already in use", r.plan.protocol()} {
				if !strings.Contains(report, want) {
					t.Errorf("no %q in the report:\n%s", want, report)
				}
			}
		})
	}
}

func TestDialThatFailsEndsAll(t *testing.T) {
	ownNetwork(t)
	if err := netns.SetPortRange(fewPorts.low, fewPorts.high-100); err != nil {
		t.Fatal(err)
	}
	p := plan{network: "udp4", total: 1000, ports: fewPorts, perProcess: 400}
	_, err := hold(t.Context(), p, memory{}, io.Discard)
	if err == nil || !strings.Contains(err.Error(), "dial process") || !strings.Contains(err.Error(), "10.1.0.1:7007") {
		t.Errorf("%v, want the process and the destination", err)
	}
}

func TestProcessThatDiesIsNamed(t *testing.T) {
	ownNetwork(t)
	c := newCrew(t.Context())
	defer c.stop()
	dialers, err := c.startDialers(2, Config{Network: "udp4", Connectx: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(c.pids[1], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	err = c.call(dialers[1], "Collect", struct{}{}, new(struct{}))
	if want := "dial process 2 of 2: signal: killed"; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	<-dialers[0].ended
}

func TestInterruptEndsAll(t *testing.T) {
	ownNetwork(t)
	ctx, cancel := context.WithCancel(t.Context())
	c := newCrew(ctx)
	defer c.stop()
	dialers, err := c.startDialers(2, Config{Network: "udp4", Connectx: true})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	for _, d := range dialers {
		<-d.ended
	}
	if err := c.call(dialers[0], "Collect", struct{}{}, new(struct{})); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want %v", err, context.Canceled)
	}
}

// echoServer echoes what comes to the first destination, until the test ends.
func echoServer(t *testing.T) netip.AddrPort {
	t.Helper()
	address := netip.AddrPortFrom(firstDestination, serverPort)
	conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(address))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() {
		var b [64]byte
		for {
			n, from, err := conn.ReadFromUDPAddrPort(b[:])
			if err != nil {
				return
			}
			conn.WriteToUDPAddrPort(b[:n], from)
		}
	}()
	return address
}

// overshadow connects two sockets on one 4-tuple, which takes nothing but
// SO_REUSEADDR.
func overshadow(t *testing.T, to netip.AddrPort) []net.Conn {
	t.Helper()
	d := net.Dialer{
		LocalAddr: net.UDPAddrFromAddrPort(netip.AddrPortFrom(source, 40000)),
		Control: func(_, _ string, c syscall.RawConn) (err error) {
			if e := c.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
			}); e != nil {
				return e
			}
			return err
		},
	}
	var conns []net.Conn
	for range 2 {
		conn, err := d.Dial("udp4", to.String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		conns = append(conns, conn)
	}
	return conns
}

func TestDuplicateIsFound(t *testing.T) {
	ownNetwork(t)
	overshadow(t, netip.AddrPortFrom(firstDestination, serverPort))
	tuples, err := dumpTuples(false)
	if err != nil {
		t.Fatal(err)
	}
	if tuples.total != 2 || tuples.duplicates != 1 {
		t.Errorf("%d sockets and %d duplicates, want 2 and 1", tuples.total, tuples.duplicates)
	}
	r := &result{plan: plan{network: "udp4", total: 2}, tuples: tuples, tally: Tally{Own: 2}}
	if err := verdict([]*result{r}); err == nil || !strings.Contains(err.Error(), "1 connections have the 4-tuple of another") {
		t.Errorf("verdict %v", err)
	}
}

func TestWrongEchoIsFound(t *testing.T) {
	ownNetwork(t)
	conns := overshadow(t, echoServer(t))
	e := echoes{window: 2, patience: 100 * time.Millisecond, datagrams: true}
	tally := e.verify(conns, newTokens(0, 2))
	if tally.Wrong != 1 || tally.Missing != 1 || tally.Own != 0 {
		t.Errorf("%+v, want one wrong and one missing", tally)
	}
	r := &result{plan: plan{network: "udp4", total: 2}, tuples: tuples{total: 2}, tally: tally}
	if err := verdict([]*result{r}); err == nil || !strings.Contains(err.Error(), "1 wrong ones, 1 none") {
		t.Errorf("verdict %v", err)
	}
}

func TestStrayIsFound(t *testing.T) {
	ownNetwork(t)
	to := echoServer(t)
	var conns []net.Conn
	for range 3 {
		conn, err := net.DialUDP("udp4", &net.UDPAddr{IP: source.AsSlice()}, net.UDPAddrFromAddrPort(to))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conns = append(conns, conn)
	}
	tokens := newTokens(0, len(conns))
	// One has nothing to read, one its own token, and one that of another.
	for i, token := range map[int]token{1: tokens[1], 2: tokens[0]} {
		if _, err := conns[i].Write(token[:]); err != nil {
			t.Fatal(err)
		}
		awaitReadable(t, conns[i])
	}
	if n, err := strays(conns, tokens); n != 1 || err != nil {
		t.Errorf("%d strays, %v; want 1", n, err)
	}
}

func awaitReadable(t *testing.T, conn net.Conn) {
	t.Helper()
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		for n := 0; n == 0; {
			if n, err = unix.Poll(poll, 10_000); err == unix.EINTR {
				n, err = 0, nil
			} else if n == 0 {
				err = context.DeadlineExceeded
				return
			}
		}
	}); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestSharesAddUp(t *testing.T) {
	for _, p := range []plan{
		{network: "udp4", total: 1_000_000, ports: defaultPorts, perProcess: 19_936},
		{network: "tcp4", total: 250_000, ports: defaultPorts, perProcess: 19_936},
		{network: "udp4", total: maxConnections, ports: defaultPorts, perProcess: 19_936},
		{network: "tcp4", total: 100_001, ports: defaultPorts, perProcess: 936},
		{network: "udp4", total: 3000, ports: fewPorts, perProcess: 900},
		{network: "udp4", total: 1, ports: fewPorts, perProcess: 900},
	} {
		of, to, total := make(map[int]int), make(map[netip.AddrPort]int), 0
		for _, s := range p.shares() {
			if s.process >= p.processes() || s.count < 1 {
				t.Fatalf("%+v: share %+v", p, s)
			}
			of[s.process] += s.count
			to[s.destination] += s.count
			total += s.count
		}
		if total != p.total {
			t.Errorf("%+v: %d connections", p, total)
		}
		for process, n := range of {
			if n > p.perProcess {
				t.Errorf("%+v: process %d has %d", p, process, n)
			}
		}
		destinations := p.destinations()
		for _, d := range destinations[:len(destinations)-1] {
			if to[d] != p.ports.size() {
				t.Errorf("%+v: %d connections to %s", p, to[d], d)
			}
		}
	}
}

func TestNeedThatIsNotMetNamesTheFlag(t *testing.T) {
	p := plan{network: "udp4", total: 1 << 34, ports: portRange{1, 65535}, perProcess: 1 << 20}
	var said bytes.Buffer
	err := checkNeeds([]plan{p}, &said)
	if err == nil || !strings.Contains(err.Error(), "fewer with -udp") || !strings.Contains(err.Error(), "MemAvailable") {
		t.Errorf("%v, want what is missing and the flag", err)
	}
	p.total, p.perProcess = 1, 1000
	if err := checkNeeds([]plan{p}, &said); err != nil {
		t.Error(err)
	}
	if !strings.Contains(said.String(), "1 UDP connections, in 1 processes, need") {
		t.Errorf("said %q", said.String())
	}
}

func TestFlags(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"-udp", "-1"}, program.Usage, "-udp -1: must be 0 to 7170928"},
		{[]string{"-tcp", "7170929"}, program.Usage, "-tcp 7170929: must be 0 to 7170928"},
		{[]string{"-udp", "many"}, program.Usage, `invalid value "many" for flag -udp`},
		{[]string{"-udp", "0", "-tcp", "0"}, program.Usage, "nothing to do"},
		{[]string{"5"}, program.Usage, `unexpected argument "5"`},
		{[]string{"-help"}, program.OK, "Usage: scale"},
	} {
		var out bytes.Buffer
		if code := run(c.args, &out, &out); code != c.code || !strings.Contains(out.String(), c.want) {
			t.Errorf("%q: exit code %d, %q; want %d, %q", c.args, code, out.String(), c.code, c.want)
		}
	}
}

func TestReportIsWrittenToAFile(t *testing.T) {
	netns.Need(t)
	if err := netns.Enter(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "scale.txt")
	plans := []plan{{network: "udp4", total: 10, ports: defaultPorts, perProcess: 936}}
	var out bytes.Buffer
	if err := measure(t.Context(), plans, filepath.Join(file, "x"), &out, io.Discard); err == nil || !strings.Contains(err.Error(), "-o ") {
		t.Errorf("%v, want the flag", err)
	}
	if err := measure(t.Context(), plans, file, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if len(text) == 0 || !strings.HasSuffix(out.String(), string(text)) {
		t.Errorf("the file has %q, and stdout %q", text, out.String())
	}
}
