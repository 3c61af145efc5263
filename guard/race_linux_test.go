package guard

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/netns"
)

// Any number of threads connect sockets to the same 4-tuple at the same time.
func TestOfThoseThatRaceOneGetsThe4Tuple(t *testing.T) {
	for _, test := range []struct {
		name   string
		locals []string
		least  int // that get it, of each round
		peers  []string
	}{
		{"two with an address", []string{"127.0.0.1:5000", "127.0.0.1:5000"}, 1, nil},
		{"four with an address", []string{"127.0.0.1:5000", "127.0.0.1:5000", "127.0.0.1:5000", "127.0.0.1:5000"}, 1, nil},
		{"two with two names of the peer", []string{"127.0.0.1:5000", "127.0.0.1:5000"}, 1, []string{"127.0.0.1:7", "0.0.0.0:7"}},
		{"two without", []string{"0.0.0.0:5000", "0.0.0.0:5000"}, 1, nil},
		// Each may see the other, and both be denied.
		{"one of either kind", []string{"127.0.0.1:5000", "0.0.0.0:5000"}, 0, nil},
		{"two of either kind", []string{"127.0.0.1:5000", "0.0.0.0:5000", "127.0.0.1:5000", "0.0.0.0:5000"}, 0, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			g := attach(t, Options{})
			got := make(map[int]int)
			for deadline := time.Now().Add(time.Second); time.Now().Before(deadline); {
				var (
					line  sync.WaitGroup
					ready atomic.Int32
					won   atomic.Int32
				)
				sockets := make([]*socket, len(test.locals))
				for i, local := range test.locals {
					sockets[i] = open(t, v4).bind(local)
				}
				for i, s := range sockets {
					peer := "127.0.0.1:7"
					if test.peers != nil {
						peer = test.peers[i]
					}
					line.Go(func() {
						ready.Add(1)
						for int(ready.Load()) < min(len(sockets), runtime.GOMAXPROCS(0)) {
						}
						switch err := s.connect(peer); err {
						case nil:
							won.Add(1)
						case unix.EADDRINUSE:
						default:
							t.Error(err)
						}
					})
				}
				line.Wait()
				n := int(won.Load())
				if got[n]++; n > 1 || n < test.least {
					t.Fatalf("%d of %d have got the 4-tuple", n, len(sockets))
				}
				for _, s := range sockets {
					s.close()
				}
			}
			t.Log("rounds by winners:", got)
			mustMatch(t, g)
		})
	}
}

// Two threads connect the same socket to two peers, while others are after these
// 4-tuples.
func TestThreadsThatConnectOneSocket(t *testing.T) {
	g := attach(t, Options{})
	peers := []string{"127.0.0.9:7", "127.0.0.9:8"}
	var (
		stop    atomic.Bool
		workers sync.WaitGroup
	)
	shared := open(t, v4).bind("127.0.0.1:5000")
	for i := range 4 {
		workers.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			own := shared
			for n := 0; !stop.Load(); n++ {
				if i >= 2 {
					own = open(t, v4).bind("127.0.0.1:5000")
				}
				switch err := own.connect(peers[(n+i)%2]); err {
				case nil, unix.EADDRINUSE, unix.EALREADY:
				default:
					t.Error(err)
				}
				if i >= 2 {
					own.close()
				} else if n%16 == 0 {
					own.disconnect()
				}
			}
		})
	}
	for deadline := time.Now().Add(2 * time.Second); time.Now().Before(deadline) && !t.Failed(); {
		if twice := duplicates(t); len(twice) > 0 {
			t.Errorf("on one 4-tuple: %v", twice)
		}
	}
	stop.Store(true)
	workers.Wait()
	mustMatch(t, g)
}

// None of the sockets that are opened and closed while a guard is attached leaves a
// reservation behind.
func TestSocketsThatComeAndGoDuringAttach(t *testing.T) {
	needCgroup(t)
	for range 10 {
		var (
			stop    atomic.Bool
			workers sync.WaitGroup
		)
		for range 4 {
			workers.Go(func() {
				for n := 0; !stop.Load(); n++ {
					fd, err := connectShared(fmt.Sprintf("127.0.0.1:%d", 5000+n%64), "127.0.0.9:7")
					if err != nil && err != unix.EADDRINUSE {
						t.Error(err)
					}
					unix.Close(fd)
				}
			})
		}
		g := attach(t, Options{})
		stop.Store(true)
		workers.Wait()
		mustMatch(t, g)
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	}
}

