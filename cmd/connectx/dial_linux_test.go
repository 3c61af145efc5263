package main

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/seed22601231/connectx/internal/netns"
)

// dialNamespace moves the test to a namespace of its own with the ephemeral
// ports 40000 to 40009.
func dialNamespace(t *testing.T) {
	t.Helper()
	err := netns.Enter()
	if errors.Is(err, netns.ErrRefused) {
		t.Skip(err)
	}
	if err == nil {
		err = netns.LoopbackUp("fd00::1/128")
	}
	if err == nil {
		err = netns.SetPortRange(40000, 40009)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// serveTCP has each connection to host served, and returns the address.
func serveTCP(t *testing.T, host string, serve func(*net.TCPConn)) string {
	t.Helper()
	listener, err := net.Listen("tcp", net.JoinHostPort(host, "7"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				serve(conn.(*net.TCPConn))
			}()
		}
	}()
	return listener.Addr().String()
}

// echoAfterEnd answers with all that it was sent, once that has come to an end.
func echoAfterEnd(conn *net.TCPConn) {
	if all, err := io.ReadAll(conn); err == nil {
		conn.Write(all)
	}
}

// serveUDP has each datagram to host answered with one that says its length.
func serveUDP(t *testing.T, host string) string {
	t.Helper()
	conn, err := net.ListenPacket("udp", net.JoinHostPort(host, "7"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() {
		b := make([]byte, 1<<16)
		for {
			n, from, err := conn.ReadFrom(b)
			if err != nil {
				return
			}
			conn.WriteTo(fmt.Appendf(nil, "%d:%s", n, b[:min(n, 100)]), from)
		}
	}()
	return conn.LocalAddr().String()
}

// reads is a standard input each of whose parts is returned by a read of its own.
type reads []string

func (r *reads) Read(b []byte) (int, error) {
	if len(*r) == 0 {
		return 0, io.EOF
	}
	n := copy(b, (*r)[0])
	if (*r)[0] = (*r)[0][n:]; (*r)[0] == "" {
		*r = (*r)[1:]
	}
	return n, nil
}

// An output is a standard output that tells when as much as is wanted has come.
type output struct {
	bytes.Buffer
	want int
	full chan struct{}
}

func newOutput(want int) *output { return &output{want: want, full: make(chan struct{})} }

func (o *output) Write(b []byte) (int, error) {
	before := o.Len()
	n, err := o.Buffer.Write(b)
	if before < o.want && o.Len() >= o.want {
		close(o.full)
	}
	return n, err
}

// Read is a standard input that ends at that time.
func (o *output) Read([]byte) (int, error) {
	select {
	case <-o.full:
		return 0, io.EOF
	case <-time.After(10 * time.Second):
		return 0, errors.New("no more answers")
	}
}

// runDial runs the subcommand in the test's goroutine and namespace.
func runDial(stdin io.Reader, args ...string) (code int, stdout, stderr string) {
	var out, errs strings.Builder
	code = dialWith(stdin, args, &out, &errs)
	return code, out.String(), errs.String()
}

func TestDial(t *testing.T) {
	dialNamespace(t)
	tcp, tcp6 := serveTCP(t, "127.1.0.1", echoAfterEnd), serveTCP(t, "fd00::1", echoAfterEnd)
	udp := serveUDP(t, "127.1.0.1")
	byeAtOnce := serveTCP(t, "127.1.0.2", func(conn *net.TCPConn) { conn.Write([]byte("bye")) })
	reset := serveTCP(t, "127.1.0.3", func(conn *net.TCPConn) { conn.SetLinger(0) })
	whoCalls := serveTCP(t, "127.1.0.4", func(conn *net.TCPConn) { fmt.Fprint(conn, conn.RemoteAddr()) })

	megabytes := make([]byte, 5<<20)
	rand.Read(megabytes)
	open, input, err := os.Pipe() // a standard input that does not end
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	defer input.Close()
	tests := []struct {
		name           string
		args           string
		stdin          io.Reader
		code           int
		stdout, stderr string // stderr: a part of it; nothing at all if empty
	}{
		{"TCP to the end of standard input, and back", "tcp " + tcp, &reads{"hel", "lo\n"}, exitOK, "hello\n", ""},
		{"TCP over IPv6", "tcp -6 " + tcp6, &reads{"hello"}, exitOK, "hello", ""},
		{"TCP without any input", "tcp " + tcp, &reads{}, exitOK, "", ""},
		{"TCP with more than the buffers hold", "tcp " + tcp, bytes.NewReader(megabytes), exitOK, string(megabytes), ""},
		{"TCP with fast open", "tcp -fastopen " + tcp, &reads{"hello"}, exitOK, "hello", ""},
		{"TCP to a peer that closes first", "tcp " + byeAtOnce, open, exitOK, "bye", ""},
		{"TCP to a peer that resets", "tcp " + reset, open, exitFailed, "", "connection reset by peer"},
		{"TCP that is refused", "tcp 127.1.0.9:7", &reads{}, exitFailed, "", "connectx dial: dial tcp 127.1.0.9:7: connect: connection refused\n"},
		{"TCP from an address and port", "tcp -source 127.2.0.1:41000 " + whoCalls, open, exitOK, "127.2.0.1:41000", ""},
		{"TCP from a port", "tcp -source :41001 " + whoCalls, open, exitOK, "127.0.0.1:41001", ""},
		{"TCP from a range of ports", "tcp -source 127.2.0.1 -ports 41007-41007 " + whoCalls, open, exitOK, "127.2.0.1:41007", ""},
		{"TCP to an address of the other family", "tcp -6 " + tcp, &reads{}, exitFailed, "", "no suitable address found"},
		{"UDP, an answer after the end of standard input", "udp -wait 2s " + udp, &reads{"hello"}, exitOK, "5:hello", ""},
		{"UDP without any input", "udp -wait 1ms " + udp, &reads{}, exitOK, "", ""},
		{"UDP without waiting for an answer", "udp -wait 0 " + udp, &reads{}, exitOK, "", ""},
		{"UDP that is refused", "udp -wait 10s 127.1.0.9:7", io.MultiReader(&reads{"hello"}, open), exitFailed, "", "connection refused"},
		{"standard input that cannot be read", "tcp " + tcp, os.NewFile(1<<20, "nothing"), exitFailed, "", "read nothing: bad file descriptor"},
	}
	for _, tt := range tests {
		code, stdout, stderr := runDial(tt.stdin, strings.Fields(tt.args)...)
		if code != tt.code {
			t.Errorf("%s: exit code %d, want %d", tt.name, code, tt.code)
		}
		if stdout != tt.stdout {
			t.Errorf("%s: stdout is %.100q, want %.100q", tt.name, stdout, tt.stdout)
		}
		if !strings.Contains(stderr, tt.stderr) || tt.stderr == "" && stderr != "" || strings.Count(stderr, "\n") > 1 {
			t.Errorf("%s: stderr is %q, want %q in it", tt.name, stderr, tt.stderr)
		}
	}
}

// What one read returns is one datagram.
// With a cookie, the handshake waits for data, of which there may be none.
func TestDialFastOpen(t *testing.T) {
	dialNamespace(t)
	// Client, server, and all listening sockets: Documentation/networking/ip-sysctl.rst.
	if err := os.WriteFile("/proc/sys/net/ipv4/tcp_fastopen", []byte("1027"), 0); err != nil {
		t.Fatal(err)
	}
	address := serveTCP(t, "127.1.0.1", func(conn *net.TCPConn) {
		fmt.Fprint(conn, "welcome, ")
		io.Copy(conn, conn)
	})
	for range 3 {
		for _, input := range []reads{{"all"}, {}} {
			want := "welcome, " + strings.Join(input, "")
			if code, stdout, stderr := runDial(&input, "tcp", "-fastopen", address); code != exitOK || stdout != want || stderr != "" {
				t.Errorf("exit code %d, stdout %q, want %q; stderr %q", code, stdout, want, stderr)
			}
		}
	}
}

func TestDialDatagrams(t *testing.T) {
	dialNamespace(t)
	udp, udp6 := serveUDP(t, "127.1.0.1"), serveUDP(t, "fd00::1")
	tests := []struct {
		name, address string
		stdin         reads
		want          string
	}{
		{"two reads", udp, reads{"hel", "lo\n"}, "3:hel3:lo\n"},
		{"over IPv6", udp6, reads{"hello"}, "5:hello"},
		{"more than the longest datagram", udp, reads{strings.Repeat("x", 16385)}, "16384:" + strings.Repeat("x", 100) + "1:x"},
	}
	for _, tt := range tests {
		out := newOutput(len(tt.want))
		code := dialWith(io.MultiReader(&tt.stdin, out), []string{"udp", "-wait", "0", tt.address}, out, io.Discard)
		if code != exitOK || out.String() != tt.want {
			t.Errorf("%s: exit code %d, stdout %.120q, want %.120q", tt.name, code, out.String(), tt.want)
		}
	}
}

// zeros is a standard input without an end.
type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return len(b), nil }

// A connection that is reset ends with an error, whether reading or writing is
// what the kernel tells it to.
func TestDialResetWhileSending(t *testing.T) {
	dialNamespace(t)
	address := serveTCP(t, "127.1.0.1", func(conn *net.TCPConn) {
		io.CopyN(io.Discard, conn, 1<<20)
		conn.SetLinger(0)
	})
	for range 50 {
		code, _, stderr := runDial(zeros{}, "tcp", address)
		if code != exitFailed || stderr == "" {
			t.Fatalf("exit code %d, stderr %q, want %d and why", code, stderr, exitFailed)
		}
	}
}

// A full range is explained in the words of the error.
func TestDialToAFullDestination(t *testing.T) {
	dialNamespace(t)
	address := serveUDP(t, "127.1.0.1")
	for port := 40000; port <= 40009; port++ {
		conn, err := net.DialUDP("udp", &net.UDPAddr{Port: port}, net.UDPAddrFromAddrPort(netip.MustParseAddrPort(address)))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	code, _, stderr := runDial(&reads{}, "udp", "-source", "127.0.0.1", address)
	want := "connectx dial: dial udp 127.0.0.1:0->127.1.0.1:7: ephemeral ports exhausted: all of 40000-40009 from 127.0.0.1 to 127.1.0.1:7 are taken"
	if code != exitFailed || !strings.HasPrefix(stderr, want) {
		t.Errorf("exit code %d, stderr %q, want %d, %q", code, stderr, exitFailed, want)
	}
}

func TestDialTrace(t *testing.T) {
	dialNamespace(t)
	tcp, udp := serveTCP(t, "127.1.0.1", echoAfterEnd), serveUDP(t, "127.1.0.1")
	// Sockets that do not share their port.
	listener, err := net.Listen("tcp", "127.0.0.1:41000")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	conn, err := net.ListenPacket("udp", "127.0.0.1:41000")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	tests := []struct {
		name string
		args []string
		want string // of stderr, without the times
	}{
		{"TCP, the kernel chooses the source", []string{"tcp", tcp}, `
try        \*:4000\d->127.1.0.1:7
connected  127.0.0.1:4000\d->127.1.0.1:7
`},
		{"UDP, the routing table chooses the source", []string{"udp", "-wait", "0", udp}, `
source     127.0.0.1->127.1.0.1:7
try        127.0.0.1:4000\d->127.1.0.1:7
connected  127.0.0.1:4000\d->127.1.0.1:7
`},
		{"TCP, a port is held", []string{"tcp", "-source", "127.0.0.1:41000", tcp}, `
source     127.0.0.1->127.1.0.1:7
try        127.0.0.1:41000->127.1.0.1:7
contention 127.0.0.1:41000->127.1.0.1:7
connectx dial: dial tcp .*: address already in use
`},
		{"UDP, one of two ports is held", []string{"udp", "-wait", "0", "-source", "127.0.0.1", "-ports", "41000-41001", udp}, `
source     127.0.0.1->127.1.0.1:7
(try        127.0.0.1:41000->127.1.0.1:7
contention 127.0.0.1:41000->127.1.0.1:7
)?try        127.0.0.1:41001->127.1.0.1:7
connected  127.0.0.1:41001->127.1.0.1:7
`},
	}
	for _, tt := range tests {
		_, _, stderr := runDial(&reads{}, append(tt.args, "-trace")...)
		got := regexp.MustCompile(`(?m)^\d+\.\d{6} `).ReplaceAllString(stderr, "")
		if !regexp.MustCompile("^" + tt.want[1:] + "$").MatchString(got) {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want[1:])
		}
	}
}

// What only a process can show.
func TestDialProcess(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "connectx")
	if out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	t.Run("two at a time share a TCP source port", func(t *testing.T) {
		dialNamespace(t)
		echo := func(conn *net.TCPConn) { io.Copy(conn, conn) }
		checkTwoAtATime(t, binary, "tcp", serveTCP(t, "127.1.0.1", echo), serveTCP(t, "127.1.0.2", echo))
	})
	t.Run("two at a time share a UDP source port", func(t *testing.T) {
		dialNamespace(t)
		checkTwoAtATime(t, binary, "udp", serveUDP(t, "127.1.0.1"), serveUDP(t, "127.1.0.2"))
	})
	t.Run("an interrupt ends it without a word", func(t *testing.T) {
		dialNamespace(t)
		address := serveTCP(t, "127.1.0.1", func(conn *net.TCPConn) {
			conn.Write([]byte("."))
			io.Copy(io.Discard, conn)
		})
		p := startDial(t, binary, "tcp", address)
		p.checkReads(".")
		if err := p.cmd.Process.Signal(os.Interrupt); err != nil {
			t.Fatal(err)
		}
		p.checkEnd(syscall.SIGINT)
	})
	t.Run("a closed standard output ends it without a word", func(t *testing.T) {
		dialNamespace(t)
		for protocol, address := range map[string]string{
			"tcp": serveTCP(t, "127.1.0.1", func(conn *net.TCPConn) { io.Copy(conn, conn) }),
			"udp": serveUDP(t, "127.1.0.1"),
		} {
			p := startDial(t, binary, protocol, address)
			p.stdout.Close()
			p.write("hello")
			p.checkEnd(syscall.SIGPIPE)
		}
	})
}

// checkTwoAtATime has two processes talk to two destinations by turns, from one
// source address and port.
func checkTwoAtATime(t *testing.T, binary, protocol string, addresses ...string) {
	var both []*dialProcess
	for _, address := range addresses {
		both = append(both, startDial(t, binary, protocol, "-source", "127.2.0.1:40003", "-trace", address))
	}
	for round := range 3 {
		for i, p := range both {
			message := fmt.Sprintf("round %d of process %d", round, i)
			want := message
			if protocol == "udp" {
				want = fmt.Sprintf("%d:%s", len(message), message)
			}
			p.write(message)
			p.checkReads(want)
		}
	}
	for i, p := range both {
		p.stdin.Close()
		p.checkEnd(0)
		if want := "127.2.0.1:40003->" + addresses[i]; !strings.Contains(p.stderr.String(), "connected  "+want) {
			t.Errorf("stderr is %q, want %q in it", p.stderr.String(), want)
		}
	}
}

// A dialProcess is a connectx dial with pipes.
type dialProcess struct {
	*testing.T
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stdout io.ReadCloser
	stderr strings.Builder
}

func startDial(t *testing.T, binary string, args ...string) *dialProcess {
	t.Helper()
	p := &dialProcess{T: t, cmd: exec.Command(binary, append([]string{"dial"}, args...)...)}
	p.cmd.Stderr = &p.stderr
	var err error
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if p.stdout, err = p.cmd.StdoutPipe(); err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.cmd.Process.Kill() })
	return p
}

func (p *dialProcess) write(s string) {
	p.Helper()
	if _, err := io.WriteString(p.stdin, s); err != nil {
		p.Fatal(err)
	}
}

func (p *dialProcess) checkReads(want string) {
	p.Helper()
	timer := time.AfterFunc(10*time.Second, func() { p.cmd.Process.Kill() })
	defer timer.Stop()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(p.stdout, got); err != nil || string(got) != want {
		p.Fatalf("read %q, %v, want %q; stderr %q", got, err, want, p.stderr.String())
	}
}

// checkEnd checks that a signal ends the process, with nothing on standard error,
// or that it ends in order if the signal is 0.
func (p *dialProcess) checkEnd(by syscall.Signal) {
	p.Helper()
	_ = p.cmd.Wait() // ProcessState has more
	status := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
	switch {
	case by == 0 && status.ExitStatus() != exitOK:
		p.Errorf("ended with %v; stderr %q", p.cmd.ProcessState, p.stderr.String())
	case by != 0 && (!status.Signaled() || status.Signal() != by || p.stderr.String() != ""):
		p.Errorf("ended with %v, want %v; stderr %q", p.cmd.ProcessState, by, p.stderr.String())
	}
}
