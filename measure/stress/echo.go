//go:build linux

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/measure/internal/echo"
)

// A token is what a connection sends: the process, its incarnation, a number that
// no other connection of theirs has, and a random one.
type token [echo.TokenSize]byte

func newToken(process, incarnation int, number uint64, random *rand.Rand) (t token) {
	binary.BigEndian.PutUint16(t[0:], uint16(process))
	binary.BigEndian.PutUint32(t[2:], uint32(incarnation))
	binary.BigEndian.PutUint64(t[8:], number)
	binary.BigEndian.PutUint64(t[16:], random.Uint64())
	return t
}

func (t token) process() int     { return int(binary.BigEndian.Uint16(t[0:])) }
func (t token) incarnation() int { return int(binary.BigEndian.Uint32(t[2:])) }

// checkAnswer returns the failure that an answer is, or nil.
func checkAnswer(b []byte, sent token, local netip.AddrPort, of string) *Failure {
	if len(b) != echo.AnswerSize {
		return &Failure{Promise: misdelivered, What: fmt.Sprintf("%s got %x", of, b)}
	}
	if got := token(b[:echo.TokenSize]); got != sent {
		return &Failure{
			Promise: misdelivered, What: fmt.Sprintf("%s got the answer to %x instead of %x", of, got, sent),
			At: now(), Sender: &Sender{got.process(), got.incarnation()},
		}
	}
	if from := echo.From(b); from != local {
		return &Failure{Promise: misdelivered, What: fmt.Sprintf("%s has come from %s", of, from)}
	}
	return nil
}

// echoPatience is how long an answer may take.
const echoPatience = 10 * time.Second

// An echoer is a connection on which the servers answer.
type echoer interface {
	// echo sends the token and returns the next answer to whatever.
	echo(t token) ([]byte, error)
	// more returns the next answer if the last one was not to the token.
	more() ([]byte, error)
	// local is the connection's address, and String its 4-tuple.
	local() netip.AddrPort
	String() string
	// close closes it, with TIME_WAIT or without.
	close(timeWait bool)
}

// verify sends a token and expects its answer. The failures include answers to
// others, which do not count if those are dead.
func verify(c echoer, t token) (failures []Failure) {
	b, err := c.echo(t)
	for {
		if err != nil {
			return append(failures, Failure{Promise: misdelivered, What: fmt.Sprintf("%s got no answer: %v", c, err)})
		}
		failure := checkAnswer(b, t, c.local(), c.String())
		if failure == nil {
			return failures
		}
		failures = append(failures, *failure)
		if failure.Sender == nil {
			return failures
		}
		b, err = c.more()
	}
}

// A goConn is a connection of this process.
type goConn struct {
	net.Conn
	room [echo.AnswerSize + 1]byte
}

func (c *goConn) echo(t token) ([]byte, error) {
	if err := c.SetDeadline(time.Now().Add(echoPatience)); err != nil {
		return nil, err
	}
	if _, err := c.Write(t[:]); err != nil {
		return nil, err
	}
	return c.more()
}

func (c *goConn) more() ([]byte, error) {
	n, err := c.Read(c.room[:])
	if _, stream := c.Conn.(*net.TCPConn); stream {
		for err == nil && n < echo.AnswerSize {
			var m int
			m, err = c.Read(c.room[n:])
			n += m
		}
	}
	return c.room[:n], err
}

func (c *goConn) local() netip.AddrPort { return addrPort(c.LocalAddr()) }

func (c *goConn) String() string {
	return fmt.Sprintf("%s %s->%s", c.LocalAddr().Network(), c.LocalAddr(), c.RemoteAddr())
}

func (c *goConn) close(timeWait bool) {
	if !timeWait {
		c.noTimeWait()
	}
	c.Close()
}

// noTimeWait has a TCP connection reset when it is closed.
func (c *goConn) noTimeWait() {
	if tcp, ok := c.Conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
}

// left returns what there is to read on a connection that expects nothing.
func (c *goConn) left() (b []byte, err error) {
	raw, err := c.Conn.(syscall.Conn).SyscallConn()
	if err != nil {
		return nil, err
	}
	ctlErr := raw.Control(func(fd uintptr) {
		var n int
		n, _, err = unix.Recvfrom(int(fd), c.room[:], unix.MSG_DONTWAIT)
		b = c.room[:max(n, 0)]
	})
	if err == unix.EAGAIN {
		return nil, ctlErr
	}
	return b, errors.Join(err, ctlErr)
}

func onSocket(c syscall.RawConn, f func(fd int) error) (err error) {
	if ctlErr := c.Control(func(fd uintptr) { err = f(int(fd)) }); ctlErr != nil {
		return ctlErr
	}
	return err
}

func addrPort(a net.Addr) netip.AddrPort {
	ap, _ := netip.ParseAddrPort(a.String())
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
