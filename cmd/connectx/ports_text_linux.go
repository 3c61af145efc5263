package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/seed22601231/connectx/portpick"
)

// writePorts writes the report for people.
func writePorts(w io.Writer, r *portsReport) {
	reserved := "none"
	if r.Range.Reserved > 0 {
		reserved = fmt.Sprint(r.Range.Reserved)
	}
	fmt.Fprintf(w, "Ephemeral port range %d-%d: %d ports, and %s reserved\n", r.Range.Low, r.Range.High, r.Range.Ports, reserved)
	failed := false
	for _, s := range r.Sections {
		fmt.Fprintln(w)
		writeSection(w, &s, r.Range.Ports)
		failed = failed || !s.works()
	}
	if failed {
		writeHints(w, &r.Range)
	}
}

// works reports whether all ways of connecting work.
func (s *portsSection) works() bool {
	return !slices.ContainsFunc(s.Verdicts, func(v portsVerdict) bool { return !v.Works })
}

// writeHints says what may help in all cases.
func writeHints(w io.Writer, r *portsRange) {
	fmt.Fprintf(w, "\nWhich programs have them: ss -tunap 'sport >= :%d and sport <= :%d'\n", r.Low, r.High)
	if most := portpick.DefaultHigh - portpick.DefaultLow + 1; r.Ports < most {
		fmt.Fprintf(w, "The range is narrower than usual: sysctl -w net.ipv4.ip_local_port_range='%d %d' makes it %d ports.\n",
			portpick.DefaultLow, portpick.DefaultHigh, most)
	}
}

func writeSection(w io.Writer, s *portsSection, ports int) {
	fmt.Fprintf(w, "%s/%s: %d of %d ports in use, %d held by sockets that do not share",
		strings.ToUpper(s.Protocol), s.Family, s.InUse, ports, s.Held)
	if len(s.Flows) == 0 && s.works() {
		fmt.Fprintln(w, "; all works")
		return
	}
	fmt.Fprintln(w)
	writeFlows(w, s, ports)
	for _, v := range s.Verdicts {
		writeVerdict(w, &v)
	}
}

func writeFlows(w io.Writer, s *portsSection, ports int) {
	if len(s.Flows) == 0 {
		return
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	timeWait := ""
	if s.Protocol == "tcp" {
		timeWait = "TIME_WAIT\t"
	}
	fmt.Fprintf(tw, "  source\tdestination\tin use\t%sheld by others\tfree\ttaken\n", timeWait)
	for _, f := range s.Flows {
		if s.Protocol == "tcp" {
			timeWait = fmt.Sprintf("%d\t", f.TimeWait)
		}
		fmt.Fprintf(tw, "  %v\t%v\t%d/%d\t%s%d\t%d\t%s\n", f.Source, f.Destination, f.InUse, ports, timeWait, f.Held, f.Free, bar(ports-f.Free, ports))
	}
	tw.Flush()
	if more := s.FlowsTotal - len(s.Flows); more > 0 {
		fmt.Fprintf(w, "  and %d more (-n 0 shows all)\n", more)
	}
	switch first := s.Flows[0]; {
	case s.FlowsFull > 1:
		fmt.Fprintf(w, "  Run out: %v to %v, and %d more\n", first.Source, first.Destination, s.FlowsFull-1)
	case s.FlowsFull == 1:
		fmt.Fprintf(w, "  Run out: %v to %v\n", first.Source, first.Destination)
	default:
		fmt.Fprintf(w, "  Runs out first: %v to %v, after %d more\n", first.Source, first.Destination, first.Free)
	}
}

// bar shows a part of a whole.
func bar(part, whole int) string {
	const width = 20
	if whole == 0 {
		return ""
	}
	n := part * width / whole
	return fmt.Sprintf("[%s%s] %3d %%", strings.Repeat("#", n), strings.Repeat(".", width-n), part*100/whole)
}

func writeVerdict(w io.Writer, v *portsVerdict) {
	if v.Works {
		fmt.Fprintf(w, "  %-19s works\n", v.Way)
		return
	}
	fmt.Fprintf(w, "  %-19s FAILS %s: %s (%s)\n", v.Way, parties(v), v.Error, v.Errno)
	fmt.Fprintf(w, "  %-19s %s\n", "", v.Advice)
}

// parties says whom something fails for.
func parties(v *portsVerdict) string {
	const shown = 3
	switch {
	case len(v.FailsFor) == 0 && v.Way == wayBind:
		return "from every source address"
	case len(v.FailsFor) == 0:
		return "to every destination"
	}
	var words []string
	for _, p := range v.FailsFor[:min(len(v.FailsFor), shown)] {
		word := fmt.Sprintf("from %v", p.Source)
		if p.Destination.IsValid() {
			word += fmt.Sprintf(" to %v", p.Destination)
		}
		words = append(words, word)
	}
	if more := len(v.FailsFor) - shown; more > 0 {
		words = append(words, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(words, ", ")
}
