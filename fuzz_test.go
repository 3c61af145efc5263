//go:build linux

package connectx_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/netns"
)

// fuzzNamespace prepares the namespace of the test process, not one of a test's
// own: net.Dialer races to two addresses in goroutines, whose threads are in the
// former. There is nothing but loopback there, with a server on port 7, and no
// name server: what names there are is in /etc/hosts.
func fuzzNamespace(f *testing.F) {
	f.Helper()
	netns.Need(f)
	resolver := net.DefaultResolver
	f.Cleanup(func() { net.DefaultResolver = resolver })
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		return nil, errors.New("there is no name server")
	}}
	// go test -fuzz has several processes in the namespace, and each does this.
	shared := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		ctlErr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) })
		return errors.Join(ctlErr, err)
	}}
	for network, host := range map[string]string{"tcp4": "0.0.0.0", "tcp6": "::"} {
		listener, err := shared.Listen(f.Context(), network, net.JoinHostPort(host, fmt.Sprint(echoPort)))
		if err != nil {
			f.Fatal(err)
		}
		f.Cleanup(func() { listener.Close() })
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				go func() { // until the client resets the connection
					defer conn.Close()
					io.Copy(io.Discard, conn)
				}()
			}
		}()
	}
}

// beAlone has the other processes of go test -fuzz wait, so that none has the chosen
// port for one dial of a pair and not for the other.
func beAlone(t *testing.T) {
	t.Helper()
	f, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
}

// outcomeOf is all that a caller can tell of how a dial has ended. The source port
// of a connection is left out if it was picked.
func outcomeOf(conn net.Conn, err error, picked bool) verdict {
	if err != nil {
		return verdictOf(nil, err)
	}
	defer hangUp(conn)
	v := verdict{Conn: fmt.Sprintf("%T", conn), Local: conn.LocalAddr().String(), Remote: conn.RemoteAddr().String()}
	if local, err := netip.ParseAddrPort(v.Local); err == nil && picked {
		v.Local = local.Addr().String()
	}
	return v
}

// portTaken reports whether a dial has ended as the README has it for an explicit
// source port that cannot be had: with net.Dialer's errno, and more words.
func portTaken(err error) bool {
	return err != nil && (strings.Contains(err.Error(), "the source port is held by a socket that does not share it") ||
		strings.Contains(err.Error(), "the 4-tuple is in use"))
}

// checkSame compares the outcome of a dial with that of net.Dialer.
func checkSame(t *testing.T, name string, want, got verdict) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s: net.Dialer -, connectx +\n%s", name, diff)
	}
}

// isUnix reports whether the address names a file. It has no place in a network
// namespace, and the dial is net.Dialer's alone.
func isUnix(network string) bool { return strings.HasPrefix(network, "unix") }

const (
	fuzzTimeout = 5 * time.Second

	// fallbackDelay is when net.Dialer begins to dial the other family as well.
	fallbackDelay = 300 * time.Millisecond
)

// addresses are of all forms that package net reads, and of some that it does not.
var addresses = []string{
	"127.0.0.1:7", "127.0.0.1:9", "[::1]:7", "[::1]:9", "[::ffff:127.0.0.1]:7", "[::ffff:0:0]:7", "0.0.0.0:7", "[::]:7", ":7", ":0", ":", "",
	"localhost:7", "localhost:echo", "no.such.name:7", "192.0.2.1:7", "[2001:db8::1]:7", "[fe80::1%lo]:7", "[::1%lo]:7",
	"[fe80::1%1]:7", "[fe80::1%none]:7", "239.1.2.3:7", "[ff02::1%lo]:7", "255.255.255.255:7", "127.0.0.1", "::1:7", "127.0.0.1:65536",
	"127.0.0.1:-1", "127.0.0.1:00007", "127.1:7", "0x7f.1:7", "127.0.0.01:7", "[127.0.0.1]:7", "127.0.0.1:echo", "[::1]", "]:7", "a:b:c",
}

