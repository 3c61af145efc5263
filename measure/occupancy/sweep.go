//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/holders"
	"github.com/seed22601231/connectx/internal/netns"
	"github.com/seed22601231/connectx/internal/techniques"
	"github.com/seed22601231/connectx/measure/internal/machine"
)

// occupancies are the percentages of the ports that are taken.
var occupancies = []float64{0, 5, 10, 25, 40, 49, 51, 60, 75, 90, 95, 98, 99, 99.5, 99.9, 100}

// Of 127.0.0.0/8 the kernel connects from 127.0.0.1, so that is the source of
// all techniques, whether they choose it or not: they compete for the same
// 4-tuples.
var (
	source      = netip.MustParseAddr("127.0.0.1")
	destination = netip.MustParseAddrPort("127.1.0.1:1000")
)

// A plan says how much is measured.
type plan struct {
	low, high uint16

	// dials are how many each technique makes at each occupancy, unless they
	// take longer than budget.
	dials  int
	budget time.Duration
}

var (
	fullPlan  = plan{low: 32768, high: 60999, dials: 1000, budget: time.Second}
	quickPlan = plan{low: 40000, high: 41999, dials: 20, budget: 100 * time.Millisecond}
)

// batch is how many dials one technique makes before it is another one's turn.
const batch = 10

func (p plan) ports() int { return int(p.high) - int(p.low) + 1 }

// taken is how many ports are taken at an occupancy.
func (p plan) taken(occupancy float64) int {
	return int(math.Round(occupancy / 100 * float64(p.ports())))
}

// measureAll measures TCP and then UDP, and writes a table of each.
func measureAll(ctx context.Context, o options, stderr io.Writer) error {
	p := fullPlan
	if o.quick {
		p = quickPlan
	}
	if err := netns.LoopbackUp(); err != nil {
		return err
	}
	if err := netns.SetPortRange(p.low, p.high); err != nil {
		return err
	}
	here := describe(p)
	// Random once, own once for each technique of ownFill.
	show := newProgress(stderr, len(networks)*(1+len(ownFill))*len(occupancies))
	defer show.end()
	for _, network := range networks {
		rows, err := measure(ctx, network, p, show)
		if err != nil {
			return fmt.Errorf("%s: %w", network, err)
		}
		for i := range rows {
			rows[i].where = here
		}
		if err := writeRows(o.file(network, "csv"), rows); err != nil {
			return err
		}
	}
	return nil
}

// describe says what the results depend on.
func describe(p plan) where {
	return where{
		ports:   p.ports(),
		kernel:  machine.Kernel(),
		machine: fmt.Sprintf("%d cores, %s", runtime.NumCPU(), machine.Processor()),
		date:    time.Now().Format(time.DateOnly),
	}
}

// measure sweeps one network.
func measure(ctx context.Context, network string, p plan, show *progress) (rows []row, err error) {
	h, err := startHolders(p)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, h.Close()) }()
	if err := h.Sink(network, destination); err != nil {
		return nil, err
	}
	rows, err = sweepRandom(ctx, h, network, p, show)
	if err != nil {
		return nil, err
	}
	for _, technique := range techniquesOf(network) {
		if !slices.Contains(ownFill, technique.Name) {
			continue
		}
		if err := h.Release(); err != nil {
			return nil, err
		}
		own, err := sweepOwn(ctx, h, network, technique, p, show)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", technique.Name, err)
		}
		rows = append(rows, own...)
	}
	return rows, nil
}

// startHolders starts as many processes as it takes to hold all ports.
func startHolders(p plan) (*holders.Holders, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return nil, os.NewSyscallError("getrlimit", err)
	}
	const others = 100 // descriptors of a holder that are not ports
	if limit.Max <= others {
		return nil, fmt.Errorf("RLIMIT_NOFILE is %d, too low to hold %d ports", limit.Max, p.ports())
	}
	// One more, because the holders are filled in batches.
	return holders.Start(p.ports()/int(limit.Max-others) + 2)
}

func techniquesOf(network string) []techniques.Technique {
	return slices.DeleteFunc(techniques.All(), func(t techniques.Technique) bool {
		return network == "tcp" && !t.TCP || network == "udp" && !t.UDP
	})
}

// A subject is a technique that is being measured.
type subject struct {
	name   string
	dialer techniques.Dialer

	// Of the current occupancy.
	took            []time.Duration // the successful dials
	dials, failures int
	spent           time.Duration
}

func newSubject(t techniques.Technique, network string, p plan) *subject {
	return &subject{name: t.Name, dialer: t.New(network, source, p.low, p.high)}
}

