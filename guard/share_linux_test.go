package guard

import (
	_ "embed"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/netns"
)

// openPlain opens a socket as a program does that knows of nothing.
func openPlain(t testing.TB, family int) *socket {
	t.Helper()
	s := open(t, family)
	s.set(unix.SO_REUSEADDR, 0)
	return s
}

func TestEachDestinationHasAllPorts(t *testing.T) {
	for _, test := range []struct {
		name    string
		open    func(t *testing.T) *socket
		address string // of a destination, by number
	}{
		{"over IPv4", func(t *testing.T) *socket { return openPlain(t, v4) }, "127.0.0.%d:7"},
		{"over IPv6", func(t *testing.T) *socket { return openPlain(t, v6) }, "[fd00::%d]:7"},
		{"from an IPv6 socket over IPv4", func(t *testing.T) *socket { return openPlain(t, v6) }, "127.0.0.%d:7"},
		{"from an address", func(t *testing.T) *socket {
			s := openPlain(t, v4)
			if err := unix.SetsockoptInt(s.fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
				t.Fatal(err)
			}
			return s.bind("127.0.0.5:0")
		}, "127.0.0.%d:7"},
		{"with SO_REUSEADDR", func(t *testing.T) *socket { return open(t, v4) }, "127.0.0.%d:7"},
	} {
		t.Run(test.name, func(t *testing.T) {
			g := attach(t, Options{Share: true})
			if err := netns.LoopbackUp("fd00::2/128", "fd00::3/128", "fd00::4/128"); err != nil {
				t.Fatal(err)
			}
			setPorts(t, g, 43000, 43010, "43002,43003")
			for destination := 2; destination <= 4; destination++ {
				peer := fmt.Sprintf(test.address, destination)
				var ports []uint16
				for range 9 {
					ports = append(ports, test.open(t).mustConnect(peer).port())
				}
				if even := ports[:5]; slices.ContainsFunc(even, func(p uint16) bool { return p%2 != 0 }) {
					t.Errorf("%v: the first five have not the even ports", ports)
				}
				slices.Sort(ports)
				if want := []uint16{43000, 43001, 43004, 43005, 43006, 43007, 43008, 43009, 43010}; !slices.Equal(ports, want) {
					t.Errorf("ports %v, want %v", ports, want)
				}
				test.open(t).mustFail(peer, unix.EAGAIN)
			}
			mustMatch(t, g)
		})
	}
}

// A port is found in about the same time if all that come first are taken: to try
// one after the other takes some hundred times as long.
func TestThePortsThatComeFirstMayBeTaken(t *testing.T) {
	const low, high, peer = 30000, 45999, "127.0.0.2:7"
	g := attach(t, Options{Share: true})
	setPorts(t, g, low, high, "")
	median := func(parity uint16) time.Duration {
		var took [100]time.Duration
		for i := range took {
			s := openPlain(t, v4)
			start := time.Now()
			s.mustConnect(peer)
			took[i] = time.Since(start)
			if port := s.port(); port%2 != parity {
				t.Errorf("port %d, want %d in its last bit", port, parity)
			}
			s.close()
		}
		slices.Sort(took[:])
		return took[len(took)/2]
	}
	before := median(0)
	for port := low; port <= high; port += 2 {
		open(t, v4).bind(fmt.Sprintf("127.0.0.1:%d", port)).mustConnect(peer)
	}
	after := median(1)
	t.Logf("median of a connect: %v, with all even ports taken %v", before, after)
	if after > 20*before {
		t.Errorf("a connect takes %v, and %v with all even ports taken", before, after)
	}
}

// setPorts sets the ephemeral port range for the rest of the test.
func setPorts(t testing.TB, g *Guard, low, high uint16, reserved string) {
	t.Helper()
	restore(t, "ip_local_port_range", func() error { return netns.SetPortRange(low, high) })
	restore(t, "ip_local_reserved_ports", func() error { return netns.SetReservedPorts(reserved) })
	if g != nil {
		mustSync(t, g)
	}
}

func TestASharedPortIsNoneThatAnUnconnectedSocketIsOn(t *testing.T) {
	g := attach(t, Options{Share: true})
	setPorts(t, g, 43000, 43001, "")
	server := open(t, v4).bind("0.0.0.0:43000")
	if port := openPlain(t, v4).mustConnect("127.0.0.2:7").port(); port != 43001 {
		t.Errorf("port %d", port)
	}
	openPlain(t, v4).mustFail("127.0.0.2:7", unix.EAGAIN)
	server.close()
	openPlain(t, v4).mustConnect("127.0.0.2:7")
	mustMatch(t, g)
}

