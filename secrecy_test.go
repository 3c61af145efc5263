//go:build linux

package connectx_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/lookup"
)

// strangerUID is any user but that of the tests.
const strangerUID = 65534

// strangerEnv is what the stranger does: the network, the 4-tuple seen from its
// source, and the option to set before bind.
const strangerEnv = "CONNECTX_TEST_STRANGER"

func init() { children["stranger"] = stranger }

// stranger is another user's process that goes for a 4-tuple. It prints how far it
// has come, then what sock_diag tells it about the 4-tuple, and then each datagram
// that it receives.
func stranger() int {
	if err := syscall.Setresgid(strangerUID, strangerUID, strangerUID); err != nil {
		return failChild("setresgid: %v", err)
	}
	if err := syscall.Setresuid(strangerUID, strangerUID, strangerUID); err != nil {
		return failChild("setresuid: %v", err)
	}
	fields := strings.Fields(os.Getenv(strangerEnv))
	network, option, goal := fields[0], fields[3], fields[4]
	local, remote := netip.MustParseAddrPort(fields[1]), netip.MustParseAddrPort(fields[2])
	kind := unix.SOCK_DGRAM
	if network == "tcp" {
		kind = unix.SOCK_STREAM
	}
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return failChild("socket: %v", err)
	}
	fmt.Println(strangerGoes(fd, option, goal, local, remote))
	fmt.Println(strangerSees(network, local, remote))
	if network == "udp" {
		go func() {
			b := make([]byte, 100)
			for {
				n, _, err := unix.Recvfrom(fd, b, 0)
				if err != nil {
					return
				}
				fmt.Printf("received %s\n", b[:n])
			}
		}()
	}
	io.Copy(io.Discard, os.Stdin) // until the test is over
	return 0
}

// strangerGoes returns the step that fails, and why.
func strangerGoes(fd int, option, goal string, local, remote netip.AddrPort) string {
	sockaddr := func(ap netip.AddrPort) unix.Sockaddr {
		return &unix.SockaddrInet4{Addr: ap.Addr().As4(), Port: int(ap.Port())}
	}
	steps := []struct {
		name string
		do   func() error
	}{
		{"setsockopt", func() error {
			switch option {
			case "SO_REUSEADDR":
				return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
			case "SO_REUSEPORT":
				return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
			}
			return nil
		}},
		{"bind", func() error { return unix.Bind(fd, sockaddr(local)) }},
		{goal, func() error {
			switch goal {
			case "connect":
				return unix.Connect(fd, sockaddr(remote))
			case "listen":
				return unix.Listen(fd, 1)
			}
			return nil
		}},
	}
	for _, step := range steps {
		if err := step.do(); err != nil {
			return step.name + " " + unix.ErrnoName(err.(syscall.Errno))
		}
	}
	return "succeeds"
}

// strangerSees returns what sock_diag tells about the socket of a 4-tuple.
func strangerSees(network string, local, remote netip.AddrPort) string {
	conn, err := lookup.Open()
	if err != nil {
		return err.Error()
	}
	defer conn.Close()
	look := conn.UDP
	if network == "tcp" {
		look = conn.TCP
	}
	s, err := look(local, remote, 1)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("uid %d", s.UID)
}

// needUsers skips a test where there is but one user.
func needUsers(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to become another user")
	}
	ids, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		t.Fatal(err)
	}
	var first, outside, count uint64
	if _, err := fmt.Sscan(string(ids), &first, &outside, &count); err != nil {
		t.Fatal(err)
	}
	if first+count <= strangerUID {
		t.Skip("needs two users, and this user namespace has one")
	}
}

// startStranger starts the stranger and returns how far it came, what it has seen,
// and the lines that it prints from then on.
func startStranger(t *testing.T, network string, local, remote net.Addr, option, goal string) (came, saw string, lines *bufio.Scanner) {
	t.Helper()
	lines = startChild(t, "stranger", strangerEnv+"="+strings.Join([]string{network, local.String(), remote.String(), option, goal}, " "))
	for _, line := range []*string{&came, &saw} {
		if !lines.Scan() {
			t.Fatal("the stranger says nothing:", lines.Err())
		}
		*line = lines.Text()
	}
	return came, saw, lines
}

