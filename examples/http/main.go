// Command http holds more HTTP connections open than there are local ports.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/examples/internal/fewports"
)

const (
	ports   = 50
	servers = 4
)

func main() {
	fewports.Main(ports, func(ctx context.Context) error { return runOwn(ctx, os.Stdout) })
}

// runOwn is run with a server of this program.
func runOwn(ctx context.Context, w io.Writer) error {
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "hello\n")
	})}
	defer srv.Close()
	addrs, err := fewports.Serve(servers, srv.Serve)
	if err != nil {
		return err
	}
	return run(ctx, w, addrs)
}

// run connects to every server as often as there are ports, with net.Dialer and
// with connectx.
func run(ctx context.Context, w io.Writer, addrs []string) error {
	plain := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	n, err := hold(ctx, addrs, plain.DialContext)
	fmt.Fprintf(w, "net.Dialer       %4d HTTP connections, then: %v\n", n, err)

	d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}}}
	n, err = hold(ctx, addrs, d.DialContext)
	fmt.Fprintf(w, "connectx.Dialer  %4d HTTP connections\n", n)
	return err
}

type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// hold returns how many connections were open together.
func hold(ctx context.Context, addrs []string, dial dialFunc) (n int, err error) {
	transport := &http.Transport{DialContext: dial}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	for range ports {
		for _, addr := range addrs {
			req, err := http.NewRequestWithContext(ctx, "GET", "http://"+addr+"/", nil)
			if err != nil {
				return n, err
			}
			resp, err := client.Do(req)
			if err != nil {
				return n, err
			}
			// Until its body is read, a response keeps its connection.
			defer resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				return n, fmt.Errorf("%s answers %s", addr, resp.Status)
			}
			n++
		}
	}
	return n, nil
}
