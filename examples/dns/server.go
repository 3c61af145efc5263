package main

import (
	"context"
	"io"
	"net"

	"golang.org/x/net/dns/dnsmessage"
)

// The name that servers know, and its address.
const (
	name    = "host.example."
	address = "192.0.2.1"
)

// runOwn is run with a DNS server of this program.
func runOwn(ctx context.Context, w io.Writer) error {
	conn, err := net.ListenPacket("udp4", "127.0.1.1:53")
	if err != nil {
		return err
	}
	defer conn.Close()
	go serve(conn)
	return run(ctx, w, conn.LocalAddr().String())
}

// serve answers every question with the one address, until conn is closed.
func serve(conn net.PacketConn) {
	b := make([]byte, 512)
	for {
		n, client, err := conn.ReadFrom(b)
		if err != nil {
			return
		}
		var m dnsmessage.Message
		if m.Unpack(b[:n]) != nil || len(m.Questions) != 1 {
			continue
		}
		m.Response = true
		m.Additionals = nil
		m.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: m.Questions[0].Name, Class: dnsmessage.ClassINET},
			Body:   &dnsmessage.AResource{A: [4]byte(net.ParseIP(address).To4())},
		}}
		if answer, err := m.Pack(); err == nil {
			_, _ = conn.WriteTo(answer, client)
		}
	}
}