func TestASharedPortIsNoneThatSomebodyHasAlone(t *testing.T) {
	g := attach(t, Options{Share: true})
	setPorts(t, g, 43000, 43003, "")
	plain := openPlain(t, v4).bind("127.0.0.1:43000")
	server := openPlain(t, v4).bind("0.0.0.0:43001")
	for range 2 {
		if port := openPlain(t, v4).mustConnect("127.0.0.2:7").port(); port != 43002 && port != 43003 {
			t.Errorf("port %d", port)
		}
	}
	openPlain(t, v4).mustFail("127.0.0.2:7", unix.EAGAIN)
	plain.close()
	server.close()
	openPlain(t, v4).mustConnect("127.0.0.2:7")
	mustMatch(t, g)
}

func TestSharedPortsBesideADialer(t *testing.T) {
	g := attach(t, Options{Share: true})
	setPorts(t, g, 43000, 43009, "")
	for range 5 {
		conn, err := dial(nil)
		if err != nil {
			continue // it has asked for a port outside of the range
		}
		defer conn.Close()
	}
	for n := range racePeers {
		for openPlain(t, v4).connect(racePeer(n)) == nil {
		}
	}
	if twice := duplicates(t); len(twice) > 0 {
		t.Errorf("on one 4-tuple: %v", twice)
	}
	mustMatch(t, g)
}

// Programs that bind port 0 and connect then.
func TestAPortThatIsBoundFirst(t *testing.T) {
	fill := func(t *testing.T, g *Guard, n int) {
		for range n {
			openPlain(t, v4).mustConnect("127.0.0.2:7")
		}
		mustSync(t, g)
	}
	for _, test := range []struct {
		name string
		run  func(t *testing.T, g *Guard)
	}{
		{"is one of its own while there are some", func(t *testing.T, g *Guard) {
			fill(t, g, 5)
			s := openPlain(t, v4).bind("0.0.0.0:0").mustConnect("127.0.0.3:7")
			if s.get(unix.SO_REUSEADDR) != 0 {
				t.Errorf("port %d is shared", s.port())
			}
		}},
		{"is shared when there are none", func(t *testing.T, g *Guard) {
			fill(t, g, 10)
			open(t, v4).bind("127.0.0.1:0").mustConnect("127.0.0.3:7")
			openPlain(t, v4).bind("0.0.0.0:0").mustConnect("127.0.0.4:7")
			openPlain(t, v6).bind("[::]:0").mustConnect("[::1]:7")
			openPlain(t, v6).bind("127.0.0.1:0").mustConnect("127.0.0.5:7")
		}},
		{"and is none from which the peer is connected", func(t *testing.T, g *Guard) {
			fill(t, g, 10)
			openPlain(t, v4).bind("0.0.0.0:0").mustFail("127.0.0.2:7", unix.EADDRINUSE)
		}},
		{"and is no other one's that has not connected yet", func(t *testing.T, g *Guard) {
			fill(t, g, 10)
			waiting := make(map[uint16]bool)
			for range 10 {
				waiting[openPlain(t, v4).bind("0.0.0.0:0").port()] = true
			}
			if len(waiting) != 10 {
				t.Errorf("ports %v, want 10", waiting)
			}
			mustMatch(t, g)
			s := openPlain(t, v4)
			if err := unix.Bind(s.fd, s.address("0.0.0.0:0")); err != unix.EADDRINUSE {
				t.Errorf("an eleventh: %v", err)
			}
			s.mustFail("127.0.0.3:7", unix.EAGAIN)
		}},
		{"and is not a server's", func(t *testing.T, g *Guard) {
			fill(t, g, 10)
			for port := 43000; port < 43009; port++ {
				open(t, v4).bind(fmt.Sprintf("0.0.0.0:%d", port))
			}
			if port := openPlain(t, v4).bind("0.0.0.0:0").port(); port != 43009 {
				t.Errorf("port %d, want 43009", port)
			}
		}},
		{"and is free again when it has connected, or is closed", func(t *testing.T, g *Guard) {
			fill(t, g, 10)
			for range 30 {
				openPlain(t, v4).bind("127.0.0.1:0").close()
				s := openPlain(t, v4).bind("127.0.0.1:0")
				s.mustConnect("127.0.0.3:7").close()
			}
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			g := attach(t, Options{Share: true})
			setPorts(t, g, 43000, 43009, "")
			test.run(t, g)
			mustMatch(t, g)
		})
	}
}

const (
	shareLow, shareHigh = 43000, 43099
	sharePeers          = 10
)

//go:embed testdata/hold.py
var holdPython string

