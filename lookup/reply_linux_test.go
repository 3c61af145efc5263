package lookup

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

const (
	testSeq  = 7
	testPort = 4711
)

// message is a netlink message with a header and the parts of a body.
func message(kind uint16, seq, port uint32, body ...[]byte) []byte {
	b := make([]byte, unix.SizeofNlMsghdr)
	binary.NativeEndian.PutUint16(b[4:], kind)
	binary.NativeEndian.PutUint32(b[8:], seq)
	binary.NativeEndian.PutUint32(b[12:], port)
	b = append(b, slices.Concat(body...)...)
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	return b
}

// saying is a message whose header gives another length than it has.
func saying(length uint32, b []byte) []byte {
	b = slices.Clone(b)
	binary.NativeEndian.PutUint32(b, length)
	return b
}

func int32Bytes(n int32) []byte {
	return binary.NativeEndian.AppendUint32(nil, uint32(n))
}

// rtmsg is the header of a route, struct rtmsg.
func rtmsg(family byte) []byte {
	b := make([]byte, unix.SizeofRtMsg)
	b[0] = family
	return b
}

// attr is an attribute, padded.
func attr(kind uint16, value ...byte) []byte {
	b := attrSaying(unix.SizeofRtAttr+len(value), kind, value...)
	return append(b, make([]byte, align4(len(b))-len(b))...)
}

// attrSaying is an attribute whose header gives that length, not padded.
func attrSaying(length int, kind uint16, value ...byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(length))
	b = binary.NativeEndian.AppendUint16(b, kind)
	return append(b, value...)
}

func oif(index uint32) []byte {
	return attr(unix.RTA_OIF, binary.NativeEndian.AppendUint32(nil, index)...)
}

// diagMessage is a struct inet_diag_msg.
func diagMessage(family byte, local, remote netip.AddrPort, cookie uint64, uid uint32) []byte {
	b := make([]byte, sizeofDiagMessage)
	b[0] = family
	id := b[messageID:]
	binary.BigEndian.PutUint16(id[idSourcePort:], local.Port())
	binary.BigEndian.PutUint16(id[idDestPort:], remote.Port())
	copy(id[idSource:idDest], local.Addr().AsSlice())
	copy(id[idDest:idInterface], remote.Addr().AsSlice())
	binary.NativeEndian.PutUint64(id[idCookie:], cookie)
	binary.NativeEndian.PutUint32(b[64:], uid)
	return b
}

func TestParseReply(t *testing.T) {
	const kind = unix.RTM_NEWROUTE
	body := []byte("the body")
	good := message(kind, testSeq, testPort, body)
	failed := message(unix.NLMSG_ERROR, testSeq, testPort, int32Bytes(-int32(unix.ENETUNREACH)), make([]byte, 16))
	tests := []struct {
		name  string
		reply []byte
		want  []byte
		is    error  // what the error has to be
		says  string // or what it has to say
	}{
		{"an answer", good, body, nil, ""},
		{"an answer without a body", message(kind, testSeq, testPort), []byte{}, nil, ""},
		{"an answer with something behind it", append(slices.Clone(good), 1, 2, 3, 4), body, nil, ""},
		{"nothing", nil, nil, nil, "0 bytes is too short"},
		{"half a header", good[:15], nil, nil, "15 bytes is too short"},
		{"an answer that is cut off", good[:len(good)-1], nil, nil, "says 24 bytes and has 23"},
		{"a length below that of the header", saying(15, good), nil, nil, "says 15 bytes"},
		{"a length of zero", saying(0, good), nil, nil, "says 0 bytes"},
		{"the largest length", saying(1<<32-1, good), nil, nil, "says 4294967295 bytes"},
		{"another type", message(unix.RTM_NEWADDR, testSeq, testPort, body), nil, nil, "type 20, not 24"},
		{"the end of a dump", message(unix.NLMSG_DONE, testSeq, testPort, body), nil, nil, "type 3, not 24"},
		{"another number", message(kind, testSeq+1, testPort, body), nil, errOtherReply, ""},
		{"an older number", message(kind, testSeq-1, testPort, body), nil, errOtherReply, ""},
		{"an answer to somebody else", message(kind, testSeq, testPort+1, body), nil, errOtherReply, ""},
		{"the kernel's own message", message(kind, testSeq, 0, body), nil, errOtherReply, ""},
		{"a long message to somebody else that is cut off", saying(5000, message(kind, 0, 0, body)), nil, errOtherReply, ""},
		{"an error for somebody else", message(unix.NLMSG_ERROR, testSeq, testPort+1, int32Bytes(-1)), nil, errOtherReply, ""},
		{"an error", failed, nil, unix.ENETUNREACH, ""},
		{"an error that has nothing but the number", message(unix.NLMSG_ERROR, testSeq, testPort, int32Bytes(-int32(unix.ENOENT))), nil, unix.ENOENT, ""},
		{"an error that is cut off", message(unix.NLMSG_ERROR, testSeq, testPort, []byte{1, 2, 3}), nil, nil, "error of 3 bytes is too short"},
		{"an acknowledgement", message(unix.NLMSG_ERROR, testSeq, testPort, int32Bytes(0), make([]byte, 16)), nil, nil, "acknowledged without an answer"},
		{"an error with the wrong sign", message(unix.NLMSG_ERROR, testSeq, testPort, int32Bytes(2)), nil, nil, "acknowledged without an answer"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseReply(tt.reply, kind, testSeq, testPort)
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("body (-want +got):\n%s", diff)
			}
			switch {
			case tt.is != nil:
				if err != tt.is {
					t.Errorf("%v, want %v", err, tt.is)
				}
			case tt.says != "":
				if err == nil || !strings.Contains(err.Error(), tt.says) {
					t.Errorf("%v, want %q", err, tt.says)
				}
			case err != nil:
				t.Error(err)
			}
		})
	}
}

