package main

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// A result is what a technique has come to in one column.
type result struct {
	held    int      // connections open at the same time
	stops   []string // the different errors that stopped it, by errno
	example error    // one of them
	tally
}

// A row is a technique with its results, one for each column; nil where it does
// not apply.
type row struct {
	technique technique
	results   []*result
}

// runAll goes through all techniques and columns, one at a time.
func runAll(ctx context.Context, st *stage, p *progress) ([]row, error) {
	var rows []row
	for _, t := range st.techniques() {
		r := row{t, make([]*result, len(st.columns))}
		for i := range st.columns {
			c := &st.columns[i]
			if c.unavailable || t.udpOnly && c.tcp() {
				continue
			}
			p.begin(t.name, c.title)
			res, err := runRound(ctx, st, t, c, p)
			if err != nil {
				return nil, err
			}
			p.line("%d/%d held, %s; %s", res.held, st.possible(), res.ending(), res.tally)
			r.results[i] = res
		}
		rows = append(rows, r)
	}
	return rows, nil
}

// ending says what ended the dialling.
func (r *result) ending() string {
	if len(r.stops) == 0 {
		return "no error"
	}
	return "then " + strings.Join(r.stops, " and ")
}

// runRound opens connections until every destination fails, verifies and closes
// them.
func runRound(ctx context.Context, st *stage, t technique, c *column, p *progress) (*result, error) {
	servers, err := startServers(c)
	if err != nil {
		return nil, err
	}
	defer servers.close()

	conns, failures := dialAll(ctx, st, t, c, servers.addrs, p)
	// Before the servers: who closes first would be left with TIME_WAIT.
	defer closeAll(conns)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	r := &result{held: len(conns)}
	for _, to := range servers.addrs {
		err := failures[to]
		if err == nil {
			continue
		}
		r.example = err
		if name := errnoName(err); !slices.Contains(r.stops, name) {
			r.stops = append(r.stops, name)
		}
	}
	r.tally, err = verify(ctx, conns, p)
	return r, err
}

// dialAll dials one destination after the other, and again, leaving out those
// that have failed.
func dialAll(ctx context.Context, st *stage, t technique, c *column, destinations []netip.AddrPort, p *progress) (conns []net.Conn, failures map[netip.AddrPort]error) {
	failures = make(map[netip.AddrPort]error)
	for n := range st.dialTries() {
		for _, to := range destinations {
			if failures[to] != nil {
				continue // done with
			}
			conn, err := t.dial(ctx, c, to, n)
			switch {
			case err == nil:
				conns = append(conns, conn)
				p.update("%d held", len(conns))
			case ctx.Err() != nil:
				return conns, failures
			default:
				failures[to] = err
			}
		}
	}
	return conns, failures
}

// closeAll resets TCP connections, which leaves no TIME_WAIT in the way of the
// next round.
func closeAll(conns []net.Conn) {
	for _, conn := range conns {
		if tcp, ok := conn.(*net.TCPConn); ok {
			tcp.SetLinger(0)
		}
		conn.Close()
	}
}

func errnoName(err error) string {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return unix.ErrnoName(errno)
	}
	return err.Error()
}
