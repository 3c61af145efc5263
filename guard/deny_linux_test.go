package guard

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/netns"
)

const (
	v4 = unix.AF_INET
	v6 = unix.AF_INET6
)

// Each of these leaves the sockets that it names open, to be compared with the
// reservations.
func TestASecondSocketOnA4TupleIsDenied(t *testing.T) {
	for _, test := range []struct {
		name string
		run  func(t *testing.T)
	}{
		{"if both are bound to it", func(t *testing.T) {
			open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7")
			open(t, v4).bind("127.0.0.1:5000").mustFail("127.0.0.9:7", unix.EADDRINUSE)
		}},
		{"over IPv6", func(t *testing.T) {
			open(t, v6).bind("[::1]:5000").mustConnect("[::1]:7")
			open(t, v6).bind("[::1]:5000").mustFail("[::1]:7", unix.EADDRINUSE)
		}},
		{"if it has the IPv4-mapped form", func(t *testing.T) {
			open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7")
			open(t, v6).bind("127.0.0.1:5000").mustFail("127.0.0.9:7", unix.EADDRINUSE)
		}},
		{"if the first one has the IPv4-mapped form", func(t *testing.T) {
			open(t, v6).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7")
			open(t, v4).bind("127.0.0.1:5000").mustFail("127.0.0.9:7", unix.EADDRINUSE)
		}},
		{"but not on one that differs in something", func(t *testing.T) {
			open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7")
			open(t, v4).bind("127.0.0.1:5001").mustConnect("127.0.0.9:7")
			open(t, v4).bind("127.0.0.2:5000").mustConnect("127.0.0.9:7")
			open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.8:7")
			open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:8")
		}},
		{"until the first one is closed", func(t *testing.T) {
			first := open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7")
			second := open(t, v4).bind("127.0.0.1:5000")
			second.mustFail("127.0.0.9:7", unix.EADDRINUSE)
			first.close()
			second.mustConnect("127.0.0.9:7")
		}},
		{"until the first one has connected elsewhere", func(t *testing.T) {
			first := open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7")
			first.mustConnect("127.0.0.9:8").mustConnect("127.0.0.9:9")
			open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7")
			open(t, v4).bind("127.0.0.1:5000").mustFail("127.0.0.9:9", unix.EADDRINUSE)
		}},
		{"and the first one may connect to the same peer again", func(t *testing.T) {
			first := open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7")
			second := open(t, v4).bind("127.0.0.1:5000")
			first.mustConnect("127.0.0.9:7").mustConnect("127.0.0.9:7")
			second.mustFail("127.0.0.9:7", unix.EADDRINUSE)
		}},
		{"and stays where it was", func(t *testing.T) {
			open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7")
			second := open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:8")
			second.mustFail("127.0.0.9:7", unix.EADDRINUSE)
			open(t, v4).bind("127.0.0.1:5000").mustFail("127.0.0.9:8", unix.EADDRINUSE)
		}},
		{"if the peer is this host", func(t *testing.T) {
			open(t, v4).bind("127.0.0.1:5000").mustConnect("0.0.0.0:7")
			open(t, v4).bind("127.0.0.1:5000").mustFail("127.0.0.1:7", unix.EADDRINUSE)
			open(t, v6).bind("[::1]:5000").mustConnect("[::]:7")
			open(t, v6).bind("[::1]:5000").mustFail("[::1]:7", unix.EADDRINUSE)
			open(t, v6).bind("127.0.0.5:5000").mustConnect("[::]:7")
			open(t, v4).bind("127.0.0.5:5000").mustFail("127.0.0.1:7", unix.EADDRINUSE)
		}},
		{"but not if the first one has gone back to no destination", func(t *testing.T) {
			first := open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7")
			first.disconnect()
			first.mustConnect("127.0.0.9:8")
			open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7")
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			g := attach(t, Options{})
			test.run(t)
			mustMatch(t, g)
		})
	}
}

func local(s *socket) string {
	s.t.Helper()
	for _, c := range connected(s.t) {
		if c.Cookie == s.cookie() {
			return c.Local.String()
		}
	}
	s.t.Fatal("the socket is not connected")
	return ""
}

