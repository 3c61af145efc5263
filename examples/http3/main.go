// Command http3 holds more HTTP/3 connections open than there are local ports.
package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"github.com/seed22601231/connectx/examples/internal/fewports"
	"github.com/seed22601231/connectx/examples/internal/selfsigned"
	"github.com/seed22601231/connectx/quicdial"
)

const (
	ports   = 100
	servers = 20
)

func main() {
	fewports.Main(ports, func(ctx context.Context) error { return run(ctx, os.Stdout) })
}

func run(ctx context.Context, w io.Writer) error {
	serverConfig, clientConfig, err := selfsigned.Configs()
	if err != nil {
		return err
	}
	srv := &http3.Server{
		TLSConfig: http3.ConfigureTLSConfig(serverConfig),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, "hello\n")
		}),
	}
	defer srv.Close()
	addrs, err := serve(srv)
	if err != nil {
		return err
	}

	// What quic-go does by itself: a socket with a port of its own for each
	// connection.
	plain := client{tls: clientConfig, dial: quic.DialAddrEarly}
	err = plain.connect(ctx, addrs)
	fmt.Fprintf(w, "quic.DialAddrEarly  %4d HTTP/3 connections, then: %v\n", plain.held, err)
	plain.close()

	var d quicdial.Dialer
	shared := client{tls: clientConfig, dial: d.Dial}
	err = shared.connect(ctx, addrs)
	defer shared.close()
	fmt.Fprintf(w, "quicdial.Dialer     %4d HTTP/3 connections\n", shared.held)
	if err != nil {
		return err
	}
	if err := shared.askAll(ctx, addrs); err != nil {
		return err
	}
	fmt.Fprintln(w, "each of them answers")
	return nil
}

// serve starts the server on several addresses.
func serve(srv *http3.Server) (addrs []string, err error) {
	for i := range servers {
		conn, err := net.ListenPacket("udp4", fmt.Sprintf("127.0.1.%d:8443", i+1))
		if err != nil {
			return nil, err
		}
		addrs = append(addrs, conn.LocalAddr().String())
		go func() {
			defer conn.Close()
			_ = srv.Serve(conn)
		}()
	}
	return addrs, nil
}

// A client holds connections. An http3.Transport has one to each server, so a
// client has many transports.
type client struct {
	tls        *tls.Config
	dial       func(context.Context, string, *tls.Config, *quic.Config) (*quic.Conn, error)
	transports []*http3.Transport
	held       int
}

// connect opens as many connections to each server as there are ports.
func (c *client) connect(ctx context.Context, addrs []string) error {
	for range ports {
		transport := &http3.Transport{
			TLSClientConfig: c.tls,
			QUICConfig:      &quic.Config{MaxIdleTimeout: 5 * time.Minute, KeepAlivePeriod: time.Minute},
			Dial:            c.dial,
		}
		c.transports = append(c.transports, transport)
		for _, addr := range addrs {
			if err := ask(ctx, transport, addr, false); err != nil {
				return err
			}
			c.held++
		}
	}
	return nil
}

// askAll asks once more over each of the connections, without opening any.
func (c *client) askAll(ctx context.Context, addrs []string) error {
	for _, transport := range c.transports {
		for _, addr := range addrs {
			if err := ask(ctx, transport, addr, true); err != nil {
				return err
			}
		}
	}
	return nil
}

func ask(ctx context.Context, transport *http3.Transport, addr string, again bool) error {
	req, err := http.NewRequestWithContext(ctx, "GET", "https://"+addr+"/", nil)
	if err != nil {
		return err
	}
	resp, err := transport.RoundTripOpt(req, http3.RoundTripOpt{OnlyCachedConn: again})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && string(body) != "hello\n" {
		err = fmt.Errorf("%s answers %s, %q", addr, resp.Status, body)
	}
	return err
}

func (c *client) close() {
	for _, transport := range c.transports {
		transport.Close()
	}
}