// A thread whose connect has come to nothing may still be in the middle of it, for
// all that another one can see which connects the same socket.
func TestWhatAnotherThreadMayBeAboutToGetIsKept(t *testing.T) {
	g := attach(t, Options{})
	s := open(t, v4).bind("127.0.0.1:5000")
	failed, end := make(chan error), make(chan bool)
	go func() {
		runtime.LockOSThread() // and the thread ends with the goroutine
		failed <- s.connect("192.0.2.1:7")
		<-end
	}()
	if err := <-failed; err != unix.ENETUNREACH {
		t.Fatal(err)
	}
	s.mustConnect("127.0.0.9:7").mustConnect("127.0.0.9:8")
	reservations, err := g.reservations()
	close(end)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(reservations, func(r Reservation) bool { return r.Remote.String() == "192.0.2.1:7" }) {
		t.Errorf("%v: not reserved to 192.0.2.1:7", reservations)
	}
	mustMatch(t, g)
}

// elsewhere calls connect in a thread of its own.
func elsewhere(connect func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // and the thread ends with the goroutine
		result <- connect()
	}()
	return <-result
}

// Of a 4-tuple that several threads have connected a socket to, one of them may
// still be on its way there, whatever the socket has been connected to since. Sync
// finds out.
func TestWhatSeveralThreadsConnectToIsKept(t *testing.T) {
	g := attach(t, Options{})
	s := open(t, v4).bind("127.0.0.1:5000")
	connect := func(peer int) error {
		return elsewhere(func() error { return s.connect(fmt.Sprintf("127.0.0.%d:7", peer)) })
	}
	for peer := 1; peer <= 2; peer++ {
		for range 3 {
			if err := connect(peer); err != nil {
				t.Fatalf("peer %d: %v", peer, err)
			}
		}
	}
	if err := connect(3); err != unix.EALREADY {
		t.Errorf("with no claim left: %v, want %v", err, unix.EALREADY)
	}
	if reservations, err := g.reservations(); err != nil || len(reservations) != 2 {
		t.Errorf("%v, %v; want that both peers are reserved", reservations, err)
	}
	mustMatch(t, g)
	if err := connect(3); err != nil {
		t.Error(err)
	}
	mustMatch(t, g)
}

// Of two threads that have connected to the same peer, one has gone on.
func TestWhatAnotherThreadConnectsToAsWellIsKept(t *testing.T) {
	g := attach(t, Options{})
	s := open(t, v4).bind("127.0.0.1:5000")
	first, second := thread(t), thread(t)
	for _, step := range []struct {
		in   func(func() error) error
		peer string
	}{
		{first, "127.0.0.1:7"}, {second, "127.0.0.1:7"}, {first, "127.0.0.1:7"},
		{second, "127.0.0.2:7"}, {second, "127.0.0.3:7"},
	} {
		if err := step.in(func() error { return s.connect(step.peer) }); err != nil {
			t.Fatal(err)
		}
	}
	reservations, err := g.reservations()
	if err != nil || !slices.ContainsFunc(reservations, func(r Reservation) bool { return r.Remote.String() == "127.0.0.1:7" }) {
		t.Errorf("%v, %v: not reserved to 127.0.0.1:7", reservations, err)
	}
	mustMatch(t, g)
}

// thread returns what calls a function in a thread that stays until the test ends.
func thread(t *testing.T) func(call func() error) error {
	calls, results := make(chan func() error), make(chan error)
	t.Cleanup(func() { close(calls) })
	go func() {
		runtime.LockOSThread() // and the thread ends with the goroutine
		for call := range calls {
			results <- call()
		}
	}()
	return func(call func() error) error {
		calls <- call
		return <-results
	}
}

// With more connects to one peer than there are claims for, it is not known which of
// them are over.
func TestWhatTooManyThreadsConnectToIsKeptUntilTheSocketIsClosed(t *testing.T) {
	g := attach(t, Options{})
	s := open(t, v4).bind("127.0.0.1:5000")
	for range 10 {
		s.disconnect() // it is not seen where it was
		if err := elsewhere(func() error { return s.connect("127.0.0.1:7") }); err != nil {
			t.Fatal(err)
		}
	}
	mustSync(t, g)
	s.mustConnect("127.0.0.2:7")
	mustSync(t, g)
	second := open(t, v4).bind("127.0.0.1:5000")
	second.mustFail("127.0.0.1:7", unix.EADDRINUSE)
	s.close()
	second.mustConnect("127.0.0.1:7")
	mustMatch(t, g)
}

