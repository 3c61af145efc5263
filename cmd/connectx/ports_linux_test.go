package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/netns"
)

func TestPortsUsage(t *testing.T) {
	tests := []struct {
		name           string
		args           []string
		code           int
		stdout, stderr string
	}{
		{"help", []string{"ports", "-h"}, exitOK, "Examples:", ""},
		{"help by the subcommand", []string{"help", "ports"}, exitOK, "-interval", ""},
		{"both families", []string{"ports", "-4", "-6"}, exitUsage, "", "-4 and -6: only one"},
		{"negative rows", []string{"ports", "-n", "-1"}, exitUsage, "", "-n -1: must be 0 or more"},
		{"no interval", []string{"ports", "-watch", "-interval", "0s"}, exitUsage, "", "-interval 0s: must be more than 0"},
		{"an interval without a unit", []string{"ports", "-interval", "2"}, exitUsage, "", `"2" for flag -interval`},
		{"unknown flag", []string{"ports", "-a"}, exitUsage, "", "-a"},
		{"unknown flag after an argument", []string{"ports", "udp", "-a"}, exitUsage, "", "-a"},
		{"two destinations", []string{"ports", "192.0.2.1", "192.0.2.2"}, exitUsage, "", `unexpected argument "192.0.2.2"`},
		{"two protocols", []string{"ports", "tcp", "192.0.2.1", "udp"}, exitUsage, "", `unexpected argument "udp"`},
		{"a port that is no number", []string{"ports", "192.0.2.1:http"}, exitUsage, "", `"192.0.2.1:http": the port must be a number`},
		{"port 0", []string{"ports", "192.0.2.1:0"}, exitUsage, "", `"192.0.2.1:0": the port must be a number, 1 to 65535`},
		{"a port that is too large", []string{"ports", "[2001:db8::1]:65536"}, exitUsage, "", `"[2001:db8::1]:65536": the port`},
		{"a port alone", []string{"ports", ":53"}, exitUsage, "", `":53": there is no host`},
		{"too many colons", []string{"ports", "example.com:53:54"}, exitUsage, "", `"example.com:53:54"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { checkRun(t, tt.args, tt.code, tt.stdout, tt.stderr) })
	}
}

func TestPortsDestination(t *testing.T) {
	tests := []struct {
		argument, host string
		port           uint16
	}{
		{"192.0.2.1", "192.0.2.1", 0},
		{"192.0.2.1:53", "192.0.2.1", 53},
		{"2001:db8::1", "2001:db8::1", 0},
		{"[2001:db8::1]", "2001:db8::1", 0},
		{"[2001:db8::1]:53", "2001:db8::1", 53},
		{"example.com", "example.com", 0},
		{"example.com:53", "example.com", 53},
	}
	for _, tt := range tests {
		var o portsOptions
		if err := o.parse([]string{"udp", tt.argument, "-json"}, io.Discard); err != nil {
			t.Errorf("%s: %v", tt.argument, err)
		}
		if o.host != tt.host || o.port != tt.port || o.protocol != "udp" || !o.json {
			t.Errorf("%s: got %+v", tt.argument, o)
		}
	}
}

// enterPorts gives the test a namespace with these ephemeral ports.
func enterPorts(t *testing.T, low, high uint16) {
	t.Helper()
	err := netns.Enter()
	if errors.Is(err, netns.ErrRefused) {
		t.Skipf("needs a network namespace of its own: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := netns.SetPortRange(low, high); err != nil {
		t.Fatal(err)
	}
	setSysctl(t, "tcp_tw_reuse", "0")
}

func setSysctl(t *testing.T, name, value string) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/net/ipv4/"+name, []byte(value), 0); err != nil {
		t.Fatal(err)
	}
}

// A portsSocket is how a test makes a socket.
type portsSocket struct {
	protocol      string
	local, remote string // not bound, not connected if empty
	reuse, listen bool
}

// tryOpen returns the error of bind or connect, for what does not work.
func tryOpen(t *testing.T, s portsSocket) (fd int, err error) {
	t.Helper()
	kind := unix.SOCK_DGRAM
	if s.protocol == "tcp" {
		kind = unix.SOCK_STREAM
	}
	family := unix.AF_INET
	if strings.HasPrefix(s.local+s.remote, "[") {
		family = unix.AF_INET6
	}
	fd, err = unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	if s.reuse {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			t.Fatal(err)
		}
	}
	if s.local != "" {
		if err := unix.Bind(fd, portsSockaddr(s.local)); err != nil {
			return fd, err
		}
	}
	if s.listen {
		if err := unix.Listen(fd, 4096); err != nil {
			t.Fatal(err)
		}
	}
	if s.remote != "" {
		return fd, unix.Connect(fd, portsSockaddr(s.remote))
	}
	return fd, nil
}

// openSocket makes a socket that stays open to the end of the test.
func openSocket(t *testing.T, s portsSocket) int {
	t.Helper()
	fd, err := tryOpen(t, s)
	if err != nil {
		t.Fatalf("%+v: %v", s, err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func portsSockaddr(s string) unix.Sockaddr {
	a := netip.MustParseAddrPort(s)
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

// leaveTimeWait connects to a listener and closes the connection, the client
// first.
func leaveTimeWait(t *testing.T, listener int, remote string) {
	t.Helper()
	fd := openSocket(t, portsSocket{protocol: "tcp", remote: remote})
	peer, _, err := unix.Accept(listener)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(unix.Shutdown(fd, unix.SHUT_WR), unix.Shutdown(peer, unix.SHUT_WR), unix.Close(peer)); err != nil {
		t.Fatal(err)
	}
}

// runPorts returns what the subcommand writes.
func runPorts(t *testing.T, args ...string) string {
	t.Helper()
	var stdout, stderr strings.Builder
	if code := run(append([]string{"ports"}, args...), &stdout, &stderr); code != exitOK || stderr.Len() > 0 {
		t.Fatalf("connectx ports %q: exit code %d, %s", args, code, stderr.String())
	}
	return stdout.String()
}

// reportPorts returns the JSON report.
func reportPorts(t *testing.T, args ...string) *portsReport {
	t.Helper()
	d := json.NewDecoder(strings.NewReader(runPorts(t, append(args, "-json")...)))
	d.DisallowUnknownFields()
	r := new(portsReport)
	if err := d.Decode(r); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestPortsText(t *testing.T) {
	tests := []struct {
		name  string
		setUp func(t *testing.T)
		args  []string
		want  string
	}{
		{
			"nobody is there",
			func(*testing.T) {},
			nil,
			`Ephemeral port range 40000-40009: 10 ports, and none reserved

TCP/IPv4: 0 of 10 ports in use, 0 held by sockets that do not share; all works

TCP/IPv6: 0 of 10 ports in use, 0 held by sockets that do not share; all works

UDP/IPv4: 0 of 10 ports in use, 0 held by sockets that do not share; all works

UDP/IPv6: 0 of 10 ports in use, 0 held by sockets that do not share; all works
`,
		},
		{
			"some ports are in use",
			func(t *testing.T) {
				for range 2 {
					openSocket(t, portsSocket{protocol: "udp", remote: "127.0.1.1:53"})
				}
				openSocket(t, portsSocket{protocol: "udp", remote: "127.0.1.2:53"})
			},
			[]string{"-4", "-n", "1", "udp"},
			`Ephemeral port range 40000-40009: 10 ports, and none reserved

UDP/IPv4: 3 of 10 ports in use, 3 held by sockets that do not share
  source     destination   in use  held by others  free  taken
  127.0.0.1  127.0.1.1:53  2/10    1               7     [######..............]  30 %
  and 1 more (-n 0 shows all)
  Runs out first: 127.0.0.1 to 127.0.1.1:53, after 7 more
  connect             works
  bind-before-connect works
`,
		},
		{
			"one destination is full of TIME_WAIT",
			func(t *testing.T) {
				if err := netns.SetReservedPorts("40001,40003"); err != nil {
					t.Fatal(err)
				}
				listener := openSocket(t, portsSocket{protocol: "tcp", local: "127.0.1.1:443", listen: true})
				for range 8 {
					leaveTimeWait(t, listener, "127.0.1.1:443")
				}
			},
			[]string{"tcp", "127.0.1.1:443"},
			`Ephemeral port range 40000-40009: 8 ports, and 2 reserved

TCP/IPv4: 8 of 8 ports in use, 0 held by sockets that do not share
  source     destination    in use  TIME_WAIT  held by others  free  taken
  127.0.0.1  127.0.1.1:443  0/8     8          0               0     [####################] 100 %
  Run out: 127.0.0.1 to 127.0.1.1:443
  connect             FAILS from 127.0.0.1 to 127.0.1.1:443: cannot assign requested address (EADDRNOTAVAIL)
                      closed connections stay in TIME_WAIT for a minute: keep connections open, or set net.ipv4.tcp_tw_reuse=1
  bind-before-connect FAILS from 127.0.0.1: address already in use (EADDRINUSE)
                      bind shares no ports between destinations: use IP_BIND_ADDRESS_NO_PORT or connectx.Dialer

Which programs have them: ss -tunap 'sport >= :40000 and sport <= :40009'
The range is narrower than usual: sysctl -w net.ipv4.ip_local_port_range='32768 60999' makes it 28232 ports.
`,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			enterPorts(t, 40000, 40009)
			tt.setUp(t)
			if diff := cmp.Diff(tt.want, runPorts(t, tt.args...)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestPortsJSON(t *testing.T) {
	enterPorts(t, 40000, 40001)
	openSocket(t, portsSocket{protocol: "udp", remote: "127.0.1.1:53"})
	openSocket(t, portsSocket{protocol: "udp", remote: "127.0.1.1:53"})
	var got map[string]any
	if err := json.Unmarshal([]byte(runPorts(t, "-4", "-json", "udp")), &got); err != nil {
		t.Fatal(err)
	}
	if _, err := time.Parse(time.RFC3339, got["time"].(string)); err != nil {
		t.Error(err)
	}
	delete(got, "time")
	want := map[string]any{
		"range": map[string]any{"low": 40000.0, "high": 40001.0, "ports": 2.0, "reserved": 0.0},
		"sections": []any{map[string]any{
			"protocol": "udp", "family": "IPv4", "in_use": 2.0, "held": 2.0, "flows_total": 1.0, "flows_full": 1.0,
			"flows": []any{map[string]any{
				"source": "127.0.0.1", "destination": "127.0.1.1:53", "in_use": 2.0, "time_wait": 0.0, "held": 0.0, "free": 0.0,
			}},
			"verdicts": []any{
				map[string]any{"way": "connect", "works": false, "errno": "EAGAIN",
					"error": "resource temporarily unavailable", "advice": adviceHeldUDP},
				map[string]any{"way": "bind-before-connect", "works": false, "errno": "EADDRINUSE",
					"error": "address already in use", "advice": adviceBindUDP,
					"fails_for": []any{map[string]any{"source": "127.0.0.1"}}},
			},
		}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestPortsTowardsADestination(t *testing.T) {
	enterPorts(t, 40000, 40099)
	for _, remote := range []string{"127.0.1.1:53", "127.0.1.1:54", "127.0.1.2:53", "[::1]:53"} {
		openSocket(t, portsSocket{protocol: "udp", remote: remote})
	}
	tests := []struct {
		args []string
		want []string
	}{
		{[]string{"udp"}, []string{"127.0.1.1:53", "127.0.1.1:54", "127.0.1.2:53", "[::1]:53"}},
		{[]string{"udp", "-6"}, []string{"[::1]:53"}},
		{[]string{"udp", "127.0.1.1"}, []string{"127.0.1.1:53", "127.0.1.1:54"}},
		{[]string{"udp", "127.0.1.1:54"}, []string{"127.0.1.1:54"}},
		{[]string{"udp", "[::1]:53"}, []string{"[::1]:53"}},
		{[]string{"tcp", "127.0.1.3"}, nil},
		{[]string{"tcp", "127.0.1.3:80"}, []string{"127.0.1.3:80"}}, // nobody is there yet
	}
	for _, tt := range tests {
		var got []string
		for _, s := range reportPorts(t, tt.args...).Sections {
			for _, f := range s.Flows {
				got = append(got, f.Destination.String())
			}
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%q (-want +got):\n%s", tt.args, diff)
		}
	}
}

// portsCommand builds the program.
func portsCommand(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(demoCommand(t).Path, append([]string{"ports"}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

func TestPortsWatch(t *testing.T) {
	tests := []struct {
		name string
		stop func(t *testing.T, cmd *exec.Cmd, stdout io.Closer)
		ends func(state *os.ProcessState) bool
	}{
		{
			"until an interrupt",
			func(t *testing.T, cmd *exec.Cmd, _ io.Closer) {
				if err := cmd.Process.Signal(os.Interrupt); err != nil {
					t.Error(err)
				}
			},
			func(state *os.ProcessState) bool { return state.ExitCode() == exitOK },
		},
		{
			"until nobody reads it",
			func(_ *testing.T, _ *exec.Cmd, stdout io.Closer) { stdout.Close() },
			func(state *os.ProcessState) bool {
				return state.Sys().(syscall.WaitStatus).Signal() == syscall.SIGPIPE
			},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cmd := portsCommand(t, "-watch", "-json", "-interval", "1ms", "udp")
			enterPorts(t, 40000, 40009) // what cmd is started in
			var stderr strings.Builder
			cmd.Stderr = &stderr
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewReader(stdout)
			for range 3 {
				line, err := lines.ReadBytes('\n')
				if err != nil || !json.Valid(line) || !bytes.Contains(line, []byte(`"high":40009`)) {
					t.Errorf("got line %q, %v", line, err)
				}
			}
			tt.stop(t, cmd, stdout)
			io.Copy(io.Discard, lines)
			_ = cmd.Wait() // its error is in the state
			if !tt.ends(cmd.ProcessState) {
				t.Errorf("ended with %v", cmd.ProcessState)
			}
			if stderr.Len() > 0 {
				t.Errorf("stderr is %q", stderr.String())
			}
		})
	}
}

// Who is not privileged sees the same.
func TestPortsUnprivileged(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can run it as somebody else as well")
	}
	cmd := portsCommand(t, "-json")
	for _, dir := range []string{filepath.Dir(cmd.Path), filepath.Dir(filepath.Dir(cmd.Path))} {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	enterPorts(t, 40000, 40009)
	openSocket(t, portsSocket{protocol: "tcp", local: "127.0.0.1:0"})
	openSocket(t, portsSocket{protocol: "udp", remote: "127.0.1.1:53"})
	const nobody = 65534
	cmd.SysProcAttr.Credential = &syscall.Credential{Uid: nobody, Gid: nobody}
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var got portsReport
	if err := json.Unmarshal(out, &got); err != nil {
		t.Fatal(err)
	}
	want := reportPorts(t)
	want.Time, got.Time = time.Time{}, time.Time{}
	if diff := cmp.Diff(want, &got, portsComparers); diff != "" {
		t.Errorf("(-root +nobody):\n%s", diff)
	}
	if !slices.ContainsFunc(got.Sections, func(s portsSection) bool { return s.Held > 0 }) {
		t.Error("nobody sees no held port")
	}
}

var portsComparers = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
}
