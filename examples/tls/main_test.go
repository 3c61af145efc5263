package main

import (
	"os"
	"strings"
	"testing"

	"github.com/seed22601231/connectx/examples/internal/exampletest"
	"github.com/seed22601231/connectx/internal/netns"
)

func TestMain(m *testing.M) { os.Exit(netns.Main(m.Run)) }

func TestTLS(t *testing.T) {
	exampletest.SetPorts(t, ports)
	var out strings.Builder
	if err := run(t.Context(), &out); err != nil {
		t.Error(err)
	}
	exampletest.Contains(t, out.String(),
		"net.Dialer         50 TLS connections, then: ", "bind: address already in use",
		"connectx.Dialer   200 TLS connections\n")
}
