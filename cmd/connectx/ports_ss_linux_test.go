package main

import (
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// ssFlows counts as ss of iproute2 sees it: the distinct ports of the range
// for each source and destination, in TIME_WAIT or not.
func ssFlows(t *testing.T, protocol string, low, high uint16) map[string][2]int {
	t.Helper()
	if _, err := exec.LookPath("ss"); err != nil {
		t.Skipf("compares with ss of iproute2: %v", err)
	}
	out, err := exec.Command("ss", "-H", "-a", "-n", "--"+protocol).Output()
	if err != nil {
		t.Fatal(err)
	}
	type tuple struct{ local, remote netip.AddrPort }
	states := make(map[tuple]string)
	listening := make(map[netip.AddrPort]bool)
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		if len(f) < 5 {
			t.Fatalf("ss wrote %q", line)
		}
		local, err := ssAddress(f[3])
		if err != nil {
			t.Fatal(err)
		}
		switch f[0] {
		case "LISTEN":
			listening[local] = true
		case "UNCONN":
		default:
			remote, err := ssAddress(f[4])
			if err != nil {
				t.Fatal(err)
			}
			states[tuple{local, remote}] = f[0]
		}
	}
	flows := make(map[string][2]int)
	for s, state := range states {
		port, any := s.local.Port(), netip.IPv6Unspecified()
		if s.local.Addr().Is4() {
			any = netip.IPv4Unspecified()
		}
		accepted := listening[s.local] || listening[netip.AddrPortFrom(any, port)] || listening[netip.AddrPortFrom(netip.IPv6Unspecified(), port)]
		if port < low || port > high || accepted {
			continue
		}
		key := fmt.Sprintf("%v %v", s.local.Addr(), s.remote)
		n := flows[key]
		if state == "TIME-WAIT" {
			n[1]++
		} else {
			n[0]++
		}
		flows[key] = n
	}
	return flows
}

func ssAddress(s string) (netip.AddrPort, error) {
	s = strings.Replace(s, "*:", "[::]:", 1)
	if strings.HasSuffix(s, ":*") {
		s = strings.TrimSuffix(s, "*") + "0"
	}
	a, err := netip.ParseAddrPort(s)
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()), err
}

// checkAgainstSS compares both protocols and families.
func checkAgainstSS(t *testing.T, r *portsReport) {
	t.Helper()
	for _, protocol := range []string{"tcp", "udp"} {
		got := make(map[string][2]int)
		for _, s := range r.Sections {
			if s.Protocol != protocol {
				continue
			}
			for _, f := range s.Flows {
				got[fmt.Sprintf("%v %v", f.Source, f.Destination)] = [2]int{f.InUse, f.TimeWait}
				if sum := f.InUse + f.TimeWait + f.Held + f.Free; sum != r.Range.Ports {
					t.Errorf("%s: the counts of %+v are %d ports together, want %d", protocol, f, sum, r.Range.Ports)
				}
			}
		}
		if diff := cmp.Diff(ssFlows(t, protocol, r.Range.Low, r.Range.High), got); diff != "" {
			t.Errorf("%s: ports in use and in TIME_WAIT (-ss +connectx):\n%s", protocol, diff)
		}
	}
}

// mix opens sockets of all kinds, some 9 × n of them.
func mix(t *testing.T, n int) {
	t.Helper()
	hosts := []string{"127.0.1.1", "[::1]"}
	// Listeners within the range, whose connections are not of this host's choice.
	for _, inRange := range []struct{ local, remote string }{
		{"127.0.1.1:40001", "127.0.1.1:40001"}, {"[::1]:40001", "[::1]:40001"},
		{"0.0.0.0:40002", "127.0.1.1:40002"}, {"[::]:40003", "127.0.1.1:40003"},
	} {
		openSocket(t, portsSocket{protocol: "tcp", local: inRange.local, listen: true})
		openSocket(t, portsSocket{protocol: "tcp", remote: inRange.remote})
	}
	for _, host := range hosts {
		server := host + ":443"
		listener := openSocket(t, portsSocket{protocol: "tcp", local: server, listen: true})
		for range n {
			openSocket(t, portsSocket{protocol: "tcp", remote: server})
			accept(t, listener)
			openSocket(t, portsSocket{protocol: "udp", remote: host + ":53"})
		}
		for range n / 4 {
			leaveTimeWait(t, listener, server)
			openSocket(t, portsSocket{protocol: "udp", remote: host + ":5353"})
			openSocket(t, portsSocket{protocol: "udp", local: strings.Replace(host, "127.0.1.1", "127.0.0.1", 1) + ":0"})
			openSocket(t, portsSocket{protocol: "tcp", local: host + ":0", listen: true})
			openSocket(t, portsSocket{protocol: "tcp", local: host + ":0", remote: server})
			accept(t, listener)
		}

		// With one connection in a queue of one, the next stays in SYN_SENT.
		full := openSocket(t, portsSocket{protocol: "tcp", local: host + ":444", listen: true})
		if err := unix.Listen(full, 0); err != nil {
			t.Fatal(err)
		}
		openSocket(t, portsSocket{protocol: "tcp", remote: host + ":444"})
		beginToConnect(t, host+":444")
	}
}

func accept(t *testing.T, listener int) {
	t.Helper()
	fd, _, err := unix.Accept(listener)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
}

// beginToConnect does not wait for the connection.
func beginToConnect(t *testing.T, remote string) {
	t.Helper()
	family := unix.AF_INET
	if remote[0] == '[' {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Connect(fd, portsSockaddr(remote)); err != unix.EINPROGRESS {
		t.Fatalf("connect to a full queue: %v", err)
	}
}

func TestPortsAgreeWithSS(t *testing.T) {
	enterPorts(t, 40000, 40999)
	mix(t, 40)
	r := reportPorts(t, "-n", "0")
	checkAgainstSS(t, r)

	held := make(map[string]int)
	for _, s := range r.Sections {
		held[s.Protocol+" "+s.Family] = s.Held
	}
	want := map[string]int{
		"tcp IPv4": 3 + 10 + 10, // the listeners within the range, the others, bound before connect
		"tcp IPv6": 2 + 10 + 10,
		"udp IPv4": 40 + 10 + 10, // all
		"udp IPv6": 40 + 10 + 10,
	}
	if diff := cmp.Diff(want, held); diff != "" {
		t.Errorf("ports that are held (-want +got):\n%s", diff)
	}
}

func TestPortsWithTenThousandSockets(t *testing.T) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if limit.Cur < 12000 {
		t.Skipf("RLIMIT_NOFILE is %d", limit.Cur)
	}
	enterPorts(t, 32768, 60999)
	mix(t, 1250)
	start := time.Now()
	r := reportPorts(t, "-n", "0")
	took := time.Since(start)
	sockets := 0
	for _, s := range r.Sections {
		for _, f := range s.Flows {
			sockets += f.InUse + f.TimeWait
		}
	}
	t.Logf("%v, %d ports in flows", took, sockets)
	// It is a second on a machine with nothing else to do.
	if took > 10*time.Second {
		t.Errorf("took %v", took)
	}
	checkAgainstSS(t, r)
}
