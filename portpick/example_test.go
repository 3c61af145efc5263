package portpick_test

import (
	"fmt"
	"net/netip"

	"github.com/seed22601231/connectx/portpick"
)

func Example() {
	ports, err := portpick.NewPorts(40000, 40009, nil)
	if err != nil {
		panic(err)
	}
	order := portpick.NewOrder() // one for all destinations
	source := netip.MustParseAddr("192.0.2.1")
	destination := netip.MustParseAddrPort("198.51.100.7:443")

	// Every connection asks for a port, and asks again where that one is
	// taken.
	taken := make(map[uint16]bool)
	evenFirst := true
	for connection := range ports.Len() {
		walk := order.Walk(ports, source, destination)
		for {
			port, ok := walk.Next()
			if !ok {
				panic("all ports are taken")
			}
			if taken[port] {
				continue
			}
			taken[port] = true
			if even := port%2 == 0; even != (connection < ports.Len()/2) {
				evenFirst = false
			}
			break
		}
	}
	fmt.Println("connections:", len(taken))
	fmt.Println("even ports before odd ones:", evenFirst)

	walk := order.Walk(ports, source, destination)
	offers := 0
	for {
		if _, ok := walk.Next(); !ok {
			break
		}
		offers++
	}
	fmt.Println("offers before a dial gives up:", offers)
	// Output:
	// connections: 10
	// even ports before odd ones: true
	// offers before a dial gives up: 10
}

func ExampleParsePorts() {
	// As read from /proc/sys/net/ipv4.
	ports, err := portpick.ParsePorts("32768\t60999\n", "33000,40000-40009\n")
	if err != nil {
		panic(err)
	}
	fmt.Println(ports)
	fmt.Println(ports.Len(), ports.Contains(40000), ports.Contains(40010))
	// Output:
	// 32768-60999 without 11 reserved
	// 28221 false true
}
