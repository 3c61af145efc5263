package guard

import (
	"encoding/binary"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// A TCP program that binds a source address gets a port from bind, which no other
// socket that binds has, before anybody knows the destination. These tests show
// why a guard does nothing about that.

// Offsets in struct bpf_sock_addr.
const (
	offsetUserPort = 24
	offsetType     = 32
)

// attachProgram runs a program, which has the context in R6, in the test's cgroup.
func attachProgram(t *testing.T, to ebpf.AttachType, body ...asm.Instructions) {
	t.Helper()
	p, err := loadProgram(t, to, body...)
	if err != nil {
		t.Fatal(err)
	}
	l, err := link.AttachCgroup(link.CgroupOptions{Path: group, Attach: to, Program: p})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
}

// loadProgram returns the verifier's error. It skips the test where nothing can be
// loaded.
func loadProgram(t *testing.T, to ebpf.AttachType, body ...asm.Instructions) (*ebpf.Program, error) {
	t.Helper()
	needCgroup(t)
	if missing := missingCapabilities(); len(missing) > 0 {
		t.Skipf("needs %v", missing)
	}
	instructions := asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}
	for _, part := range body {
		instructions = append(instructions, part...)
	}
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSockAddr, AttachType: to, License: "GPL", Instructions: instructions,
	})
	if err == nil {
		t.Cleanup(func() { p.Close() })
	}
	return p, err
}

// setOption calls bpf_setsockopt.
func setOption(level, option int32) asm.Instructions {
	return asm.Instructions{
		asm.StoreImm(asm.RFP, -4, 1, asm.Word),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, level),
		asm.Mov.Imm(asm.R3, option),
		asm.Mov.Reg(asm.R4, asm.RFP),
		asm.Add.Imm(asm.R4, -4),
		asm.Mov.Imm(asm.R5, 4),
		asm.FnSetsockopt.Call(),
	}
}

// bindAddress calls bpf_bind with an IPv4 address and port 0, which for the kernel
// means IP_BIND_ADDRESS_NO_PORT (BIND_FORCE_ADDRESS_NO_PORT).
func bindAddress(address [4]byte) asm.Instructions {
	return asm.Instructions{
		asm.StoreImm(asm.RFP, -16, unix.AF_INET, asm.Half),
		asm.StoreImm(asm.RFP, -14, 0, asm.Half),
		asm.StoreImm(asm.RFP, -12, int64(int32(binary.NativeEndian.Uint32(address[:]))), asm.Word),
		asm.StoreImm(asm.RFP, -8, 0, asm.Word),
		asm.StoreImm(asm.RFP, -4, 0, asm.Word),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -16),
		asm.Mov.Imm(asm.R3, 16),
		asm.FnBind.Call(),
	}
}

var (
	succeed = asm.Instructions{asm.Mov.Imm(asm.R0, 0)}
	allow   = asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()}
	// The system call ends with what is in R0, and with EPERM if that is no
	// error.
	end = asm.Instructions{asm.Mov.Reg(asm.R1, asm.R0), asm.FnSetRetval.Call(), asm.Mov.Imm(asm.R0, 0), asm.Return()}
	// Only TCP sockets that bind port 0 are concerned.
	allowOthers = asm.Instructions{
		asm.LoadMem(asm.R1, asm.R6, offsetType, asm.Word),
		asm.JNE.Imm(asm.R1, unix.SOCK_STREAM, "allow"),
		asm.LoadMem(asm.R1, asm.R6, offsetUserPort, asm.Word),
		asm.JEq.Imm(asm.R1, 0, "concerned"),
		asm.Mov.Imm(asm.R0, 1).WithSymbol("allow"),
		asm.Return(),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("concerned"),
	}
)

func openTCP(t *testing.T) *socket {
	t.Helper()
	fd, err := unix.Socket(v4, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	s := &socket{t: t, fd: fd, family: v4}
	t.Cleanup(s.close)
	// Nothing of it is to be left in TIME_WAIT.
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		t.Fatal(err)
	}
	return s
}

// listen lets the kernel take connections at all peers.
func listen(t *testing.T) {
	t.Helper()
	for n := range sharePeers {
		s := openTCP(t)
		s.set(unix.SO_REUSEADDR, 1)
		s.bind(sharePeer(n) + ":5353")
		if err := unix.Listen(s.fd, 1024); err != nil {
			t.Fatal(err)
		}
	}
}

