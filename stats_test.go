//go:build linux

package connectx_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
)

func init() {
	children["stats"] = statsOfAStress
	children["stats, no netlink"] = statsWithoutNetlink
}

// statsDiff is what has been counted in between.
func statsDiff(before, after connectx.Stats) (d connectx.Stats) {
	for _, p := range []struct{ before, after, diff *connectx.ProtocolStats }{
		{&before.TCP, &after.TCP, &d.TCP}, {&before.UDP, &after.UDP, &d.UDP},
	} {
		var b, a map[string]uint64
		decode := func(p *connectx.ProtocolStats, m *map[string]uint64) {
			text, _ := json.Marshal(p)
			_ = json.Unmarshal(text, m)
		}
		decode(p.before, &b)
		decode(p.after, &a)
		for name := range a {
			a[name] -= b[name]
		}
		text, _ := json.Marshal(a)
		_ = json.Unmarshal(text, p.diff)
	}
	return d
}

// Each counter counts what its name says. The ports are few, so that each dial
// can be told in advance.
func TestStats(t *testing.T) {
	const low, high = 40000, 40003
	for _, tt := range []struct {
		name    string
		prepare func(t *testing.T, network string)
		dial    func(d *connectx.Dialer, network, address string) error
		tcp     connectx.ProtocolStats
		udp     connectx.ProtocolStats
	}{
		{
			name: "a dial that chooses nothing",
			dial: dialOnce,
			tcp:  connectx.ProtocolStats{DialsFromAny: 1, Tries: 1, Wins: 1},
			udp:  connectx.ProtocolStats{DialsFromAny: 1, Tries: 1, Wins: 1},
		},
		{
			name: "a source address",
			dial: func(d *connectx.Dialer, network, address string) error {
				d.LocalAddr = localAddr(network, "127.2.0.1", 0)
				return dialOnce(d, network, address)
			},
			tcp: connectx.ProtocolStats{DialsFromAddr: 1, Tries: 1, Wins: 1},
			udp: connectx.ProtocolStats{DialsFromAddr: 1, Tries: 1, Wins: 1},
		},
		{
			name: "one of several source addresses",
			dial: func(d *connectx.Dialer, network, address string) error {
				d.SourceAddrs = []netip.Addr{netip.MustParseAddr("127.2.0.1"), netip.MustParseAddr("127.2.0.2")}
				return dialOnce(d, network, address)
			},
			tcp: connectx.ProtocolStats{DialsFromAddr: 1, Tries: 1, Wins: 1},
			udp: connectx.ProtocolStats{DialsFromAddr: 1, Tries: 1, Wins: 1},
		},
		{
			name: "a source port",
			dial: func(d *connectx.Dialer, network, address string) error {
				d.LocalAddr = localAddr(network, "", 40001)
				return dialOnce(d, network, address)
			},
			tcp: connectx.ProtocolStats{DialsFromPort: 1, Tries: 1, Wins: 1},
			udp: connectx.ProtocolStats{DialsFromPort: 1, Tries: 1, Wins: 1},
		},
		{
			name: "a 4-tuple that exists",
			dial: func(d *connectx.Dialer, network, address string) error {
				d.LocalAddr = localAddr(network, "127.2.0.1", 40001)
				conn, err := d.Dial(network, address)
				if err != nil {
					return err
				}
				defer hangUp(conn)
				if err := dialOnce(d, network, address); err == nil {
					return errors.New("there are two connections on a 4-tuple")
				}
				return nil
			},
			tcp: connectx.ProtocolStats{DialsFromPort: 2, Tries: 2, Wins: 1, Conflicts: 1},
			udp: connectx.ProtocolStats{DialsFromPort: 2, Tries: 2, Wins: 1, Conflicts: 1, Lookups: 1},
		},
		{
			name: "a port range that becomes full",
			dial: func(d *connectx.Dialer, network, address string) error {
				d.PortRange = connectx.PortRange{Low: 20000, High: 20000}
				conn, err := d.Dial(network, address)
				if err != nil {
					return err
				}
				defer hangUp(conn)
				if err := dialOnce(d, network, address); !errors.Is(err, connectx.ErrPortsExhausted) {
					return fmt.Errorf("no port left: %v", err)
				}
				return nil
			},
			// The one port is tried, and then looked at among the rest.
			tcp: connectx.ProtocolStats{DialsFromAny: 2, Tries: 3, Wins: 1, Conflicts: 2, Exhausted: 1, Lookups: 1},
			udp: connectx.ProtocolStats{DialsFromAny: 2, Tries: 2, Wins: 1, Conflicts: 1, Exhausted: 1, Lookups: 1},
		},
		{
			name: "a destination without a route",
			dial: func(d *connectx.Dialer, network, address string) error {
				d.LocalAddr = localAddr(network, "127.2.0.1", 0)
				if err := dialOnce(d, network, "198.51.100.1:7"); err == nil {
					return errors.New("there is a route")
				}
				return nil
			},
			tcp: connectx.ProtocolStats{DialsFromAddr: 1, Tries: 1, Errors: 1},
			udp: connectx.ProtocolStats{DialsFromAddr: 1, Tries: 1, Errors: 1},
		},
	} {
		for _, network := range []string{"tcp", "udp"} {
			t.Run(network+", "+tt.name, func(t *testing.T) {
				ownNamespace(t, low, high)
				address := echo(t, network, "127.1.0.1")
				before := connectx.ReadStats()
				if err := tt.dial(new(connectx.Dialer), network, address); err != nil {
					t.Fatal(err)
				}
				want := connectx.Stats{TCP: tt.tcp}
				if network == "udp" {
					want = connectx.Stats{UDP: tt.udp}
				}
				if diff := cmp.Diff(want, statsDiff(before, connectx.ReadStats())); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
			})
		}
	}
}

