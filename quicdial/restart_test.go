//go:build linux

package quicdial

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/vishvananda/netlink"

	"github.com/seed22601231/connectx/internal/netns"
)

// A flakyConn is a server's socket that can be closed and opened again under the
// server, which does not notice but for the packets that it misses.
type flakyConn struct {
	addr *net.UDPAddr

	mu     sync.Mutex
	change *sync.Cond
	conn   *net.UDPConn // nil while down
	closed bool
}

func newFlakyConn(t testing.TB, host string) *flakyConn {
	t.Helper()
	conn := listenUDP(t, host)
	f := &flakyConn{addr: conn.LocalAddr().(*net.UDPAddr), conn: conn}
	f.change = sync.NewCond(&f.mu)
	return f
}

// down closes the port.
func (f *flakyConn) down() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.conn.Close()
	f.conn = nil
}

// up opens the port again.
func (f *flakyConn) up(t testing.TB) {
	t.Helper()
	conn, err := net.ListenUDP("udp", f.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	f.mu.Lock()
	defer f.mu.Unlock()
	f.conn = conn
	f.change.Broadcast()
}

func (f *flakyConn) ReadFrom(b []byte) (int, net.Addr, error) {
	for {
		f.mu.Lock()
		for f.conn == nil && !f.closed {
			f.change.Wait()
		}
		conn, closed := f.conn, f.closed
		f.mu.Unlock()
		if closed {
			return 0, nil, net.ErrClosed
		}
		if n, addr, err := conn.ReadFrom(b); err == nil {
			return n, addr, nil
		}
	}
}

func (f *flakyConn) WriteTo(b []byte, addr net.Addr) (int, error) {
	f.mu.Lock()
	conn := f.conn
	f.mu.Unlock()
	if conn != nil {
		conn.WriteTo(b, addr)
	}
	return len(b), nil
}

func (f *flakyConn) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	f.change.Broadcast()
	if f.conn != nil {
		f.conn.Close()
	}
	return nil
}

func (f *flakyConn) LocalAddr() net.Addr { return f.addr }

// SetReadDeadline is how a quic.Transport that is closed ends the read.
func (f *flakyConn) SetReadDeadline(time.Time) error { return f.Close() }

func (f *flakyConn) SetDeadline(time.Time) error      { return errors.ErrUnsupported }
func (f *flakyConn) SetWriteDeadline(time.Time) error { return errors.ErrUnsupported }

// A server whose port is closed for a second: a client that keeps on writing has
// everything echoed in the end, on the stream that it was using.
func TestConnectionOutlivesARestartOfTheServer(t *testing.T) {
	for _, host := range []string{"127.0.0.1", "::1"} {
		t.Run(host, func(t *testing.T) {
			pc := newFlakyConn(t, host)
			s := serve(t, &quic.Transport{Conn: pc}, nil)
			var stats Stats
			conn := dial(t, &Dialer{Stats: &stats}, s.addr, clientTLS(), nil)
			checkEcho(t, conn)
			if n := stats.ReadErrors.Load() + stats.WriteErrors.Load(); n != 0 {
				t.Errorf("%d errors before the outage", n)
			}
			stream, err := conn.OpenStreamSync(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			stream.SetDeadline(time.Now().Add(testTimeout))

			pc.down()
			var sent bytes.Buffer
			ticks := time.NewTicker(5 * time.Millisecond)
			defer ticks.Stop()
			for outage := time.After(time.Second); outage != nil; {
				select {
				case <-outage:
					outage = nil
				case now := <-ticks.C:
					line := now.String() + "\n"
					sent.WriteString(line)
					if _, err := stream.Write([]byte(line)); err != nil {
						t.Fatalf("during the outage: %v", err)
					}
				}
			}
			if stats.ReadErrors.Load()+stats.WriteErrors.Load() == 0 {
				t.Error("the outage has caused no error")
			}
			pc.up(t)

			stream.Close()
			got, err := io.ReadAll(stream)
			if err != nil {
				t.Fatalf("after the outage: %v", err)
			}
			if !bytes.Equal(got, sent.Bytes()) {
				t.Errorf("got %d bytes back, sent %d", len(got), sent.Len())
			}
			checkEcho(t, conn)
			t.Logf("dropped errors: %d of reads, %d of writes", stats.ReadErrors.Load(), stats.WriteErrors.Load())
		})
	}
}

// The route to the server is gone for a while: not the network, but the client's
// own kernel says so.
func TestConnectionOutlivesALostRoute(t *testing.T) {
	netns.Need(t)
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	addr, err := netlink.ParseAddr("10.1.1.1/32")
	if err != nil {
		t.Fatal(err)
	}
	if err := netns.AddAddress(lo, addr.String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.AddrDel(lo, addr) })
	source, err := netlink.ParseAddr("10.1.1.2/32") // stays while the other is gone
	if err != nil {
		t.Fatal(err)
	}
	if err := netns.AddAddress(lo, source.String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.AddrDel(lo, source) })
	pc := newFlakyConn(t, "10.1.1.1")
	s := serve(t, &quic.Transport{Conn: pc}, nil)
	var stats Stats
	d := Dialer{Stats: &stats}
	d.LocalAddr = &net.UDPAddr{IP: source.IP}
	conn := dial(t, &d, s.addr, clientTLS(), nil)
	checkEcho(t, conn)

	if err := netlink.AddrDel(lo, addr); err != nil {
		t.Fatal(err)
	}
	probe, err := net.Dial("udp", s.addr)
	if !errors.Is(err, syscall.ENETUNREACH) {
		t.Fatalf("there still is a route: %v, %v", probe, err)
	}
	stream, err := conn.OpenStreamSync(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	stream.SetDeadline(time.Now().Add(testTimeout))
	if _, err := stream.Write([]byte("on hold")); err != nil {
		t.Fatal(err)
	}
	stream.Close()
	waitFor(t, "dropped write", func() bool { return stats.WriteErrors.Load() > 0 })

	if err := netns.AddAddress(lo, addr.String()); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(stream); string(got) != "on hold" {
		t.Fatalf("after the outage: %q, %v", got, err)
	}
}

// The server comes back without its state: the connection is of no use any more,
// and ends before any timeout.
func TestServerThatLostItsStateEndsTheConnection(t *testing.T) {
	key := quic.StatelessResetKey{1, 2, 3}
	pc := newFlakyConn(t, "127.0.0.1")
	s := serve(t, &quic.Transport{Conn: pc, StatelessResetKey: &key}, nil)
	var d Dialer
	conn := dial(t, &d, s.addr, clientTLS(), nil)
	checkEcho(t, conn)

	pc.down() // before the server can say goodbye
	s.close()
	again, err := net.ListenUDP("udp", pc.addr)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, &quic.Transport{Conn: again, StatelessResetKey: &key}, nil)

	stream, err := conn.OpenStreamSync(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Write(make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(conn.Context(), testTimeout)
	defer cancel()
	<-ctx.Done()
	if _, ok := errors.AsType[*quic.StatelessResetError](context.Cause(conn.Context())); !ok {
		t.Errorf("the connection ended with %v", context.Cause(conn.Context()))
	}
}
