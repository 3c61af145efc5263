package lookup

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// decode reads a structure that the kernel has written, the slow way.
func decode[T any](t *testing.T, b []byte) (v T) {
	t.Helper()
	if err := binary.Read(bytes.NewReader(b), binary.NativeEndian, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// A body comes only out of a reply that is whole, of the kind that was asked for,
// and to this very request.
func FuzzParseReply(f *testing.F) {
	const kind = unix.RTM_NEWROUTE
	good := message(kind, testSeq, testPort, []byte("the body"))
	f.Add(good, uint32(testSeq), uint32(testPort))
	f.Add(good, uint32(testSeq+1), uint32(testPort))
	f.Add(good, uint32(testSeq), uint32(testPort+1))
	f.Add(good[:len(good)-1], uint32(testSeq), uint32(testPort))
	f.Add(saying(15, good), uint32(testSeq), uint32(testPort))
	f.Add(saying(1<<32-1, good), uint32(testSeq), uint32(testPort))
	f.Add(message(unix.NLMSG_ERROR, testSeq, testPort, int32Bytes(-int32(unix.ENETUNREACH)), make([]byte, 16)), uint32(testSeq), uint32(testPort))
	f.Add(message(unix.NLMSG_ERROR, testSeq, testPort, int32Bytes(-1<<31)), uint32(testSeq), uint32(testPort))
	f.Add(message(unix.NLMSG_ERROR, testSeq, testPort, []byte{1, 2, 3}), uint32(testSeq), uint32(testPort))
	f.Fuzz(func(t *testing.T, reply []byte, seq, port uint32) {
		body, err := parseReply(reply, kind, seq, port)
		if (body == nil) != (err != nil) {
			t.Fatalf("body %x, error %v", body, err)
		}
		if len(reply) < unix.SizeofNlMsghdr {
			if err == nil {
				t.Fatal("a body without a header")
			}
			return
		}
		header := decode[unix.NlMsghdr](t, reply)
		ours := header.Seq == seq && header.Pid == port
		if ours == (err == errOtherReply) {
			t.Fatalf("a reply to %d, %d where %d, %d asked: %v", header.Seq, header.Pid, seq, port, err)
		}
		whole := unix.SizeofNlMsghdr <= header.Len && uint64(header.Len) <= uint64(len(reply))
		if want := ours && whole && header.Type == kind; want != (err == nil) {
			t.Fatalf("%+v in %d bytes: %v", header, len(reply), err)
		}
		if err == nil {
			if diff := cmp.Diff(reply[unix.SizeofNlMsghdr:header.Len], body); diff != "" {
				t.Fatalf("body (-want +got):\n%s", diff)
			}
			return
		}
		var errno syscall.Errno
		failed := false // the kernel says so
		if ours && whole && header.Type == unix.NLMSG_ERROR && header.Len >= unix.SizeofNlMsghdr+4 {
			failed = decode[unix.NlMsgerr](t, append(slices.Clone(reply[unix.SizeofNlMsghdr:header.Len]), make([]byte, unix.SizeofNlMsgerr)...)).Error < 0
		}
		if failed != errors.As(err, &errno) {
			t.Fatalf("%+v: %v", header, err)
		}
	})
}

// diagMessageStruct is struct inet_diag_msg of include/uapi/linux/inet_diag.h.
type diagMessageStruct struct {
	Family, State, Timer, Retrans uint8
	SourcePort, DestPort          [2]byte // network byte order
	Source, Dest                  [16]byte
	Interface                     uint32
	Cookie                        [2]uint32
	Expires, Rqueue, Wqueue, UID  uint32
	Inode                         uint32
}

// socketOf is parseDiagMessage, by way of the structure.
func socketOf(t *testing.T, body []byte) Socket {
	m := decode[diagMessageStruct](t, body)
	addrPort := func(a [16]byte, port [2]byte) netip.AddrPort {
		addr := netip.AddrFrom16(a).Unmap()
		if m.Family == unix.AF_INET {
			addr = netip.AddrFrom4([4]byte(a[:4]))
		}
		return netip.AddrPortFrom(addr, uint16(port[0])<<8|uint16(port[1]))
	}
	s := Socket{
		Cookie:   binary.NativeEndian.Uint64(body[44:]),
		Local:    addrPort(m.Source, m.SourcePort),
		UID:      m.UID,
		TimeWait: m.State == 6,
	}
	if m.DestPort != [2]byte{} {
		s.Remote = addrPort(m.Dest, m.DestPort)
	}
	return s
}

// A socket comes only out of a reply to this very request, and is the one that
// the reply names, whether the reply was received whole or as one of many that
// are cut off.
func FuzzDiagReply(f *testing.F) {
	local, remote := netip.MustParseAddrPort("192.0.2.1:40000"), netip.MustParseAddrPort("198.51.100.7:53")
	four := diagMessage(unix.AF_INET, local, remote, 1<<63|5, 1000)
	six := diagMessage(unix.AF_INET6, netip.MustParseAddrPort("[2001:db8::1]:40001"), netip.AddrPort{}, 7, 0)
	mapped := diagMessage(unix.AF_INET6, netip.MustParseAddrPort("[::ffff:192.0.2.1]:40001"), netip.AddrPort{}, 7, 0)
	timeWait := slices.Clone(four)
	timeWait[1] = tcpTimeWait
	for _, body := range [][]byte{four, six, mapped, timeWait, four[:71], append(slices.Clone(six), attr(8, 0)...)} {
		f.Add(message(unix.SOCK_DIAG_BY_FAMILY, testSeq, testPort, body))
	}
	f.Add(message(unix.SOCK_DIAG_BY_FAMILY, testSeq+1, testPort, four))
	f.Add(message(unix.SOCK_DIAG_BY_FAMILY, testSeq, testPort+1, four))
	f.Add(message(unix.RTM_NEWROUTE, testSeq, testPort, four))
	f.Add(message(unix.NLMSG_DONE, testSeq, testPort, four))
	f.Add(saying(80, message(unix.SOCK_DIAG_BY_FAMILY, testSeq, testPort, four)))
	f.Add(saying(200, message(unix.SOCK_DIAG_BY_FAMILY, testSeq, testPort, four)))
	f.Add(message(unix.NLMSG_ERROR, testSeq, testPort, int32Bytes(-int32(unix.ENOENT)), four))
	f.Add(message(unix.NLMSG_ERROR, testSeq, testPort, int32Bytes(-int32(unix.EINVAL)), four))
	f.Fuzz(func(t *testing.T, reply []byte) {
		if len(reply) < unix.SizeofNlMsghdr {
			return // askAtOnce looks at the header first
		}
		header := decode[unix.NlMsghdr](t, reply)
		var single Socket
		body, err := parseReply(slices.Clone(reply), unix.SOCK_DIAG_BY_FAMILY, testSeq, testPort)
		if err == nil {
			single, err = parseDiagMessage(body)
		}
		if err != nil && single != (Socket{}) {
			t.Fatalf("a socket beside the error %v: %+v", err, single)
		}
		if err == nil {
			if header.Type != unix.SOCK_DIAG_BY_FAMILY || header.Seq != testSeq || header.Pid != testPort || int(header.Len) > len(reply) {
				t.Fatalf("a socket out of %+v in %d bytes", header, len(reply))
			}
			if diff := cmp.Diff(socketOf(t, body), single, comparable); diff != "" {
				t.Fatalf("(-want +got):\n%s", diff)
			}
		}

		// What recvmmsg has room for.
		kept := slices.Clone(reply[:min(len(reply), sizeofBatchReply)])
		batched, batchErr := parseBatchReply(kept, testSeq, testPort)
		if err == unix.ENOENT {
			err = nil // and there is no socket
		}
		// A longer message than there are bytes is an error, except that one
		// that fills the room cannot tell.
		if len(kept) < sizeofBatchReply || int(header.Len) <= len(reply) {
			if (err == nil) != (batchErr == nil) {
				t.Fatalf("%+v in %d bytes: error %v, in a batch %v", header, len(reply), err, batchErr)
			}
			if diff := cmp.Diff(single, batched, comparable); diff != "" {
				t.Fatalf("single -, in a batch +\n%s", diff)
			}
		}
		if batchErr != nil && batched != (Socket{}) {
			t.Fatalf("a socket beside the error %v: %+v", batchErr, batched)
		}
		if batched != (Socket{}) && (header.Type != unix.SOCK_DIAG_BY_FAMILY || header.Seq != testSeq || header.Pid != testPort) {
			t.Fatalf("a socket out of %+v", header)
		}
	})
}

// A route is what netlink's own parser makes of the reply.
func FuzzParseRoute(f *testing.F) {
	source4, source6 := attr(unix.RTA_PREFSRC, 192, 0, 2, 1), attr(unix.RTA_PREFSRC, make([]byte, 16)...)
	source6[4] = 0xfd
	for _, body := range [][]byte{
		slices.Concat(rtmsg(unix.AF_INET), source4, oif(3)),
		slices.Concat(rtmsg(unix.AF_INET6), source6, oif(3)),
		slices.Concat(rtmsg(unix.AF_INET6), source4, oif(3)),
		slices.Concat(rtmsg(unix.AF_INET), oif(3)),
		slices.Concat(rtmsg(unix.AF_INET), source4, source4[:7]),
		slices.Concat(rtmsg(unix.AF_INET), attrSaying(0, unix.RTA_PREFSRC), source4),
		slices.Concat(rtmsg(unix.AF_INET), source4, attrSaying(9, unix.RTA_OIF, 3, 0, 0, 0)),
		slices.Concat(rtmsg(unix.AF_INET), attrSaying(5, unix.RTA_OIF, 3), source4),
		slices.Concat(rtmsg(unix.AF_INET), source4, attrSaying(5, unix.RTA_TABLE, 254)),
		rtmsg(unix.AF_INET)[:11],
	} {
		f.Add(body)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		route, err := parseRoute(body)
		if err != nil && err != ErrNoSource && route != (Route{}) {
			t.Fatalf("a route beside the error %v: %+v", err, route)
		}
		if len(body) < unix.SizeofRtMsg {
			if err == nil {
				t.Fatal("a route without a header")
			}
			return
		}
		attrs := body[unix.SizeofRtMsg:]
		if len(attrs)%unix.RTA_ALIGNTO != 0 {
			return // the kernel pads, and netlink's parser relies on that
		}
		list, parseErr := nl.ParseRouteAttr(attrs)
		if (parseErr != nil) != (err != nil && err != ErrNoSource) {
			t.Fatalf("error %v, netlink's %v", err, parseErr)
		}
		if parseErr != nil {
			return
		}
		var want Route
		for _, a := range list {
			addr, _ := netip.AddrFromSlice(a.Value)
			switch {
			case a.Attr.Type == unix.RTA_OIF && len(a.Value) == 4:
				want.Interface = binary.NativeEndian.Uint32(a.Value)
			case a.Attr.Type == unix.RTA_PREFSRC && (body[0] == unix.AF_INET && addr.Is4() || body[0] == unix.AF_INET6 && addr.Is6()):
				want.Source = addr.Unmap()
			}
		}
		if diff := cmp.Diff(want, route, comparable); diff != "" {
			t.Fatalf("(-want +got):\n%s", diff)
		}
		if noSource := !want.Source.IsValid() || want.Source.IsUnspecified(); noSource != (err == ErrNoSource) {
			t.Fatalf("%+v: %v", route, err)
		}
	})
}
