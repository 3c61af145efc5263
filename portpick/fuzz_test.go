package portpick

import (
	"fmt"
	"math/big"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"
)

var (
	digits       = regexp.MustCompile(`^[0-9]+$`)
	reservedItem = regexp.MustCompile(`^([0-9]+)(?:-([0-9]+))?$`)
)

// portNumber reads a port the slow way: -1 if it is none.
func portNumber(s string) int {
	n, ok := new(big.Int).SetString(s, 10)
	if !ok || !digits.MatchString(s) || n.Cmp(big.NewInt(65535)) > 0 {
		return -1
	}
	return int(n.Int64())
}

// reservedList reads a list of reserved ports the slow way.
func reservedList(s string) (reserved [1 << 16]bool, ok bool) {
	s = strings.TrimFunc(s, unicode.IsSpace)
	if s == "" {
		return reserved, true
	}
	for _, item := range strings.Split(s, ",") {
		match := reservedItem.FindStringSubmatch(item)
		if match == nil {
			return reserved, false
		}
		low, high := portNumber(match[1]), portNumber(match[1])
		if match[2] != "" {
			high = portNumber(match[2])
		}
		if low < 0 || high < 0 || low > high {
			return reserved, false
		}
		for port := low; port <= high; port++ {
			reserved[port] = true
		}
	}
	return reserved, true
}

// writeReserved is the list as the kernel writes it (proc_do_large_bitmap in
// kernel/sysctl.c).
func writeReserved(reserved func(uint16) bool) string {
	var items []string
	for port := 0; port < 1<<16; port++ {
		if !reserved(uint16(port)) {
			continue
		}
		first := port
		for port+1 < 1<<16 && reserved(uint16(port+1)) {
			port++
		}
		if first == port {
			items = append(items, fmt.Sprint(port))
		} else {
			items = append(items, fmt.Sprintf("%d-%d", first, port))
		}
	}
	return strings.Join(items, ",") + "\n"
}

// Any text is either refused or read as a slow reader reads it, and what the
// kernel would write for it is read as the same.
func FuzzParsePorts(f *testing.F) {
	for _, s := range [][2]string{
		{"32768\t60999\n", "\n"}, {"40000\t40009\n", "8080,9148-9150,40001-40003\n"}, {"1 65535", "1,65535"},
		{"40000 40009", "0-65535"}, {"40009 40000", ""}, {"0 1", ""}, {"1 65536", ""}, {"+1 2", ""}, {"1_0 20", ""},
		{"40000 40009", "40003-40001"}, {"40000 40009", "40001,,40002"}, {"40000 40009", "1-2-3"},
		{"40000 40009", "40001, 40002"}, {"40000 40009", "-1"}, {"40000 40009", "00000000000000000000040001"},
		{"63 129", "64,127-128"}, {"40000\v40009", "\u00a040001\u0085"},
	} {
		f.Add(s[0], s[1], uint16(40000), uint16(40004))
	}
	f.Add("1 2", "7", uint16(9), uint16(8))
	f.Add("1 2", "7", uint16(0), uint16(8))
	f.Fuzz(func(t *testing.T, portRange, reservedPorts string, low, high uint16) {
		ports, err := ParsePorts(portRange, reservedPorts)
		fields := strings.FieldsFunc(portRange, unicode.IsSpace)
		reserved, ok := reservedList(reservedPorts)
		if ok = ok && len(fields) == 2; ok {
			first, last := portNumber(fields[0]), portNumber(fields[1])
			if ok = first > 0 && last >= first; ok {
				checkPorts(t, ports, first, last, &reserved)
			}
		}
		if ok != (err == nil) || ok != (ports != nil) {
			t.Fatalf("ParsePorts(%q, %q) = %v, %v", portRange, reservedPorts, ports, err)
		}
		if !ok {
			return
		}

		text := writeReserved(func(port uint16) bool { return reserved[port] })
		again, err := ParsePorts(fmt.Sprintf("%d\t%d\n", ports.Low(), ports.High()), text)
		if err != nil {
			t.Fatalf("as the kernel writes %q, %q: %v", portRange, reservedPorts, err)
		}
		checkPorts(t, again, int(ports.Low()), int(ports.High()), &reserved)
		if text != "\n" && !again.equal(ports) {
			t.Fatalf("%v is not equal to %v, with %s reserved in both", again, ports, text)
		}

		within, err := ports.Within(low, high)
		if want := low > 0 && low <= high; want != (err == nil) || want != (within != nil) {
			t.Fatalf("Within(%d, %d) = %v, %v", low, high, within, err)
		}
		if within != nil {
			checkPorts(t, within, int(low), int(high), &reserved)
		}
	})
}

