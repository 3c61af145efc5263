package quicdial

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/seed22601231/connectx"
)

// A Dialer makes QUIC connections, each on a connected UDP socket of its own from
// the embedded [connectx.Dialer].
//
// The zero value is ready to use. A Dialer may be copied and is safe for
// concurrent use.
//
// The fields of the connectx.Dialer keep their meaning; Timeout and Deadline hold
// for the whole dial, from the name lookup to the end of the handshake. FallbackDelay
// and the fields for TCP have none here.
type Dialer struct {
	connectx.Dialer

	// Stats counts errors on all connections of the Dialer. If nil, they are
	// not counted.
	Stats *Stats
}

var errNoTLSConfig = errors.New("quicdial: tls.Config not set")

// Dial makes a QUIC connection to addr, "host:port" as for [net.Dial]. It can be
// the Dial of quic-go's http3.Transport.
//
// Dial owns the socket and the [quic.Transport] and closes them when the context
// of the returned connection is done, which is after the last packet was sent; if
// the dial fails, before it returns. The ctx is for the dial alone.
//
// The addresses of a host are tried one after another, in the order of the name
// lookup, until one answers. What it answers counts, be it a refused TLS handshake.
// Of a deadline each address gets an equal share of what is left, but 2 seconds if
// there are as many. If none answers, the error is that of the first.
//
// An address where nobody listens fails with ECONNREFUSED in a [*net.OpError] as
// soon as the ICMP message is here; see the package documentation. All other
// errors are those of connectx ([connectx.ErrPortsExhausted]) and quic-go
// (*[quic.IdleTimeoutError] where nobody answers, [context.Canceled]). A nil tlsConf is an error.
// If its ServerName is empty, it is the host of addr.
//
// Dial uses 0-RTT as [quic.Transport.DialEarly] does: with a ClientSessionCache in
// tlsConf that has a session with 0-RTT for the server, it returns before the
// server has answered. An address that refuses then ends the connection, as a rule,
// and no other is tried. An attacker can replay what is sent before
// [quic.Conn.HandshakeComplete]; without a ClientSessionCache nothing is.
func (d *Dialer) Dial(ctx context.Context, addr string, tlsConf *tls.Config, conf *quic.Config) (*quic.Conn, error) {
	if tlsConf == nil {
		return nil, errNoTLSConfig
	}
	if deadline := d.deadline(time.Now()); !deadline.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, deadline)
		defer cancel()
	}
	name, addrs, err := d.resolve(ctx, addr)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: "udp", Source: d.LocalAddr, Err: err}
	}
	if name != "" && tlsConf.ServerName == "" {
		tlsConf = tlsConf.Clone()
		tlsConf.ServerName = name
	}
	var firstErr error
	for i, addr := range addrs {
		conn, answered, err := d.dialShare(ctx, len(addrs)-i, addr, tlsConf, conf)
		if err == nil {
			return conn, nil
		}
		if answered || ctx.Err() != nil {
			return nil, err
		}
		if firstErr == nil {
			firstErr = err
		}
	}
	return nil, firstErr
}

// deadline is the earlier one of Deadline and the end of Timeout; zero if there is
// neither.
func (d *Dialer) deadline(now time.Time) time.Time {
	deadline := d.Deadline
	if d.Timeout != 0 {
		if end := now.Add(d.Timeout); deadline.IsZero() || end.Before(deadline) {
			deadline = end
		}
	}
	return deadline
}

// resolve returns the addresses to try, never none, and the host if it is a name.
// What it cannot make sense of it leaves to the connectx.Dialer.
func (d *Dialer) resolve(ctx context.Context, addr string) (name string, addrs []string, err error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil || host == "" {
		return "", []string{addr}, nil
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return "", []string{addr}, nil
	}
	resolver := d.Resolver
	if resolver == nil {
		resolver = net.DefaultResolver
	}
	ips, err := resolver.LookupNetIP(ctx, d.family(), host)
	if err != nil {
		return "", nil, err
	}
	for _, ip := range ips {
		addrs = append(addrs, net.JoinHostPort(ip.Unmap().String(), port))
	}
	return host, addrs, nil
}

// family is the address family that the source addresses leave, as a network of
// [net.Resolver.LookupNetIP].
func (d *Dialer) family() string {
	sources := d.SourceAddrs
	if local, ok := d.LocalAddr.(*net.UDPAddr); ok && local != nil {
		sources = []netip.Addr{local.AddrPort().Addr()}
	}
	family := ""
	for _, source := range sources {
		only := "ip6"
		if source.Unmap().Is4() {
			only = "ip4"
		}
		if !source.IsValid() || source.IsUnspecified() || family != "" && family != only {
			return "ip"
		}
		family = only
	}
	return cmp.Or(family, "ip")
}

// dialShare dials the first of n addresses in its share of the time. Like
// net.Dialer it does not let a share get so short that no address has a chance.
func (d *Dialer) dialShare(ctx context.Context, n int, addr string, tlsConf *tls.Config, conf *quic.Config) (conn *quic.Conn, answered bool, err error) {
	if deadline, ok := ctx.Deadline(); ok && n > 1 {
		share := max(time.Until(deadline)/time.Duration(n), 2*time.Second)
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, share)
		defer cancel()
	}
	return d.dialAddr(ctx, addr, tlsConf, conf)
}

// dialAddr dials one address and reports whether it has answered.
func (d *Dialer) dialAddr(ctx context.Context, addr string, tlsConf *tls.Config, conf *quic.Config) (conn *quic.Conn, answered bool, err error) {
	pc, err := d.DialPacket(ctx, "udp", addr)
	if err != nil {
		return nil, false, err
	}
	s := newSocket(pc, d.Stats)
	// Not quic.DialEarly, whose connection IDs are empty: with those, quic-go
	// takes every datagram for one of the connection and does not recognize a
	// stateless reset.
	transport := &quic.Transport{Conn: s}
	release := func() {
		transport.Close()
		s.Close()
	}
	conn, err = transport.DialEarly(ctx, pc.RemoteAddr(), tlsConf, conf)
	if err != nil {
		release()
		return nil, s.answered.Load(), d.dialError(err, pc.RemoteAddr())
	}
	context.AfterFunc(conn.Context(), release)
	return conn, true, nil
}

// dialError takes an error that the network has reported out of what quic-go says
// of it, which depends on whether a read or a write came across it, and includes
// net.ErrClosed.
func (d *Dialer) dialError(err error, peer net.Addr) error {
	if call, ok := errors.AsType[*os.SyscallError](err); ok && isUnreachable(call) {
		return &net.OpError{Op: "dial", Net: "udp", Source: d.LocalAddr, Addr: peer, Err: call}
	}
	return err
}
