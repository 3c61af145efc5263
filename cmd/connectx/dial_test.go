package main

import (
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestDialUsage(t *testing.T) {
	tests := []struct {
		name           string
		args           string
		code           int
		stdout, stderr string
	}{
		{"help", "-h", exitOK, "Examples:", ""},
		{"help after the protocol", "tcp -h", exitOK, "half-close", ""},
		{"nothing", "", exitUsage, "", "tcp or udp, and host:port are missing"},
		{"no address", "tcp", exitUsage, "", "host:port is missing"},
		{"another protocol", "sctp 192.0.2.1:7", exitUsage, "", `"sctp": must be tcp or udp`},
		{"no protocol", "192.0.2.1:7", exitUsage, "", `"192.0.2.1:7": must be tcp or udp`},
		{"host and port apart", "tcp 192.0.2.1 7", exitUsage, "", `unexpected argument "7"`},
		{"no port", "tcp 192.0.2.1", exitUsage, "", "192.0.2.1: missing port in address"},
		{"an empty port", "tcp 192.0.2.1:", exitUsage, "", "192.0.2.1:: missing port in address"},
		{"a port that is too large", "tcp 192.0.2.1:65536", exitUsage, "", "65536: invalid port"},
		{"an IPv6 address without brackets", "tcp ::1:7", exitUsage, "", "::1:7: too many colons in address"},
		{"both families", "tcp -4 -6 192.0.2.1:7", exitUsage, "", "-4 and -6: only one of them"},
		{"a source that is a name", "udp -source localhost 192.0.2.1:7", exitUsage, "", "-source localhost: must be an IP address"},
		{"a source port that is too large", "udp -source :65536 192.0.2.1:7", exitUsage, "", "-source :65536: must be"},
		{"a source port that is too large, after a zone", "udp -source [fe80::1%eth0]:65536 192.0.2.1:7", exitUsage, "", "-source [fe80::1%eth0]:65536: must be"},
		{"source port 0", "udp -source 192.0.2.1:0 192.0.2.1:7", exitUsage, "", "-source 192.0.2.1:0: must be"},
		{"a port range without an end", "tcp -ports 40000 192.0.2.1:7", exitUsage, "", "-ports 40000: must be two ports"},
		{"a port range from 0", "tcp -ports 0-9 192.0.2.1:7", exitUsage, "", "-ports 0-9: must be two ports"},
		{"a port range backwards", "tcp -ports 9-1 192.0.2.1:7", exitUsage, "", "-ports 9-1: must be two ports, the lower one first"},
		{"a port range that is too large", "tcp -ports 9-65536 192.0.2.1:7", exitUsage, "", "-ports 9-65536: must be two ports"},
		{"a source port outside of the range", "tcp -source :39999 -ports 40000-40009 192.0.2.1:7", exitUsage, "", "-source :39999: the port is not in -ports 40000-40009"},
		{"a negative timeout", "tcp -timeout -1s 192.0.2.1:7", exitUsage, "", "-timeout -1s: must not be negative"},
		{"a timeout without a unit", "tcp -timeout 5 192.0.2.1:7", exitUsage, "", `"5" for flag -timeout`},
		{"a negative wait", "udp -wait -1s 192.0.2.1:7", exitUsage, "", "-wait -1s: must not be negative"},
		{"a wait for TCP", "tcp -wait 2s 192.0.2.1:7", exitUsage, "", "-wait 2s: not for tcp"},
		{"fast open for UDP", "udp -fastopen 192.0.2.1:7", exitUsage, "", "-fastopen true: not for udp"},
		{"an unknown flag", "tcp -sources 192.0.2.1:7", exitUsage, "", "-sources"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			checkRun(t, append([]string{"dial"}, strings.Fields(tt.args)...), tt.code, tt.stdout, tt.stderr)
		})
	}
}

func TestDialSources(t *testing.T) {
	tests := []struct {
		source string
		want   string // IP, zone and port
	}{
		{"192.0.2.1", "192.0.2.1:0"},
		{"192.0.2.1:4000", "192.0.2.1:4000"},
		{":4000", ":4000"},
		{"::1", "[::1]:0"},
		{"[::1]", "[::1]:0"},
		{"[::1]:4000", "[::1]:4000"},
		{"fe80::1%eth0", "[fe80::1%eth0]:0"},
		{"[fe80::1%eth0]:4000", "[fe80::1%eth0]:4000"},
	}
	for _, tt := range tests {
		t.Run(tt.source, func(t *testing.T) {
			for _, protocol := range []string{"tcp", "udp"} {
				var o dialOptions
				if err := o.parse([]string{protocol, "-source", tt.source, "192.0.2.2:7"}, nil); err != nil {
					t.Fatal(err)
				}
				if got := o.dialer.LocalAddr; got.Network() != protocol || got.String() != tt.want {
					t.Errorf("%s address %v, want %s", got.Network(), got, tt.want)
				}
			}
		})
	}
}

// The flags may stand anywhere, and have what they say put into the Dialer.
func TestDialFlags(t *testing.T) {
	var want dialOptions
	want.network, want.address, want.trace = "tcp6", "[::2]:80", true
	want.dialer.Timeout = 1500e6
	want.wait = 1e9
	want.dialer.FastOpen = true
	want.dialer.PortRange.Low, want.dialer.PortRange.High = 40000, 40099
	want.dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.MustParseAddrPort("[::1]:40007"))
	for _, args := range []string{
		"tcp -6 -source [::1]:40007 -ports 40000-40099 -timeout 1.5s -fastopen -trace [::2]:80",
		"-6 -source=[::1]:40007 -ports=40000-40099 -timeout 1500ms tcp [::2]:80 --fastopen --trace",
	} {
		var got dialOptions
		if err := got.parse(strings.Fields(args), nil); err != nil {
			t.Errorf("%s: %v", args, err)
			continue
		}
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(dialOptions{}), cmpopts.IgnoreUnexported(net.Dialer{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", args, diff)
		}
	}
}
