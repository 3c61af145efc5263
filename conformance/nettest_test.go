//go:build linux

package conformance

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/net/nettest"

	"github.com/seed22601231/connectx"
)

// The connections stand up to what golang.org/x/net/nettest asks of a net.Conn.
func TestTCP(t *testing.T) {
	for _, host := range []string{"127.0.0.1", "::1"} {
		for _, dialer := range dialers {
			t.Run(dialer.name+" to "+host, func(t *testing.T) {
				nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
					listener, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
					if err != nil {
						return nil, nil, nil, err
					}
					defer listener.Close()
					c1, err = dialer.of(net.Dialer{})(context.Background(), "tcp", listener.Addr().String())
					if err != nil {
						return nil, nil, nil, err
					}
					c2, err = listener.Accept()
					if err != nil {
						c1.Close()
						return nil, nil, nil, err
					}
					return c1, c2, func() { c1.Close(); c2.Close() }, nil
				})
			})
		}
	}
}

// datagramTests are the tests of nettest that a UDP socket can pass: the others
// want a stream that ends or loses nothing, or a write that blocks.
const datagramTests = "RacyRead|ReadTimeout|PastTimeout|FutureTimeout|CloseTimeout|ConcurrentMethods"

// udpEnv selects, in a process that TestUDP starts, what TestUDPConn is about.
const udpEnv = "CONNECTX_CONFORMANCE_UDP"

// udpConns dial the two ends of a UDP connection.
var udpConns = map[string]func(laddr, raddr netip.AddrPort) (net.Conn, error){
	"net.UDPConn": func(laddr, raddr netip.AddrPort) (net.Conn, error) {
		return net.DialUDP("udp", net.UDPAddrFromAddrPort(laddr), net.UDPAddrFromAddrPort(raddr))
	},
	"connectx.Dialer": func(laddr, raddr netip.AddrPort) (net.Conn, error) {
		var d connectx.Dialer
		return d.DialUDP(context.Background(), "udp", laddr, raddr)
	},
	"PacketConn": func(laddr, raddr netip.AddrPort) (net.Conn, error) {
		d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(laddr)}}
		return d.DialPacket(context.Background(), "udp", raddr.String())
	},
}

// TestUDP runs datagramTests. Which tests of nettest.TestConn to run can be said
// on the command line only, so each runs in a process of its own.
func TestUDP(t *testing.T) {
	for name := range udpConns {
		for _, host := range []string{"127.0.0.1", "::1"} {
			t.Run(name+" on "+host, func(t *testing.T) {
				cmd := exec.Command("/proc/self/exe", "-test.run", "^TestUDPConn$/^("+datagramTests+")$", "-test.v")
				cmd.Env = append(os.Environ(), udpEnv+"="+name+" "+host)
				out, err := cmd.CombinedOutput()
				if err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
				if passed := bytes.Count(out, []byte("    --- PASS: ")); passed != 6 {
					t.Errorf("%d tests of 6 have passed\n%s", passed, out)
				}
			})
		}
	}
}

// TestUDPConn is what TestUDP runs in another process.
func TestUDPConn(t *testing.T) {
	var name, host string
	if _, err := fmt.Sscan(os.Getenv(udpEnv), &name, &host); err != nil {
		t.Skip("is run by TestUDP")
	}
	dial := udpConns[name]
	addr := netip.MustParseAddr(host)
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		a, b := netip.AddrPortFrom(addr, 20001), netip.AddrPortFrom(addr, 20002)
		if c1, err = dial(a, b); err != nil {
			return nil, nil, nil, err
		}
		if c2, err = dial(b, a); err != nil {
			c1.Close()
			return nil, nil, nil, err
		}
		return c1, c2, func() { c1.Close(); c2.Close() }, nil
	})
}
