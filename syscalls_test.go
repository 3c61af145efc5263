//go:build linux

package connectx_test

import (
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/seccomp"
)

// watchedCalls are those that a dial can have anything to do with. Go's runtime
// makes others at any time.
var watchedCalls = map[uint32]string{
	unix.SYS_SOCKET: "socket", unix.SYS_BIND: "bind", unix.SYS_CONNECT: "connect",
	unix.SYS_SETSOCKOPT: "setsockopt", unix.SYS_GETSOCKOPT: "getsockopt",
	unix.SYS_GETSOCKNAME: "getsockname", unix.SYS_GETPEERNAME: "getpeername",
	unix.SYS_SENDTO: "sendto", unix.SYS_RECVFROM: "recvfrom",
	unix.SYS_SENDMSG: "sendmsg", unix.SYS_RECVMSG: "recvmsg",
	unix.SYS_SENDMMSG: "sendmmsg", unix.SYS_RECVMMSG: "recvmmsg",
	unix.SYS_READ: "read", unix.SYS_WRITE: "write", unix.SYS_IOCTL: "ioctl", unix.SYS_FCNTL: "fcntl",
	unix.SYS_OPENAT: "openat", unix.SYS_CLOSE: "close", unix.SYS_DUP3: "dup3",
	unix.SYS_EPOLL_CTL: "epoll_ctl",
}

var watchedOptions = map[[2]uint32]string{
	{unix.SOL_SOCKET, unix.SO_REUSEADDR}:        "SO_REUSEADDR",
	{unix.SOL_SOCKET, unix.SO_BROADCAST}:        "SO_BROADCAST",
	{unix.SOL_SOCKET, unix.SO_NETNS_COOKIE}:     "SO_NETNS_COOKIE",
	{unix.SOL_SOCKET, unix.SO_COOKIE}:           "SO_COOKIE",
	{unix.SOL_SOCKET, unix.SO_ERROR}:            "SO_ERROR",
	{unix.SOL_SOCKET, unix.SO_KEEPALIVE}:        "SO_KEEPALIVE",
	{unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT}: "IP_BIND_ADDRESS_NO_PORT",
	{unix.SOL_IP, unix.IP_LOCAL_PORT_RANGE}:     "IP_LOCAL_PORT_RANGE",
	{unix.SOL_TCP, unix.TCP_NODELAY}:            "TCP_NODELAY",
	{unix.SOL_TCP, unix.TCP_KEEPIDLE}:           "TCP_KEEPIDLE",
	{unix.SOL_TCP, unix.TCP_KEEPINTVL}:          "TCP_KEEPINTVL",
	{unix.SOL_TCP, unix.TCP_KEEPCNT}:            "TCP_KEEPCNT",
}

// The table of system calls in the documentation is what the kernel sees.
func TestSystemCallsOfADial(t *testing.T) {
	b, err := os.ReadFile("docs/system-calls.md")
	if err != nil {
		t.Fatal(err)
	}
	columns, want := systemCallTable(t, string(b))
	for _, column := range columns {
		t.Run(column, func(t *testing.T) {
			t.Parallel()
			ownNamespace(t, 32768, 60999)
			destinations := echo(t, "tcp", "127.1.0.1") + " " + echo(t, "udp", "127.1.0.1")
			got := strings.Split(runChild(t, "system calls", "DESTINATIONS="+destinations, "COLUMN="+column), "\n")
			if diff := cmp.Diff(want[column], got); diff != "" {
				t.Errorf("(-documented +seen):\n%s", diff)
			}
		})
	}
}

// systemCallTable reads the first table of a Markdown text: the calls of each
// column whose cells are numbers.
func systemCallTable(t *testing.T, text string) (columns []string, calls map[string][]string) {
	t.Helper()
	calls = make(map[string][]string)
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "|") {
			if columns != nil {
				break
			}
			continue
		}
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		if columns == nil {
			columns = cells[1 : len(cells)-2]
			continue
		}
		for i, column := range columns {
			if cells[i+1] == "1" {
				calls[column] = append(calls[column], cells[0])
			}
		}
	}
	if len(columns) == 0 {
		t.Fatal("no table")
	}
	return columns, calls
}

func init() {
	children["system calls"] = func() int {
		tcp, udp, _ := strings.Cut(os.Getenv("DESTINATIONS"), " ")
		protocol, chosen, _ := strings.Cut(os.Getenv("COLUMN"), ", ")
		network, destination := strings.ToLower(protocol), tcp
		if network == "udp" {
			destination = udp
		}
		var d connectx.Dialer
		d.SetMultipathTCP(false)
		switch chosen {
		case "address":
			d.LocalAddr = localAddr(network, "127.2.0.1", 0)
		case "port":
			d.LocalAddr = localAddr(network, "127.2.0.1", 40005)
		case "shared port":
			d.LocalAddr = localAddr(network, "127.2.0.1", 40005)
			other, err := d.Dial(network, "127.1.0.2:9")
			if err != nil {
				return failChild("%v", err)
			}
			defer other.Close()
		}
		return printSystemCalls(&d, network, destination)
	}
}

// printSystemCalls prints what a dial that follows others asks of the kernel.
func printSystemCalls(d *connectx.Dialer, network, destination string) int {
	runtime.LockOSThread()
	// The addresses of the namespace are new, and until they are a second old
	// no route is kept.
	for start := time.Now(); time.Since(start) < 1100*time.Millisecond; {
		conn, err := d.Dial(network, destination)
		if err != nil {
			return failChild("%v", err)
		}
		hangUp(conn)
	}

	var seen [10][100][4]uint32 // by dial: the number and the first three arguments
	var counts [len(seen)]int
	var dial, written atomic.Int32 // the dial that is being watched, else -1
	dial.Store(-1)
	var numbers []uint32
	for nr := range watchedCalls {
		numbers = append(numbers, nr)
	}
	err := beforeEach(numbers, func(data []byte) {
		i := dial.Load()
		if i < 0 || counts[i] == len(seen[i]) {
			return
		}
		call := &seen[i][counts[i]]
		counts[i]++
		call[0] = binary.NativeEndian.Uint32(data)
		for j := range 3 {
			call[1+j] = binary.NativeEndian.Uint32(data[seccomp.OffsetArguments+8*j:])
		}
		written.Add(1) // what is written here may be read after a Load
	})
	if err != nil {
		return failChild("%v", err)
	}
	// The shortest of several, since now and then a dial reads the port range,
	// or finds that the handshake takes a moment longer.
	best := 0
	for i := range seen {
		dial.Store(int32(i))
		conn, err := d.Dial(network, destination)
		dial.Store(-1)
		if err != nil {
			return failChild("%v", err)
		}
		hangUp(conn)
		written.Load()
		if counts[i] < counts[best] {
			best = i
		}
	}
	for _, call := range seen[best][:counts[best]] {
		name := watchedCalls[call[0]]
		if name == "setsockopt" || name == "getsockopt" {
			option, ok := watchedOptions[[2]uint32{call[2], call[3]}]
			if !ok {
				option = fmt.Sprintf("%d, %d", call[2], call[3])
			}
			name += " " + option
		}
		fmt.Println(name)
	}
	return 0
}