func TestWhatTheKernelDoesNotAllowForTCP(t *testing.T) {
	for _, test := range []struct {
		name    string
		to      ebpf.AttachType
		program []asm.Instructions
		bind    error
		connect error
	}{
		{"IP_BIND_ADDRESS_NO_PORT in bind", ebpf.AttachCGroupInet4Bind,
			[]asm.Instructions{allowOthers, setOption(unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT), end}, unix.EINVAL, nil},
		{"to leave the bind out", ebpf.AttachCGroupInet4Bind,
			[]asm.Instructions{allowOthers, succeed, end}, unix.EPERM, nil},
		{"another port in connect", ebpf.AttachCGroupInet4Connect,
			[]asm.Instructions{bindAddress([4]byte{127, 0, 0, 1}), end}, nil, unix.EINVAL},
	} {
		t.Run(test.name, func(t *testing.T) {
			attachProgram(t, test.to, test.program...)
			listen(t)
			s := openTCP(t)
			if err := unix.Bind(s.fd, s.address("127.0.0.1:0")); !errors.Is(err, test.bind) {
				t.Errorf("bind: %v, want %v", err, test.bind)
			}
			if test.bind == nil {
				s.mustFail(sharePeer(0)+":5353", test.connect)
			}
		})
	}
	t.Run("bpf_bind in bind", func(t *testing.T) {
		_, err := loadProgram(t, ebpf.AttachCGroupInet4Bind, bindAddress([4]byte{127, 0, 0, 1}), allow)
		if want := "bpf_bind#64"; err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want the verifier to refuse %s", err, want)
		}
	})
}

// A program gives a socket that connects unbound an address, without a port.
func TestASourceAddressForTCPInConnect(t *testing.T) {
	attachProgram(t, ebpf.AttachCGroupInet4Connect, bindAddress([4]byte{127, 0, 0, 5}), allow)
	listen(t)
	setPorts(t, nil, 43000, 43003, "")
	for n := range sharePeers {
		peer := sharePeer(n) + ":5353"
		for range 4 {
			s := openTCP(t).mustConnect(peer)
			if sa, err := unix.Getsockname(s.fd); err != nil || sa.(*unix.SockaddrInet4).Addr != [4]byte{127, 0, 0, 5} {
				t.Errorf("from %v, %v", sa, err)
			}
		}
		openTCP(t).mustFail(peer, unix.EADDRNOTAVAIL)
	}
}

// Programs that turn SO_REUSEADDR on in bind let TCP programs go past the
// ephemeral ports, but not to all 4-tuples, since the destination is not known:
// some connects fail with an error that they did not have before.
func TestHowFarTCPGetsThatBindsAnAddress(t *testing.T) {
	const ports, all = shareHigh - shareLow + 1, (shareHigh - shareLow + 1) * sharePeers
	randomPort := asm.Instructions{
		asm.FnGetPrandomU32.Call(),
		asm.Mod.Imm(asm.R0, ports),
		asm.Add.Imm(asm.R0, shareLow),
		asm.HostTo(asm.BE, asm.R0, asm.Half),
		asm.StoreMem(asm.R6, offsetUserPort, asm.R0, asm.Word),
	}
	// connectAll returns how many of as many as there are 4-tuples connect, and
	// how many fail in bind and in connect.
	connectAll := func(t *testing.T) (connected, noPort, taken int) {
		listen(t)
		setPorts(t, nil, shareLow, shareHigh, "")
		for n := range sharePeers {
			for range ports {
				s := openTCP(t)
				switch err := unix.Bind(s.fd, s.address("127.0.0.1:0")); err {
				case nil:
				case unix.EADDRINUSE:
					noPort++
					continue
				default:
					t.Fatal(err)
				}
				switch err := s.connect(sharePeer(n) + ":5353"); err {
				case nil:
					connected++
				case unix.EADDRNOTAVAIL:
					taken++
					s.close()
				default:
					t.Fatal(err)
				}
			}
		}
		t.Logf("of %d, %d connected; %d had no port, and the 4-tuple of %d was taken", all, connected, noPort, taken)
		return connected, noPort, taken
	}
	t.Run("by themselves", func(t *testing.T) {
		needCgroup(t)
		if connected, noPort, _ := connectAll(t); connected != ports || noPort != all-ports {
			t.Errorf("%d connected, want %d", connected, ports)
		}
	})
	for _, test := range []struct {
		name    string
		sysctl  string
		program []asm.Instructions
	}{
		{"with ip_autobind_reuse", "1", []asm.Instructions{allowOthers, setOption(unix.SOL_SOCKET, unix.SO_REUSEADDR), allow}},
		{"with a random port", "0", []asm.Instructions{allowOthers, setOption(unix.SOL_SOCKET, unix.SO_REUSEADDR), randomPort, allow}},
	} {
		t.Run(test.name, func(t *testing.T) {
			attachProgram(t, ebpf.AttachCGroupInet4Bind, test.program...)
			restore(t, "ip_autobind_reuse", func() error {
				return os.WriteFile("/proc/sys/net/ipv4/ip_autobind_reuse", []byte(test.sysctl), 0)
			})
			connected, noPort, taken := connectAll(t)
			if connected <= 2*ports || taken == 0 || noPort != 0 {
				t.Errorf("%d connected, %d without a port, %d taken; want more than %d, none, some", connected, noPort, taken, 2*ports)
			}
		})
	}
}
