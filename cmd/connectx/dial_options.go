package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/seed22601231/connectx"
)

// dialOptions are the flags and arguments.
type dialOptions struct {
	dialer           connectx.Dialer
	network, address string
	wait             time.Duration
	trace            bool
}

const dialHelp = `Usage: connectx dial tcp|udp [flags] host:port

Connects to a host as connectx.Dialer does, from a port that connections to other
destinations may have as well. Standard input goes to the connection, and what
comes back to standard output.

TCP: at the end of standard input the peer is told so (half-close, as nc -N does),
and what it still sends is printed. It ends when the peer closes; what is left of
standard input then is not sent.

UDP: what one read of standard input returns is sent as one datagram, 16,384 bytes
at most (as nc -u does): from a terminal, a line. There is no end of a connection,
so after the end of standard input it ends once nothing has come for as long as
-wait says, or at once with -wait 0. That nobody has the peer's port (ECONNREFUSED)
ends it as well.

The exit status is 0 if there was a connection and it ended in order, 1 if not,
2 if the flags make no sense.

Flags:
`

const dialExamples = `
Examples:
  echo hello | connectx dial tcp 192.0.2.1:7
  connectx dial udp -source 192.0.2.10 -trace 192.0.2.1:7

  # One source port, two destinations, at the same time:
  connectx dial tcp -source :40000 192.0.2.1:22
  connectx dial tcp -source :40000 192.0.2.2:22

  # From a slice of the ports of an address that several machines share:
  connectx dial tcp -source 192.0.2.10 -ports 40000-44095 198.51.100.1:443
`

// parse returns flag.ErrHelp if the help was asked for and has been written.
func (o *dialOptions) parse(args []string, help io.Writer) error {
	flags := flag.NewFlagSet("dial", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // the caller reports errors
	only4 := flags.Bool("4", false, "only connect to IPv4 addresses")
	only6 := flags.Bool("6", false, "only connect to IPv6 addresses")
	source := flags.String("source", "", "connect from `ip`, ip:port or :port (IPv6: [ip]:port)")
	ports := flags.String("ports", "", "pick the source port from `low-high` (default: the system's ephemeral port range)")
	flags.DurationVar(&o.dialer.Timeout, "timeout", 0, "how long connecting may take, as 1.5s or 2m (default: as long as the system tries)")
	flags.DurationVar(&o.wait, "wait", time.Second, "udp: how long to wait for answers after the end of standard input")
	flags.BoolVar(&o.dialer.FastOpen, "fastopen", false, "tcp: send the first data with the SYN, if the peer is known to take it (RFC 7413);\nfor protocols in which the client speaks first")
	flags.BoolVar(&o.trace, "trace", false, "tell on standard error what the dial does, with the seconds since its start")

	arguments, err := parseBetween(flags, args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(help, dialHelp)
		flags.SetOutput(help)
		flags.PrintDefaults()
		fmt.Fprint(help, dialExamples)
		return err
	case err != nil:
		return err
	case len(arguments) == 0:
		return errors.New("tcp or udp, and host:port are missing")
	case arguments[0] != "tcp" && arguments[0] != "udp":
		return fmt.Errorf("%q: must be tcp or udp", arguments[0])
	case len(arguments) == 1:
		return errors.New("host:port is missing")
	case len(arguments) > 2:
		return fmt.Errorf("unexpected argument %q", arguments[2])
	}
	o.network, o.address = arguments[0], arguments[1]
	if err := o.checkAddress(); err != nil {
		return err
	}
	if err := o.checkProtocol(flags); err != nil {
		return err
	}
	if err := o.setPorts(*ports); err != nil {
		return err
	}
	if err := o.setSource(*source); err != nil {
		return err
	}
	return o.setFamily(*only4, *only6)
}

// parseBetween parses flags that may stand before, between and after the
// arguments, which it returns.
func parseBetween(flags *flag.FlagSet, args []string) (arguments []string, err error) {
	for {
		if err := flags.Parse(args); err != nil {
			return nil, err
		}
		if flags.NArg() == 0 {
			return arguments, nil
		}
		arguments, args = append(arguments, flags.Arg(0)), flags.Args()[1:]
	}
}

// checkAddress refuses what can be seen not to be a host and a port. A port may
// have a name.
func (o *dialOptions) checkAddress() error {
	_, port, err := net.SplitHostPort(o.address)
	if err != nil {
		return err
	}
	if port == "" {
		return &net.AddrError{Err: "missing port in address", Addr: o.address}
	}
	_, err = net.LookupPort(o.network, port)
	return err
}

// checkProtocol refuses flags that the protocol has no use for, and times that
// are none.
func (o *dialOptions) checkProtocol(flags *flag.FlagSet) (err error) {
	flags.Visit(func(f *flag.Flag) {
		if f.Name == "fastopen" && o.network != "tcp" || f.Name == "wait" && o.network != "udp" {
			err = fmt.Errorf("-%s %v: not for %s", f.Name, f.Value, o.network)
		}
	})
	switch {
	case err != nil:
		return err
	case o.wait < 0:
		return fmt.Errorf("-wait %v: must not be negative", o.wait)
	case o.dialer.Timeout < 0:
		return fmt.Errorf("-timeout %v: must not be negative", o.dialer.Timeout)
	}
	return nil
}

// setPorts reads "40000-40099".
func (o *dialOptions) setPorts(ports string) error {
	if ports == "" {
		return nil
	}
	low, high, ok := strings.Cut(ports, "-")
	l, err := strconv.ParseUint(low, 10, 16)
	h, err2 := strconv.ParseUint(high, 10, 16)
	if !ok || err != nil || err2 != nil || l == 0 || l > h {
		return fmt.Errorf("-ports %s: must be two ports, the lower one first, as in 40000-40099", ports)
	}
	o.dialer.PortRange = connectx.PortRange{Low: uint16(l), High: uint16(h)}
	return nil
}

// setSource reads an address, an address and port, or ":port".
func (o *dialOptions) setSource(source string) error {
	if source == "" {
		return nil
	}
	local, ok := parseSource(source)
	if !ok {
		return fmt.Errorf("-source %s: must be an IP address, an address and port as in [::1]:4000, or a port as in :4000", source)
	}
	if r := o.dialer.PortRange; local.Port() != 0 && r != (connectx.PortRange{}) && !r.Contains(local.Port()) {
		return fmt.Errorf("-source %s: the port is not in -ports %v", source, r)
	}
	if o.network == "tcp" {
		o.dialer.LocalAddr = net.TCPAddrFromAddrPort(local)
	} else {
		o.dialer.LocalAddr = net.UDPAddrFromAddrPort(local)
	}
	return nil
}

func parseSource(source string) (local netip.AddrPort, ok bool) {
	if port, ok := strings.CutPrefix(source, ":"); ok {
		if n, err := strconv.ParseUint(port, 10, 16); err == nil {
			return netip.AddrPortFrom(netip.Addr{}, uint16(n)), n != 0
		}
	}
	host := source
	if strings.HasPrefix(host, "[") && strings.HasSuffix(host, "]") {
		host = host[1 : len(host)-1]
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		return netip.AddrPortFrom(addr, 0), true
	}
	local, err := netip.ParseAddrPort(source)
	return local, err == nil && local.Port() != 0
}

// setFamily narrows the network.
func (o *dialOptions) setFamily(only4, only6 bool) error {
	switch {
	case only4 && only6:
		return errors.New("-4 and -6: only one of them")
	case only4:
		o.network += "4"
	case only6:
		o.network += "6"
	}
	return nil
}
