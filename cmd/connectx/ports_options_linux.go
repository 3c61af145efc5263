package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// portsOptions are the flags and arguments.
type portsOptions struct {
	only4, only6 bool
	json, watch  bool
	interval     time.Duration
	rows         int
	protocol     string // or empty for both
	host         string // or empty for all destinations
	port         uint16 // or 0 for all
}

const portsHelp = `Usage: connectx ports [flags] [tcp|udp] [destination]

Shows who uses the ephemeral ports of this network namespace, towards which
destinations they run out, and which ways of connecting still work, for when
programs fail with "cannot assign requested address" (EADDRNOTAVAIL), "address
already in use" (EADDRINUSE) or "resource temporarily unavailable" (EAGAIN). It
sends nothing to other hosts and needs no privileges.

For each source address and destination, the ports of the range are
  in use          with a connection to this destination
  TIME_WAIT       with one that was closed here less than a minute ago
  held by others  not with one of these, but with a socket that does not share
  free            the rest; a socket that shares its port can still have them

The ways of connecting are
  connect              without a bind before it, as most programs do
  bind-before-connect  to a source address and port 0, without
                       IP_BIND_ADDRESS_NO_PORT
They are tried, except connect for TCP, which follows from the counts.

A destination is an address, a host name, or either with a port.

Flags:
`

const portsExamples = `
JSON: an object with time, range (low, high, ports, reserved) and sections, one for
each protocol and family: protocol, family, in_use and held (ports), flows_total and
flows_full (how many), flows (source, destination, in_use, time_wait, held, free) and
verdicts (way, works, and if it does not: errno, error, fails_for with source and
destination, each left out where it is any, and advice). With -watch it is one object
a line.

Examples:
  connectx ports
  connectx ports udp
  connectx ports -watch tcp 192.0.2.1:443
  connectx ports -json -n 0 | jq '.sections[].verdicts[] | select(.works | not)'
`

// parse returns flag.ErrHelp if the help was asked for and has been written.
func (o *portsOptions) parse(args []string, help io.Writer) error {
	flags := flag.NewFlagSet("ports", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // the caller reports errors
	flags.BoolVar(&o.only4, "4", false, "only IPv4")
	flags.BoolVar(&o.only6, "6", false, "only IPv6")
	flags.BoolVar(&o.json, "json", false, "write JSON")
	flags.BoolVar(&o.watch, "watch", false, "repeat until interrupted")
	flags.DurationVar(&o.interval, "interval", 2*time.Second, "time between two reports of -watch")
	flags.IntVar(&o.rows, "n", 10, "rows of each table, 0 for all")
	var arguments []string
	for len(args) > 0 {
		if err := flags.Parse(args); err != nil {
			if errors.Is(err, flag.ErrHelp) {
				fmt.Fprint(help, portsHelp)
				flags.SetOutput(help)
				flags.PrintDefaults()
				fmt.Fprint(help, portsExamples)
			}
			return err
		}
		// Flags may follow the arguments.
		if args = flags.Args(); len(args) > 0 {
			arguments, args = append(arguments, args[0]), args[1:]
		}
	}
	switch {
	case o.only4 && o.only6:
		return errors.New("-4 and -6: only one of them can be given")
	case o.rows < 0:
		return fmt.Errorf("-n %d: must be 0 or more", o.rows)
	case o.interval <= 0:
		return fmt.Errorf("-interval %v: must be more than 0", o.interval)
	}
	return o.parseArguments(arguments)
}

func (o *portsOptions) parseArguments(arguments []string) error {
	if len(arguments) > 0 && (arguments[0] == "tcp" || arguments[0] == "udp") {
		o.protocol, arguments = arguments[0], arguments[1:]
	}
	switch len(arguments) {
	case 0:
		return nil
	case 1:
		return o.parseDestination(arguments[0])
	default:
		return fmt.Errorf("unexpected argument %q", arguments[1])
	}
}

// parseDestination reads "192.0.2.1", "192.0.2.1:53", "2001:db8::1",
// "[2001:db8::1]:53", "[2001:db8::1]", "example.com" or "example.com:53".
func (o *portsOptions) parseDestination(s string) error {
	o.host = strings.TrimSuffix(strings.TrimPrefix(s, "["), "]")
	if _, err := netip.ParseAddr(o.host); err == nil {
		return nil
	}
	if o.host = s; strings.Contains(s, ":") {
		host, port, err := net.SplitHostPort(s)
		if err != nil {
			return fmt.Errorf("destination %q: %w", s, err)
		}
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return fmt.Errorf("destination %q: the port must be a number, 1 to 65535", s)
		}
		o.host, o.port = host, uint16(n)
	}
	if o.host == "" {
		return fmt.Errorf("destination %q: there is no host", s)
	}
	return nil
}

// lookUp returns the addresses of the destination, nil if there is none.
func (o *portsOptions) lookUp(ctx context.Context) ([]netip.Addr, error) {
	if o.host == "" {
		return nil, nil
	}
	network := "ip"
	switch {
	case o.only4:
		network = "ip4"
	case o.only6:
		network = "ip6"
	}
	const timeout = 10 * time.Second
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, network, o.host)
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	return addrs, err
}
