//go:build linux

package quicdial

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/netns"
)

// descriptors counts what is open. The netlink sockets that a connectx.Dialer has
// in reserve, as many as dials ran side by side, are not counted.
func descriptors(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, entry := range entries {
		fd, err := strconv.Atoi(entry.Name())
		if err != nil {
			t.Fatal(err)
		}
		addr, err := unix.Getsockname(fd)
		if errors.Is(err, syscall.EBADF) {
			continue // was closed since
		}
		if _, ok := addr.(*unix.SockaddrNetlink); !ok {
			n++
		}
	}
	return n
}

// An outcome is a way for a dial, or the connection from it, to end. It returns an
// error if it went another way.
type outcome struct {
	name string
	run  func() error
}

// After many connections, half of which never came to be, everything that they
// took is back.
func TestNothingIsLeftOfConnections(t *testing.T) {
	netns.Need(t)
	total := 10_000
	if testing.Short() {
		total = 500
	}
	const workers = 16 // fewer than ports, for they may all dial the same address
	var base Dialer
	checkEcho(t, dial(t, &base, serveOn(t, "127.0.3.1").addr, clientTLS(), nil)) // opens what is kept

	goroutines, open := runtime.NumGoroutine(), descriptors(t)
	t.Run("dials", func(t *testing.T) {
		failures, successes := outcomes(t, base)
		var wg sync.WaitGroup
		var next atomic.Int64
		for range workers {
			wg.Go(func() {
				for i := int(next.Add(1)) - 1; i < total && !t.Failed(); i = int(next.Add(1)) - 1 {
					// Half of all.
					of := failures
					if i%2 == 0 {
						of = successes
					}
					o := of[i/2%len(of)]
					if err := o.run(); err != nil {
						t.Errorf("%s: %v", o.name, err)
					}
				}
			})
		}
		wg.Wait()
	}) // closes the servers
	deadline := time.Now().Add(testTimeout)
	for runtime.NumGoroutine() > goroutines || descriptors(t) > open {
		if time.Now().After(deadline) {
			stacks := make([]byte, 1<<16)
			t.Fatalf("goroutines: %d, before %d; descriptors: %d, before %d\n%s",
				runtime.NumGoroutine(), goroutines, descriptors(t), open, stacks[:runtime.Stack(stacks, true)])
		}
		time.Sleep(10 * time.Millisecond) // only so as not to spin
	}
}