func TestAnUnknownSourceAddress(t *testing.T) {
	for _, test := range []struct {
		name string
		run  func(t *testing.T, g *Guard)
	}{
		{"is denied where an address is", func(t *testing.T, _ *Guard) {
			open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7")
			open(t, v4).bind("0.0.0.0:5000").mustFail("127.0.0.9:7", unix.EADDRINUSE)
			open(t, v6).bind("[::]:5000").mustFail("127.0.0.9:7", unix.EADDRINUSE)
		}},
		{"keeps out an address", func(t *testing.T, _ *Guard) {
			open(t, v4).bind("0.0.0.0:5000").mustConnect("127.0.0.1:7")
			open(t, v4).bind("127.0.0.1:5000").mustFail("127.0.0.1:7", unix.EADDRINUSE)
		}},
		{"keeps out another one", func(t *testing.T, _ *Guard) {
			open(t, v4).bind("0.0.0.0:5000").mustConnect("127.0.0.1:7")
			open(t, v6).bind("[::]:5000").mustFail("127.0.0.1:7", unix.EADDRINUSE)
		}},
		{"keeps out no other address once it is known", func(t *testing.T, g *Guard) {
			open(t, v4).bind("0.0.0.0:5000").mustConnect("127.0.0.1:7")
			mustMatch(t, g)
			open(t, v4).bind("127.0.0.2:5000").mustConnect("127.0.0.1:7")
			open(t, v4).bind("127.0.0.1:5000").mustFail("127.0.0.1:7", unix.EADDRINUSE)
		}},
		{"is no matter to other ports and peers", func(t *testing.T, _ *Guard) {
			open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.1:7")
			open(t, v4).bind("0.0.0.0:5000").mustConnect("127.0.0.1:8")
			open(t, v4).bind("0.0.0.0:5001").mustConnect("127.0.0.1:7")
			open(t, v6).bind("[::]:5000").mustConnect("[::1]:7")
		}},
		{"goes with the address that it has become", func(t *testing.T, g *Guard) {
			open(t, v4).bind("0.0.0.0:5000").mustConnect("127.0.0.1:7").mustConnect("127.0.0.1:7").mustConnect("127.0.0.1:8")
			mustMatch(t, g)
			open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.1:7")
			open(t, v4).bind("127.0.0.1:5000").mustFail("127.0.0.1:8", unix.EADDRINUSE)
		}},
		{"goes when the address does", func(t *testing.T, _ *Guard) {
			other := open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.1:7")
			any := open(t, v4).bind("0.0.0.0:5000")
			any.mustFail("127.0.0.1:7", unix.EADDRINUSE)
			other.close()
			any.mustConnect("127.0.0.1:7")
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			g := attach(t, Options{})
			test.run(t, g)
			mustMatch(t, g)
		})
	}
}

// While Sync gives a socket its reservation, another one may have made the same,
// and not looked yet for why it must not have it.
func TestAnUnknownSourceAddressIsKeptFromWhoIsJustBeingDenied(t *testing.T) {
	g := attach(t, Options{})
	open(t, v4).bind("0.0.0.0:5000").mustConnect("127.0.0.1:7")
	ns, err := namespace()
	if err != nil {
		t.Fatal(err)
	}
	mapped := [4]uint32{2: binary.NativeEndian.Uint32([]byte{0, 0, 0xff, 0xff}), 3: binary.NativeEndian.Uint32([]byte{127, 0, 0, 1})}
	other := programsTuple{Netns: ns, Source: mapped, Peer: mapped, Port: 5000, PeerPort: 7}
	if err := g.objects.Reserved.Put(other, uint64(1)); err != nil {
		t.Fatal(err)
	}
	mustSync(t, g)
	if err := g.objects.Reserved.Delete(other); err != nil {
		t.Fatal(err)
	}
	open(t, v4).bind("0.0.0.0:5000").mustFail("127.0.0.1:7", unix.EADDRINUSE)
	if got := mustStats(t, g); got.Overlapping != 0 {
		t.Errorf("overlapping %d, want 0", got.Overlapping)
	}
	mustMatch(t, g)
}

