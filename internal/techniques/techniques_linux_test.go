package techniques

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/netns"
)

func TestMain(m *testing.M) { os.Exit(netns.Main(m.Run)) }

// So few that random-port finds the last one with near certainty.
const low, high, ports = 40000, 40007, 8

func TestAll(t *testing.T) {
	netns.Need(t)
	for _, technique := range All() {
		for _, network := range []string{"tcp4", "tcp6", "udp4", "udp6"} {
			if strings.HasPrefix(network, "tcp") && technique.TCP || strings.HasPrefix(network, "udp") && technique.UDP {
				t.Run(technique.Name+"/"+network, func(t *testing.T) { fill(t, technique, network) })
			}
		}
	}
}

// fill dials one destination until every port is taken, and once more after one
// is free again.
func fill(t *testing.T, technique Technique, network string) {
	if err := netns.Enter(); err != nil {
		t.Fatal(err)
	}
	if err := netns.LoopbackUp("fd00::1/128", "fd00::11/128"); err != nil {
		t.Fatal(err)
	}
	if err := netns.SetPortRange(low, high); err != nil {
		t.Fatal(err)
	}
	source, host := netip.MustParseAddr("127.2.0.1"), "127.1.0.1"
	if strings.HasSuffix(network, "6") {
		source, host = netip.MustParseAddr("fd00::11"), "fd00::1"
	}
	address := net.JoinHostPort(host, "7")
	echo(t, network, address)

	d := technique.New(network, source, low, high)
	open := make(map[netip.AddrPort]net.Conn)
	dial := func() error {
		conn, err := d.Dial(network, address)
		if err != nil {
			return err
		}
		t.Cleanup(func() { conn.Close() })
		if got := conn.RemoteAddr().String(); got != address {
			t.Fatalf("connected to %v, want %v", got, address)
		}
		local := netip.MustParseAddrPort(conn.LocalAddr().String())
		if local.Port() < low || local.Port() > high {
			t.Fatalf("connected from %v, want a port of %d to %d", local, low, high)
		}
		if choosesSource := technique.Name != "net.Dialer" && technique.Name != "connectx.Dialer"; choosesSource && local.Addr() != source {
			t.Fatalf("connected from %v, want %v", local, source)
		}
		if other, ok := open[local]; ok {
			t.Fatalf("%v is the local address of %v as well", local, other)
		}
		checkEcho(t, conn)
		open[local] = conn
		return nil
	}

	wanted := ports
	overshadows := technique.Name == "SO_REUSEADDR" && strings.HasPrefix(network, "udp")
	if overshadows {
		wanted = 1 // more of them may be on one port
	}
	for i := range wanted {
		if err := dial(); err != nil {
			t.Fatalf("dial %d of %d: %v", i+1, ports, err)
		}
	}
	if overshadows {
		return
	}
	if err := dial(); err == nil {
		t.Fatalf("dialled more than %d times", ports)
	} else if !portTaken(err) && !errors.Is(err, unix.EAGAIN) {
		t.Fatalf("dial to a full destination: %v", err)
	}
	for local, conn := range open {
		if tcp, ok := conn.(interface{ SetLinger(sec int) error }); ok {
			if err := tcp.SetLinger(0); err != nil {
				t.Fatal(err)
			}
		}
		if err := conn.Close(); err != nil {
			t.Fatal(err)
		}
		delete(open, local)
		// For a moment connectx remembers that there was no port.
		for deadline := time.Now().Add(10 * time.Second); ; {
			err := dial()
			if err == nil {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("dial after %v was closed: %v", local, err)
			}
		}
		if _, ok := open[local]; !ok {
			t.Fatalf("dial after %v was closed: connected elsewhere", local)
		}
		break
	}
}

// echo serves until the test ends.
func echo(t *testing.T, network, address string) {
	t.Helper()
	if strings.HasPrefix(network, "udp") {
		conn, err := net.ListenPacket(network, address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		go func() {
			var b [64]byte
			for {
				n, from, err := conn.ReadFrom(b[:])
				if err != nil {
					return
				}
				conn.WriteTo(b[:n], from)
			}
		}()
		return
	}
	listener, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				io.Copy(conn, conn)
			}()
		}
	}()
}

// checkEcho sends random bytes and wants them back.
func checkEcho(t *testing.T, conn net.Conn) {
	t.Helper()
	var want, got [16]byte
	rand.Read(want[:])
	if _, err := conn.Write(want[:]); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, got[:]); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got[:], want[:]) {
		t.Fatalf("sent %x, got %x", want, got)
	}
}
