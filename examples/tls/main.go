// Command tls holds more TLS connections open than there are local ports.
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/examples/internal/fewports"
	"github.com/seed22601231/connectx/examples/internal/selfsigned"
)

const (
	ports   = 50
	servers = 4
)

func main() {
	fewports.Main(ports, func(ctx context.Context) error { return run(ctx, os.Stdout) })
}

func run(ctx context.Context, w io.Writer) error {
	serverConfig, config, err := selfsigned.Configs()
	if err != nil {
		return err
	}
	srv := &http.Server{TLSConfig: serverConfig}
	defer srv.Close()
	addrs, err := fewports.Serve(servers, func(l net.Listener) error { return srv.ServeTLS(l, "", "") })
	if err != nil {
		return err
	}

	plain := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	n, err := hold(ctx, addrs, &tls.Dialer{NetDialer: plain, Config: config})
	fmt.Fprintf(w, "net.Dialer       %4d TLS connections, then: %v\n", n, err)

	d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}}}
	n, err = hold(ctx, addrs, &tls.Dialer{NetDialer: d.NetDialer(), Config: config})
	fmt.Fprintf(w, "connectx.Dialer  %4d TLS connections\n", n)
	return err
}

// hold returns how many connections were open together, each of them after a
// question and an answer.
func hold(ctx context.Context, addrs []string, d *tls.Dialer) (n int, err error) {
	for range ports {
		for _, addr := range addrs {
			conn, err := d.DialContext(ctx, "tcp", addr)
			if err != nil {
				return n, err
			}
			defer conn.Close()
			if _, err := fmt.Fprintf(conn, "OPTIONS * HTTP/1.1\r\nHost: %s\r\n\r\n", selfsigned.ServerName); err != nil {
				return n, err
			}
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				return n, err
			}
			if resp.StatusCode != http.StatusOK {
				return n, fmt.Errorf("%s answers %s", addr, resp.Status)
			}
			n++
		}
	}
	return n, nil
}
