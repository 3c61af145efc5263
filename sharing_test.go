//go:build linux

package connectx_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/netns"
)

// A machine is a network namespace, and a goroutine that stays in it.
type machine struct {
	ns   int // a descriptor of the namespace
	work chan func()
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	m := &machine{work: make(chan func())}
	entered := make(chan error)
	go func() {
		err := netns.Enter()
		if err == nil {
			m.ns, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		}
		entered <- err
		for f := range m.work {
			f()
		}
	}()
	t.Cleanup(func() { close(m.work) })
	if err := <-entered; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(m.ns) })
	return m
}

// run runs f in the namespace.
func (m *machine) run(f func() error) error {
	done := make(chan error)
	m.work <- func() { done <- f() }
	return <-done
}

// The address of each family that the machines share.
var sharedAddresses = [...]string{"192.0.2.1", "2001:db8::1"}

// plug joins the namespace of the calling thread with the router, whose end of
// the nth cable has the address 1, and this one the address 2.
func plug(router *machine, n int) error {
	here := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "router"}, PeerName: fmt.Sprintf("cable%d", n), PeerNamespace: netlink.NsFd(router.ns)}
	if err := netlink.LinkAdd(here); err != nil {
		return err
	}
	end := func(name string, address int) error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		// Until the kernel has found its link-local address to be unique, which
		// takes it a second, it cannot ask for its neighbours'.
		if err := setSysctl("ipv6/conf/"+name+"/accept_dad", "0"); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		return errors.Join(
			netns.AddAddress(link, fmt.Sprintf("10.0.%d.%d/24", n, address)),
			netns.AddAddress(link, fmt.Sprintf("fd64:0:0:%d::%d/64", n, address)),
		)
	}
	if err := router.run(func() error { return end(here.PeerName, 1) }); err != nil {
		return err
	}
	return end("router", 2)
}

func setSysctl(name, value string) error {
	return os.WriteFile("/proc/sys/net/"+name, []byte(value), 0)
}

// routeAll routes everything to the address 1 or 2 on the nth cable. The source
// is one of the shared addresses where a program does not choose it.
func routeAll(n, address, table int, fromShared bool) error {
	for i, gateway := range []string{fmt.Sprintf("10.0.%d.%d", n, address), fmt.Sprintf("fd64:0:0:%d::%d", n, address)} {
		route := &netlink.Route{Gw: net.ParseIP(gateway), Table: table}
		_, route.Dst, _ = net.ParseCIDR([]string{"0.0.0.0/0", "::/0"}[i])
		if fromShared {
			route.Src = net.ParseIP(sharedAddresses[i])
		}
		if err := netlink.RouteAdd(route); err != nil {
			return fmt.Errorf("default route via %s: %w", gateway, err)
		}
	}
	return nil
}

// routeSlice has what comes to a shared address, on a port of the slice, routed
// by a table of its own to the machine on the nth cable.
func routeSlice(n int, slice connectx.PortRange) error {
	for i, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rule := netlink.NewRule()
		rule.Family, rule.Table = family, 100+n
		_, rule.Dst, _ = net.ParseCIDR(sharedAddresses[i] + []string{"/32", "/128"}[i])
		rule.Dport = netlink.NewRulePortRange(slice.Low, slice.High)
		if err := netlink.RuleAdd(rule); err != nil {
			return fmt.Errorf("rule for ports %v: %w", slice, err)
		}
	}
	return routeAll(n, 2, 100+n, false)
}

// shareAddresses builds the network of docs/sharing-an-address.md: a machine for
// each slice of the ports, all of them with the same addresses, and the router in
// front of them. The test's own namespace is a server behind the router.
func shareAddresses(t *testing.T, parts, ranges []connectx.PortRange) (machines []*machine) {
	t.Helper()
	ownNamespace(t, 40000, 40099)
	router := newMachine(t)
	err := router.run(func() error {
		return errors.Join(setSysctl("ipv4/ip_forward", "1"), setSysctl("ipv6/conf/all/forwarding", "1"))
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(plug(router, 0), routeAll(0, 1, 0, false)); err != nil {
		t.Fatal(err)
	}
	for i, slice := range parts {
		n := i + 1
		m := newMachine(t)
		err := m.run(func() error {
			return errors.Join(
				netns.LoopbackUp(sharedAddresses[0]+"/32", sharedAddresses[1]+"/128"),
				netns.SetPortRange(ranges[i].Low, ranges[i].High),
				plug(router, n),
				routeAll(n, 1, 0, true),
			)
		})
		if err := errors.Join(err, router.run(func() error { return routeSlice(n, slice) })); err != nil {
			t.Fatal(err)
		}
		machines = append(machines, m)
	}
	return machines
}

// Machines that share an address have each slice to the full, and what comes
// back reaches the one whose connection it is for.
func TestMachinesShareAnAddress(t *testing.T) {
	parts := []connectx.PortRange{{Low: 40000, High: 40009}, {Low: 40010, High: 40019}}
	system := []connectx.PortRange{{Low: 32768, High: 60999}, {Low: 32768, High: 60999}}
	other := []connectx.PortRange{{Low: 50000, High: 50099}, {Low: 50000, High: 50099}}
	inner := net.Dialer{Timeout: 10 * time.Second}
	sliced := func(family int, slice connectx.PortRange) dialer {
		return &connectx.Dialer{Dialer: inner, PortRange: slice, SourceAddrs: []netip.Addr{netip.MustParseAddr(sharedAddresses[family])}}
	}
	plain := func(int, connectx.PortRange) dialer { return &inner }
	rows := []struct {
		name   string
		ranges []connectx.PortRange // of the machines: net.ipv4.ip_local_port_range
		dialer func(family int, slice connectx.PortRange) dialer
	}{
		{"each slice is the range of the system", parts, sliced},
		{"each slice is a part of the range of the system", system, sliced},
		{"each slice is outside of the range of the system", other, sliced},
		{"plain sockets keep to the range of the system", parts, plain},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			machines := shareAddresses(t, parts, row.ranges)
			for family, host := range []string{"10.0.0.2", "fd64::2"} {
				for network, full := range map[string]unix.Errno{"tcp": unix.EADDRNOTAVAIL, "udp": unix.EAGAIN} {
					address := echo(t, network, host)
					var conns []net.Conn
					for i, m := range machines {
						slice := parts[i]
						var got []string
						err := m.run(func() error {
							d := row.dialer(family, slice)
							for {
								conn, err := d.Dial(network, address)
								if err != nil {
									return err
								}
								conns = append(conns, conn)
								got = append(got, conn.LocalAddr().String())
							}
						})
						if !errors.Is(err, full) {
							t.Errorf("machine %d, %s to %s: after all ports of its slice: %v", i, network, address, err)
						}
						var want []string
						for port := slice.Low; port <= slice.High; port++ {
							want = append(want, net.JoinHostPort(sharedAddresses[family], fmt.Sprint(port)))
						}
						slices.Sort(got)
						if diff := cmp.Diff(want, got); diff != "" {
							t.Errorf("machine %d, %s to %s: sources (-want +got):\n%s", i, network, address, diff)
						}
					}
					for _, conn := range conns {
						checkEcho(t, conn)
						hangUp(conn)
					}
				}
			}
		})
	}
}