func TestParseDiagMessage(t *testing.T) {
	four, six := netip.MustParseAddrPort("192.0.2.1:40000"), netip.MustParseAddrPort("[2001:db8::1]:40001")
	mapped := netip.MustParseAddrPort("[::ffff:192.0.2.1]:40000")
	tests := []struct {
		name string
		body []byte
		want Socket
	}{
		{"a connected IPv4 socket", diagMessage(unix.AF_INET, four, netip.MustParseAddrPort("198.51.100.7:53"), 1<<63|5, 1000),
			Socket{Cookie: 1<<63 | 5, Local: four, Remote: netip.MustParseAddrPort("198.51.100.7:53"), UID: 1000}},
		{"an unconnected IPv4 socket", diagMessage(unix.AF_INET, four, netip.AddrPort{}, 6, 0),
			Socket{Cookie: 6, Local: four}},
		{"a connected IPv6 socket", diagMessage(unix.AF_INET6, six, netip.MustParseAddrPort("[2001:db8::2]:53"), 7, 1<<32-2),
			Socket{Cookie: 7, Local: six, Remote: netip.MustParseAddrPort("[2001:db8::2]:53"), UID: 1<<32 - 2}},
		{"an unconnected IPv6 socket", diagMessage(unix.AF_INET6, netip.MustParseAddrPort("[::]:40001"), netip.AddrPort{}, 8, 1),
			Socket{Cookie: 8, Local: netip.MustParseAddrPort("[::]:40001"), UID: 1}},
		{"an IPv6 socket that speaks IPv4", diagMessage(unix.AF_INET6, mapped, mapped, 9, 1),
			Socket{Cookie: 9, Local: four, Remote: four, UID: 1}},
		{"attributes behind it", append(diagMessage(unix.AF_INET, four, netip.AddrPort{}, 6, 0), attr(1, 2, 3, 4, 5)...),
			Socket{Cookie: 6, Local: four}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseDiagMessage(tt.body)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got, comparable); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			for n := range sizeofDiagMessage {
				if got, err := parseDiagMessage(tt.body[:n]); err == nil || got != (Socket{}) {
					t.Fatalf("the first %d bytes: %+v, %v", n, got, err)
				}
			}
		})
	}
}

