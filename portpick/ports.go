package portpick

import (
	"fmt"
	"math/bits"
	"strconv"
	"strings"
)

// The range that Linux starts with, for where the system's cannot be read.
const (
	DefaultLow  = 32768
	DefaultHigh = 60999
)

// Ports is an inclusive range of ports with the reserved ones left out. It
// does not change once made and is safe for concurrent use.
type Ports struct {
	low, high uint16
	count     int
	reserved  *portSet // nil if none is reserved; may have ports outside of the range
}

// A portSet has one bit for each port.
type portSet [1 << 16 / 64]uint64

func (s *portSet) add(port uint16)           { s[port/64] |= 1 << (port % 64) }
func (s *portSet) contains(port uint16) bool { return s[port/64]&(1<<(port%64)) != 0 }

// count returns how many ports from low to high are in the set.
func (s *portSet) count(low, high uint16) int {
	n := 0
	for i := low / 64; i <= high/64; i++ {
		word := s[i]
		if i == low/64 {
			word &= ^uint64(0) << (low % 64)
		}
		if i == high/64 {
			word &= ^uint64(0) >> (63 - high%64)
		}
		n += bits.OnesCount64(word)
	}
	return n
}

// NewPorts returns the ports from low to high, both included. Ports for which
// reserved returns true are left out; reserved may be nil.
//
// It is an error if low is 0 or above high.
func NewPorts(low, high uint16, reserved func(port uint16) bool) (*Ports, error) {
	var set *portSet
	if reserved != nil {
		set = new(portSet)
		for port := range 1 << 16 {
			if reserved(uint16(port)) {
				set.add(uint16(port))
			}
		}
	}
	return portsWithout(low, high, set)
}

func portsWithout(low, high uint16, reserved *portSet) (*Ports, error) {
	if low == 0 || low > high {
		return nil, fmt.Errorf("port range %d-%d: low must be at least 1 and at most high", low, high)
	}
	p := &Ports{low: low, high: high, count: int(high) - int(low) + 1, reserved: reserved}
	if reserved != nil {
		p.count -= reserved.count(low, high)
	}
	return p, nil
}

// Within returns the ports from low to high, with the same ones reserved as in
// p. They need not be part of p's range. The errors are those of [NewPorts].
func (p *Ports) Within(low, high uint16) (*Ports, error) {
	return portsWithout(low, high, p.reserved)
}

// Low is the first port of the range.
func (p *Ports) Low() uint16 { return p.low }

// High is the last port of the range.
func (p *Ports) High() uint16 { return p.high }

// Len is the number of ports that can be offered: the size of the range
// without the reserved ports.
func (p *Ports) Len() int { return p.count }

// Reserved is the number of ports of the range that are left out.
func (p *Ports) Reserved() int { return int(p.high) - int(p.low) + 1 - p.count }

// Contains reports whether port is in the range and not reserved.
func (p *Ports) Contains(port uint16) bool {
	return p.low <= port && port <= p.high && !p.isReserved(port)
}

func (p *Ports) isReserved(port uint16) bool {
	return p.reserved != nil && p.reserved.contains(port)
}

// equal reports whether p and q hold the same ports, and have the same reserved.
func (p *Ports) equal(q *Ports) bool {
	if p.low != q.low || p.high != q.high || p.count != q.count {
		return false
	}
	return p.reserved == q.reserved || p.reserved != nil && q.reserved != nil && *p.reserved == *q.reserved
}

// String is the range as text, with the number of reserved ports where there
// are any: "32768-60999", "32768-60999 without 12 reserved".
func (p *Ports) String() string {
	s := fmt.Sprintf("%d-%d", p.low, p.high)
	if n := p.Reserved(); n > 0 {
		s += fmt.Sprintf(" without %d reserved", n)
	}
	return s
}

// half is the number of ports with an even offset (parity 0) or an odd offset
// (parity 1), reserved ones included.
func (p *Ports) half(parity uint32) uint32 {
	return (uint32(p.high) - uint32(p.low) + 2 - parity) / 2
}

// ParsePorts reads the text of /proc/sys/net/ipv4/ip_local_port_range ("32768
// 60999") and of /proc/sys/net/ipv4/ip_local_reserved_ports ("8080,9148-9150",
// or nothing), as the kernel writes them.
func ParsePorts(portRange, reservedPorts string) (*Ports, error) {
	fields := strings.Fields(portRange)
	if len(fields) != 2 {
		return nil, fmt.Errorf("ip_local_port_range %q: want two ports", portRange)
	}
	low, err := parsePort(fields[0])
	if err != nil {
		return nil, fmt.Errorf("ip_local_port_range %q: %w", portRange, err)
	}
	high, err := parsePort(fields[1])
	if err != nil {
		return nil, fmt.Errorf("ip_local_port_range %q: %w", portRange, err)
	}
	reserved, err := parseReserved(reservedPorts)
	if err != nil {
		return nil, fmt.Errorf("ip_local_reserved_ports %q: %w", reservedPorts, err)
	}
	return portsWithout(low, high, reserved)
}

func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	return uint16(n), err
}

func parseReserved(s string) (*portSet, error) {
	s = strings.TrimSpace(s)
	if s == "" {
		return nil, nil
	}
	set := new(portSet)
	for item := range strings.SplitSeq(s, ",") {
		first, last, isRange := strings.Cut(item, "-")
		low, err := parsePort(first)
		if err != nil {
			return nil, err
		}
		high := low
		if isRange {
			if high, err = parsePort(last); err != nil {
				return nil, err
			}
		}
		if low > high {
			return nil, fmt.Errorf("%s runs backwards", item)
		}
		for port := int(low); port <= int(high); port++ {
			set.add(uint16(port))
		}
	}
	return set, nil
}
