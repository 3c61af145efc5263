// Command grpc holds more gRPC connections open than there are local ports.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/examples/internal/fewports"
)

const (
	ports   = 20
	servers = 4
)

func main() {
	fewports.Main(ports, func(ctx context.Context) error { return run(ctx, os.Stdout) })
}

func run(ctx context.Context, w io.Writer) error {
	srv := grpc.NewServer()
	defer srv.Stop()
	healthpb.RegisterHealthServer(srv, health.NewServer())
	addrs, err := fewports.Serve(servers, srv.Serve)
	if err != nil {
		return err
	}

	plain := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	n, err := hold(ctx, addrs, plain.DialContext)
	fmt.Fprintf(w, "net.Dialer       %4d gRPC connections, then: %v\n", n, err)

	d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}}}
	n, err = hold(ctx, addrs, d.DialContext)
	fmt.Fprintf(w, "connectx.Dialer  %4d gRPC connections\n", n)
	return err
}

type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// hold returns how many connections were open together, each with a server that
// says that it is in good health.
func hold(ctx context.Context, addrs []string, dial dialFunc) (n int, err error) {
	for range ports {
		for _, addr := range addrs {
			conn, err := grpc.NewClient("passthrough:///"+addr,
				grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
					return dial(ctx, "tcp", addr)
				}),
				grpc.WithTransportCredentials(insecure.NewCredentials()))
			if err != nil {
				return n, err
			}
			defer conn.Close()
			resp, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
			if err != nil {
				return n, err
			}
			if resp.Status != healthpb.HealthCheckResponse_SERVING {
				return n, fmt.Errorf("%s is %v", addr, resp.Status)
			}
			n++
		}
	}
	return n, nil
}
