//go:build linux

package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/netns"
)

// lingers is for how long the library may keep the descriptors of a namespace in
// which there are no more dials: 10 s, and the time that a timer may be late.
const lingers = 15 * time.Second

// keptNamespaces is how many namespaces the library keeps in mind. As long as they
// are fewer, each new one takes memory.
const keptNamespaces = 64

// fleetingNamespaces count namespaces that were dialled in and are gone.
type fleetingNamespaces struct {
	mu   sync.Mutex
	n    int
	last []time.Time // when the latest were dialled in, no longer ago than lingers
}

func (n *fleetingNamespaces) dialledIn(t time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.n++
	n.expire(t)
	n.last = append(n.last, t)
}

// kept is how many of them the library may still keep descriptors of.
func (n *fleetingNamespaces) kept() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.expire(time.Now())
	return min(len(n.last), keptNamespaces)
}

func (n *fleetingNamespaces) expire(now time.Time) {
	for len(n.last) > 0 && now.Sub(n.last[0]) > lingers {
		n.last = n.last[1:]
	}
}

// runNamespaces has namespaces come and go.
func (r *run) runNamespaces(random *rand.Rand) {
	for !r.stopped() {
		r.quiet.RLock()
		r.dialInNamespace()
		r.quiet.RUnlock()
		moment(random, time.Second)
	}
}

// dialInNamespace dials in a new namespace, and leaves it for good.
func (r *run) dialInNamespace() {
	start := time.Now()
	ended := make(chan error)
	go func() {
		// The thread ends with the goroutine, and so does the namespace.
		err := netns.Enter()
		if err == nil {
			// The library keeps less of a small range.
			err = netns.SetPortRange(fleetingPort, fleetingPort)
		}
		if err == nil {
			err = dialAround()
		}
		r.namespaces.dialledIn(time.Now())
		ended <- err
	}()
	if err := <-ended; err != nil {
		why := r.explainFaults(err, start, false)
		r.failed(why, err, func() string { return fmt.Sprintf("in a new namespace: %v", err) })
	}
}

// fleetingPort is the one port of these namespaces.
const fleetingPort = 40001

// dialAround dials two destinations of each protocol from one port.
func dialAround() error {
	for _, network := range []string{"udp", "tcp"} {
		var conns []net.Conn
		err := func() error {
			for n := range 2 {
				to := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 1, 0, byte(n)}), silentPort)
				if network == "tcp" {
					listener, err := net.Listen(network, to.String())
					if err != nil {
						return err
					}
					defer listener.Close()
				}
				p := map[string]protocol{"udp": udp, "tcp": tcp}[network]
				local := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), fleetingPort)
				d := connectx.Dialer{Dialer: net.Dialer{Timeout: dialPatience, LocalAddr: netAddr(p, local)}}
				conn, err := d.DialContext(context.Background(), network, to.String())
				if err != nil {
					return err
				}
				conns = append(conns, conn)
			}
			return nil
		}()
		for _, conn := range conns {
			abandon(conn)
			conn.Close()
		}
		if err != nil {
			return err
		}
	}
	return nil
}