// checkPorts checks all that there is to know of ports.
func checkPorts(t *testing.T, ports *Ports, low, high int, reserved *[1 << 16]bool) {
	t.Helper()
	if ports == nil || int(ports.Low()) != low || int(ports.High()) != high {
		t.Fatalf("got %v, want %d-%d", ports, low, high)
	}
	count := 0
	for port := range 1 << 16 {
		want := low <= port && port <= high && !reserved[port]
		if ports.Contains(uint16(port)) != want {
			t.Fatalf("%v: Contains(%d) is not %t", ports, port, want)
		}
		if want {
			count++
		}
	}
	if ports.Len() != count || ports.Reserved() != high-low+1-count {
		t.Fatalf("%v: Len() = %d, Reserved() = %d; there are %d", ports, ports.Len(), ports.Reserved(), count)
	}
	text := fmt.Sprintf("%d-%d", low, high)
	if n := high - low + 1 - count; n > 0 {
		text += fmt.Sprintf(" without %d reserved", n)
	}
	if ports.String() != text {
		t.Fatalf("String() = %q, want %q", ports, text)
	}
}

// Two walks that take turns in any way are each offered every port, whatever the
// range, what of it is reserved, and where walks before them have left off; and a
// walk that nobody interrupts is offered each port once.
//
// mask has one bit for each port, and begins again where it ends: those that are
// reserved. Each bit of turns says which walk goes next; afterwards the first
// one goes to its end, and then the second.
func FuzzWalk(f *testing.F) {
	f.Add(uint16(40000), uint16(40000), uint64(0), uint64(0), []byte{}, []byte{})
	f.Add(uint16(40000), uint16(40031), uint64(1), uint64(0), []byte{0x11}, []byte{0x55, 0x55, 0x55, 0x55, 0x55})
	f.Add(uint16(40000), uint16(40032), uint64(2), ^uint64(0), []byte{}, []byte{0x0f, 0xf0, 0x33})
	f.Add(uint16(40001), uint16(41000), uint64(3), uint64(255)<<32, []byte{0xaa}, []byte{0xff, 0xff, 0, 0, 0xff})
	f.Add(uint16(40001), uint16(40100), uint64(4), uint64(1)<<32|0xffff, []byte{0x55}, []byte{0xcc})
	f.Add(uint16(DefaultLow), uint16(DefaultHigh), uint64(5), uint64(0x12345678), []byte{1, 0, 0}, []byte{0x5a})
	f.Add(uint16(1), uint16(65535), uint64(6), uint64(7), []byte{0}, []byte{})
	f.Add(uint16(65535), uint16(65535), uint64(7), uint64(8), []byte{}, []byte{1})
	f.Add(uint16(40000), uint16(40099), uint64(8), uint64(9), []byte{0xff}, []byte{1})
	f.Fuzz(func(t *testing.T, low, high uint16, secret, position uint64, mask, turns []byte) {
		if len(turns) > 1<<10 || high-low >= 1<<12 && len(turns) > 1 {
			return // takes longer, and shows no more
		}
		reserved := func(port uint16) bool {
			bit := int(port) % max(8*len(mask), 1)
			return len(mask) > 0 && mask[bit/8]>>(bit%8)&1 == 1
		}
		ports, err := NewPorts(low, high, reserved)
		if err != nil {
			if low > 0 && low <= high {
				t.Fatal(err)
			}
			return
		}
		order := &Order{secret: [2]uint64{secret, ^secret}}
		// Makes the cursor, which then is as earlier walks may have left it.
		slot := order.Walk(ports, testSource, testDestination).slot
		slot.Store(slot.Load()>>tagShift<<tagShift | position&(1<<tagShift-1))

		var walks [2]Walk
		for i := range walks {
			walks[i] = order.Walk(ports, testSource, testDestination)
		}
		var offered [2][]uint16
		var ended, interrupted [2]bool
		next := func(i int) {
			other := 1 - i
			interrupted[other] = interrupted[other] || len(offered[other]) > 0 && !ended[other]
			port, ok := walks[i].Next()
			switch {
			case !ok:
				ended[i] = true
			case ended[i]:
				t.Fatalf("walk %d goes on after its end", i)
			case !ports.Contains(port):
				t.Fatalf("walk %d is offered %d of %v", i, port, ports)
			case len(offered[i]) > 2*(int(high)-int(low)+1):
				t.Fatalf("walk %d of %v does not end", i, ports)
			default:
				offered[i] = append(offered[i], port)
			}
		}
		for bit := range 8 * len(turns) {
			next(int(turns[bit/8] >> (bit % 8) & 1))
		}
		for i := range walks {
			for !ended[i] {
				next(i)
			}
			next(i) // which has nothing more
		}

		want := portsOf(ports)
		for i := range offered {
			slices.Sort(offered[i])
			if interrupted[i] {
				offered[i] = slices.Compact(offered[i])
			}
			if diff := differ(want, offered[i]); diff != "" {
				t.Fatalf("walk %d of %v, interrupted %t (-want +got):\n%s", i, ports, interrupted[i], diff)
			}
		}
	})
}

// portsOf lists the ports that there are.
func portsOf(p *Ports) []uint16 {
	var list []uint16
	for port := int(p.Low()); port <= int(p.High()); port++ {
		if p.Contains(uint16(port)) {
			list = append(list, uint16(port))
		}
	}
	return list
}
