package connectx_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"

	"github.com/seed22601231/connectx"
)

// A connected socket for code that wants a net.PacketConn.
func ExampleDialer_DialPacket() {
	server, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	defer server.Close()

	var d connectx.Dialer
	conn, err := d.DialPacket(context.Background(), "udp", server.LocalAddr().String())
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()

	// The address of the peer is the only one that can be written to.
	if _, err := conn.WriteTo([]byte("hello"), server.LocalAddr()); err != nil {
		log.Fatal(err)
	}
	b := make([]byte, 1500)
	n, _, err := server.ReadFrom(b)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", b[:n])

	_, err = conn.WriteTo([]byte("hello"), &net.UDPAddr{IP: net.IPv4(127, 0, 0, 2), Port: 53})
	fmt.Println(errors.Is(err, net.ErrWriteToConnected))
	// Output:
	// hello
	// true
}
