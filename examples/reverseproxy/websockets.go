package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"

	"github.com/coder/websocket"

	"github.com/seed22601231/connectx/examples/internal/fewports"
)

// A clients is a proxy with WebSockets open through it.
//
// They come to the proxy over a Unix socket. The clients of a real one are on
// other hosts, and these, too, take no ports from it.
type clients struct {
	proxy http.Server
	open  []*websocket.Conn
}

// openWebSockets opens up to n WebSockets through the proxy. If that fails, the
// error says why it was not more.
func openWebSockets(ctx context.Context, proxy http.Handler, n int) (*clients, error) {
	// An abstract address belongs to the network namespace, and leaves no file.
	const address = "@connectx-reverseproxy"
	c := &clients{proxy: http.Server{Handler: proxy}}
	l, err := net.Listen("unix", address)
	if err != nil {
		return c, err
	}
	go c.proxy.Serve(l)

	var unix net.Dialer
	client := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return unix.DialContext(ctx, "unix", address)
		},
	}}
	defer client.CloseIdleConnections()
	for range n {
		conn, resp, err := websocket.Dial(ctx, "ws://proxy/", &websocket.DialOptions{HTTPClient: client})
		if err != nil {
			if resp != nil {
				reason, _ := io.ReadAll(resp.Body)
				err = fmt.Errorf("%s: %s", resp.Status, strings.TrimSpace(string(reason)))
			}
			return c, err
		}
		c.open = append(c.open, conn)
	}
	return c, nil
}

// askAll sends every WebSocket a text of its own, and only then reads what they
// answer.
func (c *clients) askAll(ctx context.Context) error {
	text := func(i int) string { return fmt.Sprintf("WebSocket %d", i) }
	for i, conn := range c.open {
		if err := conn.Write(ctx, websocket.MessageText, []byte(text(i))); err != nil {
			return err
		}
	}
	for i, conn := range c.open {
		_, answer, err := conn.Read(ctx)
		if err != nil {
			return err
		}
		if string(answer) != text(i) {
			return fmt.Errorf("the answer to %q is %q", text(i), answer)
		}
	}
	return nil
}

func (c *clients) close() {
	for _, conn := range c.open {
		_ = conn.CloseNow()
	}
	_ = c.proxy.Close()
}

// An echoServer is the upstream servers: all of them.
type echoServer struct {
	server http.Server
	conns  sync.WaitGroup
}

func (s *echoServer) start(n int) (addrs []string, err error) {
	s.server.Handler = s
	return fewports.Serve(n, s.server.Serve)
}

func (s *echoServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.conns.Add(1)
	defer s.conns.Done()
	conn, err := websocket.Accept(w, r, nil)
	if err != nil {
		return
	}
	defer conn.CloseNow()
	for {
		typ, text, err := conn.Read(r.Context())
		if err != nil || conn.Write(r.Context(), typ, text) != nil {
			return
		}
	}
}

// close waits for the proxy to close its connections.
func (s *echoServer) close() {
	s.server.Close()
	s.conns.Wait()
}
