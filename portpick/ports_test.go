package portpick

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// all lists the ports that p contains, asking about every port there is.
func all(p *Ports) []uint16 {
	var list []uint16
	for port := range 1 << 16 {
		if p.Contains(uint16(port)) {
			list = append(list, uint16(port))
		}
	}
	return list
}

// portList lists the ports from low to high.
func portList(low, high uint16) []uint16 {
	var list []uint16
	for port := int(low); port <= int(high); port++ {
		list = append(list, uint16(port))
	}
	return list
}

func TestParsePorts(t *testing.T) {
	tests := []struct {
		name                string
		portRange, reserved string
		want                []uint16
		text                string
	}{
		{"as the kernel writes them", "40000\t40003\n", "\n", portList(40000, 40003), "40000-40003"},
		{"without white space around them", "40000 40003", "", portList(40000, 40003), "40000-40003"},
		{"a range of one port", "40000\t40000\n", "\n", []uint16{40000}, "40000-40000"},
		{"all ports there are", "1\t65535\n", "\n", portList(1, 65535), "1-65535"},
		{"the range that Linux starts with", "32768\t60999\n", "\n", portList(DefaultLow, DefaultHigh), "32768-60999"},
		{"a single reserved port", "40000\t40003\n", "40001\n", []uint16{40000, 40002, 40003}, "40000-40003 without 1 reserved"},
		{"a reserved range", "40000\t40003\n", "40001-40002\n", []uint16{40000, 40003}, "40000-40003 without 2 reserved"},
		{"a reserved range of one port", "40000\t40003\n", "40003-40003\n", portList(40000, 40002), "40000-40003 without 1 reserved"},
		{"single ports and ranges", "8000\t9999\n", "8080,9148-9150\n",
			slices.Concat(portList(8000, 8079), portList(8081, 9147), portList(9151, 9999)), "8000-9999 without 4 reserved"},
		{"reserved ranges that overlap count once", "40000\t40009\n", "40001-40004,40003-40005,40004\n",
			[]uint16{40000, 40006, 40007, 40008, 40009}, "40000-40009 without 5 reserved"},
		{"reserved ports outside of the range do not count", "40000\t40003\n", "1,39999,40004,65535\n", portList(40000, 40003), "40000-40003"},
		{"a reserved range across the edge counts in part", "40000\t40003\n", "39000-40000,40003-50000\n", []uint16{40001, 40002}, "40000-40003 without 2 reserved"},
		{"everything reserved", "40000\t40003\n", "1-65535\n", nil, "40000-40003 without 4 reserved"},
		{"port 0 may be on the list", "40000\t40001\n", "0\n", portList(40000, 40001), "40000-40001"},
		{"the edges of the words of a bit set", "63\t129\n", "64,127-128\n", slices.Concat([]uint16{63}, portList(65, 126), []uint16{129}), "63-129 without 3 reserved"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, err := ParsePorts(tt.portRange, tt.reserved)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, all(p)); diff != "" {
				t.Errorf("ports (-want +got):\n%s", diff)
			}
			if p.Len() != len(tt.want) {
				t.Errorf("Len() = %d, want %d", p.Len(), len(tt.want))
			}
			if p.String() != tt.text {
				t.Errorf("String() = %q, want %q", p, tt.text)
			}
		})
	}
}

func TestParsePortsRejects(t *testing.T) {
	tests := []struct {
		name                string
		portRange, reserved string
		mentions            []string
	}{
		{"an empty range", "", "", []string{"ip_local_port_range", `""`}},
		{"one number", "40000\n", "", []string{"ip_local_port_range", "40000", "two ports"}},
		{"three numbers", "40000 40001 40002\n", "", []string{"ip_local_port_range", "40002", "two ports"}},
		{"low above high", "40001\t40000\n", "", []string{"40001", "40000"}},
		{"low that is zero", "0\t40000\n", "", []string{"0-40000"}},
		{"letters for low", "low\t40000\n", "", []string{"ip_local_port_range", "low"}},
		{"letters for high", "40000\thigh\n", "", []string{"ip_local_port_range", "high"}},
		{"low above 65535", "65536\t65537\n", "", []string{"ip_local_port_range", "65536"}},
		{"high above 65535", "40000\t65536\n", "", []string{"ip_local_port_range", "65536"}},
		{"a negative port", "-1\t40000\n", "", []string{"ip_local_port_range", "-1"}},
		{"a sign", "+1\t40000\n", "", []string{"ip_local_port_range", "+1"}},
		{"a hexadecimal port", "0x10\t40000\n", "", []string{"ip_local_port_range", "0x10"}},
		{"a reserved range that runs backwards", "40000\t40003\n", "40002-40001\n", []string{"ip_local_reserved_ports", "40002-40001", "backwards"}},
		{"letters on the reserved list", "40000\t40003\n", "40001,http\n", []string{"ip_local_reserved_ports", "http"}},
		{"a reserved port above 65535", "40000\t40003\n", "65536\n", []string{"ip_local_reserved_ports", "65536"}},
		{"the end of a reserved range above 65535", "40000\t40003\n", "1-65536\n", []string{"ip_local_reserved_ports", "65536"}},
		{"an empty item on the reserved list", "40000\t40003\n", "40001,,40002\n", []string{"ip_local_reserved_ports", "40001,,40002"}},
		{"a reserved list that ends in a comma", "40000\t40003\n", "40001,\n", []string{"ip_local_reserved_ports", "40001,"}},
		{"a reserved range without an end", "40000\t40003\n", "40001-\n", []string{"ip_local_reserved_ports", "40001-"}},
		{"a reserved range without a start", "40000\t40003\n", "-40001\n", []string{"ip_local_reserved_ports", "-40001"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, err := ParsePorts(tt.portRange, tt.reserved)
			if err == nil {
				t.Fatalf("ParsePorts(%q, %q) = %v", tt.portRange, tt.reserved, p)
			}
			if p != nil {
				t.Errorf("there are ports beside the error: %v", p)
			}
			for _, s := range tt.mentions {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("the error does not mention %q: %v", s, err)
				}
			}
		})
	}
}

