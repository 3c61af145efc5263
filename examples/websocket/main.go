// Command websocket holds more WebSockets open than there are local ports, half
// of them with github.com/coder/websocket and half with
// github.com/gorilla/websocket.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"

	coder "github.com/coder/websocket"
	gorilla "github.com/gorilla/websocket"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/examples/internal/fewports"
)

const (
	ports   = 50
	servers = 4
)

func main() {
	fewports.Main(ports, func(ctx context.Context) error { return run(ctx, os.Stdout) })
}

func run(ctx context.Context, w io.Writer) error {
	srv := &http.Server{Handler: http.HandlerFunc(echo)}
	defer srv.Close()
	addrs, err := fewports.Serve(servers, srv.Serve)
	if err != nil {
		return err
	}

	plain := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	n, err := hold(ctx, addrs, plain.DialContext)
	fmt.Fprintf(w, "net.Dialer       %4d WebSockets, then: %v\n", n, err)

	d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}}}
	n, err = hold(ctx, addrs, d.DialContext)
	fmt.Fprintf(w, "connectx.Dialer  %4d WebSockets\n", n)
	return err
}

type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// hold returns how many WebSockets were open together, each with its echo.
func hold(ctx context.Context, addrs []string, dial dialFunc) (n int, err error) {
	client := &http.Client{Transport: &http.Transport{DialContext: dial}}
	dialer := &gorilla.Dialer{NetDialContext: dial}
	for i := range ports {
		for _, addr := range addrs {
			url := "ws://" + addr
			var c conn
			if i%2 == 0 {
				ws, _, err := coder.Dial(ctx, url, &coder.DialOptions{HTTPClient: client})
				if err != nil {
					return n, err
				}
				defer ws.CloseNow()
				c = coderConn{ctx, ws}
			} else {
				ws, _, err := dialer.DialContext(ctx, url, nil)
				if err != nil {
					return n, err
				}
				defer ws.Close()
				c = ws
			}
			if err := ask(c, fmt.Sprintf("WebSocket %d", n)); err != nil {
				return n, fmt.Errorf("%s: %w", addr, err)
			}
			n++
		}
	}
	return n, nil
}
