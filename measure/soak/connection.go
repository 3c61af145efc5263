//go:build linux

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/measure/internal/echo"
)

// A connection is one that is held.
type connection struct {
	net.Conn
	flow   flow
	port   int       // counted from firstPort
	opened time.Time // when the dial began
	busy   bool      // somebody uses it; under flows.mu
	used   time.Time // when that was last begun without an error
}

func (c *connection) String() string {
	return fmt.Sprintf("%s %s->%s", c.LocalAddr().Network(), c.LocalAddr(), c.RemoteAddr())
}

// Close closes the connection, and leaves nothing in TIME_WAIT.
func (c *connection) Close() error {
	abandon(c.Conn)
	return c.Conn.Close()
}

// abandon has a TCP connection reset when it is closed.
func abandon(c net.Conn) {
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
}

// A token is what a connection sends: a number that no other has, and random bytes.
type token [echo.TokenSize]byte

func newToken(goroutine, number uint64, random *rand.Rand) (t token) {
	binary.BigEndian.PutUint64(t[0:], goroutine)
	binary.BigEndian.PutUint64(t[8:], number)
	binary.BigEndian.PutUint64(t[16:], random.Uint64())
	return t
}

const (
	// echoPatience is how long an answer may take if nothing explains that there
	// is none.
	echoPatience = 10 * time.Second

	// echoGlance is how long it may take until that is asked.
	echoGlance = 300 * time.Millisecond
)

// errWrongBytes is what nothing explains.
var errWrongBytes = errors.New("has got what is not its own")

// verify sends a token, and returns when its answer is there, or what is wrong.
// When there is none it asks now and then whether it should give up.
func verify(c net.Conn, t token, giveUp func() bool) error {
	if _, err := c.Write(t[:]); err != nil {
		return err
	}
	var room [echo.AnswerSize + 1]byte
	_, stream := c.(*net.TCPConn)
	n := 0
	for deadline := time.Now().Add(echoPatience); n == 0 || stream && n < echo.AnswerSize; {
		if err := c.SetReadDeadline(time.Now().Add(echoGlance)); err != nil {
			return err
		}
		m, err := c.Read(room[n:])
		n += m
		switch {
		case err == nil:
		case !errors.Is(err, os.ErrDeadlineExceeded), time.Now().After(deadline), giveUp():
			return err
		}
	}
	return checkAnswer(room[:n], t, addrPort(c.LocalAddr()))
}

func checkAnswer(b []byte, sent token, local netip.AddrPort) error {
	switch {
	case len(b) != echo.AnswerSize || token(b[:echo.TokenSize]) != sent:
		return fmt.Errorf("%w: %x instead of %x", errWrongBytes, b, sent)
	case echo.From(b) != local:
		return fmt.Errorf("%w: an answer to %s", errWrongBytes, echo.From(b))
	}
	return nil
}

// shares reports whether others can have the connection's port for other
// destinations.
func shares(c net.Conn) bool {
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		return false
	}
	on := 0
	_ = raw.Control(func(fd uintptr) { on, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR) })
	return err == nil && on != 0
}

func addrPort(a net.Addr) netip.AddrPort {
	ap, _ := netip.ParseAddrPort(a.String())
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
