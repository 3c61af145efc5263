package main

import (
	"os"
	"strings"
	"testing"

	"github.com/seed22601231/connectx/examples/internal/exampletest"
	"github.com/seed22601231/connectx/internal/netns"
)

func TestMain(m *testing.M) { os.Exit(netns.Main(m.Run)) }

func TestReverseProxy(t *testing.T) {
	exampletest.SetPorts(t, ports)
	held := 0
	var out strings.Builder
	if err := run(t.Context(), &out, func() { held++ }); err != nil {
		t.Error(err)
	}
	exampletest.Contains(t, out.String(),
		"net.Dialer        100 WebSockets, then: 502 Bad Gateway: ", "bind: address already in use\n",
		"connectx.Dialer  2000 WebSockets\n", "each of them answers\n", "each of them still answers\n")
	if held != 1 {
		t.Errorf("held %d times", held)
	}
}
