//go:build linux

package main

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// tuples is what sock_diag says is connected from the source address.
type tuples struct {
	total      int
	duplicates int                    // sockets beyond the first on their 4-tuple
	to         map[netip.AddrPort]int // how many, by destination
}

// dumpTuples has the kernel list all connected sockets of a protocol in the
// calling thread's namespace.
func dumpTuples(tcp bool) (tuples, error) {
	protocol := byte(unix.IPPROTO_UDP)
	if tcp {
		protocol = unix.IPPROTO_TCP
	}
	req := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
	req.AddData(newDiagRequest(protocol))

	type ports struct{ local, remote netip.AddrPort }
	seen := make(map[ports]struct{})
	t := tuples{to: make(map[netip.AddrPort]int)}
	short := 0
	err := req.ExecuteIter(unix.NETLINK_INET_DIAG, nl.SOCK_DIAG_BY_FAMILY, func(msg []byte) bool {
		if len(msg) < sizeofDiagMessage {
			short++
			return true
		}
		p := ports{diagAddrPort(msg[diagSource:], msg[diagSourcePort:]), diagAddrPort(msg[diagDest:], msg[diagDestPort:])}
		if p.local.Addr() != source {
			return true // the other end of one
		}
		t.total++
		t.to[p.remote]++
		if _, again := seen[p]; again {
			t.duplicates++
		}
		seen[p] = struct{}{}
		return true
	})
	switch {
	case err != nil:
		return t, fmt.Errorf("list sockets with sock_diag: %w", err)
	case short > 0:
		return t, fmt.Errorf("list sockets with sock_diag: %d messages of less than %d bytes", short, sizeofDiagMessage)
	}
	return t, nil
}

// Layouts from include/uapi/linux/inet_diag.h.
const (
	sizeofDiagRequest = 56 // struct inet_diag_req_v2
	sizeofDiagMessage = 72 // struct inet_diag_msg

	// Offsets of struct inet_diag_msg.
	diagSourcePort = 4
	diagDestPort   = 6
	diagSource     = 8
	diagDest       = 24

	// established is TCP_ESTABLISHED as a bit of the states asked for, which
	// connected UDP sockets are in as well (include/net/tcp_states.h).
	established = 1 << 1
)

// A diagRequest is a struct inet_diag_req_v2 with no address in it.
type diagRequest [sizeofDiagRequest]byte

func newDiagRequest(protocol byte) *diagRequest {
	r := &diagRequest{0: unix.AF_INET, 1: protocol}
	binary.NativeEndian.PutUint32(r[4:], established)
	return r
}

func (r *diagRequest) Len() int          { return len(r) }
func (r *diagRequest) Serialize() []byte { return r[:] }

func diagAddrPort(address, port []byte) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(address)), binary.BigEndian.Uint16(port))
}
