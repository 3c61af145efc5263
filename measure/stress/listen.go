//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/measure/internal/echo"
)

// group is the multicast group of a listener.
var group = netip.MustParseAddr("239.1.2.3")

// A listening is a listener and who sends to it.
type listening struct {
	network, address string
	join             bool
	to               []netip.AddrPort
	patience         time.Duration
}

// runListeners runs unconnected sockets with SO_REUSEADDR on ports of the range,
// and sends them datagrams, one at a time.
func runListeners(c Config, reports *reporter, stop *atomic.Bool) error {
	wildcard, multicast := c.Layout.listenPort(), netip.AddrPortFrom(group, c.Layout.groupPort())
	var all []func()
	for _, l := range []listening{
		{network: "udp4", address: fmt.Sprintf(":%d", wildcard), to: on(wildcard, sources[0][:])},
		{network: "udp6", address: fmt.Sprintf(":%d", wildcard), to: on(wildcard, sources[1][:])},
		{network: "udp4", address: multicast.String(), join: true, to: []netip.AddrPort{multicast}},
	} {
		l.patience = listenPatience
		listener, err := l.listen()
		if err != nil {
			return fmt.Errorf("listen on %s: %w", l.address, err)
		}
		sender, err := l.sender()
		if err != nil {
			return fmt.Errorf("send to %s: %w", l.address, err)
		}
		all = append(all, func() { l.run(listener, sender, reports, stop) })
	}
	reports.ready()
	var wg sync.WaitGroup
	for _, run := range all {
		wg.Go(run)
	}
	wg.Wait()
	return nil
}

func on(port uint16, addresses []netip.Addr) (all []netip.AddrPort) {
	for _, a := range addresses {
		all = append(all, netip.AddrPortFrom(a, port))
	}
	return all
}

func (l listening) listen() (net.PacketConn, error) {
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return onSocket(c, func(fd int) error {
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil || !l.join {
				return err
			}
			return unix.SetsockoptIPMreq(fd, unix.SOL_IP, unix.IP_ADD_MEMBERSHIP, &unix.IPMreq{Multiaddr: group.As4(), Interface: sources[0][0].As4()})
		})
	}}
	// Package net would listen on the wildcard address instead of a group's.
	if l.join {
		return listenOnGroup(l.address, config.Control)
	}
	return config.ListenPacket(context.Background(), l.network, l.address)
}

// listenOnGroup binds a socket to the address of a multicast group, which package
// net does not do.
func listenOnGroup(address string, control func(string, string, syscall.RawConn) error) (net.PacketConn, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	file := os.NewFile(uintptr(fd), address)
	defer file.Close()
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, err
	}
	if err := control("udp4", address, raw); err != nil {
		return nil, err
	}
	a := netip.MustParseAddrPort(address)
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}); err != nil {
		return nil, os.NewSyscallError("bind", err)
	}
	return net.FilePacketConn(file)
}

// sender returns a socket to send from, on a port outside of the range.
func (l listening) sender() (net.PacketConn, error) {
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return onSocket(c, func(fd int) error {
			if !l.join {
				return nil
			}
			return unix.SetsockoptInet4Addr(fd, unix.SOL_IP, unix.IP_MULTICAST_IF, sources[0][0].As4())
		})
	}}
	// A port that no dial uses.
	for port := echo.Port + 1; ; port++ {
		conn, err := config.ListenPacket(context.Background(), l.network, fmt.Sprintf(":%d", port))
		if err == nil || port > echo.Port+100 {
			return conn, err
		}
	}
}

const (
	// listenPatience is how long a datagram may take on a busy machine.
	listenPatience = 10 * time.Second

	// listenPause is how long the sender rests between two datagrams, at most.
	listenPause = time.Millisecond
)

// run sends datagrams and expects each of them. The dials about it do not change
// what is received.
func (l listening) run(listener, sender net.PacketConn, reports *reporter, stop *atomic.Bool) {
	var number uint64
	var b [16]byte
	for !stop.Load() {
		number++
		message := binary.BigEndian.AppendUint64(nil, number)
		to := l.to[rand.IntN(len(l.to))]
		_, err := sender.WriteTo(message, net.UDPAddrFromAddrPort(to))
		if err == nil {
			err = listener.SetReadDeadline(time.Now().Add(l.patience))
		}
		n := 0
		if err == nil {
			n, _, err = listener.ReadFrom(b[:])
		}
		reports.count(func(t *Tally) { t.Sent++ })
		if err != nil || string(b[:n]) != string(message) {
			reports.fail(Failure{Promise: misdelivered, What: fmt.Sprintf("datagram %x to the listener on %s at %s: got %x, %v", message, l.address, to, b[:n], err)})
		} else {
			reports.count(func(t *Tally) { t.Received++ })
		}
		time.Sleep(time.Duration(rand.Int64N(int64(listenPause))))
	}
}
