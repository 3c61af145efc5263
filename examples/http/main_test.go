package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/examples/internal/exampletest"
	"github.com/seed22601231/connectx/internal/netns"
)

func TestMain(m *testing.M) { os.Exit(netns.Main(m.Run)) }

func TestHTTP(t *testing.T) {
	exampletest.SetPorts(t, ports)
	var out strings.Builder
	if err := runOwn(t.Context(), &out); err != nil {
		t.Error(err)
	}
	check(t, out.String())
}

func TestHTTPWithNginx(t *testing.T) {
	exampletest.SetPorts(t, ports)
	addrs := startNginx(t)
	var out strings.Builder
	if err := run(t.Context(), &out, addrs); err != nil {
		t.Error(err)
	}
	check(t, out.String())
}

func check(t *testing.T, printed string) {
	t.Helper()
	exampletest.Contains(t, printed,
		"net.Dialer         50 HTTP connections, then: ", "bind: address already in use\n",
		"connectx.Dialer   200 HTTP connections\n")
}

// More connections than there are ports, kept alive and used again.
func TestKeepAliveWithNginx(t *testing.T) {
	exampletest.SetPorts(t, ports)
	addrs := startNginx(t)
	d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 3)}}}
	var dials atomic.Int32
	transport := &http.Transport{
		MaxIdleConnsPerHost: ports,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			dials.Add(1)
			return d.DialContext(ctx, network, address)
		},
	}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	for range 3 {
		// All responses are there before the first body is read.
		var bodies []io.ReadCloser
		for range ports {
			for _, addr := range addrs {
				resp, err := client.Get("http://" + addr + "/")
				if err != nil {
					t.Fatal(err)
				}
				defer resp.Body.Close()
				bodies = append(bodies, resp.Body)
			}
		}
		for _, body := range bodies {
			if b, err := io.ReadAll(body); err != nil || string(b) != "hello\n" {
				t.Fatalf("the body is %q, %v", b, err)
			}
		}
	}
	if got, want := int(dials.Load()), ports*servers; got != want {
		t.Errorf("%d connections for %d requests at a time", got, want)
	}
}

// startNginx returns the addresses that it listens on.
func startNginx(t *testing.T) (addrs []string) {
	t.Helper()
	dir := t.TempDir()
	var listen strings.Builder
	for i := range servers {
		addr := fmt.Sprintf("127.0.1.%d:8081", i+1)
		addrs = append(addrs, addr)
		fmt.Fprintf(&listen, "listen %s;\n", addr)
	}
	conf := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, nginxConf, listen.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	// It names its way to wait for events once its sockets listen.
	exampletest.Start(t, "event method", "nginx", "-p", dir, "-e", "stderr", "-c", conf, "-g", "daemon off;")
	return addrs
}

// The user is root because a user namespace need not have another. A master
// process would have to be asked to stop, or its workers stay.
const nginxConf = `
user root;
master_process off;
pid nginx.pid;
error_log stderr notice;
events { worker_connections 1024; }
http {
	access_log off;
	client_body_temp_path body;
	proxy_temp_path proxy;
	fastcgi_temp_path fastcgi;
	uwsgi_temp_path uwsgi;
	scgi_temp_path scgi;
	server {
		%s
		location / { return 200 "hello\n"; }
	}
}
`
