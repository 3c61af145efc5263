// Command dns resolves a name while every local UDP port is in use.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/examples/internal/fewports"
)

const ports = 20

func main() {
	fewports.Main(ports, func(ctx context.Context) error { return runOwn(ctx, os.Stdout) })
}

// run resolves the name with net.Dialer and with connectx.
func run(ctx context.Context, w io.Writer, server string) error {
	var d connectx.Dialer
	for range ports {
		flow, err := d.DialContext(ctx, "udp", "127.0.2.1:4433")
		if err != nil {
			return err
		}
		defer flow.Close()
	}
	fmt.Fprintf(w, "Each of %d ports has a UDP connection to 127.0.2.1:4433.\n", ports)

	plain := newResolver(server, new(net.Dialer).DialContext)
	_, err := plain.LookupNetIP(ctx, "ip4", name)
	fmt.Fprintf(w, "net.Dialer       %v\n", err)

	sharing := newResolver(server, d.DialContext)
	addrs, err := sharing.LookupNetIP(ctx, "ip4", name)
	fmt.Fprintf(w, "connectx.Dialer  %v\n", addrs)
	return err
}

type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// newResolver returns a resolver that asks the given server, though its errors
// name one of /etc/resolv.conf. To ask those, it takes no more than
//
//	net.Resolver{PreferGo: true, Dial: d.DialContext}
func newResolver(server string, dial dialFunc) *net.Resolver {
	return &net.Resolver{
		PreferGo: true,
		Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return dial(ctx, network, server)
		},
	}
}
