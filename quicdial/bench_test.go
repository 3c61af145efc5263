//go:build linux

package quicdial

import (
	"context"
	"io"
	"net"
	"testing"

	"github.com/quic-go/quic-go"

	"github.com/seed22601231/connectx"
)

// Sends 32 MiB over one connection on loopback: from a quic.Transport on an
// unconnected *net.UDPConn, as quic-go would have it, from one on a
// *connectx.PacketConn, and from a Dialer.
func BenchmarkTransfer(b *testing.B) {
	const size = 32 << 20
	chunk := make([]byte, 64<<10)
	for _, direction := range []string{"upload", "download"} {
		for _, kind := range []string{"UDPConn", "PacketConn", "quicdial"} {
			b.Run(direction+"/dialer="+kind, func(b *testing.B) {
				transport := &quic.Transport{Conn: listenUDP(b, "127.0.0.1")}
				defer transport.Conn.Close()
				defer transport.Close()
				listener, err := transport.Listen(serverTLS(), nil)
				if err != nil {
					b.Fatal(err)
				}
				go source(listener, chunk)
				conn := dialKind(b, kind, transport.Conn.LocalAddr())
				b.SetBytes(size)
				for b.Loop() {
					stream, err := conn.OpenStream()
					if err != nil {
						b.Fatal(err)
					}
					// The first byte asks for a direction.
					if direction == "download" {
						stream.Write([]byte{1})
						stream.Close()
						if n, err := io.Copy(io.Discard, stream); n != size || err != nil {
							b.Fatal(n, err)
						}
						continue
					}
					stream.Write([]byte{0})
					for range size / len(chunk) {
						if _, err := stream.Write(chunk); err != nil {
							b.Fatal(err)
						}
					}
					stream.Close()
					if _, err := io.ReadAll(stream); err != nil { // the other side has it all
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// source is the server of BenchmarkTransfer: it discards, or sends the chunk over
// and over.
func source(listener *quic.Listener, chunk []byte) {
	const size = 32 << 20
	for {
		conn, err := listener.Accept(context.Background())
		if err != nil {
			return
		}
		go func() {
			for {
				stream, err := conn.AcceptStream(context.Background())
				if err != nil {
					return
				}
				var direction [1]byte
				io.ReadFull(stream, direction[:])
				if direction[0] == 0 {
					io.Copy(io.Discard, stream)
				} else {
					for range size / len(chunk) {
						stream.Write(chunk)
					}
				}
				stream.Close()
			}
		}()
	}
}

// dialKind returns a connection, closed when the benchmark ends.
func dialKind(b *testing.B, kind string, addr net.Addr) *quic.Conn {
	b.Helper()
	if kind == "quicdial" {
		return dial(b, new(Dialer), addr.String(), clientTLS(), nil)
	}
	var pc net.PacketConn
	if kind == "UDPConn" {
		pc = listenUDP(b, "127.0.0.1")
	} else {
		var d connectx.Dialer
		var err error
		if pc, err = d.DialPacket(b.Context(), "udp", addr.String()); err != nil {
			b.Fatal(err)
		}
	}
	transport := &quic.Transport{Conn: pc}
	conn, err := transport.Dial(b.Context(), addr, clientTLS(), nil)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		conn.CloseWithError(0, "")
		transport.Close()
		pc.Close()
	})
	return conn
}
