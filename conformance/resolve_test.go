//go:build linux

package conformance

import (
	"context"
	"fmt"
	"net"
	"net/http/httptrace"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/seed22601231/connectx/internal/netns"
)

// names is what the name server of the tests knows: names with addresses.
type names map[string][]string

// resolver starts the name server and returns a resolver that asks it.
func (n names) resolver(t *testing.T) *net.Resolver {
	t.Helper()
	server, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	go func() {
		b := make([]byte, 1500)
		for {
			size, from, err := server.ReadFrom(b)
			if err != nil {
				return
			}
			if answer, err := n.answer(b[:size]); err == nil {
				server.WriteTo(answer, from)
			}
		}
	}()
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, server.LocalAddr().String())
	}}
}

func (n names) answer(query []byte) ([]byte, error) {
	var p dnsmessage.Parser
	header, err := p.Start(query)
	if err != nil {
		return nil, err
	}
	question, err := p.Question()
	if err != nil {
		return nil, err
	}
	addresses, known := n[strings.TrimSuffix(question.Name.String(), ".")]
	header.Response, header.Authoritative = true, true
	if !known {
		header.RCode = dnsmessage.RCodeNameError
	}
	b := dnsmessage.NewBuilder(nil, header)
	b.StartQuestions()
	b.Question(question)
	b.StartAnswers()
	resource := dnsmessage.ResourceHeader{Name: question.Name, Class: dnsmessage.ClassINET, TTL: 60}
	for _, address := range addresses {
		addr := netip.MustParseAddr(address)
		switch {
		case addr.Is4() && question.Type == dnsmessage.TypeA:
			b.AResource(resource, dnsmessage.AResource{A: addr.As4()})
		case addr.Is6() && question.Type == dnsmessage.TypeAAAA:
			b.AAAAResource(resource, dnsmessage.AAAAResource{AAAA: addr.As16()})
		}
	}
	return b.Finish()
}

// Addresses where a SYN gets no answer: a queue of no length that is full.
func blackHole(t *testing.T, host string, port int) {
	t.Helper()
	listenWithoutQueue(t, host, port)
	address := net.JoinHostPort(host, fmt.Sprint(port))
	for range 2 {
		d := net.Dialer{Timeout: 50 * time.Millisecond}
		if conn, err := d.Dial("tcp", address); err == nil {
			t.Cleanup(func() { conn.Close() })
		}
	}
}

// A name with several addresses, some of which do not answer: both dialers try
// the same ones, in the same order and for the same time.
func TestAddressesOfAName(t *testing.T) {
	netns.Need(t)
	const port = 7
	for _, host := range []string{"127.1.0.1", "2001:db8::1"} {
		listener, err := net.Listen("tcp", net.JoinHostPort(host, fmt.Sprint(port)))
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				defer conn.Close()
			}
		}()
	}
	blackHole(t, "127.1.0.2", port)
	blackHole(t, "2001:db8::2", port)
	resolver := names{
		"both.test":         {"127.1.0.1", "2001:db8::1"},
		"dead6.test":        {"2001:db8::2", "127.1.0.1"},
		"dead4.test":        {"127.1.0.2", "2001:db8::1"},
		"onlydead6.test":    {"2001:db8::2"},
		"refused6.test":     {"2001:db8::3", "127.1.0.1"},
		"refused.test":      {"127.1.0.3"},
		"dead.test":         {"127.1.0.2", "2001:db8::2"},
		"deadthenlive.test": {"127.1.0.2", "127.1.0.1"},
		"only4.test":        {"127.1.0.1"},
		"only6.test":        {"2001:db8::1"},
	}.resolver(t)

	type result struct {
		Remote   string
		Error    string
		Attempts []string
		Waited   string // in steps that differ by more than the machine's moods
	}
	tests := []struct {
		name    string
		dialer  net.Dialer
		network string
		host    string
	}{
		{"both answer", net.Dialer{}, "tcp", "both.test"},
		{"IPv4 only is asked for", net.Dialer{}, "tcp4", "both.test"},
		{"IPv6 only is asked for", net.Dialer{}, "tcp6", "both.test"},
		{"IPv6 does not answer", net.Dialer{}, "tcp", "dead6.test"},
		{"IPv6 does not answer, with a short delay", net.Dialer{FallbackDelay: 20 * time.Millisecond}, "tcp", "dead6.test"},
		{"IPv6 does not answer, and there is no fallback", net.Dialer{FallbackDelay: -1, Timeout: 500 * time.Millisecond}, "tcp", "onlydead6.test"},
		{"IPv4 does not answer", net.Dialer{}, "tcp", "dead4.test"},
		{"IPv6 refuses", net.Dialer{}, "tcp", "refused6.test"},
		{"all refuse", net.Dialer{}, "tcp", "refused.test"},
		{"none answers in time", net.Dialer{Timeout: 250 * time.Millisecond}, "tcp", "dead.test"},
		{"the time is shared between addresses", net.Dialer{Timeout: 4500 * time.Millisecond}, "tcp", "deadthenlive.test"},
		{"no such name", net.Dialer{}, "tcp", "missing.test"},
		{"UDP", net.Dialer{}, "udp", "both.test"},
		{"UDP to IPv6 only", net.Dialer{}, "udp6", "both.test"},
	}
	for _, test := range tests {
		results := make([]result, len(dialers))
		for i, dialer := range dialers {
			inner := test.dialer
			inner.Resolver = resolver
			var mu sync.Mutex
			var attempts []string
			ctx := httptrace.WithClientTrace(context.Background(), &httptrace.ClientTrace{
				ConnectStart: func(network, addr string) {
					mu.Lock()
					defer mu.Unlock()
					attempts = append(attempts, network+" "+addr)
				},
			})
			start := time.Now()
			conn, err := dialer.of(inner)(ctx, test.network, net.JoinHostPort(test.host, fmt.Sprint(port)))
			waited := time.Since(start)
			r := &results[i]
			if err != nil {
				r.Error = err.Error()
			} else {
				r.Remote = conn.RemoteAddr().String()
				conn.Close()
			}
			mu.Lock()
			r.Attempts = slices.Clone(attempts)
			mu.Unlock()
			slices.Sort(r.Attempts)
			r.Waited = step(waited)
		}
		for i := range results[1:] {
			if diff := cmp.Diff(results[0], results[i+1], cmp.Comparer(sameError)); diff != "" {
				t.Errorf("%s: %s -, %s +\n%s", test.name, dialers[0].name, dialers[i+1].name, diff)
			}
		}
		t.Logf("%s: %+v", test.name, results[0])
	}
}

// sameError compares texts without the ports that were picked for questions to
// the name server.
func sameError(a, b string) bool { return withoutPort(a) == withoutPort(b) }

func withoutPort(s string) string {
	if i := strings.Index(s, " on 1"); i >= 0 {
		s = s[:i]
	}
	return s
}

func step(d time.Duration) string {
	switch {
	case d < 200*time.Millisecond:
		return "at once"
	case d < 1200*time.Millisecond:
		return "some hundred milliseconds"
	default:
		return "seconds"
	}
}
