package main

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/netns"
)

// What the summary says must be what a program sees that tries.
func TestPortsVerdicts(t *testing.T) {
	const (
		server     = "127.0.1.1:443"
		other      = "127.0.1.2:443"
		third      = "127.0.1.3:443"
		onLoopback = "10.0.0.1:443" // on that interface, but no loopback address
		server6    = "[::1]:443"

		tcpConnect, tcpBind = "tcp connect", "tcp bind-before-connect"
		udpConnect, udpBind = "udp connect", "udp bind-before-connect"
	)
	open := func(n int, s portsSocket) func(*testing.T) {
		return func(t *testing.T) {
			for range n {
				openSocket(t, s)
			}
		}
	}
	fill := func(s portsSocket) func(*testing.T) {
		return func(t *testing.T) {
			for {
				fd, err := tryOpen(t, s)
				if err != nil {
					return
				}
				t.Cleanup(func() { unix.Close(fd) })
			}
		}
	}
	timeWaits := func(server, reuse string) func(*testing.T) {
		return func(t *testing.T) {
			setSysctl(t, "tcp_tw_reuse", reuse)
			listener := openSocket(t, portsSocket{protocol: "tcp", local: server, listen: true})
			for range 20 {
				leaveTimeWait(t, listener, server)
			}
		}
	}
	both := func(first, second func(*testing.T)) func(*testing.T) {
		return func(t *testing.T) { first(t); second(t) }
	}
	tests := []struct {
		name  string
		setUp func(t *testing.T)
		fails []string // ways that fail somewhere
	}{
		{"nobody is there", func(*testing.T) {}, nil},
		{"TCP: half of the ports to one destination", open(10, portsSocket{protocol: "tcp", remote: server}), nil},
		{"TCP: all ports to one destination", fill(portsSocket{protocol: "tcp", remote: server}), []string{tcpBind, tcpConnect}},
		{"TCP: all ports to one IPv6 destination", fill(portsSocket{protocol: "tcp", remote: server6}), []string{tcpBind, tcpConnect}},
		{"TCP: all ports in TIME_WAIT", timeWaits(third, "0"), []string{tcpBind, tcpConnect}},
		{"TCP: all ports in TIME_WAIT, reused on loopback", timeWaits(third, "2"), []string{tcpBind}},
		{"TCP: all ports in TIME_WAIT, reused on loopback only", timeWaits(onLoopback, "2"), []string{tcpBind, tcpConnect}},
		{"TCP: all ports in TIME_WAIT, reused everywhere", timeWaits(onLoopback, "1"), []string{tcpBind}},
		{"TCP: all ports bound before connect", fill(portsSocket{protocol: "tcp", local: "127.0.0.1:0", remote: other}), []string{tcpBind, tcpConnect}},
		{"TCP: all ports bound before connect, with IPv6", fill(portsSocket{protocol: "tcp", local: "[::1]:0", remote: server6}), []string{tcpBind, tcpConnect}},
		{"TCP: all ports bound, not connected", fill(portsSocket{protocol: "tcp", local: "0.0.0.0:0"}), []string{tcpBind, tcpConnect}},
		{"TCP: half of the ports bound before connect, the rest to one destination", both(
			open(10, portsSocket{protocol: "tcp", local: "127.0.0.1:0", remote: other}),
			fill(portsSocket{protocol: "tcp", remote: server}),
		), []string{tcpBind, tcpConnect}},
		{"TCP: all ports bound with SO_REUSEADDR", func(t *testing.T) {
			for port := 40000; port <= 40019; port++ {
				openSocket(t, portsSocket{protocol: "tcp", local: fmt.Sprintf("127.0.0.1:%d", port), remote: other, reuse: true})
			}
		}, []string{tcpBind, tcpConnect}},
		{"UDP: all ports but one", open(19, portsSocket{protocol: "udp", remote: server}), nil},
		{"UDP: all ports", fill(portsSocket{protocol: "udp", remote: server}), []string{udpBind, udpConnect}},
		{"UDP: all ports, with IPv6", fill(portsSocket{protocol: "udp", remote: server6}), []string{udpBind, udpConnect}},
		{"UDP: all ports bound to another address", both(
			fill(portsSocket{protocol: "udp", local: "127.0.0.2:0"}),
			open(1, portsSocket{protocol: "udp", local: "127.0.0.1:0", remote: server}),
		), []string{udpBind, udpConnect}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			enterPorts(t, 40000, 40019)
			if err := netns.LoopbackUp("10.0.0.1/32"); err != nil {
				t.Fatal(err)
			}
			for _, local := range []string{server, other, server6} {
				openSocket(t, portsSocket{protocol: "tcp", local: local, listen: true})
			}
			tt.setUp(t)

			var fails []string
			for _, s := range reportPorts(t).Sections {
				// Bind first, since connect may reuse what is in TIME_WAIT.
				for _, v := range slices.Backward(s.Verdicts) {
					way := s.Protocol + " " + v.Way
					if !v.Works && !slices.Contains(fails, way) {
						fails = append(fails, way)
					}
					checkVerdict(t, s.Protocol, s.Family, v)
				}
			}
			slices.Sort(fails)
			if diff := cmp.Diff(tt.fails, fails); diff != "" {
				t.Errorf("said to fail (-want +got):\n%s", diff)
			}
		})
	}
}