// Whatever the network and the address, each way of dialling ends as with
// net.Dialer.
func FuzzDial(f *testing.F) {
	fuzzNamespace(f)
	for _, network := range []string{"tcp", "udp6"} {
		for _, address := range addresses {
			f.Add(network, address)
		}
	}
	for _, network := range []string{"tcp4", "tcp6", "udp", "udp4", "ip", "ip4:icmp", "ip6:58", "ip4:", "ip:256", "tcp5", "TCP", "", "udp4 "} {
		f.Add(network, "127.0.0.1:7")
		f.Add(network, "::1")
	}
	f.Fuzz(func(t *testing.T, network, address string) {
		if isUnix(network) || oddZones.MatchString(address) {
			return
		}
		ctx, cancel := context.WithTimeout(t.Context(), fuzzTimeout)
		defer cancel()
		slow := false // so that another address of the host may have been faster
		outcome := func(dial func(context.Context, string, string) (net.Conn, error)) verdict {
			start := time.Now()
			conn, err := dial(ctx, network, address)
			slow = slow || time.Since(start) >= fallbackDelay
			return outcomeOf(conn, err, true)
		}
		var d connectx.Dialer
		want := outcome((&net.Dialer{}).DialContext)
		same := func(name string, want, got verdict) {
			if !slow {
				checkSame(t, name, want, got)
			}
		}
		same("Dialer.DialContext", want, outcome(d.DialContext))
		same("Dialer.NetDialer", want, outcome(d.NetDialer().DialContext))
		same("DialContext", want, outcome(connectx.DialContext))
		same("Dial", want, outcome(func(_ context.Context, network, address string) (net.Conn, error) {
			return connectx.Dial(network, address)
		}))

		got := outcome(func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := d.DialPacket(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return conn, nil
		})
		switch {
		case network != "udp" && network != "udp4" && network != "udp6":
			// It is for UDP only, and says so before it looks at the address.
			want = verdictOf(nil, &net.OpError{Op: "dial", Net: network, Err: net.UnknownNetworkError(network)})
		case want.Error == "":
			want.Conn = "*connectx.PacketConn"
		}
		same("Dialer.DialPacket", want, got)
	})
}

// localAddrOf is a LocalAddr of the type that kind says, or nil.
func localAddrOf(kind byte, ip []byte, zone string, port int) net.Addr {
	if len(ip) == 0 {
		ip = nil
	}
	switch kind % 8 {
	case 1:
		return &net.TCPAddr{IP: ip, Zone: zone, Port: port}
	case 2:
		return &net.UDPAddr{IP: ip, Zone: zone, Port: port}
	case 3:
		return &net.IPAddr{IP: ip, Zone: zone}
	case 4:
		return &net.UnixAddr{Name: zone, Net: "unix"}
	case 5:
		return (*net.TCPAddr)(nil)
	case 6:
		return (*net.UDPAddr)(nil)
	}
	return nil
}

// thisHost reports whether the address is this host's as 0.0.0.0, :: or nothing, and
// which of them.
func thisHost(address string) (to netip.Addr, ok bool) {
	host, _, err := net.SplitHostPort(address)
	switch {
	case err != nil:
		host = address // of a network without ports
	case host == "":
		return netip.IPv4Unspecified(), true
	}
	to, err = netip.ParseAddr(host)
	return to, err == nil && to.Unmap().WithZone("").IsUnspecified()
}

// isOtherThisHost reports whether this host is dialled as 0.0.0.0 or :: from an
// address of the other family. A Dialer connects to the one of the same family,
// while with net.Dialer it depends on how it is written; see
// TestThisHostFromAnIPv6Source.
func isOtherThisHost(address string, ip []byte) bool {
	from, _ := netip.AddrFromSlice(ip)
	from = from.Unmap()
	to, ok := thisHost(address)
	return ok && from.IsValid() && from != netip.IPv4Unspecified() && (from.Is6() || to.Is6())
}

// isThisHostFromMany reports whether this host is dialled as 0.0.0.0 from an address
// that is that of many. The kernel takes none of these for the source of what it
// sends, and connects to 127.0.0.1; a Dialer takes it for the host that is meant.
func isThisHostFromMany(address string, ip []byte) bool {
	from, _ := netip.AddrFromSlice(ip)
	from = from.Unmap()
	to, ok := thisHost(address)
	many := from.IsMulticast() || from == netip.AddrFrom4([4]byte{255, 255, 255, 255}) || from == netip.AddrFrom4([4]byte{127, 255, 255, 255})
	return ok && from.Is4() && many && to.Unmap().Is4()
}

// oddZones are those of which package net reads the digits at the start as an index,
// and those that an address cannot be written with.
var oddZones = regexp.MustCompile(`(?s)%[0-9]+[^0-9\]]|%.*[\[%]|%.*\].*\]`)

// lacksZone reports whether a link-local source address has no zone. A Dialer gives
// it that of the destination, where net.Dialer refuses it.
func lacksZone(ip []byte, zone string) bool {
	from, _ := netip.AddrFromSlice(ip)
	return from.Unmap().Is6() && from.IsLinkLocalUnicast() && zone == ""
}

