package connectx

import "fmt"

// A PortRange is the ports from Low to High, both included. The zero PortRange
// stands for the system's ephemeral range, net.ipv4.ip_local_port_range.
type PortRange struct {
	Low, High uint16
}

// String is the range as "40000-40099".
func (r PortRange) String() string { return fmt.Sprintf("%d-%d", r.Low, r.High) }

// Contains reports whether port is in the range. The zero PortRange contains
// none.
func (r PortRange) Contains(port uint16) bool {
	return r != PortRange{} && r.Low <= port && port <= r.High
}
