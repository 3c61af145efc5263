package lookup

import (
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// Many questions at once have the answers of as many single ones.
func TestPortsHaveTheAnswersOfSingleQuestions(t *testing.T) {
	for _, host := range []string{"127.0.0.1", "::1"} {
		t.Run(host, func(t *testing.T) {
			addr := netip.MustParseAddr(host)
			if addr.Is6() {
				needIPv6(t)
			}
			free := freePorts(t, MaxPorts+1)
			ports, remote := free[:MaxPorts], netip.AddrPortFrom(addr, free[MaxPorts])

			var config net.ListenConfig
			config.SetMultipathTCP(false)
			listener, err := config.Listen(t.Context(), "tcp", remote.String())
			check(t, err)
			defer listener.Close()
			for i, port := range ports {
				local := netip.AddrPortFrom(addr, port)
				switch i % 4 {
				case 0:
					openSocket(t, spec{bind: local, connect: remote})
				case 1:
					openSocket(t, spec{bind: local})
				}
				if i%3 == 0 {
					d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(local)}
					conn, err := d.Dial("tcp", remote.String())
					check(t, err)
					defer conn.Close()
				}
			}

			for _, buffer := range []string{"large", "small"} {
				c := openConn(t)
				if buffer == "small" {
					// Two replies and no more.
					check(t, unix.SetsockoptInt(c.diag.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1))
				}
				for _, protocol := range []struct {
					name string
					one  func(local, remote netip.AddrPort, ifindex uint32) (Socket, error)
					many func(local netip.Addr, ports []uint16, remote netip.AddrPort, ifindex uint32) ([]Socket, error)
				}{
					{"UDP", c.UDP, c.UDPPorts},
					{"TCP", c.TCP, c.TCPPorts},
				} {
					var want []Socket
					found := 0
					for _, port := range ports {
						s, err := protocol.one(netip.AddrPortFrom(addr, port), remote, 0)
						if err != nil && err != ErrNotFound {
							t.Fatal(err)
						}
						if err == nil {
							found++
						}
						want = append(want, s)
					}
					if found < MaxPorts/4 || found > MaxPorts*3/4 {
						t.Errorf("%s: %d of %d are found", protocol.name, found, MaxPorts)
					}
					for _, n := range []int{MaxPorts, 1, 7, 0, MaxPorts} {
						got, err := protocol.many(addr, ports[:n], remote, 0)
						check(t, err)
						if diff := cmp.Diff(want[:n], append([]Socket{}, got...), comparable); n > 0 && diff != "" {
							t.Errorf("%s, %d ports, %s buffer (-want +got):\n%s", protocol.name, n, buffer, diff)
						}
						if len(got) != n {
							t.Errorf("%s: %d answers for %d ports", protocol.name, len(got), n)
						}
					}
				}
			}
		})
	}
}

func TestPortsAllocateNothing(t *testing.T) {
	c := openConn(t)
	ports := freePorts(t, MaxPorts)
	local, remote := netip.MustParseAddr("127.0.0.1"), netip.MustParseAddrPort("127.0.0.2:9")
	openSocket(t, spec{bind: netip.AddrPortFrom(local, ports[0])})
	allocs := testing.AllocsPerRun(100, func() {
		if _, err := c.UDPPorts(local, ports, remote, 0); err != nil {
			t.Fatal(err)
		}
	})
	if allocs != 0 {
		t.Errorf("%v allocations", allocs)
	}
}

func TestPortsRejectsWhatItCannotAnswer(t *testing.T) {
	c := openConn(t)
	four, six := netip.MustParseAddr("127.0.0.1"), netip.MustParseAddrPort("[::1]:9")
	for _, tt := range []struct {
		name   string
		local  netip.Addr
		ports  int
		remote netip.AddrPort
		want   string
	}{
		{"two families", four, 1, six, "not of one family"},
		{"no local address", netip.Addr{}, 1, six, "not of one family"},
		{"no remote address", four, 1, netip.AddrPort{}, "not of one family"},
		{"too many ports", six.Addr(), MaxPorts + 1, six, "65 ports at once, the limit is 64"},
	} {
		_, err := c.UDPPorts(tt.local, make([]uint16, tt.ports), tt.remote, 0)
		if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "lookup udp") {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}