// outcomes returns all that can happen, and the servers for it. They are on many
// addresses, so that the ports suffice for what runs side by side.
func outcomes(t *testing.T, base Dialer) (failures, successes []outcome) {
	closed := closedPort(t, "127.0.3.2")
	silent := listenUDP(t, "127.0.3.3").LocalAddr().String()
	full := listenUDP(t, "127.0.3.4").LocalAddr().String()
	for range ports {
		var d connectx.Dialer
		pc, err := d.DialPacket(t.Context(), "udp", full)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { pc.Close() })
	}
	var servers []*server
	for i := range 8 {
		servers = append(servers, serveOn(t, fmt.Sprintf("127.0.4.%d", i+1)))
	}
	var turn atomic.Uint32
	some := func() string { return servers[turn.Add(1)%uint32(len(servers))].addr }
	// closers close each connection once it has a stream.
	closer := listenUDP(t, "127.0.3.5")
	closerTransport := &quic.Transport{Conn: closer}
	listener, err := closerTransport.Listen(serverTLS(), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closerTransport.Close() })
	go func() {
		for {
			conn, err := listener.Accept(context.Background())
			if err != nil {
				return
			}
			conn.CloseWithError(7, "enough")
		}
	}()
	refuser := listenUDP(t, "127.0.3.6")
	refuserTransport := &quic.Transport{
		Conn:        refuser,
		ConnContext: func(context.Context, *quic.ClientInfo) (context.Context, error) { return nil, errors.New("no") },
	}
	if _, err := refuserTransport.Listen(serverTLS(), nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { refuserTransport.Close() })

	const short = 5 * time.Millisecond
	dial := func(ctx context.Context, d Dialer, addr string, change func(*tls.Config), conf *quic.Config) (*quic.Conn, error) {
		tlsConf := clientTLS()
		if change != nil {
			change(tlsConf)
		}
		return d.Dial(ctx, addr, tlsConf, conf)
	}
	fails := func(want error, d Dialer, addr string, change func(*tls.Config), conf *quic.Config) func() error {
		return func() error {
			if want == nil {
				return check()(dial(context.Background(), d, addr, change, conf))
			}
			return check(want)(dial(context.Background(), d, addr, change, conf))
		}
	}
	with := func(change func(*Dialer)) Dialer {
		d := base
		change(&d)
		return d
	}
	names := with(func(d *Dialer) { d.Resolver = resolver("127.0.3.2", "127.0.3.7") })
	_, closedPortNumber, _ := net.SplitHostPort(closed)
	failures = []outcome{
		{"closed port", fails(syscall.ECONNREFUSED, base, closed, nil, nil)},
		{"all addresses refuse", fails(syscall.ECONNREFUSED, names, serverName+":"+closedPortNumber, nil, nil)},
		{"no such host", fails(&net.DNSError{}, names, "nobody.test:443", nil, nil)},
		{"no port", fails(&net.AddrError{}, base, "127.0.0.1", nil, nil)},
		{"unknown port", fails(&net.DNSError{}, base, "127.0.0.1:no-such-port", nil, nil)},
		{"no route", func() error {
			// The kernel looks for a port before a route, and while all are in
			// use finds none for a socket that does not share.
			return check(syscall.ENETUNREACH, syscall.EAGAIN)(dial(context.Background(), base, "192.0.2.1:443", nil, nil))
		}},
		{"ports exhausted", fails(connectx.ErrPortsExhausted, base, full, nil, nil)},
		{"source of another family", fails(&net.AddrError{}, with(func(d *Dialer) { d.LocalAddr = &net.UDPAddr{IP: net.IPv6loopback} }), silent, nil, nil)},
		{"hook says no", fails(errHook, with(func(d *Dialer) {
			d.Control = func(string, string, syscall.RawConn) error { return errHook }
		}), silent, nil, nil)},
		{"invalid quic.Config", fails(nil, base, silent, nil, &quic.Config{Versions: []quic.Version{0x1234}})},
		{"no TLS config", func() error {
			return check(errNoTLSConfig)(base.Dial(context.Background(), silent, nil, nil))
		}},
		{"no ALPN", fails(nil, base, silent, func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }, nil)},
		{"certificate not trusted", func() error {
			return check(&quic.TransportError{})(dial(context.Background(), base, some(), func(c *tls.Config) { c.RootCAs = x509.NewCertPool() }, nil))
		}},
		{"another ALPN", func() error {
			return check(&quic.TransportError{})(dial(context.Background(), base, some(), func(c *tls.Config) { c.NextProtos = []string{"another"} }, nil))
		}},
		{"server refuses", fails(&quic.TransportError{}, base, refuser.LocalAddr().String(), nil, nil)},
		{"no answer", func() error {
			// The handshake's own limit is twice that, and may end it first.
			return check(&quic.IdleTimeoutError{}, &quic.HandshakeTimeoutError{})(
				dial(context.Background(), base, silent, nil, &quic.Config{HandshakeIdleTimeout: short}))
		}},
		{"Timeout", fails(context.DeadlineExceeded, with(func(d *Dialer) { d.Timeout = short }), silent, nil, nil)},
		{"deadline", func() error {
			ctx, cancel := context.WithTimeout(context.Background(), short)
			defer cancel()
			return check(context.DeadlineExceeded)(dial(ctx, base, silent, nil, nil))
		}},
		{"cancelled before", func() error {
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			return check()(dial(ctx, base, some(), nil, nil))
		}},
		{"cancelled during the handshake", func() error {
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			return check(context.Canceled, &quic.TransportError{})(dial(ctx, base, some(), func(c *tls.Config) {
				c.VerifyConnection = func(tls.ConnectionState) error { cancel(); return errHook }
			}, nil))
		}},
	}

	established := func(addr func() string, conf *quic.Config, end func(*quic.Conn) error) func() error {
		return func() error {
			ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
			defer cancel()
			conn, err := dial(ctx, base, addr(), nil, conf)
			if err != nil {
				return err
			}
			if err := end(conn); err != nil {
				return err
			}
			select {
			case <-conn.Context().Done():
				return nil
			case <-ctx.Done():
				return errors.New("the connection does not end")
			}
		}
	}
	successes = []outcome{
		{"client closes", established(some, nil, func(conn *quic.Conn) error {
			return conn.CloseWithError(0, "")
		})},
		{"client closes after an echo", established(some, nil, func(conn *quic.Conn) error {
			defer conn.CloseWithError(0, "")
			return tryEcho(conn)
		})},
		{"context of the dial ends first", func() error {
			ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
			conn, err := dial(ctx, base, some(), nil, nil)
			cancel()
			if err != nil {
				return err
			}
			defer conn.CloseWithError(0, "")
			return tryEcho(conn)
		}},
		{"server closes", established(func() string { return closer.LocalAddr().String() }, nil, func(*quic.Conn) error { return nil })},
	}
	// This one takes long, at least three times the probe timeout.
	idle := outcome{"idle timeout", established(some, &quic.Config{MaxIdleTimeout: 100 * time.Millisecond}, func(*quic.Conn) error { return nil })}
	return failures, append(slices.Repeat(successes, 6), idle)
}

var errHook = errors.New("hook")

// check checks that a dial has failed, and with an error that is, or is of the type
// of, one of those wanted; none allows all.
func check(wanted ...error) func(*quic.Conn, error) error {
	return func(conn *quic.Conn, err error) error {
		if err == nil {
			conn.CloseWithError(0, "")
			return errors.New("connected")
		}
		for _, want := range wanted {
			ok := errors.Is(err, want)
			switch want.(type) {
			case *quic.IdleTimeoutError:
				_, ok = errors.AsType[*quic.IdleTimeoutError](err)
			case *quic.HandshakeTimeoutError:
				_, ok = errors.AsType[*quic.HandshakeTimeoutError](err)
			case *net.DNSError:
				_, ok = errors.AsType[*net.DNSError](err)
			case *net.AddrError:
				_, ok = errors.AsType[*net.AddrError](err)
			case *quic.TransportError:
				_, ok = errors.AsType[*quic.TransportError](err)
			}
			if ok {
				return nil
			}
		}
		if len(wanted) == 0 {
			return nil
		}
		return fmt.Errorf("%T: %w", err, err)
	}
}
