//go:build linux

package quicdial

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
)

// newTestSocket is connected to a port that is open if it is told so. A peer that
// has gone leaves no datagrams behind.
func newTestSocket(t testing.TB, host string) (s *socket, peer *net.UDPConn) {
	t.Helper()
	peer = listenUDP(t, host)
	var d connectx.Dialer
	pc, err := d.DialPacket(t.Context(), "udp", peer.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pc.Close() })
	pc.SetDeadline(time.Now().Add(testTimeout))
	return newSocket(pc, nil), peer
}

// A way to read and write as quic-go does on some system.
type access struct {
	name  string
	read  func(*socket, []byte) (int, error)
	write func(*socket, []byte) (int, error)
}

var accesses = []access{
	{
		"batches",
		func(s *socket, b []byte) (int, error) {
			ms := []ipv4.Message{{Buffers: [][]byte{b}}}
			n, err := s.ReadBatch(ms, 0)
			if n != 1 {
				return 0, err
			}
			return ms[0].N, err
		},
		func(s *socket, b []byte) (int, error) {
			n, _, err := s.WriteMsgUDP(b, nil, s.RemoteAddr().(*net.UDPAddr))
			return n, err
		},
	},
	{
		"single",
		func(s *socket, b []byte) (int, error) {
			n, _, err := s.ReadFrom(b)
			return n, err
		},
		func(s *socket, b []byte) (int, error) { return s.WriteTo(b, s.RemoteAddr()) },
	},
}

// forEachAccess runs a test over IPv4 and IPv6 with either way to read and write.
func forEachAccess(t *testing.T, test func(t *testing.T, a access, s *socket, peer *net.UDPConn)) {
	for _, host := range []string{"127.0.0.1", "::1"} {
		for _, a := range accesses {
			t.Run(host+"/"+a.name, func(t *testing.T) {
				s, peer := newTestSocket(t, host)
				test(t, a, s, peer)
			})
		}
	}
}

// mustWrite writes as quic-go does.
func mustWrite(t *testing.T, a access, s *socket, message string) {
	t.Helper()
	if n, err := a.write(s, []byte(message)); n != len(message) || err != nil {
		t.Fatalf("write: %d, %v", n, err)
	}
}

// converse exchanges a datagram in each direction.
func converse(t *testing.T, a access, s *socket, peer *net.UDPConn) {
	t.Helper()
	mustWrite(t, a, s, "question")
	expect(t, peer, "question")
	if _, err := peer.WriteTo([]byte("answer"), s.LocalAddr()); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	if n, err := a.read(s, buf); err != nil || string(buf[:n]) != "answer" {
		t.Fatalf("read: %q, %v", buf[:max(n, 0)], err)
	}
}

func expect(t *testing.T, peer *net.UDPConn, want string) {
	t.Helper()
	peer.SetReadDeadline(time.Now().Add(testTimeout))
	buf := make([]byte, 100)
	if n, _, err := peer.ReadFrom(buf); err != nil || string(buf[:n]) != want {
		t.Fatalf("the peer got %q, %v, want %q", buf[:n], err, want)
	}
}

func reopen(t *testing.T, peer *net.UDPConn) *net.UDPConn {
	t.Helper()
	peer, err := net.ListenUDP("udp", peer.LocalAddr().(*net.UDPAddr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { peer.Close() })
	return peer
}

func checkStats(t *testing.T, s *socket, reads, writes uint64) {
	t.Helper()
	if r, w := s.stats.ReadErrors.Load(), s.stats.WriteErrors.Load(); r != reads || w != writes {
		t.Errorf("counted %d read errors and %d write errors, want %d and %d", r, w, reads, writes)
	}
}

func TestRefusalBeforeTheFirstDatagramIsReturned(t *testing.T) {
	forEachAccess(t, func(t *testing.T, a access, s *socket, peer *net.UDPConn) {
		peer.Close()
		mustWrite(t, a, s, "lost")
		if _, err := a.read(s, make([]byte, 100)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("read: %v", err)
		}
		mustWrite(t, a, s, "lost")
		if _, err := a.write(s, []byte("lost")); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("write: %v", err)
		}
		checkStats(t, s, 0, 0)
	})
}