func dialOnce(d *connectx.Dialer, network, address string) error {
	conn, err := d.Dial(network, address)
	if err == nil {
		hangUp(conn)
	}
	return err
}

// A hook that panics ends its try.
func TestStatsAfterAPanic(t *testing.T) {
	ownNamespace(t, 40000, 40003)
	before := connectx.ReadStats()
	func() {
		defer func() {
			if recover() == nil {
				t.Error("there was no panic")
			}
		}()
		ctx := connectx.WithTrace(t.Context(), &connectx.Trace{Try: func(connectx.TraceTry) { panic("hook") }})
		_, _ = connectx.DialContext(ctx, "udp", "127.1.0.1:7")
	}()
	want := connectx.Stats{UDP: connectx.ProtocolStats{DialsFromAny: 1, Tries: 1, Errors: 1}}
	if diff := cmp.Diff(want, statsDiff(before, connectx.ReadStats())); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// However many dial at once, and however they end, the counters add up.
func TestStatsAddUp(t *testing.T) {
	ownNamespace(t, 40000, 40019)
	env := []string{"DESTINATIONS=" + echo(t, "tcp", "127.1.0.1") + " " + echo(t, "udp", "127.1.0.1")}
	for _, name := range []string{"stats", "stats, no netlink"} {
		if out := runChild(t, name, env...); !strings.HasPrefix(out, "ok") {
			t.Errorf("%s: %q", name, out)
		} else {
			t.Log(out)
		}
	}
}

// statsOfAStress dials in all ways, many at once, and compares what was counted
// with what has happened.
func statsOfAStress() int {
	tcp, udp, _ := strings.Cut(os.Getenv("DESTINATIONS"), " ")
	const goroutines, dials = 8, 400
	var mu sync.Mutex
	want := map[string]*connectx.ProtocolStats{"tcp": {}, "udp": {}}
	exhausted := map[string]uint64{}
	connected := map[string]uint64{}
	var wg sync.WaitGroup
	for g := range goroutines {
		wg.Go(func() {
			var held []net.Conn
			for i := range dials {
				network, address := "tcp", tcp
				if (i+g)%2 == 0 {
					network, address = "udp", udp
				}
				if i%13 == 0 {
					address = "198.51.100.1:7" // no route
				}
				var d connectx.Dialer
				row := &want[network].DialsFromAny
				switch i / 2 % 5 {
				case 1:
					d.LocalAddr = localAddr(network, "127.2.0.1", 0)
					row = &want[network].DialsFromAddr
				case 2:
					d.LocalAddr = localAddr(network, "127.2.0.1", uint16(40000+i%8))
					row = &want[network].DialsFromPort
				case 3:
					d.SourceAddrs = []netip.Addr{netip.MustParseAddr("127.2.0.1"), netip.MustParseAddr("127.2.0.2")}
					row = &want[network].DialsFromAddr
				case 4:
					d.PortRange = connectx.PortRange{Low: 20000, High: 20007}
				}
				conn, err := d.Dial(network, address)
				mu.Lock()
				*row++
				if errors.Is(err, connectx.ErrPortsExhausted) {
					exhausted[network]++
				}
				if err == nil {
					connected[network]++
				}
				mu.Unlock()
				if err == nil {
					held = append(held, conn)
				}
				if len(held) > 12 {
					hangUp(held[0])
					held = slices.Delete(held, 0, 1)
				}
				if i%16 == 0 {
					runtime.Gosched()
				}
			}
			for _, conn := range held {
				hangUp(conn)
			}
		})
	}
	wg.Wait()
	stats := connectx.ReadStats()
	for network, got := range map[string]connectx.ProtocolStats{"tcp": stats.TCP, "udp": stats.UDP} {
		if got.Tries != got.Wins+got.Conflicts+got.Contention+got.Errors {
			return failChild("%s does not add up: %+v", network, got)
		}
		if got.DialsFromAny != want[network].DialsFromAny || got.DialsFromAddr != want[network].DialsFromAddr || got.DialsFromPort != want[network].DialsFromPort {
			return failChild("%s: %+v, want the dials of %+v", network, got, *want[network])
		}
		if got.Wins != connected[network] || got.Exhausted != exhausted[network] || got.Fallbacks != 0 {
			return failChild("%s: %+v, want %d connected, %d exhausted", network, got, connected[network], exhausted[network])
		}
		if got.Conflicts == 0 || got.Errors == 0 || got.Exhausted == 0 || got.Lookups == 0 {
			return failChild("%s: the stress has left something out: %+v", network, got)
		}
	}
	text, err := json.Marshal(stats)
	if err != nil {
		return failChild("%v", err)
	}
	fmt.Printf("ok %s", text)
	return 0
}

// statsWithoutNetlink counts dials that fall back.
func statsWithoutNetlink() int {
	if err := refuse(noNetlink); err != nil {
		return failChild("%v", err)
	}
	_, udp, _ := strings.Cut(os.Getenv("DESTINATIONS"), " ")
	var reason error
	ctx := connectx.WithTrace(context.Background(), &connectx.Trace{Fallback: func(err error) { reason = err }})
	conn, err := connectx.DialContext(ctx, "udp", udp)
	if err != nil {
		return failChild("%v", err)
	}
	defer conn.Close()
	if err := ping(conn, 1); err != nil {
		return failChild("%v", err)
	}
	if !errors.Is(reason, unix.EPERM) {
		return failChild("the reason of the fallback is %v", reason)
	}
	d := connectx.Dialer{PortRange: connectx.PortRange{Low: 20000, High: 20004}}
	for i := range 5 {
		conn, err := d.Dial("udp", udp)
		if err != nil {
			return failChild("dial %d: %v", i, err)
		}
		defer conn.Close()
		if port := portOf(conn.LocalAddr()); !d.PortRange.Contains(port) {
			return failChild("port %d is not in %v", port, d.PortRange)
		}
		if err := ping(conn, uint64(i)); err != nil {
			return failChild("%v", err)
		}
	}
	if _, err := d.Dial("udp", udp); !errors.Is(err, connectx.ErrPortsExhausted) {
		return failChild("all ports in use: %v", err)
	}
	got := connectx.ReadStats()
	want := connectx.Stats{UDP: connectx.ProtocolStats{DialsFromAny: 7, Fallbacks: 7, Exhausted: 1}}
	if diff := cmp.Diff(want, got); diff != "" {
		return failChild("(-want +got):\n%s", diff)
	}
	d = connectx.Dialer{SourceAddrs: []netip.Addr{netip.MustParseAddr("127.2.0.1"), netip.MustParseAddr("127.2.0.2")}}
	for i := range 40 {
		conn, err := d.Dial("udp", udp)
		if err != nil {
			return failChild("dial %d of two source addresses: %v", i, err)
		}
		defer conn.Close()
	}
	if _, err := d.Dial("udp", udp); !errors.Is(err, connectx.ErrPortsExhausted) {
		return failChild("all ports of two source addresses in use: %v", err)
	}
	fmt.Print("ok")
	return 0
}