// hookRefuses reports whether a NetDialer, whose LocalAddr is looked at in the hook
// when a destination is known, refuses it in other words than net.Dialer.
func hookRefuses(want, got verdict, ip []byte, port int) bool {
	_, isAddr := netip.AddrFromSlice(ip)
	return want.Error != "" && (want.Addr == "" || // net.Dialer did not get as far as that
		len(ip) > 0 && !isAddr || port < 0 || port > 0xffff ||
		strings.HasSuffix(got.Error, "no suitable address found")) // of another family
}

// hookIgnores reports whether the family that a NetDialer uses may differ from net.Dialer's
// because the source is unspecified. Its hook is not told whether the caller has
// asked for IPv4 or for both, and this host is of the family that it is written in.
func hookIgnores(want verdict, network, address string, ip []byte) bool {
	from, _ := netip.AddrFromSlice(ip)
	if _, ok := thisHost(address); ok && from.IsUnspecified() {
		return true
	}
	return from == netip.IPv6Unspecified() && strings.HasSuffix(network, "4") && strings.HasSuffix(want.Error, "non-IPv4 address")
}

// sourceText is the address in a verdict's Source.
func sourceText(source string) string {
	_, text, _ := strings.Cut(source, " ")
	return text
}

// The same from any LocalAddr.
func FuzzLocalAddr(f *testing.F) {
	fuzzNamespace(f)
	four, six, mapped := []byte{127, 0, 0, 2}, net.IPv6loopback, net.IPv4(127, 0, 0, 2)
	for kind, network := range []string{"tcp", "tcp", "udp", "ip4:1", "udp", "tcp", "udp4"} {
		f.Add(network, "127.0.0.1:7", byte(kind), four, "", 0)
		f.Add(network, "127.0.0.1:9", byte(kind), four, "", 30000)
		f.Add(network, "[::1]:7", byte(kind), []byte(six), "", 30001)
		f.Add(network, "[::1]:7", byte(kind), four, "lo", -1)
		f.Add(network, "127.0.0.1", byte(kind), []byte(mapped), "", 65536)
		f.Add(network, ":7", byte(kind), []byte{}, "", 7)
		f.Add(network, "[fe80::1%lo]:7", byte(kind), []byte{0xfe, 0x80, 15: 1}, "lo", 30002)
		f.Add(network, "0.0.0.0:7", byte(kind), []byte{1, 2, 3}, "", 0)
		f.Add(network, "localhost:7", byte(kind), make([]byte, 16), "", 30003)
		f.Add(network, "[::ffff:127.0.0.1]:7", byte(kind), make([]byte, 4), "", 30003)
		f.Add(network, "localhost:9", byte(kind), four, "", 0)
		f.Add(network, "192.0.2.1:7", byte(kind), []byte{192, 0, 2, 9}, "", 0)
		f.Add("ip:1", "0.0.0.0", byte(kind), []byte{0xff, 0x30, 15: 1}, "", 0)
		f.Add("ip:1", "127.0.0.1", byte(kind), four, "", 0)
	}
	f.Fuzz(func(t *testing.T, network, address string, kind byte, ip []byte, zone string, port int) {
		if isUnix(network) || oddZones.MatchString(address) || oddZones.MatchString("%"+zone+"]") {
			return
		}
		local := localAddrOf(kind, ip, zone, port)
		_, hasPort := local.(interface{ AddrPort() netip.AddrPort })
		if hasPort && (isOtherThisHost(address, ip) || isThisHostFromMany(address, ip) || lacksZone(ip, zone)) {
			return
		}
		// One family after the other, however slow the machine is.
		inner := net.Dialer{LocalAddr: local, FallbackDelay: fuzzTimeout}
		picked := port == 0 || kind%8 != 1 && kind%8 != 2
		if !picked {
			beAlone(t)
		}
		ctx, cancel := context.WithTimeout(t.Context(), fuzzTimeout)
		defer cancel()
		conn, err := inner.DialContext(ctx, network, address)
		want := outcomeOf(conn, err, picked)

		d := connectx.Dialer{Dialer: inner}
		conn, err = d.DialContext(ctx, network, address)
		if portTaken(err) {
			if want.Error == "" || !errors.Is(err, unix.EADDRINUSE) && !errors.Is(err, unix.EADDRNOTAVAIL) {
				t.Errorf("net.Dialer: %+v, connectx: %v", want, err)
			}
			return
		}
		checkSame(t, "Dialer.DialContext", want, outcomeOf(conn, err, picked))

		conn, err = d.NetDialer().DialContext(ctx, network, address)
		got := outcomeOf(conn, err, picked)
		if !hasPort {
			checkSame(t, "Dialer.NetDialer", want, got)
			return
		}
		if hookRefuses(want, got, ip, port) {
			if got.Error == "" {
				t.Errorf("Dialer.NetDialer: net.Dialer: %s, connectx: %+v", want.Error, got)
			}
			return
		}
		if hookIgnores(want, network, address, ip) {
			return
		}
		want.Error = strings.Replace(want.Error, " "+sourceText(want.Source)+"->", " ", 1)
		want.Source = ""
		checkSame(t, "Dialer.NetDialer", want, got)
	})
}

