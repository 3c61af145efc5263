//go:build linux

package quicdial

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/seed22601231/connectx/internal/netns"
)

// The ephemeral ports of all tests. A Dialer would not notice a change at once.
const (
	lowPort  = 40000
	highPort = 40019
	ports    = highPort - lowPort + 1
)

func TestMain(m *testing.M) {
	// quic-go would mention once that a flakyConn has no buffer sizes to set.
	os.Setenv("QUIC_GO_DISABLE_RECEIVE_BUFFER_WARNING", "true")
	os.Exit(netns.Main(func() int {
		if netns.Inside() {
			if err := netns.SetPortRange(lowPort, highPort); err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
		}
		return m.Run()
	}))
}

const (
	serverName = "server.test"
	protocol   = "echo"
)

// certificate is the servers', and the only one that clients trust.
var certificate = selfSigned()

func selfSigned() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: serverName},
		DNSNames:              []string{serverName},
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

func serverTLS() *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{certificate}, NextProtos: []string{protocol}}
}

func clientTLS() *tls.Config {
	roots := x509.NewCertPool()
	roots.AddCert(certificate.Leaf)
	return &tls.Config{RootCAs: roots, ServerName: serverName, NextProtos: []string{protocol}}
}

var lastPort atomic.Uint32

// listenUDP takes a port that was not taken before, and is not ephemeral.
func listenUDP(t testing.TB, host string) *net.UDPConn {
	t.Helper()
	for {
		port := 20000 + lastPort.Add(1)
		pc, err := net.ListenPacket("udp", net.JoinHostPort(host, fmt.Sprint(port)))
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { pc.Close() })
		return pc.(*net.UDPConn)
	}
}

// closedPort is the address of a port that was just closed.
func closedPort(t testing.TB, host string) string {
	t.Helper()
	pc := listenUDP(t, host)
	defer pc.Close()
	return pc.LocalAddr().String()
}

// A server echoes what comes on each stream of each connection.
type server struct {
	addr string
	// conns has the connections that the server accepted. Nobody has to
	// receive from it.
	conns chan *quic.Conn
	close func()
}

// serve runs a server on a transport until the test ends, or it is closed.
func serve(t testing.TB, transport *quic.Transport, conf *quic.Config) *server {
	t.Helper()
	listener, err := transport.ListenEarly(serverTLS(), conf)
	if err != nil {
		t.Fatal(err)
	}
	s := &server{
		addr:  transport.Conn.LocalAddr().String(),
		conns: make(chan *quic.Conn, 1000),
		close: func() {
			listener.Close()
			transport.Close()
			transport.Conn.Close()
		},
	}
	t.Cleanup(s.close)
	go func() {
		for {
			conn, err := listener.Accept(context.Background())
			if err != nil {
				return
			}
			select {
			case s.conns <- conn:
			default:
			}
			go echo(conn)
		}
	}()
	return s
}

// serveOn runs a server on a port of its own.
func serveOn(t testing.TB, host string) *server {
	t.Helper()
	return serve(t, &quic.Transport{Conn: listenUDP(t, host)}, &quic.Config{Allow0RTT: true})
}

func echo(conn *quic.Conn) {
	for {
		stream, err := conn.AcceptStream(context.Background())
		if err != nil {
			return
		}
		go func() {
			io.Copy(stream, stream)
			stream.Close()
		}()
	}
}

// checkEcho sends what is a different message on each connection and call.
func checkEcho(t testing.TB, conn *quic.Conn) {
	t.Helper()
	if err := tryEcho(conn); err != nil {
		t.Fatal(err)
	}
}

func tryEcho(conn *quic.Conn) error {
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	stream, err := conn.OpenStreamSync(ctx)
	if err != nil {
		return fmt.Errorf("open stream: %w", err)
	}
	stream.SetDeadline(time.Now().Add(testTimeout))
	message := []byte(rand.Text())
	if _, err := stream.Write(message); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	stream.Close()
	got, err := io.ReadAll(stream)
	if err != nil {
		return fmt.Errorf("read: %w", err)
	}
	if !bytes.Equal(got, message) {
		return fmt.Errorf("sent %q, got back %q", message, got)
	}
	return nil
}

// testTimeout is for what takes milliseconds.
const testTimeout = 20 * time.Second

// dial dials and closes the connection when the test ends.
func dial(t testing.TB, d *Dialer, addr string, tlsConf *tls.Config, conf *quic.Config) *quic.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	conn, err := d.Dial(ctx, addr, tlsConf, conf)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.CloseWithError(0, "") })
	return conn
}

// waitFor waits for a condition that holds soon, since others work on it.
func waitFor(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(testTimeout); !condition(); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not after %v", what, testTimeout)
		}
	}
}
