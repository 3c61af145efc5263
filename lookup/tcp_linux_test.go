package lookup

import (
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/sys"
)

// tcpSocket is what a lookup should say of a TCP socket.
func tcpSocket(t *testing.T, s syscall.Conn, local, remote net.Addr) Socket {
	t.Helper()
	raw, err := s.SyscallConn()
	check(t, err)
	want := Socket{Local: netip.MustParseAddrPort(local.String()), UID: uint32(os.Getuid())}
	if remote != nil {
		want.Remote = netip.MustParseAddrPort(remote.String())
	}
	var cookieErr error
	check(t, raw.Control(func(fd uintptr) { want.Cookie, cookieErr = sys.Cookie(int(fd), unix.SO_COOKIE) }))
	check(t, cookieErr)
	return want
}

func TestTCPFindsTheSocketOnThe4TupleOrTheListener(t *testing.T) {
	for _, network := range []string{"127.0.0.1:0", "[::1]:0"} {
		t.Run(network, func(t *testing.T) {
			if strings.HasPrefix(network, "[") {
				needIPv6(t)
			}
			// The socket of a multipath listener, which is what Go makes, is
			// not the one that TCP knows.
			var config net.ListenConfig
			config.SetMultipathTCP(false)
			l, err := config.Listen(t.Context(), "tcp", network)
			check(t, err)
			defer l.Close()
			client, err := net.Dial("tcp", l.Addr().String())
			check(t, err)
			defer client.Close()
			server, err := l.Accept()
			check(t, err)
			defer server.Close()
			listening := tcpSocket(t, l.(*net.TCPListener), l.Addr(), nil)
			dialled := tcpSocket(t, client.(*net.TCPConn), client.LocalAddr(), client.RemoteAddr())
			accepted := tcpSocket(t, server.(*net.TCPConn), server.LocalAddr(), server.RemoteAddr())
			a, b := dialled.Local, listening.Local
			unused := freePorts(t, 1)[0]

			c := openConn(t)
			for _, q := range []struct {
				name          string
				local, remote netip.AddrPort
				want          *Socket
			}{
				{"the dialled side", a, b, &dialled},
				{"the accepted side", b, a, &accepted},
				{"the listener, for somebody else", b, netip.AddrPortFrom(a.Addr(), unused), &listening},
				{"another remote port", a, netip.AddrPortFrom(b.Addr(), unused), nil},
				{"another local port", netip.AddrPortFrom(a.Addr(), unused), b, nil},
			} {
				got, err := c.TCP(q.local, q.remote, 0)
				if q.want == nil {
					if err != ErrNotFound {
						t.Errorf("%s: %+v, %v; want ErrNotFound", q.name, got, err)
					}
					continue
				}
				if diff := cmp.Diff(*q.want, got, comparable); diff != "" || err != nil {
					t.Errorf("%s: %v (-want +got):\n%s", q.name, err, diff)
				}
				if got.Connected() != q.want.Remote.IsValid() {
					t.Errorf("%s: Connected() = %v", q.name, got.Connected())
				}
				if got, err := c.UDP(q.local, q.remote, 0); err != ErrNotFound {
					t.Errorf("%s, as UDP: %+v, %v", q.name, got, err)
				}
			}

			// The 4-tuple stays taken for a minute after both sides have
			// closed it, the one that did so first having nothing to do with
			// it any more.
			check(t, client.Close())
			check(t, server.Close())
			got, err := c.TCP(a, b, 0)
			if err != nil || got.Local != a || got.Remote != b {
				t.Errorf("closed: %+v, %v", got, err)
			}
			allocs := testing.AllocsPerRun(100, func() {
				if _, err := c.TCP(a, b, 0); err != nil {
					t.Fatal(err)
				}
			})
			if allocs != 0 {
				t.Errorf("%v allocations", allocs)
			}
		})
	}
}

func TestTCPDoesNotFindAUDPSocket(t *testing.T) {
	_, socket := openSocket(t, spec{bind: netip.MustParseAddrPort("127.0.0.1:0"), connect: netip.MustParseAddrPort("127.0.0.2:9")})
	if got, err := openConn(t).TCP(socket.Local, socket.Remote, 0); err != ErrNotFound {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestTCPRejectsAddressesThatDoNotMatch(t *testing.T) {
	four, six := netip.MustParseAddrPort("127.0.0.1:9"), netip.MustParseAddrPort("[::1]:9")
	c := openConn(t)
	for _, pair := range [][2]netip.AddrPort{{four, six}, {six, four}, {four, {}}, {{}, six}} {
		_, err := c.TCP(pair[0], pair[1], 0)
		if err == nil || err == ErrNotFound || !strings.Contains(err.Error(), "lookup tcp") || !strings.Contains(err.Error(), "not of one family") {
			t.Errorf("%v->%v: %v", pair[0], pair[1], err)
		}
	}
}
