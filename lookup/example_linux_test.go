package lookup_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/seed22601231/connectx/lookup"
)

func Example() {
	conn, err := lookup.Open()
	if err != nil {
		panic(err)
	}
	defer conn.Close()

	socket, err := net.Dial("udp4", "127.0.0.1:9")
	if err != nil {
		panic(err)
	}
	defer socket.Close()
	local := netip.MustParseAddrPort(socket.LocalAddr().String())
	remote := netip.MustParseAddrPort("127.0.0.1:9")

	// The 4-tuple of the socket.
	found, err := conn.UDP(local, remote, 0)
	if err != nil {
		panic(err)
	}
	fmt.Println("connected:", found.Connected(), "to", found.Remote)

	// The socket is connected, so it receives nothing from anybody else.
	_, err = conn.UDP(local, netip.MustParseAddrPort("127.0.0.1:10"), 0)
	fmt.Println("another peer:", errors.Is(err, lookup.ErrNotFound))
	// Output:
	// connected: true to 127.0.0.1:9
	// another peer: true
}

func ExampleConn_Source() {
	conn, err := lookup.Open()
	if err != nil {
		panic(err)
	}
	defer conn.Close()

	route, err := conn.Source(netip.MustParseAddrPort("127.0.0.1:53"), lookup.RouteOptions{})
	if err != nil {
		panic(err)
	}
	fmt.Println(route.Source)
	// Output: 127.0.0.1
}
