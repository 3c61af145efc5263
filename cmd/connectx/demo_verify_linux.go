package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// A token is what one connection sends and should get back.
type token [tokenSize]byte

const tokenSize = 16

// A tally counts echoes. Those that came to another connection are misdelivered
// there and missing where they belong.
type tally struct {
	echoed, misdelivered, missing int
}

func (t tally) sent() int { return t.echoed + t.missing }

func (t *tally) add(other tally) {
	t.echoed += other.echoed
	t.misdelivered += other.misdelivered
	t.missing += other.missing
}

func (t tally) String() string {
	s := fmt.Sprintf("%d echoes", t.echoed)
	if t.missing != 0 || t.misdelivered != 0 {
		s += fmt.Sprintf(", %d missing, %d misdelivered", t.missing, t.misdelivered)
	}
	return s
}

const (
	// maxInFlight keeps the echoes under way from overflowing the receive
	// buffer of a UDP server.
	maxInFlight = 32

	// echoPatience is how long nothing may arrive before the echoes that are
	// under way are given up.
	echoPatience = 2 * time.Second
)

// verify sends a token of its own on every connection, and sees where each
// echo arrives. The error is that of the context.
func verify(ctx context.Context, conns []net.Conn, p *progress) (tally, error) {
	tokens := make([]token, len(conns))
	for i := range tokens {
		rand.Read(tokens[i][:])
	}
	arrivals, stop := receiveAll(conns)
	defer stop()

	t := tally{missing: len(conns)}
	sent, inFlight := 0, 0
	for sent < len(conns) || inFlight > 0 {
		if sent < len(conns) && inFlight < maxInFlight {
			// The connection of a token that cannot be sent misses its echo.
			if _, err := conns[sent].Write(tokens[sent][:]); err == nil {
				inFlight++
			}
			sent++
			continue
		}
		select {
		case a := <-arrivals:
			inFlight--
			if a.token == tokens[a.conn] {
				t.echoed++
				t.missing--
			} else {
				t.misdelivered++
			}
			p.update("%d echoes", t.echoed)
		case <-time.After(echoPatience):
			return t, nil
		case <-ctx.Done():
			return t, ctx.Err()
		}
	}
	return t, nil
}

// An arrival is a token that was received on a connection.
type arrival struct {
	conn int
	token
}

// receiveAll receives on all connections until stop is called.
func receiveAll(conns []net.Conn) (arrivals <-chan arrival, stop func()) {
	ch := make(chan arrival)
	done := make(chan struct{})
	var wg sync.WaitGroup
	for i, conn := range conns {
		wg.Go(func() {
			a := arrival{conn: i}
			for {
				// A datagram is a whole token, part of a stream need not be.
				if _, err := io.ReadFull(conn, a.token[:]); err != nil {
					return
				}
				select {
				case ch <- a:
				case <-done:
					return
				}
			}
		})
	}
	return ch, func() {
		close(done)
		for _, conn := range conns {
			conn.SetReadDeadline(time.Unix(1, 0))
		}
		wg.Wait()
	}
}
