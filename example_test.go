package connectx_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"time"

	"github.com/seed22601231/connectx"
)

// Every connection that the client opens shares its port with those to other
// servers, and comes from the same source address.
func ExampleDialer() {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprintf(w, "hello, %s", host)
	}))
	defer server.Close()

	d := connectx.Dialer{Dialer: net.Dialer{
		Timeout:   10 * time.Second,
		LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)},
	}}
	transport := &http.Transport{DialContext: d.DialContext}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}

	resp, err := client.Get(server.URL)
	if err != nil {
		log.Fatal(err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	fmt.Println(string(body))
	// Output: hello, 127.0.0.1
}

// Two connections to different destinations from one UDP source port.
func ExampleDialer_DialUDP() {
	var d connectx.Dialer
	source := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), 39999)
	for _, destination := range []string{"127.0.0.2:9", "127.0.0.3:9"} {
		conn, err := d.DialUDP(context.Background(), "udp", source, netip.MustParseAddrPort(destination))
		if err != nil {
			fmt.Println(err)
			return
		}
		defer conn.Close()
		fmt.Println(conn.LocalAddr(), "->", conn.RemoteAddr())
	}
}

// What to do when a destination has no port left.
func ExampleErrPortsExhausted() {
	conn, err := connectx.Dial("udp", "127.0.0.1:9")
	switch {
	case errors.Is(err, connectx.ErrPortsExhausted):
		fmt.Println("wait for a connection to this destination to end, or use another source address")
	case err != nil:
		fmt.Println(err)
	default:
		fmt.Println("connected to", conn.RemoteAddr())
		conn.Close()
	}
	// Output: connected to 127.0.0.1:9
}