func TestAThreadThatRunsMayBeConnecting(t *testing.T) {
	var stop atomic.Bool
	end := make(chan bool)
	for _, test := range []struct {
		name string
		stay func()
		stop func()
		want bool
	}{
		{"one that runs", func() {
			for !stop.Load() {
			}
		}, func() { stop.Store(true) }, false},
		{"one that sleeps", func() { <-end }, func() { close(end) }, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			thread := make(chan int)
			go func() {
				runtime.LockOSThread() // and the thread ends with the goroutine
				thread <- unix.Gettid()
				test.stay()
			}()
			id := uint32(<-thread)
			// It may still be on its way to where it stays, or ends.
			eventually(t, fmt.Sprintf("%s is over: %v", test.name, test.want), func() bool { return isOver(id) == test.want })
			test.stop()
			eventually(t, "one that has ended is over", func() bool { return isOver(id) })
		})
	}
}

// duplicates are connected sockets on a 4-tuple that another one has as well. A
// dump is not made in one moment, and it has sockets that are just being closed:
// these are in two dumps, and still have descriptors.
func duplicates(t testing.TB) []connection {
	t.Helper()
	first := onSame4Tuple(connected(t))
	if len(first) == 0 {
		return nil
	}
	again := onSame4Tuple(connected(t))
	open := descriptors(t)
	return onSame4Tuple(slices.DeleteFunc(again, func(c connection) bool {
		return !slices.Contains(first, c) || !open[fmt.Sprintf("socket:[%d]", c.inode)]
	}))
}

func onSame4Tuple(all []connection) (twice []connection) {
	type tuple struct{ local, remote netip.AddrPort }
	first := make(map[tuple]connection)
	for _, c := range all {
		k := tuple{c.Local, c.Remote}
		switch f, ok := first[k]; {
		case !ok:
			first[k] = c
		case f.Cookie != c.Cookie: // a dump may have a socket that moves twice
			twice = append(twice, f, c)
		}
	}
	return twice
}

// descriptors are what all processes have open, as /proc has it.
func descriptors(t testing.TB) map[string]bool {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	open := make(map[string]bool)
	for _, l := range links {
		if to, err := os.Readlink(l); err == nil { // else it has been closed
			open[to] = true
		}
	}
	return open
}

var raceTime = flag.Duration("racetime", 3*time.Second, "how `long` programs with and without the lock race for the same 4-tuples")

const (
	racers     = 8 // processes of either kind
	raceLow    = 42000
	raceHigh   = 42039
	racePorts  = 8 // of the range, that are asked for
	racePeers  = 4
	raceHeld   = 6
	racePeerIP = "127.1.0."
)

func racePeer(n int) string { return fmt.Sprintf("%s%d:7007", racePeerIP, n+1) }

// Programs that set SO_REUSEADDR and connect, and programs that use
// connectx.Dialer, race for the same 4-tuples.
func TestProgramsThatRace(t *testing.T) {
	for _, test := range []struct {
		name    string
		options Options
	}{
		{"with a guard", Options{}},
		{"with a guard that shares ports", Options{Share: true}},
	} {
		t.Run(test.name, func(t *testing.T) {
			g := attach(t, test.options)
			r := race(t, g, patience)
			if r.Duplicates != 0 || r.Misdelivered != 0 || r.Unanswered != 0 {
				t.Errorf("%d dumps with duplicates, %d datagrams misdelivered, %d unanswered", r.Duplicates, r.Misdelivered, r.Unanswered)
			}
			s := mustStats(t, g)
			t.Logf("%+v, denied %d", r, s.Denied)
			if s.Denied == 0 || s.FailedOpen != 0 || s.Overlapping != 0 {
				t.Errorf("%+v", s)
			}
			if reservations, err := g.Reservations(); err != nil || len(reservations) != 0 {
				t.Errorf("in the end there are reservations: %v, %v", reservations, err)
			}
		})
	}
	t.Run("without", func(t *testing.T) {
		needCgroup(t)
		r := race(t, nil, 100*time.Millisecond) // many answers go to others
		t.Logf("%+v", r)
		if r.Duplicates == 0 || r.Misdelivered == 0 {
			t.Error("nothing overshadows another: this race does not show what a guard is for")
		}
	})
}