func TestASocketWithoutAPortGetsOneOfItsOwn(t *testing.T) {
	g := attach(t, Options{})
	restore(t, "ip_local_port_range", func() error { return netns.SetPortRange(41000, 41001) })
	one, two, three := open(t, v4), open(t, v6), open(t, v4)
	two.set(unix.SO_REUSEPORT, 1)
	three.set(unix.SO_REUSEPORT, 1)
	one.mustConnect("127.0.0.9:7")
	two.mustConnect("127.0.0.9:7")
	if one.port() == two.port() {
		t.Errorf("both have port %d", one.port())
	}
	if one.get(unix.SO_REUSEADDR) != 0 || two.get(unix.SO_REUSEPORT) != 0 {
		t.Error("they share their ports with others")
	}
	three.mustFail("127.0.0.9:8", unix.EAGAIN)
	if got := mustStats(t, g); got.Denied != 0 || got.Allowed != 3 {
		t.Errorf("denied %d, allowed %d; want 0, 3", got.Denied, got.Allowed)
	}
}

func TestASocketThatSharesItsPortOnlyLater(t *testing.T) {
	attach(t, Options{})
	first := open(t, v4).mustConnect("127.0.0.9:7")
	first.set(unix.SO_REUSEADDR, 1)
	open(t, v4).bind(local(first)).mustFail("127.0.0.9:7", unix.EADDRINUSE)
}

func TestWhatIsNotConnectedInTheEndIsGivenUp(t *testing.T) {
	for _, test := range []struct {
		name string
		run  func(t *testing.T)
	}{
		{"because connect has failed", func(t *testing.T) {
			open(t, v4).bind("127.0.0.1:5000").mustFail("192.0.2.1:7", unix.ENETUNREACH)
		}},
		{"because a later connect has failed", func(t *testing.T) {
			s := open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7")
			s.mustFail("192.0.2.1:7", unix.ENETUNREACH)
			open(t, v4).bind("127.0.0.1:5000").mustFail("127.0.0.9:7", unix.EADDRINUSE)
		}},
		{"because it was disconnected", func(t *testing.T) {
			open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7").disconnect()
		}},
		{"because it was disconnected, without an address", func(t *testing.T) {
			open(t, v4).bind("0.0.0.0:5000").mustConnect("127.0.0.1:7").disconnect()
		}},
		{"because it was disconnected after a second connect", func(t *testing.T) {
			open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7").mustConnect("127.0.0.9:7").disconnect()
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			g := attach(t, Options{})
			test.run(t)
			mustMatch(t, g)
			open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.1:7")
			mustMatch(t, g)
		})
	}
}

// No lookup finds what is only reserved.
func TestADialerGoesOnToTheNextPort(t *testing.T) {
	g := attach(t, Options{})
	setPorts(t, g, 43000, 43003, "")
	d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: &net.UDPAddr{IP: net.IPv4(127, 0, 0, 2)}}}
	for port := 43000; port <= 43002; port++ {
		open(t, v4).bind(fmt.Sprintf("0.0.0.0:%d", port)).mustConnect("127.0.0.9:7")
	}
	conn, err := d.Dial("udp4", "127.0.0.9:7")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got, want := conn.LocalAddr().String(), "127.0.0.2:43003"; got != want {
		t.Errorf("from %s, want %s", got, want)
	}
	if conn, err := d.Dial("udp4", "127.0.0.9:7"); !errors.Is(err, connectx.ErrPortsExhausted) {
		t.Errorf("%v, %v; want %v", conn, err, connectx.ErrPortsExhausted)
	}
	if got := mustStats(t, g); got.Denied == 0 {
		t.Error("nothing was denied")
	}
	mustMatch(t, g)
}

func TestAnyNumberConnectsToMulticast(t *testing.T) {
	g := attach(t, Options{})
	for range 2 {
		s := open(t, v4).bind("127.0.0.1:5000").mustConnect("224.0.0.251:5353")
		defer s.close()
	}
	reservations, err := g.Reservations()
	if err != nil || len(reservations) != 0 {
		t.Errorf("reservations %v, %v; want none", reservations, err)
	}
}

