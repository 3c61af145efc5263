package main

import (
	"fmt"
	"slices"
	"strings"
)

// A row is one line of the table: one quantity by another, or less another, or in
// a unit.
type row struct {
	group, name string
	of, by      quantity
	unit        float64 // where there is no by: what of is counted in
	less        bool    // the difference instead of the quotient
	limit       float64 // 0 means that there is none
	atLeast     bool    // the limit is a lower one
}

func (w row) keeps(value float64) bool {
	if w.atLeast {
		return value >= w.limit
	}
	return value <= w.limit
}

func (w row) limitText() string {
	switch {
	case w.limit == 0:
		return ""
	case w.atLeast:
		return "≥ " + number(w.limit)
	default:
		return "≤ " + number(w.limit)
	}
}

// evaluate returns the median of the runs, the smallest and the largest. runs is
// 0 if one of the benchmarks has not been run.
func (w row) evaluate(r results) (middle, low, high float64, runs int, err error) {
	of, by := r[w.of], r[w.by]
	if w.unit != 0 {
		by = slices.Repeat([]float64{w.unit}, len(of))
	}
	if len(of) == 0 || len(by) == 0 {
		return 0, 0, 0, 0, nil
	}
	if len(of) != len(by) {
		return 0, 0, 0, 0, fmt.Errorf("%d results of %v, but %d of %v", len(of), w.of, len(by), w.by)
	}
	values := make([]float64, len(of))
	for i := range values {
		if w.less {
			values[i] = of[i] - by[i]
			continue
		}
		values[i] = of[i] / by[i]
	}
	return median(values), slices.Min(values), slices.Max(values), len(values), nil
}

// rows returns the table. What can be compared, and some limits, depend on the
// results.
func rows(r results) []row {
	return slices.Concat(dialRows(), egressRows(), allocationRows(), parallelRows(r), occupancyRows(), fullRows(), techniqueRows(r))
}

const (
	perOp = "ns/op"
	p50   = "p50-ns"
	p99   = "p99-ns"
)

var (
	networks = []string{"tcp", "udp"}
	families = []string{"IPv4", "IPv6"}
	contract = []string{"destination", "source", "source+port", "port"}
)

func udpLimit(row string) float64 {
	if strings.HasPrefix(row, "source") {
		return 1.45
	}
	return 1.70 // the source address has to be found out
}

func dialRows() (table []row) {
	paths := []struct {
		name, text string
		tcp        float64
		benchmarks []string
	}{
		{"loopback", "loopback", 0.90, []string{"tcp/IPv4", "tcp/IPv6", "udp/IPv4", "udp/IPv6"}},
		{"busy", "loopback, servers at work in the same process", 0.90, []string{"tcp/IPv4"}},
		{"apart", "loopback, servers at work in another process", 0.90, []string{"tcp/IPv4"}},
		{"veth", "a veth pair", 1.02, []string{"tcp/IPv4", "udp/IPv4"}},
		{"vethbusy", "a veth pair, servers at work in the same process", 1.02, []string{"tcp/IPv4"}},
	}
	for _, path := range paths {
		var floors []row
		for _, benchmark := range path.benchmarks {
			for _, contractRow := range contract {
				name := strings.Join([]string{"DialInTurn", path.name, benchmark, contractRow}, "/")
				toNet := row{
					group: "p50 of open and close, " + path.text + " : net.Dialer",
					name:  strings.ReplaceAll(benchmark, "/", " ") + " " + contractRow,
					of:    quantity{name, "connectx-p50-ns"}, by: quantity{name, "net-p50-ns"},
					limit: path.tcp,
				}
				toFloor := toNet
				toFloor.group = "p50 of open and close, " + path.text + " : net.Dialer with the same system calls"
				toFloor.by.unit = "floor-p50-ns"
				toFloor.limit = 0
				if strings.HasPrefix(benchmark, "udp") {
					toNet.limit, toFloor.limit = udpLimit(contractRow), 1.10
				}
				table = append(table, toNet)
				floors = append(floors, toFloor)
			}
		}
		table = append(table, floors...)
	}
	for _, other := range []struct{ name, text string }{{"net", "net.Dialer"}, {"floor", "net.Dialer with the same system calls"}} {
		for _, network := range networks {
			for _, family := range families {
				for _, contractRow := range contract {
					benchmark := strings.Join([]string{"Dial", network, family, contractRow}, "/")
					table = append(table, row{
						group: "mean of open and close, loopback, each dialer by itself : " + other.text,
						name:  strings.Join([]string{network, family, contractRow}, " "),
						of:    quantity{benchmark + "/dialer=connectx", perOp}, by: quantity{benchmark + "/dialer=" + other.name, perOp},
					})
				}
			}
		}
	}
	return table
}

func egressRows() (table []row) {
	for _, network := range networks {
		for _, policy := range []struct {
			name, text string
			limit      float64
		}{
			{"source", "SourceAddrs, one address", 1.03},
			{"sources", "SourceAddrs, 256 addresses of each family", 1.03},
			{"ports", "PortRange within the system's", 1.03},
			{"outside", "PortRange outside of it", 1.03},
		} {
			table = append(table, row{
				group: "p50 of open and close, loopback : LocalAddr with the same source address",
				name:  network + " " + policy.text,
				of:    quantity{"EgressInTurn/" + network, policy.name + "-p50-ns"}, by: quantity{"EgressInTurn/" + network, "local-p50-ns"},
				limit: policy.limit,
			})
		}
	}
	return table
}

