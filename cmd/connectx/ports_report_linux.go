package main

import (
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/inuse"
	"github.com/seed22601231/connectx/portpick"
)

// A portsReport is what there is to know at one time. Its JSON is described in
// the help.
type portsReport struct {
	Time     time.Time      `json:"time"`
	Range    portsRange     `json:"range"`
	Sections []portsSection `json:"sections"`
}

// A portsRange is the ephemeral port range.
type portsRange struct {
	Low      uint16 `json:"low"`
	High     uint16 `json:"high"`
	Ports    int    `json:"ports"` // without the reserved
	Reserved int    `json:"reserved"`
}

// A portsSection is about one protocol and family.
type portsSection struct {
	Protocol   string         `json:"protocol"` // "tcp" or "udp"
	Family     string         `json:"family"`   // "IPv4" or "IPv6"
	InUse      int            `json:"in_use"`   // ports with a socket of the family
	Held       int            `json:"held"`     // ports with one that does not share
	FlowsTotal int            `json:"flows_total"`
	FlowsFull  int            `json:"flows_full"` // of those, without a free port
	Flows      []portsFlow    `json:"flows"`      // the fullest of them
	Verdicts   []portsVerdict `json:"verdicts"`
}

// A portsFlow is a source address and a destination, see [inuse.Counts].
type portsFlow struct {
	Source      netip.Addr     `json:"source"`
	Destination netip.AddrPort `json:"destination"`
	InUse       int            `json:"in_use"`
	TimeWait    int            `json:"time_wait"`
	Held        int            `json:"held"`
	Free        int            `json:"free"`
}

// gatherPorts looks at the network namespace of this process. towards are the
// addresses of the destination that was asked for, nil for all.
func gatherPorts(o portsOptions, towards []netip.Addr) (*portsReport, error) {
	sysctl, err := portpick.OpenSysctl()
	if err != nil {
		return nil, err
	}
	defer sysctl.Close()
	ports, err := sysctl.Ports(nil)
	if err != nil {
		return nil, err
	}
	r := &portsReport{
		Time:  time.Now(),
		Range: portsRange{ports.Low(), ports.High(), ports.Len(), ports.Reserved()},
	}
	for _, protocol := range []string{"tcp", "udp"} {
		if o.protocol != "" && o.protocol != protocol {
			continue
		}
		snapshot, err := inuse.Take(protocol, ports)
		if err != nil {
			return nil, err
		}
		for _, is4 := range []bool{true, false} {
			if !o.wants(is4, towards) {
				continue
			}
			g := portsGatherer{o: o, towards: towards, protocol: protocol, is4: is4, snapshot: snapshot}
			section, err := g.section()
			if err != nil {
				return nil, err
			}
			if section != nil {
				r.Sections = append(r.Sections, *section)
			}
		}
	}
	return r, nil
}

// wants reports whether a family is asked for.
func (o *portsOptions) wants(is4 bool, towards []netip.Addr) bool {
	if is4 && o.only6 || !is4 && o.only4 {
		return false
	}
	return o.host == "" || slices.ContainsFunc(towards, func(a netip.Addr) bool { return a.Is4() == is4 })
}

// A portsGatherer gathers one section.
type portsGatherer struct {
	o        portsOptions
	towards  []netip.Addr
	protocol string
	is4      bool
	snapshot *inuse.Snapshot
}

// section returns nil if this host does not have the family.
func (g *portsGatherer) section() (*portsSection, error) {
	s := &portsSection{Protocol: g.protocol, Family: "IPv6"}
	if g.is4 {
		s.Family = "IPv4"
	}
	var err error
	s.InUse, s.Held, err = g.snapshot.Used(g.is4)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	flows, err := g.flows()
	if err != nil {
		return nil, err
	}
	s.FlowsTotal = len(flows)
	for _, f := range flows {
		if f.Free == 0 {
			s.FlowsFull++
		}
	}
	shown := flows
	if g.o.rows > 0 {
		shown = flows[:min(len(flows), g.o.rows)]
	}
	s.Flows = make([]portsFlow, len(shown))
	for i, f := range shown {
		s.Flows[i] = portsFlow{f.Source, f.Destination, f.InUse, f.TimeWait, f.Held, f.Free}
	}
	s.Verdicts, err = g.verdicts(flows)
	return s, err
}

// flows returns those that are asked for: of a destination with a port, also the
// one that does not exist yet.
func (g *portsGatherer) flows() ([]inuse.Flow, error) {
	all, err := g.snapshot.Flows(g.is4)
	if err != nil || g.o.host == "" {
		return all, err
	}
	flows := slices.DeleteFunc(all, func(f inuse.Flow) bool {
		return !slices.Contains(g.towards, f.Destination.Addr()) || g.o.port != 0 && g.o.port != f.Destination.Port()
	})
	if len(flows) > 0 || g.o.port == 0 {
		return flows, nil
	}
	for _, a := range g.towards {
		if a.Is4() != g.is4 {
			continue
		}
		routes, err := netlink.RouteGet(a.AsSlice())
		if err != nil || len(routes) == 0 {
			continue // there is no way to it
		}
		source, ok := netip.AddrFromSlice(routes[0].Src)
		if !ok {
			continue
		}
		f := inuse.Flow{Source: source.Unmap(), Destination: netip.AddrPortFrom(a, g.o.port)}
		if f.Counts, err = g.snapshot.Count(f.Source, f.Destination); err != nil {
			return nil, err
		}
		flows = append(flows, f)
	}
	return flows, nil
}