type raceResult struct {
	Connected, Refused, Misdelivered int
	Answered, Unanswered             int // datagrams
	Duplicates                       int `json:"-"` // dumps that had some
	Dumps, Killed                    int `json:"-"`

	// Of whom the datagrams that were misdelivered are, and the sockets for
	// which the kernel has picked a port.
	Foreign []uint32
	Picked  []uint64
}

// race returns when all processes have ended. In between it compares the
// reservations of what they hold.
func race(t *testing.T, g *Guard, wait time.Duration) (total raceResult) {
	restore(t, "ip_local_port_range", func() error { return netns.SetPortRange(raceLow, raceHigh) })
	serveEcho(t)
	var (
		crew   []*racer
		killed = make(map[uint32]bool)
		id     uint32
	)
	for i := range 2 * racers {
		id++
		crew = append(crew, startRacer(t, i%2 == 0, id, wait))
	}
	nextKill := time.Now().Add(200 * time.Millisecond)
	for deadline := time.Now().Add(*raceTime); time.Now().Before(deadline); total.Dumps++ {
		if len(duplicates(t)) > 0 {
			total.Duplicates++
		}
		if time.Now().After(nextKill) {
			nextKill = time.Now().Add(200 * time.Millisecond)
			i := rand.IntN(len(crew))
			_ = crew[i].cmd.Process.Kill()
			_ = crew[i].cmd.Wait()
			killed[crew[i].id] = true
			total.Killed++
			id++
			crew[i] = startRacer(t, i%2 == 0, id, wait)
		}
		if g != nil && total.Dumps%8 == 0 {
			mustSync(t, g) // as the command does
		}
	}
	for _, r := range crew {
		fmt.Fprintln(r.stdin, "stop")
	}
	for _, r := range crew {
		var one raceResult
		if err := json.NewDecoder(r.stdout).Decode(&one); err != nil {
			t.Fatalf("the report of process %d: %v", r.id, err)
		}
		total.Connected += one.Connected
		total.Refused += one.Refused
		total.Answered += one.Answered
		total.Unanswered += one.Unanswered
		total.Picked = append(total.Picked, one.Picked...)
		for _, f := range one.Foreign {
			// The answer to one that was killed goes to who comes after it.
			if !killed[f] {
				total.Misdelivered++
			}
		}
	}
	if len(duplicates(t)) > 0 {
		total.Duplicates++
	}
	if g != nil {
		mustMatch(t, g, total.Picked...)
	}
	for _, r := range crew {
		r.stdin.Close()
	}
	for _, r := range crew {
		if err := r.cmd.Wait(); err != nil {
			t.Errorf("process %d: %v", r.id, err)
		}
	}
	total.Picked, total.Foreign = nil, nil
	return total
}

// serveEcho answers on the addresses of all peers.
func serveEcho(t *testing.T) {
	for n := range racePeers {
		c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(racePeer(n))))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		go func() {
			var b [64]byte
			for {
				n, from, err := c.ReadFromUDPAddrPort(b[:])
				if errors.Is(err, net.ErrClosed) {
					return
				}
				if err == nil {
					_, _ = c.WriteToUDPAddrPort(b[:n], from)
				}
			}
		}()
	}
}

type racer struct {
	id     uint32
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stdout io.Reader
}

func startRacer(t *testing.T, outsider bool, id uint32, wait time.Duration) *racer {
	t.Helper()
	role := "dial"
	if outsider {
		role = "outsider"
	}
	r := &racer{id: id, cmd: roleCommand(t, role, fmt.Sprint(id), wait.String())}
	var err error
	if r.stdin, err = r.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if r.stdout, err = r.cmd.StdoutPipe(); err != nil {
		t.Fatal(err)
	}
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if r.cmd.ProcessState == nil {
			_ = r.cmd.Process.Kill()
			_ = r.cmd.Wait()
		}
	})
	return r
}

func init() {
	roles["outsider"] = func(args []string) error { return playRacer(args, outsider) }
	roles["dial"] = func(args []string) error { return playRacer(args, dial) }
}

