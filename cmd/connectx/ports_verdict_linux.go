package main

import (
	"errors"
	"net/netip"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/inuse"
)

// A portsVerdict says whether one way of connecting works.
type portsVerdict struct {
	Way      string       `json:"way"` // "connect" or "bind-before-connect"
	Works    bool         `json:"works"`
	Errno    string       `json:"errno,omitempty"` // as "EAGAIN"
	Error    string       `json:"error,omitempty"` // as programs print it
	FailsFor []portsParty `json:"fails_for,omitempty"`
	Advice   string       `json:"advice,omitempty"`
}

// A portsParty is whom something fails for. What is left out is any.
type portsParty struct {
	Source      netip.Addr     `json:"source,omitzero"`
	Destination netip.AddrPort `json:"destination,omitzero"`
}

const (
	wayConnect = "connect"
	wayBind    = "bind-before-connect"
)

// What helps against each cause.
const (
	adviceTimeWait = "closed connections stay in TIME_WAIT for a minute: keep connections open, or set net.ipv4.tcp_tw_reuse=1"
	adviceFull     = "every port has a connection to it already: use more source addresses (connectx.Dialer.SourceAddrs)"
	adviceHeldTCP  = "sockets bound before connect hold ports for all destinations: with IP_BIND_ADDRESS_NO_PORT or connectx.Dialer they would share them"
	adviceHeldUDP  = "plain UDP sockets hold their ports for all destinations: with connectx.Dialer they would share them"
	adviceIPv4     = "IPv4 sockets have the ports, and without IPV6_V6ONLY a socket needs one that is free in both families"
	adviceBindTCP  = "bind shares no ports between destinations: use IP_BIND_ADDRESS_NO_PORT or connectx.Dialer"
	adviceBindUDP  = "bind shares no ports between destinations: use connectx.Dialer"
)

func failing(way string, errno unix.Errno, parties []portsParty, advice string) portsVerdict {
	return portsVerdict{Way: way, Errno: unix.ErrnoName(errno), Error: errno.Error(), FailsFor: parties, Advice: advice}
}

func (g *portsGatherer) verdicts(flows []inuse.Flow) ([]portsVerdict, error) {
	var connect portsVerdict
	var err error
	if g.protocol == "tcp" {
		connect, err = g.connectTCP(flows)
	} else {
		connect, err = g.connectUDP()
	}
	return []portsVerdict{connect, g.bindBeforeConnect(flows)}, err
}

// connectUDP binds to any address and any port, as connect does for a socket that
// has none.
func (g *portsGatherer) connectUDP() (portsVerdict, error) {
	any := unspecified(g.is4)
	err := inuse.BindAnyPort("udp", any, false)
	if err == nil {
		return portsVerdict{Way: wayConnect, Works: true}, nil
	}
	if !errors.Is(err, unix.EADDRINUSE) {
		return portsVerdict{}, err
	}
	advice := adviceHeldUDP
	if !g.is4 && inuse.BindAnyPort("udp", any, true) == nil {
		advice = adviceIPv4
	}
	return failing(wayConnect, unix.EAGAIN, nil, advice), nil
}

// connectTCP goes by the counts, since a connect that works would send a SYN.
func (g *portsGatherer) connectTCP(flows []inuse.Flow) (portsVerdict, error) {
	var anywhere inuse.Flow
	var err error
	anywhere.Source = unspecified(g.is4)
	if anywhere.Counts, err = g.snapshot.Count(anywhere.Source, anywhere.Destination); err != nil {
		return portsVerdict{}, err
	}
	n, err := g.snapshot.Connectable(anywhere, false)
	if err != nil {
		return portsVerdict{}, err
	}
	if n == 0 {
		return failing(wayConnect, unix.EADDRNOTAVAIL, nil, adviceHeldTCP), nil
	}

	reuse := timeWaitReuse()
	var parties []portsParty
	var sum inuse.Counts
	for _, f := range flows {
		n, err := g.snapshot.Connectable(f, reuse(f))
		if err != nil {
			return portsVerdict{}, err
		}
		if n == 0 {
			parties = append(parties, portsParty{f.Source, f.Destination})
			sum.InUse += f.InUse
			sum.TimeWait += f.TimeWait
			sum.Held += f.Held
		}
	}
	advice := adviceFull
	switch largest := max(sum.InUse, sum.TimeWait, sum.Held); {
	case len(parties) == 0:
		return portsVerdict{Way: wayConnect, Works: true}, nil
	case largest == sum.TimeWait:
		advice = adviceTimeWait
	case largest == sum.Held:
		advice = adviceHeldTCP
	}
	return failing(wayConnect, unix.EADDRNOTAVAIL, parties, advice), nil
}

// timeWaitReuse returns whether connect may take over a 4-tuple in TIME_WAIT, as
// net.ipv4.tcp_tw_reuse has it (tcp_twsk_unique): not at all, always, or on the
// loopback interface. It does so after a second.
func timeWaitReuse() func(inuse.Flow) bool {
	text, err := os.ReadFile("/proc/sys/net/ipv4/tcp_tw_reuse")
	setting := strings.TrimSpace(string(text))
	return func(f inuse.Flow) bool {
		switch {
		case err != nil || setting == "0":
			return false
		case setting == "1":
			return true
		default:
			return f.Source.IsLoopback() || f.Destination.Addr().IsLoopback()
		}
	}
}

// maxSources bounds the source addresses that are tried: in a full range of the
// default size a try takes some milliseconds.
const maxSources = 32

// bindBeforeConnect binds to port 0 of the source addresses that are in use, those
// with the most sockets first. While there are none, the loopback address stands
// for all.
func (g *portsGatherer) bindBeforeConnect(flows []inuse.Flow) portsVerdict {
	errno, advice := unix.EADDRINUSE, adviceBindUDP
	if g.protocol == "tcp" {
		advice = adviceBindTCP
	}
	sources := g.snapshot.Sources(g.is4)
	if g.o.host != "" {
		sources = sourcesOf(flows)
	}
	if len(sources) == 0 && errors.Is(inuse.BindAnyPort(g.protocol, loopback(g.is4), true), errno) {
		return failing(wayBind, errno, nil, advice)
	}
	var parties []portsParty
	for _, source := range sources[:min(len(sources), maxSources)] {
		if errors.Is(inuse.BindAnyPort(g.protocol, source, true), errno) {
			parties = append(parties, portsParty{Source: source})
		}
	}
	if len(parties) > 0 {
		return failing(wayBind, errno, parties, advice)
	}
	return portsVerdict{Way: wayBind, Works: true}
}

func sourcesOf(flows []inuse.Flow) []netip.Addr {
	var sources []netip.Addr
	seen := make(map[netip.Addr]bool)
	for _, f := range flows {
		if !seen[f.Source] {
			seen[f.Source] = true
			sources = append(sources, f.Source)
		}
	}
	return sources
}

func loopback(is4 bool) netip.Addr {
	if is4 {
		return netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	return netip.IPv6Loopback()
}

func unspecified(is4 bool) netip.Addr {
	if is4 {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}
