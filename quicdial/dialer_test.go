//go:build linux

package quicdial

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/netns"
)

// Dial has the shape that HTTP/3 wants.
var _ = http3.Transport{Dial: new(Dialer).Dial}

func TestDialConnectsToAServer(t *testing.T) {
	for _, host := range []string{"127.0.0.1", "::1"} {
		t.Run(host, func(t *testing.T) {
			s := serveOn(t, host)
			tlsConf := clientTLS()
			tlsConf.ServerName = "" // the certificate has the address, too
			conn := dial(t, new(Dialer), s.addr, tlsConf, nil)
			checkEcho(t, conn)
			if got := conn.RemoteAddr().String(); got != s.addr {
				t.Errorf("remote address %s, dialled %s", got, s.addr)
			}
			if tlsConf.ServerName != "" {
				t.Errorf("the caller's ServerName has become %q", tlsConf.ServerName)
			}
		})
	}
}

func TestDialFromAChosenSourceAddressAndPort(t *testing.T) {
	s := serveOn(t, "127.0.0.1")
	local := &net.UDPAddr{IP: net.IPv4(127, 0, 0, 5), Port: 30005}
	d := Dialer{Dialer: connectx.Dialer{Dialer: net.Dialer{LocalAddr: local}}}
	conn := dial(t, &d, s.addr, clientTLS(), nil)
	checkEcho(t, conn)
	if got := conn.LocalAddr().String(); got != local.String() {
		t.Errorf("local address %s, chosen %s", got, local)
	}
}

func TestDialFromOneOfSeveralSourceAddresses(t *testing.T) {
	s := serveOn(t, "127.0.0.9")
	port := netip.MustParseAddrPort(s.addr).Port()
	var d Dialer
	d.SourceAddrs = []netip.Addr{netip.MustParseAddr("127.0.0.5"), netip.MustParseAddr("127.0.0.6")}
	d.Resolver = resolver("127.0.0.9")
	for _, addr := range []string{s.addr, fmt.Sprintf("%s:%d", serverName, port)} {
		conn := dial(t, &d, addr, clientTLS(), nil)
		checkEcho(t, conn)
		if got := conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr(); !slices.Contains(d.SourceAddrs, got) {
			t.Errorf("to %s from %v, chosen %v", addr, got, d.SourceAddrs)
		}
	}

	// Only addresses of the same family are looked up.
	d.SourceAddrs = []netip.Addr{netip.IPv6Loopback()}
	conn, err := d.Dial(t.Context(), fmt.Sprintf("%s:%d", serverName, port), clientTLS(), nil)
	if _, ok := errors.AsType[*net.DNSError](err); !ok {
		t.Errorf("%v, %v, want that there is no IPv6 address", conn, err)
	}
}