// An unmodified program: each of its sockets has to get its own bytes back.
func TestPythonUnderAGuard(t *testing.T) {
	python, err := exec.LookPath("python3")
	if err != nil {
		t.Skip("needs Python: ", err)
	}
	hold := func(t *testing.T) string {
		serveShared(t, echo)
		out, err := exec.Command(python, "-c", holdPython, fmt.Sprint(sharePeers), "100").CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return strings.TrimSpace(string(out))
	}
	t.Run("that shares", func(t *testing.T) {
		g := attach(t, Options{Share: true})
		setPorts(t, g, shareLow, shareHigh, "")
		if got := hold(t); got != "1000 answered" {
			t.Errorf("%s, want 1000 answered", got)
		}
		mustMatch(t, g)
	})
	t.Run("without", func(t *testing.T) {
		needCgroup(t)
		setPorts(t, nil, shareLow, shareHigh, "")
		if got := hold(t); got != "100 answered" {
			t.Errorf("%s, want 100 answered", got)
		}
	})
}

func sharePeer(n int) string { return fmt.Sprintf("127.2.0.%d", n+1) }

// serveShared answers at all peers.
func serveShared(t *testing.T, answer func([]byte) []byte) {
	t.Helper()
	for n := range sharePeers {
		serve(t, sharePeer(n)+":5353", answer)
	}
}

func echo(b []byte) []byte { return b }

func serve(t testing.TB, address string, answer func([]byte) []byte) {
	t.Helper()
	c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(address)))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() {
		c.Close()
		<-done
	})
	go func() {
		defer close(done)
		var b [1500]byte
		for {
			n, from, err := c.ReadFromUDPAddrPort(b[:])
			if err != nil {
				return
			}
			if a := answer(b[:n]); a != nil {
				_, _ = c.WriteToUDPAddrPort(a, from)
			}
		}
	}()
}

// digEach is how many questions dig asks each server.
const digEach = 100

// While all ports are held by connections to elsewhere, dig gets an answer to each
// question if its port is shared, and none otherwise. It binds port 0 before it
// connects, anew for each question.
func TestDigUnderAGuard(t *testing.T) {
	dig, err := exec.LookPath("dig")
	if err != nil {
		t.Skip("needs dig: ", err)
	}
	var questions, answers []string
	for peer := range sharePeers {
		for n := range digEach {
			questions = append(questions, fmt.Sprintf("@%s 192-0-%d-%d.example A", sharePeer(peer), peer, n))
			answers = append(answers, fmt.Sprintf("192.0.%d.%d", peer, n))
		}
	}
	batch := filepath.Join(t.TempDir(), "questions")
	if err := os.WriteFile(batch, []byte(strings.Join(questions, "\n")+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	// ask returns what dig prints, in the order of the questions.
	ask := func(t *testing.T, g *Guard) []string {
		serveShared(t, answerDNS)
		for range shareHigh - shareLow + 1 {
			openPlain(t, v4).mustConnect("127.3.0.1:7")
		}
		if g != nil {
			mustSync(t, g)
		}
		out, _ := exec.Command(dig, "-r", "+short", "+tries=1", "+time=30", "-p", "5353", "-f", batch).CombinedOutput()
		return strings.Split(strings.TrimSpace(string(out)), "\n")
	}
	t.Run("that shares", func(t *testing.T) {
		g := attach(t, Options{Share: true})
		setPorts(t, g, shareLow, shareHigh, "")
		if diff := gocmp.Diff(answers, ask(t, g)); diff != "" {
			t.Errorf("answers (-want +got):\n%s", diff)
		}
		mustMatch(t, g)
	})
	t.Run("without", func(t *testing.T) {
		needCgroup(t)
		setPorts(t, nil, shareLow, shareHigh, "")
		got := ask(t, nil)
		if i := slices.IndexFunc(got, func(line string) bool { return slices.Contains(answers, line) }); i >= 0 {
			t.Errorf("an answer: %s", got[i])
		}
	})
}

// answerDNS answers a question for the address of 192-0-2-1.example with
// 192.0.2.1.
func answerDNS(q []byte) []byte {
	if len(q) < 12 {
		return nil
	}
	end := 12
	for end < len(q) && q[end] != 0 {
		end += int(q[end]) + 1
	}
	end += 5 // the end of the name, type and class
	if end > len(q) {
		return nil
	}
	label := string(q[13:][:q[12]])
	address, err := netip.ParseAddr(strings.ReplaceAll(label, "-", "."))
	if err != nil {
		return nil
	}
	a := slices.Clone(q[:end])
	copy(a[2:12], []byte{0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0}) // an answer, with one record
	a = append(a, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4)
	return append(a, address.AsSlice()...)
}
