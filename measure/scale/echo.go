//go:build linux

package main

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A token is what one connection sends and should get back: its number, which no
// other connection has, and random bytes.
type token [tokenSize]byte

const tokenSize = 16

func newTokens(first uint64, n int) []token {
	tokens := make([]token, n)
	for i := range tokens {
		rand.Read(tokens[i][8:]) // never fails
		binary.BigEndian.PutUint64(tokens[i][:], first+uint64(i))
	}
	return tokens
}

// A Tally counts connections by what became of their token.
type Tally struct {
	Own     int // came back
	Wrong   int // other bytes came
	Missing int // nothing came
	Again   int // tokens that were sent again, of UDP only

	// Failure is the first error, if any.
	Failure string
}

func (t *Tally) add(other Tally) {
	t.Own += other.Own
	t.Wrong += other.Wrong
	t.Missing += other.Missing
	t.Again += other.Again
	t.fail(other.Failure)
}

func (t *Tally) fail(failure string) {
	if t.Failure == "" {
		t.Failure = failure
	}
}

const (
	// echoPatience is how long an echo may take.
	echoPatience = 2 * time.Second

	// echoTries is how often a token is sent at most. A datagram may be lost.
	echoTries = 3

	// maxInFlight is how many tokens are under way at most, on the whole
	// machine: so few that they all fit into the default receive buffer of one
	// UDP socket, where each takes 768 bytes.
	maxInFlight = 128
)

// echoes says how to verify connections.
type echoes struct {
	window    int // tokens under way at a time
	patience  time.Duration
	datagrams bool // that may be lost
}

// verify sends the connections' tokens, and reads what comes back.
func (e echoes) verify(conns []net.Conn, tokens []token) Tally {
	var t Tally
	for start := 0; start < len(conns); start += e.window {
		end := min(start+e.window, len(conns))
		e.verifyWindow(&t, conns[start:end], tokens[start:end])
	}
	return t
}

func (e echoes) verifyWindow(t *Tally, conns []net.Conn, tokens []token) {
	pending := make([]int, len(conns))
	for i := range pending {
		pending[i] = i
	}
	tries := 1
	if e.datagrams {
		tries = echoTries
	}
	for try := 0; try < tries && len(pending) > 0; try++ {
		if try > 0 {
			t.Again += len(pending)
		}
		for _, i := range pending {
			if _, err := conns[i].Write(tokens[i][:]); err != nil {
				t.fail(err.Error())
			}
		}
		var silent []int
		for _, i := range pending {
			var got token
			err := conns[i].SetReadDeadline(time.Now().Add(e.patience))
			if err == nil {
				// A datagram is a whole token, part of a stream need not be.
				_, err = io.ReadFull(conns[i], got[:])
			}
			switch {
			case err != nil:
				silent = append(silent, i)
				t.fail(err.Error())
			case got != tokens[i]:
				t.Wrong++
				t.fail(fmt.Sprintf("%s got %x instead of %x", conns[i].LocalAddr(), got, tokens[i]))
			default:
				t.Own++
			}
		}
		pending = silent
	}
	t.Missing += len(pending)
}

// strays counts the connections on which there is anything to read, and be it
// the end of a stream. The token of the connection itself is no stray: it has
// come a second time if it was late at first and sent again.
func strays(conns []net.Conn, tokens []token) (int, error) {
	n := 0
	for i, conn := range conns {
		raw, err := conn.(syscall.Conn).SyscallConn()
		if err != nil {
			return n, err
		}
		stray := false
		if err := raw.Control(func(fd uintptr) {
			var got [tokenSize + 1]byte
			for {
				length, _, err := unix.Recvfrom(int(fd), got[:], unix.MSG_DONTWAIT)
				if err != nil {
					stray = stray || err != unix.EAGAIN
					return
				}
				if !bytes.Equal(got[:length], tokens[i][:]) {
					stray = true
					return
				}
			}
		}); err != nil {
			return n, err
		}
		if stray {
			n++
		}
	}
	return n, nil
}