func TestHTTP3ClientDialsWithIt(t *testing.T) {
	pc := listenUDP(t, "127.0.0.1")
	h3 := http3.Server{
		TLSConfig: http3.ConfigureTLSConfig(&tls.Config{Certificates: []tls.Certificate{certificate}}),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "%s %s over %s", r.Method, r.URL.Path, r.Proto)
		}),
	}
	go h3.Serve(pc)
	t.Cleanup(func() { h3.Close() })

	var d Dialer
	tlsConf := clientTLS()
	tlsConf.ServerName = ""
	transport := &http3.Transport{TLSClientConfig: tlsConf, Dial: d.Dial}
	defer transport.Close()
	client := http.Client{Transport: transport, Timeout: testTimeout}
	for _, path := range []string{"/one", "/two"} {
		response, err := client.Get("https://" + pc.LocalAddr().String() + path)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(response.Body)
		response.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		if got, want := string(body), "GET "+path+" over HTTP/3.0"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// Early data is data that the server has before the handshake is complete.
func TestSecondDialSendsEarlyData(t *testing.T) {
	s := serveOn(t, "127.0.0.1")
	tlsConf := clientTLS()
	tickets := make(ticketCache, 1)
	tlsConf.ClientSessionCache = tickets
	var d Dialer

	conn := dial(t, &d, s.addr, tlsConf, nil)
	checkEcho(t, conn)
	if (<-s.conns).ConnectionState().Used0RTT {
		t.Error("the first connection used 0-RTT, from nothing")
	}
	waitFor(t, "session ticket", func() bool { return len(tickets) > 0 })
	conn.CloseWithError(0, "")

	conn = dial(t, &d, s.addr, tlsConf, nil)
	select {
	case <-conn.HandshakeComplete():
		t.Error("Dial waited for the handshake")
	default:
	}
	checkEcho(t, conn)
	<-conn.HandshakeComplete()
	if !conn.ConnectionState().Used0RTT {
		t.Error("the client did not use 0-RTT")
	}
	if !(<-s.conns).ConnectionState().Used0RTT {
		t.Error("the server did not use 0-RTT")
	}
}

// A ticketCache gives each session out once.
type ticketCache chan *tls.ClientSessionState

func (c ticketCache) Get(string) (*tls.ClientSessionState, bool) {
	select {
	case state := <-c:
		return state, true
	default:
		return nil, false
	}
}

func (c ticketCache) Put(_ string, state *tls.ClientSessionState) {
	if state == nil {
		return
	}
	select {
	case c <- state:
	default:
	}
}

// Early data to a closed port: Dial has mostly returned by then.
func TestRefusedEarlyConnectionEndsAtOnce(t *testing.T) {
	s := serveOn(t, "127.0.0.1")
	tlsConf := clientTLS()
	tickets := make(ticketCache, 1)
	tlsConf.ClientSessionCache = tickets
	var d Dialer
	checkEcho(t, dial(t, &d, s.addr, tlsConf, nil))
	waitFor(t, "session ticket", func() bool { return len(tickets) > 0 })
	s.close()

	start := time.Now()
	conn, err := d.Dial(t.Context(), s.addr, tlsConf, nil)
	if err == nil {
		<-conn.Context().Done()
		err = context.Cause(conn.Context())
	}
	if took := time.Since(start); took > atOnce {
		t.Errorf("the connection ended after %v", took)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the connection ended with %v", err)
	}
}

// Each of 5 destinations has the 20 ports to itself.
func TestMoreConnectionsThanPorts(t *testing.T) {
	netns.Need(t)
	const destinations = 5
	var servers []*server
	for i := range destinations {
		servers = append(servers, serveOn(t, fmt.Sprintf("127.0.1.%d", i+1)))
	}
	var d Dialer
	var conns []*quic.Conn
	for range ports {
		for _, s := range servers {
			conns = append(conns, dial(t, &d, s.addr, clientTLS(), nil))
		}
	}
	var wg sync.WaitGroup
	for _, conn := range conns {
		wg.Go(func() {
			if err := tryEcho(conn); err != nil {
				t.Errorf("%s to %s: %v", conn.LocalAddr(), conn.RemoteAddr(), err)
			}
		})
	}
	wg.Wait()
	if _, err := d.Dial(t.Context(), servers[0].addr, clientTLS(), nil); !errors.Is(err, connectx.ErrPortsExhausted) {
		t.Errorf("one more connection than there are ports: %v", err)
	}
}

// atOnce is a hundredth of what quic-go waits for an answer.
const atOnce = 50 * time.Millisecond

func TestDialToAClosedPortFailsAtOnce(t *testing.T) {
	for _, host := range []string{"127.0.0.1", "::1"} {
		t.Run(host, func(t *testing.T) {
			addr := closedPort(t, host)
			var d Dialer
			var took []time.Duration
			for range 20 {
				start := time.Now()
				conn, err := d.Dial(t.Context(), addr, clientTLS(), nil)
				took = append(took, time.Since(start))
				if !errors.Is(err, syscall.ECONNREFUSED) {
					t.Fatalf("%v, %v", conn, err)
				}
				op, ok := err.(*net.OpError)
				if !ok || op.Op != "dial" || op.Net != "udp" || op.Addr.String() != addr {
					t.Errorf("the error is %#v: %v", err, err)
				}
				if errors.Is(err, net.ErrClosed) {
					t.Errorf("%v is net.ErrClosed", err)
				}
			}
			// The machine may be busy with something else for a while.
			slices.Sort(took)
			if median := took[len(took)/2]; median > atOnce {
				t.Errorf("half of the dials took %v or more", median)
			}
		})
	}
}

// errTimeout stands for all errors that are timeouts.
var errTimeout = errors.New("timeout")

func TestDialTriesAllAddressesOfAHost(t *testing.T) {
	s := serveOn(t, "127.0.0.9")
	port := netip.MustParseAddrPort(s.addr).Port()
	silent, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 8), Port: int(port)})
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	short := &quic.Config{HandshakeIdleTimeout: 200 * time.Millisecond}
	tests := []struct {
		name  string
		hosts []string
		conf  *quic.Config
		want  error // nil: connected to the last one
	}{
		{"one", []string{"127.0.0.9"}, nil, nil},
		{"the second, for nobody listens on the first", []string{"127.0.0.7", "127.0.0.9"}, nil, nil},
		{"the second, for the first does not answer", []string{"127.0.0.8", "127.0.0.9"}, short, nil},
		{"none: the error is the first one's, refused", []string{"127.0.0.7", "127.0.0.8"}, short, syscall.ECONNREFUSED},
		{"none: the error is the first one's, a timeout", []string{"127.0.0.8", "127.0.0.7"}, short, errTimeout},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			d := Dialer{Dialer: connectx.Dialer{Dialer: net.Dialer{Resolver: resolver(test.hosts...)}}}
			tlsConf := clientTLS()
			tlsConf.ServerName = "" // the name that is dialled
			conn, err := d.Dial(t.Context(), fmt.Sprintf("%s:%d", serverName, port), tlsConf, test.conf)
			if test.want != nil {
				var timeout net.Error
				isTimeout := errors.As(err, &timeout) && timeout.Timeout()
				if !errors.Is(err, test.want) && !(test.want == errTimeout && isTimeout) {
					t.Errorf("%v, %v", conn, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer conn.CloseWithError(0, "")
			checkEcho(t, conn)
		})
	}
}

