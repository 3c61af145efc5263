//go:build linux

// Package model_test compares the rules that kernel.pml has for UDP sockets with
// what the kernel does.
package model_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/google/go-cmp/cmp"

	"github.com/seed22601231/connectx/internal/netns"
	"github.com/seed22601231/connectx/internal/sys"
	"github.com/seed22601231/connectx/lookup"
)

func TestMain(m *testing.M) { os.Exit(netns.Main(m.Run)) }

const (
	sockets      = 4
	ports        = 2
	destinations = 2
)

// The source address is the same for all, as in the model.
func source(port int) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(40000+port))
}

func destination(dest int) netip.AddrPort {
	if dest == 0 {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 1, 0, byte(dest)}), 9)
}

// A socket is one of the model, and the real one.
type socket struct {
	port, dest int // 0: none
	flag       bool
	fd         int
	cookie     uint64
}

// Rules are those of kernel.pml: its slots, and its sockets.
type rules struct {
	sockets []*socket
	on      [ports + 1][]*socket // the one bound last first
}

// bind says what bind has to return, and binds if that is nothing.
func (r *rules) bind(s *socket, port int) error {
	if s.port != 0 {
		return unix.EINVAL
	}
	for _, other := range r.on[port] {
		if !s.flag || !other.flag {
			return unix.EADDRINUSE
		}
	}
	s.port = port
	r.on[port] = slices.Insert(r.on[port], 0, s)
	return nil
}

// find says which sockets a lookup may find: any that is on the 4-tuple, or
// else the unconnected one that was bound last.
func (r *rules) find(port, dest int) (may []*socket) {
	for _, s := range r.on[port] {
		if s.dest == dest {
			may = append(may, s)
		}
	}
	for _, s := range r.on[port] {
		if s.dest == 0 && may == nil {
			may = []*socket{s}
		}
	}
	return may
}

func (r *rules) close(s *socket) {
	r.on[s.port] = slices.DeleteFunc(r.on[s.port], func(other *socket) bool { return other == s })
}

// A walk does the same to the rules and to the kernel.
type walk struct {
	rules
	conn  *lookup.Conn
	rand  *rand.Rand
	steps []string
}

func (w *walk) note(format string, args ...any) {
	w.steps = append(w.steps, fmt.Sprintf(format, args...))
}

// open replaces a socket by a fresh one.
func (w *walk) open(i int) error {
	w.note("socket %d: new", i)
	if old := w.sockets[i]; old != nil {
		w.close(old)
		unix.Close(old.fd)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	s := &socket{fd: fd}
	w.sockets[i] = s
	s.cookie, err = sys.Cookie(fd, unix.SO_COOKIE)
	return err
}

// step makes one random call, and reports where the kernel differs.
func (w *walk) step() error {
	i, port, dest := w.rand.IntN(sockets), 1+w.rand.IntN(ports), 1+w.rand.IntN(destinations)
	s := w.sockets[i]
	switch w.rand.IntN(8) {
	case 0:
		return w.open(i)
	case 1, 2:
		s.flag = !s.flag
		w.note("socket %d: flag %t", i, s.flag)
		on := int32(0)
		if s.flag {
			on = 1
		}
		return sys.SetInt(s.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, on)
	case 3, 4:
		w.note("socket %d: bind port %d", i, port)
		sa := sys.NewSockaddr(unix.AF_INET, source(port), 0)
		got, want := sys.Bind(s.fd, &sa), w.bind(s, port)
		if got != want {
			return fmt.Errorf("bind: %v, by the rules %v", got, want)
		}
		return nil
	case 5:
		if s.port == 0 || s.dest != 0 {
			return nil // in the model only bound sockets connect, and a follower's once
		}
		w.note("socket %d: connect to %d", i, dest)
		s.dest = dest
		sa := sys.NewSockaddr(unix.AF_INET, destination(dest), 0)
		return sys.ConnectUDP(s.fd, &sa)
	default:
		w.note("lookup port %d, destination %d", port, dest)
		return w.compare(port, dest)
	}
}

// compare looks a 4-tuple up.
func (w *walk) compare(port, dest int) error {
	got, err := w.conn.UDP(source(port), destination(dest), 0)
	may := w.find(port, dest)
	if errors.Is(err, lookup.ErrNotFound) && len(may) == 0 {
		return nil
	}
	if err != nil {
		return fmt.Errorf("lookup: %w, by the rules %d sockets may be found", err, len(may))
	}
	i := slices.IndexFunc(may, func(s *socket) bool { return s.cookie == got.Cookie })
	if i < 0 {
		return fmt.Errorf("lookup: finds %+v, by the rules one of %d others", got, len(may))
	}
	want := lookup.Socket{Cookie: may[i].cookie, Local: source(port), Remote: destination(may[i].dest), UID: got.UID}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		return fmt.Errorf("lookup (-rules +kernel):\n%s", diff)
	}
	return nil
}

func TestTheKernelFollowsTheRulesOfTheModel(t *testing.T) {
	netns.Need(t)
	conn, err := lookup.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	met := make(map[string]int)
	for seed := range uint64(500) {
		w := walk{conn: conn, rand: rand.New(rand.NewPCG(seed, 1))}
		w.sockets = make([]*socket, sockets)
		for i := range sockets {
			if err := w.open(i); err != nil {
				t.Fatal(err)
			}
		}
		for range 60 {
			if err := w.step(); err != nil {
				t.Fatalf("seed %d: %v\nafter\n%s", seed, err, strings.Join(w.steps, "\n"))
			}
			for port := 1; port <= ports; port++ {
				met[fmt.Sprintf("%d on a port", len(w.on[port]))]++
			}
		}
		for _, s := range w.sockets {
			unix.Close(s.fd)
		}
	}
	// Else the walks would say nothing about sharing.
	if shared := met[fmt.Sprintf("%d on a port", sockets-1)]; shared == 0 {
		t.Errorf("no walk had %d sockets on a port: %v", sockets-1, met)
	}
}