func TestNewPortsNamesWhatIsWrong(t *testing.T) {
	tests := []struct {
		name      string
		low, high uint16
		want      string
	}{
		{"low is zero", 0, 40000, "port range 0-40000: low must be at least 1 and at most high"},
		{"both are zero", 0, 0, "port range 0-0: low must be at least 1 and at most high"},
		{"low is above high", 40001, 40000, "port range 40001-40000: low must be at least 1 and at most high"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, err := NewPorts(tt.low, tt.high, nil)
			if err == nil || err.Error() != tt.want || p != nil {
				t.Errorf("NewPorts(%d, %d) = %v, %v, want %q", tt.low, tt.high, p, err, tt.want)
			}
		})
	}
}

// Within needs to know of those outside of the range as well.
func TestNewPortsAsksOnceAboutEachPort(t *testing.T) {
	var asked []uint16
	p, err := NewPorts(65530, 65535, func(port uint16) bool {
		asked = append(asked, port)
		return port%2 == 0
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(portList(0, 65535), asked); diff != "" {
		t.Errorf("asked (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]uint16{65531, 65533, 65535}, all(p)); diff != "" {
		t.Errorf("ports (-want +got):\n%s", diff)
	}
	if p.Low() != 65530 || p.High() != 65535 {
		t.Errorf("from %d to %d, want 65530 to 65535", p.Low(), p.High())
	}
}

func TestPortsAreEqualOnlyIfTheyAndTheReservedAreTheSame(t *testing.T) {
	parse := func(portRange, reserved string) *Ports {
		p, err := ParsePorts(portRange, reserved)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	tests := []struct {
		name string
		p, q *Ports
		want bool
	}{
		{"the same range", parse("10 20", ""), parse("10 20", ""), true},
		{"the same reserved ports", parse("10 20", "12-13"), parse("10 20", "13,12"), true},
		{"other reserved ports outside", parse("10 20", "30"), parse("10 20", "5"), false},
		{"another low", parse("10 20", ""), parse("11 20", ""), false},
		{"another high", parse("10 20", ""), parse("10 21", ""), false},
		{"reserved ports on one side", parse("10 20", "12"), parse("10 20", ""), false},
		{"as many reserved ports, but others", parse("10 20", "12"), parse("10 20", "13"), false},
		{"the same number of ports in another range", parse("10 20", "12"), parse("10 19", ""), false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.p.equal(tt.q) != tt.want || tt.q.equal(tt.p) != tt.want {
				t.Errorf("%v and %v: equal is not %v both ways", tt.p, tt.q, tt.want)
			}
		})
	}
}

func TestWithin(t *testing.T) {
	tests := []struct {
		name      string
		reserved  string
		low, high uint16
		want      []uint16
		text      string
	}{
		{"a part of the range", "", 40002, 40004, portList(40002, 40004), "40002-40004"},
		{"the whole range", "", 40000, 40009, portList(40000, 40009), "40000-40009"},
		{"outside of the range", "", 1, 3, portList(1, 3), "1-3"},
		{"across its edge", "40008-40011", 40007, 40012, []uint16{40007, 40012}, "40007-40012 without 4 reserved"},
		{"one port that is not reserved", "40001,40003", 40002, 40002, []uint16{40002}, "40002-40002"},
		{"one port that is reserved", "40001-40003", 40002, 40002, nil, "40002-40002 without 1 reserved"},
		{"nothing reserved in it", "1-63,128-40000", 64, 127, portList(64, 127), "64-127"},
		{"all ports there are", "1,65535", 1, 65535, portList(2, 65534), "1-65535 without 2 reserved"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			system, err := ParsePorts("40000 40009", tt.reserved)
			if err != nil {
				t.Fatal(err)
			}
			p, err := system.Within(tt.low, tt.high)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, all(p)); diff != "" {
				t.Errorf("ports (-want +got):\n%s", diff)
			}
			if p.Len() != len(tt.want) || p.String() != tt.text {
				t.Errorf("%d ports, %q; want %d, %q", p.Len(), p, len(tt.want), tt.text)
			}
			if p, err := system.Within(tt.high, tt.low); tt.low != tt.high && (err == nil || p != nil) {
				t.Errorf("from high to low there is %v, error %v", p, err)
			}
		})
	}
}
