//go:build linux

package connectx_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/seed22601231/connectx/internal/techniques"
)

// Opens and closes one connection with each of the techniques that a program
// could use instead, where no port is taken.
func BenchmarkTechniques(b *testing.B) {
	for _, network := range []string{"tcp", "udp"} {
		for _, technique := range techniques.All() {
			if network == "tcp" && !technique.TCP || network == "udp" && !technique.UDP {
				continue
			}
			b.Run(strings.Join([]string{network, "technique=" + technique.Name}, "/"), func(b *testing.B) {
				benchNamespace(b)
				addresses := sinks(b, network, "127.1.0.1")
				d := technique.New(network, netip.MustParseAddr("127.2.0.1"), benchLow, benchHigh)
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					conn, err := d.Dial(network, addresses[i%len(addresses)])
					if err != nil {
						b.Fatal(err)
					}
					if tcp, ok := conn.(interface{ SetLinger(int) error }); ok {
						tcp.SetLinger(0)
					}
					conn.Close()
				}
			})
		}
	}
}