// sweepRandom has other processes take random ports.
func sweepRandom(ctx context.Context, h *holders.Holders, network string, p plan, show *progress) ([]row, error) {
	order := make([]uint16, p.ports())
	for i, n := range rand.Perm(p.ports()) {
		order[i] = p.low + uint16(n)
	}
	var subjects []*subject
	for _, t := range techniquesOf(network) {
		subjects = append(subjects, newSubject(t, network, p))
	}
	var rows []row
	taken := 0
	for _, occupancy := range occupancies {
		n := p.taken(occupancy)
		if err := h.Take(network, source, destination, order[taken:n]); err != nil {
			return nil, err
		}
		taken = n
		if err := dialAll(ctx, network, subjects, p); err != nil {
			return nil, err
		}
		for _, s := range subjects {
			rows = append(rows, s.row(fillRandom, occupancy))
		}
		show.step(fmt.Sprintf("%s, random ports taken", network), occupancy)
	}
	return rows, nil
}

// ownFill are the techniques that fill the range themselves as well.
var ownFill = []string{"net.Dialer", "connectx.Dialer"}

// sweepOwn has the technique fill the range by itself. Other processes hold its
// sockets.
func sweepOwn(ctx context.Context, h *holders.Holders, network string, t techniques.Technique, p plan, show *progress) ([]row, error) {
	s := newSubject(t, network, p)
	var rows []row
	taken := 0
	for _, occupancy := range occupancies {
		var conns []syscall.Conn
		keep := func() error {
			err := h.Keep(conns...)
			conns = conns[:0]
			return err
		}
		for ; taken < p.taken(occupancy); taken++ {
			conn, err := s.dialer.Dial(network, destination.String())
			if err != nil {
				return nil, errors.Join(err, keep())
			}
			conns = append(conns, conn.(syscall.Conn))
			if len(conns) == 1000 || ctx.Err() != nil {
				if err := errors.Join(keep(), ctx.Err()); err != nil {
					return nil, err
				}
			}
		}
		if err := keep(); err != nil {
			return nil, err
		}
		if err := dialAll(ctx, network, []*subject{s}, p); err != nil {
			return nil, err
		}
		rows = append(rows, s.row(fillOwn, occupancy))
		show.step(fmt.Sprintf("%s, filled by %s", network, t.Name), occupancy)
	}
	return rows, nil
}

// dialAll has the subjects take turns, so that whatever else goes on on this
// machine hits all alike. The first turn is not counted.
func dialAll(ctx context.Context, network string, subjects []*subject, p plan) error {
	runtime.GC()
	for _, s := range subjects {
		if err := s.dial(network, 1); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		s.took, s.dials, s.failures, s.spent = s.took[:0], 0, 0, 0
	}
	for turns := p.dials / batch; turns > 0; turns-- {
		for _, s := range subjects {
			if s.spent >= p.budget {
				continue
			}
			if err := s.dial(network, batch); err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

// dial opens and closes n connections, and times the opening. That there is no
// port is a failure; other errors are returned.
func (s *subject) dial(network string, n int) error {
	address := destination.String()
	for range n {
		start := time.Now()
		conn, err := s.dialer.Dial(network, address)
		took := time.Since(start)
		s.dials++
		s.spent += took
		if err != nil {
			if !noPort(err) {
				return err
			}
			s.failures++
			continue
		}
		s.took = append(s.took, took)
		if err := hangUp(conn); err != nil {
			return err
		}
	}
	return nil
}

func noPort(err error) bool {
	return errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EAGAIN)
}

// hangUp closes a connection without leaving TIME_WAIT behind, which would take
// the port.
func hangUp(conn net.Conn) error {
	if tcp, ok := conn.(interface{ SetLinger(sec int) error }); ok {
		if err := tcp.SetLinger(0); err != nil {
			return errors.Join(err, conn.Close())
		}
	}
	return conn.Close()
}

// row is the result at one occupancy.
func (s *subject) row(fill string, occupancy float64) row {
	r := row{fill: fill, technique: s.name, occupancy: occupancy, dials: s.dials, failures: s.failures}
	if len(s.took) > 0 {
		slices.Sort(s.took)
		r.p50, r.p99 = quantile(s.took, 50), quantile(s.took, 99)
	}
	return r
}

// quantile is the smallest of the sorted durations that percent of them do not
// exceed.
func quantile(sorted []time.Duration, percent int) time.Duration {
	return sorted[(len(sorted)*percent+99)/100-1]
}