type conn interface {
	io.ReadWriteCloser
	SetReadDeadline(time.Time) error
}

// A held is a connected socket of a racer.
type held struct {
	conn
	again func() error // changes something about it, if there is anything to change
	quiet bool         // it is not connected at the moment
}

// playRacer connects, checks that it gets its own bytes, and nobody else's, and
// closes, until it is told to stop.
func playRacer(args []string, connect func(*raceResult) (*held, error)) error {
	var (
		id   uint32
		stop atomic.Bool
		r    raceResult
		all  []*held
	)
	if _, err := fmt.Sscan(args[0], &id); err != nil {
		return err
	}
	wait, err := time.ParseDuration(args[1])
	if err != nil {
		return err
	}
	in := bufio.NewReader(os.Stdin)
	go func() {
		_, _ = in.ReadString('\n')
		stop.Store(true)
	}()
	for seq := uint64(0); !stop.Load(); seq++ {
		h, err := connect(&r)
		switch {
		case isRefusal(err):
			r.Refused++
		case err != nil:
			return err
		default:
			r.Connected++
			all = append(all, h)
		}
		for _, h := range all {
			r.exchange(h, id, seq, wait)
		}
		if len(all) > 0 && rand.IntN(2) == 0 {
			if h := all[rand.IntN(len(all))]; h.again != nil {
				if err := h.again(); err != nil && !isRefusal(err) {
					return err
				}
			}
		}
		for len(all) >= raceHeld {
			i := rand.IntN(len(all))
			all[i].Close()
			all[i] = all[len(all)-1]
			all = all[:len(all)-1]
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
		return err
	}
	_, _ = in.ReadString('\n')
	return nil
}

func isRefusal(err error) bool {
	return errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EALREADY)
}

// exchange sends a datagram, and waits so long for the answer.
func (r *raceResult) exchange(h *held, id uint32, seq uint64, wait time.Duration) {
	if h.quiet {
		return
	}
	var b, got [16]byte
	binary.NativeEndian.PutUint32(b[:], id)
	binary.NativeEndian.PutUint64(b[8:], seq)
	if _, err := h.Write(b[:]); err != nil {
		return
	}
	_ = h.SetReadDeadline(time.Now().Add(wait))
	for {
		switch _, err := h.Read(got[:]); {
		case err != nil:
			r.Unanswered++
			return
		case got == b:
			r.Answered++
			return
		}
		if from := binary.NativeEndian.Uint32(got[:]); from != id {
			r.Misdelivered++
			r.Foreign = append(r.Foreign, from)
		}
	}
}

// outsider connects a socket that has SO_REUSEADDR.
func outsider(r *raceResult) (*held, error) {
	fd, err := unix.Socket(v4, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	h := &held{conn: os.NewFile(uintptr(fd), "socket")}
	if err := connectOutsider(h, fd, r); err != nil {
		h.Close()
		return nil, err
	}
	return h, nil
}

func connectOutsider(h *held, fd int, r *raceResult) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	s := &socket{family: v4}
	port := raceLow + rand.IntN(racePorts)
	local := fmt.Sprintf("127.0.0.1:%d", port)
	kind := rand.IntN(8)
	switch kind {
	case 0: // the kernel picks a port
		local = ""
		cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
		if err != nil {
			return err
		}
		r.Picked = append(r.Picked, cookie)
	case 1, 2:
		local = fmt.Sprintf("0.0.0.0:%d", port)
	}
	if local != "" {
		if err := unix.Bind(fd, s.address(local)); err != nil {
			return err
		}
	}
	connect := func() error { return unix.Connect(fd, s.address(racePeer(rand.IntN(racePeers)))) }
	if kind == 3 {
		h.again = func() error {
			if rand.IntN(3) == 0 {
				h.quiet = true
				return disconnect(fd)
			}
			err := elsewhere(connect) // as goroutines do
			h.quiet = h.quiet && err != nil
			return err
		}
	}
	return connect()
}

// dial uses connectx.Dialer.
func dial(*raceResult) (*held, error) {
	var d connectx.Dialer
	if rand.IntN(2) == 0 {
		d.LocalAddr = &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: raceLow + rand.IntN(racePorts)}
	}
	conn, err := d.Dial("udp4", racePeer(rand.IntN(racePeers)))
	if err != nil {
		return nil, err
	}
	return &held{conn: conn}, nil
}
