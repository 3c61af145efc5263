//go:build linux

package connectx_test

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
)

// tcpCounters reads the counters of the namespace that begin with TCPFastOpen,
// those which are not 0 (/proc/net/netstat).
func tcpCounters(t *testing.T) map[string]int {
	t.Helper()
	b, err := os.ReadFile("/proc/thread-self/net/netstat")
	if err != nil {
		t.Fatal(err)
	}
	names, rest, _ := strings.Cut(string(b), "\n")
	values, _, _ := strings.Cut(rest, "\n")
	counters := make(map[string]int)
	all := strings.Fields(values)
	for i, name := range strings.Fields(names) {
		n, err := strconv.Atoi(all[i])
		if err == nil && n != 0 && strings.HasPrefix(name, "TCPFastOpen") && name != "TCPFastOpenCookieReqd" {
			counters[name] = n
		}
	}
	return counters
}

// fastEcho is echo for TCP, with fast open on the listening socket if queue is
// not 0.
func fastEcho(t *testing.T, network, host string, queue int) net.Listener {
	t.Helper()
	var config net.ListenConfig
	if queue != 0 {
		config.Control = setSocketOption(unix.SOL_TCP, unix.TCP_FASTOPEN, queue)
	}
	listener, err := config.Listen(t.Context(), network, net.JoinHostPort(host, strconv.Itoa(echoPort)))
	if err != nil {
		t.Fatal(err)
	}
	serveEcho(t, listener)
	return listener
}

func setFastOpen(t *testing.T, bits int) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/net/ipv4/tcp_fastopen", []byte(strconv.Itoa(bits)), 0); err != nil {
		t.Fatal(err)
	}
}

// The second dial to a server sends its data in the SYN, whatever the caller
// chooses. The counters are the kernel's own.
func TestFastOpen(t *testing.T) {
	for _, family := range families {
		for _, row := range []struct {
			name  string
			local func(i int) net.Addr
			own   connectx.PortRange
		}{
			{name: "destination only", local: func(int) net.Addr { return nil }},
			{name: "source IP", local: func(int) net.Addr { return localAddr("tcp", family.source, 0) }},
			{name: "source IP and port", local: func(i int) net.Addr { return localAddr("tcp", family.source, uint16(40000+i)) }},
			{name: "port only", local: func(i int) net.Addr { return localAddr("tcp", "", uint16(40000+i)) }},
			{name: "port range", local: func(int) net.Addr { return nil }, own: connectx.PortRange{Low: 40005, High: 40009}},
			{name: "port range outside", local: func(int) net.Addr { return nil }, own: connectx.PortRange{Low: 20000, High: 20009}},
		} {
			t.Run(family.name+", "+row.name, func(t *testing.T) {
				ownNamespace(t, 40000, 40019)
				setFastOpen(t, 3) // client and server
				address := fastEcho(t, "tcp"+family.suffix, family.hosts[0], 16).Addr().String()
				const dials = 4
				for i := range dials {
					d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: row.local(i)}, PortRange: row.own, FastOpen: true}
					conn, err := d.Dial("tcp", address)
					if err != nil {
						t.Fatal(err)
					}
					defer hangUp(conn)
					checkEcho(t, conn)
				}
				want := map[string]int{"TCPFastOpenActive": dials - 1, "TCPFastOpenPassive": dials - 1}
				if diff := cmp.Diff(want, tcpCounters(t)); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
			})
		}
	}
}

// Where the kernel or the peer does not do it, the same program works.
func TestFastOpenFallsBack(t *testing.T) {
	tests := []struct {
		name  string
		bits  int
		queue int
	}{
		{"the peer does not do it", 3, 0},
		{"the kernel does not do it", 0, 16},
		{"the kernel does not do it as a client", 2, 16},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ownNamespace(t, 40000, 40019)
			setFastOpen(t, tt.bits)
			address := fastEcho(t, "tcp", "127.1.0.1", tt.queue).Addr().String()
			for range 4 {
				d := connectx.Dialer{FastOpen: true}
				conn, err := d.Dial("tcp", address)
				if err != nil {
					t.Fatal(err)
				}
				defer hangUp(conn)
				checkEcho(t, conn)
			}
			if got := tcpCounters(t); len(got) != 0 {
				t.Errorf("%v", got)
			}
		})
	}

	t.Run("the peer does it no longer", func(t *testing.T) {
		ownNamespace(t, 40000, 40019)
		setFastOpen(t, 3)
		address := fastEcho(t, "tcp", "127.1.0.1", 16).Addr().String()
		d := connectx.Dialer{FastOpen: true}
		for i := range 4 {
			if i == 2 {
				setFastOpen(t, 1)
			}
			conn, err := d.Dial("tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			defer hangUp(conn)
			checkEcho(t, conn)
		}
		if got := tcpCounters(t); got["TCPFastOpenActive"] != 1 || got["TCPFastOpenActiveFail"] == 0 {
			t.Errorf("%v", got)
		}
	})
}

// A connection that has not sent anything yet holds its 4-tuple as any other
// does, and says what is wrong with the peer when it is written to.
func TestFastOpenBeforeTheFirstWrite(t *testing.T) {
	const low, high = 40000, 40009
	ownNamespace(t, low, high)
	setFastOpen(t, 3)
	address := fastEcho(t, "tcp", "127.1.0.1", 16).Addr().String()
	d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: localAddr("tcp", "127.2.0.1", 0)}, FastOpen: true}
	first, err := d.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	checkEcho(t, first)
	hangUp(first)

	conns := fillUp(t, &d, "tcp", address)
	checkPorts(t, conns, connectx.PortRange{Low: low, High: high}, high-low+1)
	if got := tcpCounters(t)["TCPFastOpenActive"]; got != high-low+1 {
		t.Errorf("%d connections with data in the SYN, want %d", got, high-low+1)
	}
}

func TestFastOpenToAServerThatIsGone(t *testing.T) {
	ownNamespace(t, 40000, 40019)
	setFastOpen(t, 3)
	server := fastEcho(t, "tcp", "127.1.0.1", 16)
	address := server.Addr().String()
	d := connectx.Dialer{FastOpen: true}
	first, err := d.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	checkEcho(t, first)
	hangUp(first)
	server.Close()

	conn, err := d.Dial("tcp", address)
	if err != nil {
		t.Fatalf("a dial with a cookie is done at once, but: %v", err)
	}
	defer hangUp(conn)
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	_, err = fmt.Fprint(conn, "anybody there?")
	if err == nil {
		_, err = conn.Read(make([]byte, 1))
	}
	if err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("%v, want connection refused", err)
	}
}