func TestSocketsThatWereConnectedBefore(t *testing.T) {
	needCgroup(t)
	before := open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7")
	picked := open(t, v4)
	picked.set(unix.SO_REUSEADDR, 0)
	picked.mustConnect("127.0.0.9:7")
	g := attach(t, Options{})
	mustMatch(t, g, picked.cookie())
	open(t, v4).bind("127.0.0.1:5000").mustFail("127.0.0.9:7", unix.EADDRINUSE)
	open(t, v4).bind("0.0.0.0:5000").mustFail("127.0.0.9:7", unix.EADDRINUSE)
	before.mustConnect("127.0.0.9:7")
	before.close()
	open(t, v4).bind("0.0.0.0:5000").mustConnect("127.0.0.9:7")
	mustMatch(t, g, picked.cookie())
}

func TestAFullMap(t *testing.T) {
	t.Run("lets connects through", func(t *testing.T) {
		g := attach(t, Options{Max: 1})
		open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7")
		open(t, v4).bind("127.0.0.1:5000").mustFail("127.0.0.9:7", unix.EADDRINUSE)
		open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:8")
		for range 3 {
			if got := mustStats(t, g); got.FailedOpen != 1 {
				t.Errorf("failed open %d, want 1", got.FailedOpen)
			}
			mustSync(t, g)
		}
		// The kernel knows of it, though.
		open(t, v4).bind("127.0.0.1:5000").mustFail("127.0.0.9:8", unix.EADDRINUSE)
	})
	t.Run("does not take a socket for another one", func(t *testing.T) {
		attach(t, Options{Max: 1})
		open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7")
		open(t, v4).bind("127.0.0.1:5001").mustConnect("127.0.0.9:7").mustConnect("127.0.0.9:7")
	})
	t.Run("denies them if told so", func(t *testing.T) {
		g := attach(t, Options{Max: 1, DenyWhenFull: true})
		first := open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7")
		second := open(t, v4).bind("127.0.0.1:5000")
		second.mustFail("127.0.0.9:8", unix.ENOBUFS)
		first.close()
		second.mustConnect("127.0.0.9:8")
		mustMatch(t, g)
	})
}

func TestCloseEndsIt(t *testing.T) {
	needCgroup(t)
	g := attach(t, Options{})
	open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7")
	second := open(t, v4).bind("127.0.0.1:5000")
	second.mustFail("127.0.0.9:7", unix.EADDRINUSE)
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	second.mustConnect("127.0.0.9:7")
}

func TestStatsNameWhoWasDeniedLast(t *testing.T) {
	g := attach(t, Options{})
	if got := mustStats(t, g); got != (Stats{}) {
		t.Errorf("%+v before anything has happened", got)
	}
	open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7")
	open(t, v6).bind("127.0.0.1:5000").mustFail("127.0.0.9:7", unix.EADDRINUSE)
	got := mustStats(t, g)
	if got.Allowed != 1 || got.Denied != 1 || got.LastDenied == nil {
		t.Fatalf("%+v", got)
	}
	d := *got.LastDenied
	if d.PID != unix.Getpid() || d.Command == "" || d.Errno != unix.EADDRINUSE || d.SinceBoot <= 0 ||
		d.Local.String() != "127.0.0.1:5000" || d.Remote.String() != "127.0.0.9:7" {
		t.Errorf("%+v", d)
	}
}

func mustSync(t testing.TB, g *Guard) {
	t.Helper()
	if err := g.Sync(); err != nil {
		t.Fatal(err)
	}
}

func mustStats(t testing.TB, g *Guard) Stats {
	t.Helper()
	s, err := g.Stats()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// restore changes a sysctl of the namespace for one test.
func restore(t testing.TB, name string, change func() error) {
	t.Helper()
	path := "/proc/sys/net/ipv4/" + name
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(path, before, 0); err != nil {
			t.Error(err)
		}
	})
	if err := change(); err != nil {
		t.Fatal(err)
	}
}
