package main

import (
	"os"
	"strings"
	"testing"

	"github.com/seed22601231/connectx/examples/internal/exampletest"
	"github.com/seed22601231/connectx/internal/netns"
)

func TestMain(m *testing.M) { os.Exit(netns.Main(m.Run)) }

func TestDNS(t *testing.T) {
	exampletest.SetPorts(t, ports)
	var out strings.Builder
	if err := runOwn(t.Context(), &out); err != nil {
		t.Error(err)
	}
	check(t, out.String())
}

func TestDNSWithDnsmasq(t *testing.T) {
	exampletest.SetPorts(t, ports)
	// As root, dnsmasq would go on as a user that a user namespace does not
	// have, unless it is in debug mode.
	exampletest.Start(t, "started, version", "dnsmasq", "--no-daemon",
		"--conf-file=/dev/null", "--pid-file=", "--no-resolv", "--no-hosts",
		"--listen-address=127.0.1.2", "--bind-interfaces", "--port=53",
		"--address=/"+strings.TrimSuffix(name, ".")+"/"+address)
	var out strings.Builder
	if err := run(t.Context(), &out, "127.0.1.2:53"); err != nil {
		t.Error(err)
	}
	check(t, out.String())
}

func check(t *testing.T, printed string) {
	t.Helper()
	exampletest.Contains(t, printed,
		"net.Dialer       lookup host.example.", "connect: resource temporarily unavailable\n",
		"connectx.Dialer  ["+address+"]\n")
}