// An address that answers with an alert is the one: the next might be a server
// that is not meant.
func TestDialDoesNotTryAnotherAddressAfterAnAnswer(t *testing.T) {
	first := serveOn(t, "127.0.0.9")
	port := netip.MustParseAddrPort(first.addr).Port()
	second, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 8), Port: int(port)})
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	d := Dialer{Dialer: connectx.Dialer{Dialer: net.Dialer{Resolver: resolver("127.0.0.9", "127.0.0.8")}}}
	tlsConf := clientTLS()
	tlsConf.NextProtos = []string{"another"}
	_, err = d.Dial(t.Context(), fmt.Sprintf("%s:%d", serverName, port), tlsConf, nil)
	if _, ok := errors.AsType[*quic.TransportError](err); !ok {
		t.Errorf("error %v, want an alert", err)
	}
	second.SetReadDeadline(time.Unix(1, 0))
	if n, from, err := second.ReadFrom(make([]byte, 1)); err == nil {
		t.Errorf("the second address has got a datagram of %d bytes or more from %v", n, from)
	}
}

// resolver knows one name, serverName, and its addresses.
func resolver(hosts ...string) *net.Resolver {
	return &net.Resolver{
		PreferGo: true,
		Dial: func(context.Context, string, string) (net.Conn, error) {
			client, server := net.Pipe()
			go answer(server, hosts)
			return client, nil
		},
	}
}

// answer answers one question as a DNS server does over TCP.
func answer(conn net.Conn, hosts []string) {
	defer conn.Close()
	var length [2]byte
	if _, err := io.ReadFull(conn, length[:]); err != nil {
		return
	}
	query := make([]byte, binary.BigEndian.Uint16(length[:]))
	if _, err := io.ReadFull(conn, query); err != nil {
		return
	}
	var m dnsmessage.Message
	if err := m.Unpack(query); err != nil {
		return
	}
	m.Response = true
	m.Additionals = nil
	question := m.Questions[0]
	if question.Name.String() != serverName+"." {
		m.RCode = dnsmessage.RCodeNameError
	} else if question.Type == dnsmessage.TypeA {
		for _, host := range hosts {
			m.Answers = append(m.Answers, dnsmessage.Resource{
				Header: dnsmessage.ResourceHeader{Name: question.Name, Class: question.Class, TTL: 1},
				Body:   &dnsmessage.AResource{A: netip.MustParseAddr(host).As4()},
			})
		}
	}
	reply, err := m.AppendPack(make([]byte, 2))
	if err != nil {
		return
	}
	binary.BigEndian.PutUint16(reply, uint16(len(reply)-2))
	conn.Write(reply)
}

func TestTimeoutsEndTheDial(t *testing.T) {
	silent := listenUDP(t, "127.0.0.1").LocalAddr().String()
	const short = 50 * time.Millisecond
	past := time.Now().Add(-time.Second)
	within := func(d time.Duration) context.Context {
		ctx, cancel := context.WithTimeout(t.Context(), d)
		t.Cleanup(cancel)
		return ctx
	}
	tests := []struct {
		name   string
		dialer net.Dialer
		ctx    context.Context
		conf   *quic.Config
	}{
		{"Timeout", net.Dialer{Timeout: short}, t.Context(), nil},
		{"Deadline", net.Dialer{Deadline: time.Now().Add(short)}, t.Context(), nil},
		{"Deadline before Timeout", net.Dialer{Timeout: time.Hour, Deadline: time.Now().Add(short)}, t.Context(), nil},
		{"Timeout before Deadline", net.Dialer{Timeout: short, Deadline: time.Now().Add(time.Hour)}, t.Context(), nil},
		{"Deadline in the past", net.Dialer{Deadline: past}, t.Context(), nil},
		{"deadline of the context", net.Dialer{}, within(short), nil},
		{"HandshakeIdleTimeout", net.Dialer{}, t.Context(), &quic.Config{HandshakeIdleTimeout: short}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			d := Dialer{Dialer: connectx.Dialer{Dialer: test.dialer}}
			start := time.Now()
			conn, err := d.Dial(test.ctx, silent, clientTLS(), test.conf)
			took := time.Since(start)
			var timeout net.Error
			if !errors.As(err, &timeout) || !timeout.Timeout() {
				t.Errorf("%v, %v", conn, err)
			}
			if took > 3*time.Second {
				t.Errorf("took %v", took)
			}
		})
	}
}

func TestDialWithoutTLSConfigFails(t *testing.T) {
	if conn, err := new(Dialer).Dial(t.Context(), "127.0.0.1:9", nil, nil); err == nil {
		t.Error(conn)
	}
}