// The same for dials between addresses that need no parsing.
func FuzzDialTyped(f *testing.F) {
	fuzzNamespace(f)
	four, six, mapped := []byte{127, 0, 0, 1}, []byte(net.IPv6loopback), []byte(net.IPv4(127, 0, 0, 1))
	none, any4, any6 := []byte{}, make([]byte, 4), make([]byte, 16)
	for _, network := range []string{"tcp", "udp", "tcp4", "udp6", "ip4:1", "ip6:58", "ip", "", "tcp5"} {
		f.Add(network, none, uint16(0), four, uint16(7), "")
		f.Add(network, four, uint16(30000), four, uint16(7), "")
		f.Add(network, six, uint16(0), six, uint16(9), "lo")
		f.Add(network, mapped, uint16(0), four, uint16(9), "")
		f.Add(network, four, uint16(30001), mapped, uint16(7), "")
		f.Add(network, any4, uint16(30002), six, uint16(7), "")
		f.Add(network, any6, uint16(30003), four, uint16(7), "")
		f.Add(network, none, uint16(30004), any6, uint16(7), "")
		f.Add(network, four, uint16(0), any4, uint16(7), "")
		f.Add(network, six, uint16(0), none, uint16(7), "")
		f.Add(network, six, uint16(0), four, uint16(0), "")
	}
	f.Fuzz(func(t *testing.T, network string, localIP []byte, localPort uint16, remoteIP []byte, remotePort uint16, zone string) {
		addr := func(ip []byte) netip.Addr {
			a, _ := netip.AddrFromSlice(ip)
			return a.WithZone(zone)
		}
		laddr, raddr := netip.AddrPortFrom(addr(localIP), localPort), netip.AddrPortFrom(addr(remoteIP), remotePort)
		if isOtherThisHost(raddr.String(), localIP) || isThisHostFromMany(raddr.String(), localIP) || lacksZone(localIP, zone) || oddZones.MatchString("%"+zone+"]") {
			return
		}
		if localPort != 0 {
			beAlone(t)
		}
		ctx, cancel := context.WithTimeout(t.Context(), fuzzTimeout)
		defer cancel()
		var inner net.Dialer
		d := &connectx.Dialer{Dialer: inner}
		for _, dial := range []struct {
			name      string
			inner, of func() (net.Conn, error)
		}{
			{
				"DialTCP",
				func() (net.Conn, error) { return typedConn(inner.DialTCP(ctx, network, laddr, raddr)) },
				func() (net.Conn, error) { return typedConn(d.DialTCP(ctx, network, laddr, raddr)) },
			},
			{
				"DialUDP",
				func() (net.Conn, error) { return typedConn(inner.DialUDP(ctx, network, laddr, raddr)) },
				func() (net.Conn, error) { return typedConn(d.DialUDP(ctx, network, laddr, raddr)) },
			},
			{
				"DialIP",
				func() (net.Conn, error) { return typedConn(inner.DialIP(ctx, network, laddr.Addr(), raddr.Addr())) },
				func() (net.Conn, error) { return typedConn(d.DialIP(ctx, network, laddr.Addr(), raddr.Addr())) },
			},
		} {
			conn, err := dial.inner()
			want := outcomeOf(conn, err, localPort == 0)
			conn, err = dial.of()
			if portTaken(err) {
				if want.Error == "" || !errors.Is(err, unix.EADDRINUSE) && !errors.Is(err, unix.EADDRNOTAVAIL) {
					t.Errorf("%s: net.Dialer: %+v, connectx: %v", dial.name, want, err)
				}
				continue
			}
			checkSame(t, dial.name, want, outcomeOf(conn, err, localPort == 0))
		}
	})
}

// typedConn keeps a nil pointer out of the net.Conn.
func typedConn[T net.Conn](conn T, err error) (net.Conn, error) {
	if err != nil {
		return nil, err
	}
	return conn, nil
}
