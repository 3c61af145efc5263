// Command reverseproxy is a reverse proxy that holds more WebSockets open to its
// upstream servers than there are local ports.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"sync/atomic"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/examples/internal/fewports"
)

const (
	ports     = 100
	upstreams = 20
)

func main() {
	hold := flag.Bool("hold", false, "hold the WebSockets until standard input ends, and ask them again")
	flag.Parse()
	fewports.Main(ports, func(ctx context.Context) error {
		var held func()
		if *hold {
			held = func() { _, _ = io.Copy(io.Discard, os.Stdin) }
		}
		return run(ctx, os.Stdout, held)
	})
}

// run opens WebSockets through the proxy. If held is not nil, run calls it while
// connectx has all of them open, and asks them again afterwards.
func run(ctx context.Context, w io.Writer, held func()) error {
	var echo echoServer
	addrs, err := echo.start(upstreams)
	if err != nil {
		return err
	}
	defer echo.close()

	plain := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	c, err := openWebSockets(ctx, newProxy(addrs, plain.DialContext), ports*upstreams)
	fmt.Fprintf(w, "net.Dialer       %4d WebSockets, then: %v\n", len(c.open), err)
	c.close()

	d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}}}
	c, err = openWebSockets(ctx, newProxy(addrs, d.DialContext), ports*upstreams)
	defer c.close()
	fmt.Fprintf(w, "connectx.Dialer  %4d WebSockets\n", len(c.open))
	if err != nil {
		return err
	}
	if err := c.askAll(ctx); err != nil {
		return err
	}
	fmt.Fprintln(w, "each of them answers")
	if held == nil {
		return nil
	}
	held()
	if err := c.askAll(ctx); err != nil {
		return err
	}
	fmt.Fprintln(w, "each of them still answers")
	return nil
}

type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// newProxy returns a proxy that takes the upstream servers in turn.
func newProxy(addrs []string, dial dialFunc) http.Handler {
	var turn atomic.Uint32
	return &httputil.ReverseProxy{
		Transport: &http.Transport{DialContext: dial},
		Rewrite: func(r *httputil.ProxyRequest) {
			i := int(turn.Add(1)) % len(addrs)
			r.SetURL(&url.URL{Scheme: "http", Host: addrs[i]})
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			http.Error(w, err.Error(), http.StatusBadGateway)
		},
	}
}