func allocationRows() (table []row) {
	for _, network := range networks {
		for _, family := range families {
			for _, contractRow := range contract {
				benchmark := strings.Join([]string{"Dial", network, family, contractRow}, "/")
				table = append(table, row{
					group: "allocations per dial, less those of net.Dialer", name: strings.Join([]string{network, family, contractRow}, " "),
					of: quantity{benchmark + "/dialer=connectx", "allocs/op"}, by: quantity{benchmark + "/dialer=net", "allocs/op"},
					less: true, limit: 6,
				})
			}
		}
	}
	return table
}

// parallelRows compares two goroutines with one. Where net.Dialer falls short of
// 1.7 itself, it sets the limit.
func parallelRows(r results) (table []row) {
	scaling := func(network, dialer string) row {
		return row{
			group: "dials per second, two goroutines : one", name: network + " " + dialer,
			of: quantity{"Parallel/" + network + "/goroutines=2/dialer=" + dialer, "dials/s"},
			by: quantity{"Parallel/" + network + "/goroutines=1/dialer=" + dialer, "dials/s"},
		}
	}
	for _, network := range networks {
		standard, ours := scaling(network, "net"), scaling(network, "connectx")
		ours.limit, ours.atLeast = 1.7, true
		if net, _, _, runs, err := standard.evaluate(r); err == nil && runs > 0 && net < 1.7 {
			ours.limit = 0.95 * net
		}
		table = append(table, standard, ours)
	}
	return table
}

func occupancyRows() (table []row) {
	const (
		itself = "one destination, by how many percent of the ports are taken : itself with fewer"
		toNet  = "one destination, by how many percent of the ports are taken : net.Dialer"
	)
	at := func(network, fill, dialer string, percent int, unit string) quantity {
		if fill == "own" {
			return quantity{fmt.Sprintf("Occupancy/%s/fill=own/dialer=%s/percent=%d", network, dialer, percent), unit}
		}
		return quantity{fmt.Sprintf("Occupancy/%s/fill=other/percent=%d/dialer=%s", network, percent, dialer), unit}
	}
	fills := []struct{ name, text string }{{"own", "by itself"}, {"other", "by others at random"}}
	for _, network := range networks {
		for _, fill := range fills {
			limit := 0.0
			if network == "tcp" {
				limit = 1.5
			}
			table = append(table, row{
				group: itself, name: network + " p50, 95 : 5, taken " + fill.text, limit: limit,
				of: at(network, fill.name, "connectx", 95, p50), by: at(network, fill.name, "connectx", 5, p50),
			})
		}
	}
	for _, network := range networks {
		for _, fill := range fills {
			for _, percent := range []int{0, 5, 50, 75, 90, 95, 99} {
				for _, unit := range []string{p50, p99} {
					limit := 0.0
					switch {
					case network == "tcp" && percent == 95 && unit == p50:
						limit = 1.0 / 15
					case network == "tcp" && percent == 99 && unit == p99:
						limit = 1.0 / 5
					}
					table = append(table, row{
						group: toNet, name: fmt.Sprintf("%s %s, %d, taken %s", network, unit[:3], percent, fill.text), limit: limit,
						of: at(network, fill.name, "connectx", percent, unit), by: at(network, fill.name, "net", percent, unit),
					})
				}
			}
		}
	}
	return table
}

// defaultPorts is how many ports the range has that Linux starts with.
const defaultPorts = 28232

func fullRows() (table []row) {
	for _, network := range networks {
		limit := 0.0
		if network == "udp" {
			limit = 1.5
		}
		benchmark := "Fill/" + network + "/dialer=connectx"
		table = append(table, row{
			group: "filling one destination", name: network + " p50, last percent : first percent", limit: limit,
			of: quantity{benchmark, "last-p50-ns"}, by: quantity{benchmark, "first-p50-ns"},
		})
	}
	for _, level := range []struct {
		percent int
		limit   float64
	}{{95, 3}, {99, 12}} {
		table = append(table, row{
			group: "udp while others keep taking and freeing ports",
			name:  fmt.Sprintf("p50, %d percent taken : empty", level.percent), limit: level.limit,
			of: quantity{fmt.Sprintf("Churn/udp/percent=%d/dialer=connectx", level.percent), p50},
			by: quantity{"Churn/udp/percent=0/dialer=connectx", p50},
		})
	}
	for _, network := range networks {
		group := fmt.Sprintf("a full destination of %d ports, %s", defaultPorts, network)
		benchmark := "Exhausted/" + network + "/dialer=connectx"
		table = append(table,
			row{
				group: group, name: "first answer : a lookup for each port", limit: 1,
				of: quantity{benchmark, "first-ns"}, by: quantity{benchmark, "lookups-ns"},
			},
			row{
				group: group, name: "p50 of the following answers : an uncontended dial", limit: 5,
				of: quantity{benchmark, p50}, by: quantity{benchmark, "uncontended-p50-ns"},
			},
			row{
				group: group, name: "milliseconds until a freed port is found, at most", limit: 100,
				of: quantity{benchmark, "found-max-ns"}, unit: 1e6,
			},
		)
	}
	return table
}

// techniqueRows compares all techniques that there are results of.
func techniqueRows(r results) (table []row) {
	for _, network := range networks {
		prefix := "Techniques/" + network + "/technique="
		for q := range r {
			technique, ok := strings.CutPrefix(q.name, prefix)
			if !ok || q.unit != perOp || technique == "net.Dialer" {
				continue
			}
			table = append(table, row{
				group: "open and close, other techniques : net.Dialer", name: network + " " + technique,
				of: q, by: quantity{prefix + "net.Dialer", perOp},
			})
		}
	}
	slices.SortFunc(table, func(a, b row) int { return strings.Compare(a.name, b.name) })
	return table
}