// What a read comes across does not keep it from the datagram after it.
func TestReadDropsARefusalAfterTheFirstDatagram(t *testing.T) {
	forEachAccess(t, func(t *testing.T, a access, s *socket, peer *net.UDPConn) {
		converse(t, a, s, peer)
		peer.Close()
		mustWrite(t, a, s, "lost")
		peer = reopen(t, peer)
		if _, err := peer.WriteTo([]byte("hello"), s.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 100)
		if n, err := a.read(s, buf); err != nil || string(buf[:n]) != "hello" {
			t.Errorf("read: %q, %v", buf[:max(n, 0)], err)
		}
		checkStats(t, s, 1, 0)
	})
}

// The datagram that the kernel did not send, to report an error about an earlier
// one, is sent after all.
func TestWriteSendsAgainAfterARefusal(t *testing.T) {
	forEachAccess(t, func(t *testing.T, a access, s *socket, peer *net.UDPConn) {
		converse(t, a, s, peer)
		peer.Close()
		mustWrite(t, a, s, "lost")
		peer = reopen(t, peer)
		mustWrite(t, a, s, "sent")
		expect(t, peer, "sent")
		checkStats(t, s, 0, 1)
	})
}

func TestReadEndsWithTheSocketAndTheDeadline(t *testing.T) {
	forEachAccess(t, func(t *testing.T, a access, s *socket, peer *net.UDPConn) {
		converse(t, a, s, peer)
		s.SetReadDeadline(time.Unix(1, 0))
		if _, err := a.read(s, make([]byte, 100)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read after the deadline: %v", err)
		}
		s.Close()
		if _, err := a.read(s, make([]byte, 100)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("read after Close: %v", err)
		}
		if _, err := a.write(s, []byte("late")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("write after Close: %v", err)
		}
	})
}

// quic-go has to hear of a datagram that is too large, for path MTU discovery.
func TestWriteReturnsThatADatagramIsTooLarge(t *testing.T) {
	forEachAccess(t, func(t *testing.T, a access, s *socket, peer *net.UDPConn) {
		converse(t, a, s, peer)
		if _, err := a.write(s, make([]byte, 1<<16)); !errors.Is(err, syscall.EMSGSIZE) {
			t.Errorf("write: %v", err)
		}
		checkStats(t, s, 0, 0)
	})
}

// A spy sees what quic-go does with a socket.
type spy struct {
	quic.OOBCapablePacketConn
	batch interface {
		ReadBatch([]ipv4.Message, int) (int, error)
	}

	gso, ecn  atomic.Bool // a write had UDP_SEGMENT, or IP_TOS with ECT(0)
	sawECN    atomic.Bool // a read had IP_TOS with ECT(0)
	batchSize atomic.Int32
}

func (s *spy) SetWriteBuffer(n int) error {
	return s.OOBCapablePacketConn.(interface{ SetWriteBuffer(int) error }).SetWriteBuffer(n)
}

func (s *spy) WriteMsgUDP(b, oob []byte, addr *net.UDPAddr) (n, oobn int, err error) {
	if hasControl(oob, unix.SOL_UDP, unix.UDP_SEGMENT, func(data []byte) bool {
		return len(b) > int(data[0])|int(data[1])<<8
	}) {
		s.gso.Store(true)
	}
	if hasControl(oob, unix.IPPROTO_IP, unix.IP_TOS, isECT0) {
		s.ecn.Store(true)
	}
	return s.OOBCapablePacketConn.WriteMsgUDP(b, oob, addr)
}

func (s *spy) ReadBatch(ms []ipv4.Message, flags int) (int, error) {
	n, err := s.batch.ReadBatch(ms, flags)
	if err == nil {
		s.batchSize.Store(max(s.batchSize.Load(), int32(n)))
		for _, m := range ms[:n] {
			if hasControl(m.OOB[:m.NN], unix.IPPROTO_IP, unix.IP_TOS, isECT0) {
				s.sawECN.Store(true)
			}
		}
	}
	return n, err
}