func TestParseRoute(t *testing.T) {
	addr := netip.MustParseAddr
	source4 := attr(unix.RTA_PREFSRC, 192, 0, 2, 1)
	source6 := attr(unix.RTA_PREFSRC, addr("2001:db8::1").AsSlice()...)
	join := func(parts ...[]byte) []byte { return slices.Concat(parts...) }
	tests := []struct {
		name string
		body []byte
		want Route
		is   error
		says string
	}{
		{"an IPv4 route", join(rtmsg(unix.AF_INET), source4, oif(3)), Route{addr("192.0.2.1"), 3}, nil, ""},
		{"an IPv6 route", join(rtmsg(unix.AF_INET6), source6, oif(4)), Route{addr("2001:db8::1"), 4}, nil, ""},
		{"the attributes in another order, among others", join(rtmsg(unix.AF_INET), attr(unix.RTA_TABLE, 1, 0, 0, 0), oif(3), attr(unix.RTA_DST, 10, 0, 0, 1), source4, attr(unix.RTA_CACHEINFO, make([]byte, 32)...)), Route{addr("192.0.2.1"), 3}, nil, ""},
		{"attributes of odd lengths before it", join(rtmsg(unix.AF_INET), attr(99, 1), attr(98, 1, 2, 3), attr(97), source4, oif(3)), Route{addr("192.0.2.1"), 3}, nil, ""},
		{"a last attribute without its padding", join(rtmsg(unix.AF_INET), source4, oif(3), attrSaying(5, 99, 1)), Route{addr("192.0.2.1"), 3}, nil, ""},
		{"no interface", join(rtmsg(unix.AF_INET), source4), Route{addr("192.0.2.1"), 0}, nil, ""},
		{"fewer bytes behind the last attribute than a header has", join(rtmsg(unix.AF_INET), source4, oif(3), []byte{9, 9, 9}), Route{addr("192.0.2.1"), 3}, nil, ""},
		{"no attributes", rtmsg(unix.AF_INET), Route{}, ErrNoSource, ""},
		{"no source", join(rtmsg(unix.AF_INET), oif(3)), Route{Interface: 3}, ErrNoSource, ""},
		{"the unspecified address as source", join(rtmsg(unix.AF_INET), attr(unix.RTA_PREFSRC, 0, 0, 0, 0), oif(3)), Route{addr("0.0.0.0"), 3}, ErrNoSource, ""},
		{"the unspecified IPv6 address as source", join(rtmsg(unix.AF_INET6), attr(unix.RTA_PREFSRC, make([]byte, 16)...)), Route{Source: addr("::")}, ErrNoSource, ""},
		{"a source of the other family", join(rtmsg(unix.AF_INET), source6, oif(3)), Route{Interface: 3}, ErrNoSource, ""},
		{"a source of three bytes", join(rtmsg(unix.AF_INET), attr(unix.RTA_PREFSRC, 192, 0, 2), oif(3)), Route{Interface: 3}, ErrNoSource, ""},
		{"a source of five bytes", join(rtmsg(unix.AF_INET), attr(unix.RTA_PREFSRC, 192, 0, 2, 1, 0), oif(3)), Route{Interface: 3}, ErrNoSource, ""},
		{"an empty source", join(rtmsg(unix.AF_INET), attr(unix.RTA_PREFSRC), oif(3)), Route{Interface: 3}, ErrNoSource, ""},
		{"an interface of two bytes", join(rtmsg(unix.AF_INET), source4, attr(unix.RTA_OIF, 3, 0)), Route{addr("192.0.2.1"), 0}, nil, ""},
		{"an unknown family", join(rtmsg(99), source4, oif(3)), Route{Interface: 3}, ErrNoSource, ""},
		{"nothing", nil, Route{}, nil, "0 bytes is too short"},
		{"half a header", rtmsg(unix.AF_INET)[:11], Route{}, nil, "11 bytes is too short"},
		{"an attribute that is longer than what is left", join(rtmsg(unix.AF_INET), source4, attrSaying(9, unix.RTA_OIF, 3, 0, 0, 0)), Route{}, nil, "attribute of 9 bytes where 8 are left"},
		{"an attribute of the largest length", join(rtmsg(unix.AF_INET), attrSaying(65535, unix.RTA_PREFSRC, 192, 0, 2, 1)), Route{}, nil, "attribute of 65535 bytes where 8 are left"},
		{"an attribute that is shorter than its header", join(rtmsg(unix.AF_INET), attrSaying(3, unix.RTA_PREFSRC), source4), Route{}, nil, "attribute of 3 bytes"},
		{"an attribute of length zero, which would never end", join(rtmsg(unix.AF_INET), attrSaying(0, unix.RTA_PREFSRC), source4), Route{}, nil, "attribute of 0 bytes"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseRoute(tt.body)
			if diff := cmp.Diff(tt.want, got, comparable); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			switch {
			case tt.is != nil:
				if err != tt.is {
					t.Errorf("%v, want %v", err, tt.is)
				}
			case tt.says != "":
				if err == nil || !strings.Contains(err.Error(), tt.says) {
					t.Errorf("%v, want %q", err, tt.says)
				}
			case err != nil:
				t.Error(err)
			}
		})
	}
}

