//go:build linux

package connectx_test

import (
	"fmt"
	"runtime"
	"sync"
	"testing"
)

// Connections opened and closed per second by one goroutine, and by two on two
// processors. What the kernel does for the other end of a TCP connection is part
// of it.
func BenchmarkParallel(b *testing.B) {
	if runtime.NumCPU() < 2 {
		b.Skip("needs two processors")
	}
	for _, network := range []string{"tcp", "udp"} {
		for _, goroutines := range []int{1, 2} {
			for _, name := range []string{"net", "connectx"} {
				b.Run(fmt.Sprintf("%s/goroutines=%d/dialer=%s", network, goroutines, name), func(b *testing.B) {
					benchNamespace(b)
					addresses := sinks(b, network, "127.1.0.1")
					d := benchRows[0].dialer(b, name, network, "", addresses)
					defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
					errs := make([]error, goroutines)
					var wg sync.WaitGroup
					b.ReportAllocs()
					b.ResetTimer()
					for g := range goroutines {
						wg.Go(func() {
							for i := g; i < b.N && errs[g] == nil; i += goroutines {
								errs[g] = dialAndHangUp(d, network, addresses[(i+benchServers/2*g)%len(addresses)])
							}
						})
					}
					wg.Wait()
					b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "dials/s")
					for _, err := range errs {
						if err != nil {
							b.Fatal(err)
						}
					}
				})
			}
		}
	}
}

func dialAndHangUp(d dialer, network, address string) error {
	conn, err := d.Dial(network, address)
	if err == nil {
		hangUp(conn)
	}
	return err
}