func isECT0(data []byte) bool { return data[0]&3 == 2 }

func hasControl(oob []byte, level, kind int32, is func(data []byte) bool) bool {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return false
	}
	for _, m := range messages {
		if m.Header.Level == level && m.Header.Type == kind && is(m.Data) {
			return true
		}
	}
	return false
}

// What quic-go gets out of a *net.UDPConn it gets out of a socket, too.
func TestOffloadsAreThoseOfAUDPConn(t *testing.T) {
	const size = 8 << 20
	data := bytes.Repeat([]byte("0123456789abcdef"), size/16)
	for _, kind := range []string{"UDPConn", "socket"} {
		t.Run(kind, func(t *testing.T) {
			far := listenUDP(t, "127.0.0.1")
			farSpy := &spy{OOBCapablePacketConn: far, batch: ipv4.NewPacketConn(far)}
			s := serve(t, &quic.Transport{Conn: farSpy}, nil)
			var near *spy
			if kind == "UDPConn" {
				pc := listenUDP(t, "127.0.0.1")
				near = &spy{OOBCapablePacketConn: pc, batch: ipv4.NewPacketConn(pc)}
			} else {
				var d connectx.Dialer
				pc, err := d.DialPacket(t.Context(), "udp", s.addr)
				if err != nil {
					t.Fatal(err)
				}
				defer pc.Close()
				sock := newSocket(pc, nil)
				near = &spy{OOBCapablePacketConn: sock, batch: sock}
			}
			transport := quic.Transport{Conn: near}
			defer transport.Close()
			conn, err := transport.Dial(t.Context(), far.LocalAddr(), clientTLS(), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.CloseWithError(0, "")
			stream, err := conn.OpenStreamSync(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			go func() {
				stream.Write(data)
				stream.Close()
			}()
			if got, err := io.ReadAll(stream); err != nil || !bytes.Equal(got, data) {
				t.Fatalf("got %d bytes back, sent %d: %v", len(got), len(data), err)
			}
			if !conn.ConnectionState().GSO || !near.gso.Load() {
				t.Error("no GSO")
			}
			if !near.ecn.Load() || !farSpy.sawECN.Load() {
				t.Error("no ECN on packets sent")
			}
			if !near.sawECN.Load() {
				t.Error("no ECN seen on packets received")
			}
			if n := near.batchSize.Load(); n < 2 {
				t.Errorf("at most %d datagrams read at once", n)
			}
			raw, err := near.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			checkDF(t, raw)
		})
	}
}

func checkDF(t *testing.T, raw syscall.RawConn) {
	t.Helper()
	if err := raw.Control(func(fd uintptr) {
		mode, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER)
		if err != nil || mode != unix.IP_PMTUDISC_PROBE {
			t.Errorf("IP_MTU_DISCOVER is %d, %v", mode, err)
		}
	}); err != nil {
		t.Error(err)
	}
}

// And the connections of a Dialer have it.
func TestDialedConnectionHasTheOffloads(t *testing.T) {
	far := listenUDP(t, "127.0.0.1")
	farSpy := &spy{OOBCapablePacketConn: far, batch: ipv4.NewPacketConn(far)}
	s := serve(t, &quic.Transport{Conn: farSpy}, nil)
	var d Dialer
	var raw syscall.RawConn
	d.ControlContext = func(_ context.Context, _, _ string, c syscall.RawConn) error {
		raw = c // of the last socket that the dial took, which is the one it keeps
		return nil
	}
	conn := dial(t, &d, s.addr, clientTLS(), nil)
	// quic-go marks no datagram that has a part of the handshake in it, as the
	// first one with data may.
	checkEcho(t, conn)
	checkEcho(t, conn)
	if !conn.ConnectionState().GSO {
		t.Error("no GSO")
	}
	if !farSpy.sawECN.Load() {
		t.Error("no ECN")
	}
	checkDF(t, raw)
}