// Requests are written over what was received last.
func TestARequestHasNothingOfAnEarlierReplyInIt(t *testing.T) {
	c := &Conn{seq: 6}
	for i := range c.buf {
		c.buf[i] = 0xff
	}
	body := c.request(unix.RTM_GETROUTE, unix.SizeofRtMsg)
	body[0] = unix.AF_INET
	c.attribute(unix.RTA_IP_PROTO, 1)[0] = unix.IPPROTO_UDP
	binary.NativeEndian.PutUint32(c.attribute(unix.RTA_OIF, 4), 3)
	want := message(unix.RTM_GETROUTE, 7, 0, rtmsg(unix.AF_INET), attr(unix.RTA_IP_PROTO, unix.IPPROTO_UDP), oif(3))
	binary.NativeEndian.PutUint16(want[6:], unix.NLM_F_REQUEST)
	if diff := cmp.Diff(want, c.buf[:len(want)]); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// realReplies are what this kernel answers.
func realReplies(t testing.TB) (replies [][]byte) {
	t.Helper()
	c := openConn(t)
	keep := func(err error) {
		check(t, err)
		size := binary.NativeEndian.Uint32(c.buf[:])
		reply := slices.Clone(c.buf[:size])
		// As if the question had had the number and the port that parseAll
		// expects.
		binary.NativeEndian.PutUint32(reply[8:], testSeq)
		binary.NativeEndian.PutUint32(reply[12:], testPort)
		replies = append(replies, reply)
	}
	_, socket := openSocket(t, spec{bind: netip.MustParseAddrPort("127.0.0.1:0"), connect: netip.MustParseAddrPort("127.0.0.2:9")})
	_, err := c.UDP(socket.Local, socket.Remote, 0)
	keep(err)
	_, err = c.UDP(socket.Remote, socket.Local, 0)
	if !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	keep(nil)
	_, err = c.askRoute(netip.MustParseAddrPort("127.0.0.1:53"), RouteOptions{})
	keep(err)
	return replies
}

// parseAll parses a reply as each of the kinds that there are.
func parseAll(t *testing.T, reply []byte) {
	t.Helper()
	for _, kind := range []uint16{unix.SOCK_DIAG_BY_FAMILY, unix.RTM_NEWROUTE} {
		body, err := parseReply(reply, kind, testSeq, testPort)
		if err != nil {
			if body != nil {
				t.Errorf("a body beside the error %v: %x", err, body)
			}
			continue
		}
		if len(body) > len(reply)-unix.SizeofNlMsghdr {
			t.Errorf("a body of %d bytes in a reply of %d", len(body), len(reply))
		}
		if socket, err := parseDiagMessage(body); err == nil {
			if !socket.Local.IsValid() || socket.Connected() != (socket.Remote.Port() != 0) {
				t.Errorf("%+v", socket)
			}
		}
		if route, err := parseRoute(body); err == nil {
			if !route.Source.IsValid() || route.Source.IsUnspecified() || route.Source.Zone() != "" {
				t.Errorf("%+v", route)
			}
		} else if err != ErrNoSource && route != (Route{}) {
			t.Errorf("a route beside the error %v: %+v", err, route)
		}
	}
}

func TestAReplyMayEndAnywhere(t *testing.T) {
	for _, reply := range realReplies(t) {
		for n := range len(reply) + 1 {
			parseAll(t, reply[:n:n])
			if n >= unix.SizeofNlMsghdr {
				parseAll(t, saying(uint32(n), reply[:n:n]))
			}
		}
	}
}

func FuzzReply(f *testing.F) {
	for _, reply := range realReplies(f) {
		f.Add(reply)
		f.Add(reply[:len(reply)-3])
	}
	f.Add(message(unix.RTM_NEWROUTE, testSeq, testPort, rtmsg(unix.AF_INET6), attr(unix.RTA_PREFSRC, make([]byte, 16)...), oif(1)))
	f.Add(message(unix.NLMSG_ERROR, testSeq, testPort, int32Bytes(-int32(unix.ENOENT))))
	f.Fuzz(func(t *testing.T, reply []byte) {
		parseAll(t, reply)
		// Most of what comes out of the fuzzer has the wrong header; what is
		// behind it is worth a try all the same.
		if len(reply) >= unix.SizeofNlMsghdr {
			for _, kind := range []uint16{unix.SOCK_DIAG_BY_FAMILY, unix.RTM_NEWROUTE} {
				parseAll(t, message(kind, testSeq, testPort, reply[unix.SizeofNlMsghdr:]))
			}
		}
	})
}
