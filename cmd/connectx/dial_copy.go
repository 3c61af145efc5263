package main

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// longAgo is a deadline that ends reads and writes at once.
var longAgo = time.Unix(1, 0)

// copyStream copies in both directions until the peer closes, or an error.
func copyStream(conn *net.TCPConn, stdin io.Reader, stdout io.Writer) error {
	s := &sender{conn: conn}
	sent, received := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := io.Copy(s, stdin)
		if err == nil {
			startHandshake(conn)
			// Fails if the connection is over, which receiving tells about.
			_ = conn.CloseWrite()
		}
		sent <- err
	}()
	go func() {
		// Plain reads and writes: with splice, a closed standard output would be an
		// error of the connection, and would not end the program as others.
		_, err := io.Copy(struct{ io.Writer }{stdout}, struct{ io.Reader }{conn})
		received <- err
	}()
	select {
	case err := <-received:
		if err == nil {
			err = s.stop()
		}
		return err
	case err := <-sent:
		if err != nil {
			return err
		}
		return <-received
	}
}

// A sender writes to a connection, and remembers the error. The kernel tells
// what has ended a connection once only, to the one who reads or to the one who
// writes; the other sees the end of the stream.
type sender struct {
	conn net.Conn

	mu  sync.Mutex // held while writing
	err error
}

func (s *sender) Write(b []byte) (n int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, s.err = s.conn.Write(b)
	return n, s.err
}

// stop ends a write that is under way, and returns the error of the last one.
func (s *sender) stop() error {
	_ = s.conn.SetWriteDeadline(longAgo)
	s.mu.Lock()
	defer s.mu.Unlock()
	if errors.Is(s.err, os.ErrDeadlineExceeded) {
		return nil
	}
	return s.err
}

// The sizes of a read: of standard input what nc has, of the connection what the
// longest datagram fits in.
const (
	maxSent     = 16384
	maxReceived = 65536
)

// copyDatagrams sends what each read of stdin returns as a datagram, and writes
// each answer to stdout. After the end of stdin it goes on until there is no
// answer for as long as wait.
func copyDatagrams(conn net.Conn, stdin io.Reader, stdout io.Writer, wait time.Duration) error {
	var last atomic.Bool // nothing more will be sent
	sent, received := make(chan error, 1), make(chan error, 1)
	go func() {
		err := sendDatagrams(conn, stdin)
		if err == nil {
			last.Store(true)
			_ = conn.SetReadDeadline(time.Now().Add(wait))
		}
		sent <- err
	}()
	go func() {
		b := make([]byte, maxReceived)
		for {
			n, err := conn.Read(b)
			if err == nil {
				_, err = stdout.Write(b[:n])
			}
			if err != nil {
				received <- err
				return
			}
			if last.Load() {
				_ = conn.SetReadDeadline(time.Now().Add(wait))
			}
		}
	}()
	var err error
	select {
	case err = <-received:
	case err = <-sent:
		if err == nil {
			err = <-received
		}
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return err
}

func sendDatagrams(conn net.Conn, stdin io.Reader) error {
	b := make([]byte, maxSent)
	for {
		n, err := stdin.Read(b)
		if n > 0 {
			if _, err := conn.Write(b[:n]); err != nil {
				return err
			}
		}
		switch {
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
	}
}
