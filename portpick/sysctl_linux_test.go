package portpick

import (
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/seed22601231/connectx/internal/netns"
)

func TestMain(m *testing.M) { os.Exit(netns.Main(m.Run)) }

// enter gives the test a namespace that it may set the sysctls of.
func enter(t *testing.T) {
	t.Helper()
	netns.Need(t)
	if err := netns.Enter(); err != nil {
		t.Fatal(err)
	}
}

func openTestSysctl(t *testing.T) *Sysctl {
	t.Helper()
	s, err := OpenSysctl()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func readPorts(t *testing.T, s *Sysctl, old *Ports) *Ports {
	t.Helper()
	p, err := s.Ports(old)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func setRange(t *testing.T, low, high uint16) {
	t.Helper()
	if err := netns.SetPortRange(low, high); err != nil {
		t.Fatal(err)
	}
}

func setReserved(t *testing.T, list string) {
	t.Helper()
	if err := netns.SetReservedPorts(list); err != nil {
		t.Fatal(err)
	}
}

func TestSysctlReadsTheFilesOfProc(t *testing.T) {
	portRange, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		t.Skip(err)
	}
	reserved, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_reserved_ports")
	if err != nil {
		t.Skip(err)
	}
	want, err := ParsePorts(string(portRange), string(reserved))
	if err != nil {
		t.Fatal(err)
	}
	if got := readPorts(t, openTestSysctl(t), nil); !got.equal(want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestSysctlFollowsEveryChange(t *testing.T) {
	enter(t)
	s := openTestSysctl(t)
	var last *Ports
	for _, step := range []struct {
		name     string
		change   func()
		want     string
		reserved []uint16
	}{
		{"a range", func() { setRange(t, 40000, 40009) }, "40000-40009", nil},
		{"a larger range", func() { setRange(t, 1024, 65535) }, "1024-65535", nil},
		{"a smaller range", func() { setRange(t, 40000, 40099) }, "40000-40099", nil},
		{"reserved ports", func() { setReserved(t, "40003,40010-40019") }, "40000-40099 without 11 reserved", []uint16{40003, 40010, 40019}},
		{"as many other reserved ports", func() { setReserved(t, "40004,40020-40029") }, "40000-40099 without 11 reserved", []uint16{40004, 40020, 40029}},
		{"fewer reserved ports", func() { setReserved(t, "40004") }, "40000-40099 without 1 reserved", []uint16{40004}},
		{"no reserved port", func() { setReserved(t, "") }, "40000-40099", nil},
	} {
		step.change()
		p := readPorts(t, s, last)
		if p == last {
			t.Errorf("%s: the ports are the same as before: %v", step.name, p)
		}
		if p.String() != step.want {
			t.Errorf("%s: %v, want %s", step.name, p, step.want)
		}
		for _, port := range step.reserved {
			if p.Contains(port) {
				t.Errorf("%s: port %d is not reserved", step.name, port)
			}
		}
		if again := readPorts(t, s, p); again != p {
			t.Errorf("%s: nothing has changed since, but there are new ports", step.name)
		}
		last = p
	}
}

// The kernel gives the list out in one read from the start or not at all, so
// a buffer that is too small would lose the end of it.
func TestSysctlReadsReservedListsOfAnyLength(t *testing.T) {
	enter(t)
	s := openTestSysctl(t)
	setRange(t, 1024, 65535)
	// A port takes six bytes. The first buffer holds 64; the longest list is
	// past seven pages, and the kernel takes it in several writes.
	for _, count := range []int{1, 9, 10, 11, 12, 20, 21, 22, 100, 1000, 5000} {
		list := make([]string, count)
		for i := range list {
			list[i] = strconv.Itoa(10001 + 2*i)
		}
		setReserved(t, strings.Join(list, ","))
		p := readPorts(t, s, nil)
		if got := 65535 - 1024 + 1 - p.Len(); got != count {
			t.Errorf("%d reserved ports, want %d", got, count)
		}
		for port := 1024; port <= 65535; port++ {
			want := port < 10001 || port > 10001+2*(count-1) || port%2 == 0
			if p.Contains(uint16(port)) != want {
				t.Fatalf("%d reserved ports: %d can be used: %v", count, port, !want)
			}
		}
	}
}

// A list whose text ends exactly where a buffer does.
func TestSysctlReadsAListThatFillsTheBuffer(t *testing.T) {
	enter(t)
	s := openTestSysctl(t)
	setRange(t, 1024, 65535)
	// Each port of four digits takes five bytes with its comma or newline, a
	// port of five digits takes six: 64 = 2×5 + 9×6, 63 = 3×5 + 8×6,
	// 65 = 1×5 + 10×6.
	for _, n := range []struct{ four, five int }{{3, 8}, {2, 9}, {1, 10}} {
		var list []string
		for i := range n.four {
			list = append(list, strconv.Itoa(2001+2*i))
		}
		for i := range n.five {
			list = append(list, strconv.Itoa(20001+2*i))
		}
		setReserved(t, strings.Join(list, ","))
		p := readPorts(t, s, nil)
		if got, want := 65535-1024+1-p.Len(), n.four+n.five; got != want {
			t.Errorf("%d reserved ports, want %d", got, want)
		}
	}
}

func TestSysctlKeepsToTheNamespaceItWasOpenedIn(t *testing.T) {
	enter(t)
	setRange(t, 50000, 50009)
	here := openTestSysctl(t)

	type result struct {
		sysctl *Sysctl
		err    error
	}
	opened, reread, done := make(chan result), make(chan struct{}), make(chan error)
	go func() {
		// Another thread in a namespace of its own.
		var r result
		if r.err = netns.Enter(); r.err == nil {
			if r.err = netns.SetPortRange(41000, 41004); r.err == nil {
				if r.err = netns.SetReservedPorts("41002"); r.err == nil {
					r.sysctl, r.err = OpenSysctl()
				}
			}
		}
		opened <- r
		<-reread
		if r.err == nil {
			r.err = netns.SetPortRange(42000, 42004)
		}
		done <- r.err
	}()
	there := <-opened
	if there.err != nil {
		close(reread)
		<-done
		t.Fatal(there.err)
	}
	defer there.sysctl.Close()

	if got, want := readPorts(t, there.sysctl, nil).String(), "41000-41004 without 1 reserved"; got != want {
		t.Errorf("the other namespace, read from here: %s, want %s", got, want)
	}
	if got, want := readPorts(t, here, nil).String(), "50000-50009"; got != want {
		t.Errorf("this namespace: %s, want %s", got, want)
	}
	close(reread)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got, want := readPorts(t, there.sysctl, nil).String(), "42000-42004"; got != want {
		t.Errorf("the other namespace after a change, when its thread is gone: %s, want %s", got, want)
	}

	// And this one's, from a thread that is somewhere else.
	read := make(chan string)
	go func() {
		if err := netns.Enter(); err != nil {
			read <- err.Error()
			return
		}
		p, err := here.Ports(nil)
		if err != nil {
			read <- err.Error()
			return
		}
		read <- p.String()
	}()
	if got, want := <-read, "50000-50009"; got != want {
		t.Errorf("this namespace, read from the other: %s, want %s", got, want)
	}
}

func TestSysctlLeavesNoDescriptorBehind(t *testing.T) {
	before := countDescriptors(t)
	for range 10 {
		s, err := OpenSysctl()
		if err != nil {
			t.Fatal(err)
		}
		if n := countDescriptors(t); n != before+2 {
			t.Fatalf("an open Sysctl has %d descriptors, want 2", n-before)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if n := countDescriptors(t); n != before {
			t.Fatalf("%d descriptors are left after Close", n-before)
		}
		if _, err := s.Ports(nil); err == nil {
			t.Error("a closed Sysctl can be read")
		}
	}
}

func countDescriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip(err)
	}
	return len(entries)
}

func BenchmarkSysctl(b *testing.B) {
	s, err := OpenSysctl()
	if err != nil {
		b.Skip(err)
	}
	defer s.Close()
	b.ReportAllocs()
	var p *Ports
	for b.Loop() {
		if p, err = s.Ports(p); err != nil {
			b.Fatal(err)
		}
	}
}
