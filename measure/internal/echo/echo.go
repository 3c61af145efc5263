//go:build linux

// Package echo has servers that answer what they receive, on all addresses of
// this machine, and say where it has come from.
package echo

import (
	"encoding/binary"
	"net/netip"
)

// Port is the port that the servers listen on.
const Port = 7007

// A request is TokenSize bytes. The answer is the same bytes, and the address and
// port that they came from.
const (
	TokenSize  = 24
	AnswerSize = TokenSize + 18
)

// Answer is the answer to a request.
func Answer(token []byte, from netip.AddrPort) []byte {
	a := from.Addr().As16()
	b := append(append(make([]byte, 0, AnswerSize), token...), a[:]...)
	return binary.BigEndian.AppendUint16(b, from.Port())
}

// From is where the request came from, according to an answer of AnswerSize.
func From(answer []byte) netip.AddrPort {
	a := answer[TokenSize:]
	return netip.AddrPortFrom(netip.AddrFrom16([16]byte(a)).Unmap(), binary.BigEndian.Uint16(a[16:]))
}
