package main

import (
	"bufio"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/seed22601231/connectx/examples/internal/exampletest"
	"github.com/seed22601231/connectx/internal/netns"
)

func TestMain(m *testing.M) { os.Exit(netns.Main(m.Run)) }

// The HTTP/3 connections are held beside the 2,000 WebSockets of the reverse
// proxy, in a namespace with 100 ports.
func TestHTTP3BesideReverseProxy(t *testing.T) {
	exampletest.SetPorts(t, ports)
	program := t.TempDir() + "/reverseproxy"
	if out, err := exec.Command("go", "build", "-o", program, "../reverseproxy").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	proxy := exec.CommandContext(t.Context(), program, "-hold")
	proxy.Stderr = os.Stderr
	stdin, err := proxy.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := proxy.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := proxy.Start(); err != nil {
		t.Fatal(err)
	}
	var printed strings.Builder
	lines := bufio.NewScanner(stdout)
	for lines.Scan() {
		printed.WriteString(lines.Text() + "\n")
		if lines.Text() == "each of them answers" {
			break
		}
	}

	var out strings.Builder
	if err := run(t.Context(), &out); err != nil {
		t.Error(err)
	}
	exampletest.Contains(t, out.String(),
		"quic.DialAddrEarly   100 HTTP/3 connections, then: ", "address already in use\n",
		"quicdial.Dialer     2000 HTTP/3 connections\n", "each of them answers\n")

	// Then the WebSockets are all asked again.
	stdin.Close()
	for lines.Scan() {
		printed.WriteString(lines.Text() + "\n")
	}
	if err := proxy.Wait(); err != nil {
		t.Errorf("reverseproxy: %v", err)
	}
	exampletest.Contains(t, printed.String(), "connectx.Dialer  2000 WebSockets\n", "each of them still answers\n")
}
