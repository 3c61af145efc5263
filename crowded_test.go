//go:build linux

package connectx_test

import (
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/netns"
)

// The more sockets are on a port, the longer bind takes from reading the flag of
// one to adding its own. Of two that dial one 4-tuple meanwhile, one must fail.
func TestOneOfTwoDialsFailsOnACrowdedPort(t *testing.T) {
	netns.Need(t) // the goroutines dial in that of all tests
	d := connectx.Dialer{Dialer: net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:40000"))}}
	for i := range 2000 {
		conn, err := d.Dial("udp", fmt.Sprintf("127.1.%d.%d:9", i/250, i%250+1))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	const rounds = 200
	var (
		round [2]atomic.Int32 // that each has begun
		conns [2][rounds]net.Conn
		wg    sync.WaitGroup
	)
	for i := range conns {
		wg.Go(func() {
			runtime.LockOSThread() // and not wait for a goroutine that waits for us
			defer runtime.UnlockOSThread()
			for n := range conns[i] {
				round[i].Add(1)
				for round[1-i].Load() < round[i].Load() {
				}
				conns[i][n], _ = d.Dial("udp", fmt.Sprintf("127.2.0.%d:9", n+1))
			}
		})
	}
	wg.Wait()
	for n := range rounds {
		if conns[0][n] != nil && conns[1][n] != nil {
			t.Errorf("round %d: two connections on one 4-tuple", n)
		}
		for i := range conns {
			if conns[i][n] != nil {
				conns[i][n].Close()
			}
		}
	}
}