// checkVerdict tries what the verdict is about, in all ways there are here.
func checkVerdict(t *testing.T, protocol, family string, v portsVerdict) {
	t.Helper()
	pairs := [][2]string{
		{"127.0.0.1", "127.0.1.1:443"}, {"127.0.0.1", "127.0.1.2:443"}, {"127.0.0.1", "127.0.1.3:443"}, {"10.0.0.1", "10.0.0.1:443"},
	}
	if family == "IPv6" {
		pairs = [][2]string{{"::1", "[::1]:443"}}
	}
	for _, pair := range pairs {
		party := portsParty{netip.MustParseAddr(pair[0]), netip.MustParseAddrPort(pair[1])}
		s := portsSocket{protocol: protocol, remote: pair[1]}
		if v.Way == wayBind {
			party.Destination = netip.AddrPort{}
			s = portsSocket{protocol: protocol, local: netip.AddrPortFrom(party.Source, 0).String()}
		}
		checkParty(t, v, party, s, protocol, family)
	}
}

func checkParty(t *testing.T, v portsVerdict, party portsParty, s portsSocket, protocol, family string) {
	t.Helper()
	works := v.Works || len(v.FailsFor) > 0 && !slices.Contains(v.FailsFor, party)
	fd, err := tryOpen(t, s)
	// A 4-tuple in TIME_WAIT is reused a second after its connection ended.
	for deadline := time.Now().Add(10 * time.Second); works && portTaken(err) && time.Now().Before(deadline); {
		fd, err = tryOpen(t, s)
	}
	if err == nil {
		closeNow(fd)
	}
	if errors.Is(err, unix.ECONNREFUSED) {
		err = nil // there was a port for it
	}
	if works != (err == nil) {
		t.Errorf("%s/%s %s for %v is said to work: %t, and gives %v", protocol, family, v.Way, party, works, err)
	}
	if err != nil && !works && (v.Errno != unix.ErrnoName(errnoOf(err)) || v.Error != err.Error()) {
		t.Errorf("%s/%s %s for %v fails with %v, not %s (%s)", protocol, family, v.Way, party, err, v.Error, v.Errno)
	}
	if !works && (v.Advice == "" || strings.Contains(v.Advice, "\n")) {
		t.Errorf("advice %q", v.Advice)
	}
}

func portTaken(err error) bool {
	return errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EAGAIN)
}

func errnoOf(err error) unix.Errno {
	var errno unix.Errno
	errors.As(err, &errno)
	return errno
}

// closeNow ends a connection without TIME_WAIT.
func closeNow(fd int) {
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	unix.Close(fd)
}