// What another user of the machine comes to who goes for the 4-tuple of a
// connection, or for its port. docs/port-secrecy.md has these lines.
func TestWhatAnotherUserCanDo(t *testing.T) {
	tests := []struct {
		network, option, goal string
		want                  string
	}{
		{"udp", "none", "connect", "bind EADDRINUSE"},
		{"udp", "SO_REUSEPORT", "connect", "bind EADDRINUSE"},
		{"udp", "SO_REUSEADDR", "stay", "succeeds"},
		{"udp", "SO_REUSEADDR", "connect", "succeeds"},
		{"tcp", "none", "connect", "bind EADDRINUSE"},
		{"tcp", "SO_REUSEPORT", "connect", "bind EADDRINUSE"},
		{"tcp", "SO_REUSEADDR", "connect", "connect EADDRNOTAVAIL"},
		{"tcp", "SO_REUSEADDR", "listen", "succeeds"},
	}
	needUsers(t)
	for _, tt := range tests {
		t.Run(tt.network+" with "+tt.option+" to "+tt.goal, func(t *testing.T) {
			ownNamespace(t, 40000, 40019)
			address := echo(t, tt.network, "127.1.0.1")
			conn, err := connectx.Dial(tt.network, address)
			if err != nil {
				t.Fatal(err)
			}
			defer hangUp(conn)
			came, saw, lines := startStranger(t, tt.network, conn.LocalAddr(), conn.RemoteAddr(), tt.option, tt.goal)
			if came != tt.want {
				t.Errorf("it %s, want %s", came, tt.want)
			}
			if taken := tt.network == "udp" && tt.goal == "connect" && came == "succeeds"; taken {
				if want := fmt.Sprintf("uid %d", strangerUID); saw != want {
					t.Errorf("sock_diag says %s, want %s", saw, want)
				}
				checkTakenOver(t, conn, lines)
				return
			}
			// Whose connection it is can be seen by all.
			if want := fmt.Sprintf("uid %d", os.Getuid()); saw != want {
				t.Errorf("sock_diag says %s, want %s", saw, want)
			}
			checkEcho(t, conn)
		})
	}
}

// checkTakenOver checks that what the peer sends comes to the stranger, and not to
// the connection.
func checkTakenOver(t *testing.T, conn net.Conn, lines *bufio.Scanner) {
	t.Helper()
	if _, err := conn.Write([]byte("secret")); err != nil {
		t.Fatal(err)
	}
	if !lines.Scan() || lines.Text() != "received secret" {
		t.Errorf("the stranger says %q: %v", lines.Text(), lines.Err())
	}
	conn.SetReadDeadline(time.Unix(1, 0)) // it has been delivered
	if n, err := conn.Read(make([]byte, 100)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection has received %d bytes: %v", n, err)
	}
}

// What a dial makes of a stranger who was there first: it never takes anything from
// them, and finds another port where it may.
func TestWhatAnotherUserHasIsNotTaken(t *testing.T) {
	tests := []struct {
		option, goal string
		want         string
	}{
		{"none", "stay", "held by a socket that does not share it"},
		{"none", "connect", "the 4-tuple is in use"},
		{"SO_REUSEADDR", "stay", "held by a socket that does not share it"},
		{"SO_REUSEADDR", "connect", "the 4-tuple is in use"},
	}
	needUsers(t)
	for _, tt := range tests {
		t.Run("with "+tt.option+" to "+tt.goal, func(t *testing.T) {
			ownNamespace(t, 40000, 40001)
			address := echo(t, "udp", "127.1.0.1")
			local := localAddr("udp", "127.2.0.1", 40000)
			came, _, _ := startStranger(t, "udp", local, net.UDPAddrFromAddrPort(netip.MustParseAddrPort(address)), tt.option, tt.goal)
			if came != "succeeds" {
				t.Fatal("the stranger's", came)
			}
			d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: local}}
			if _, err := d.Dial("udp", address); !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("a dial from the stranger's port: %v", err)
			}
			d.LocalAddr = localAddr("udp", "127.2.0.1", 0)
			conn, err := d.Dial("udp", address)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if port := portOf(conn.LocalAddr()); port != 40001 {
				t.Errorf("port %d", port)
			}
			checkEcho(t, conn)
		})
	}
}

// While a port is locked, no option gets another user on it. The socket here is as a
// dial has it between bind and setsockopt.
func TestAnotherUserCannotBindALockedPort(t *testing.T) {
	needUsers(t)
	ownNamespace(t, 40000, 40019)
	local := &unix.SockaddrInet4{Addr: [4]byte{127, 2, 0, 1}, Port: 40000}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	var got []string
	for _, step := range []func() error{
		func() error { return unix.Bind(fd, local) },
		func() error {
			return unix.Connect(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 1, 0, 1}, Port: echoPort})
		},
		func() error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
		for _, option := range []string{"SO_REUSEADDR", "SO_REUSEPORT"} {
			came, _, _ := startStranger(t, "udp", localAddr("udp", "127.2.0.1", 40000), localAddr("udp", "127.1.0.1", echoPort), option, "stay")
			got = append(got, option+" "+came)
		}
	}
	want := []string{
		"SO_REUSEADDR bind EADDRINUSE", "SO_REUSEPORT bind EADDRINUSE", // bound
		"SO_REUSEADDR bind EADDRINUSE", "SO_REUSEPORT bind EADDRINUSE", // connected
		"SO_REUSEADDR succeeds", "SO_REUSEPORT bind EADDRINUSE", // shared
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
