//go:build linux

package main

import (
	"bufio"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/kernels/internal/job"
)

// features finds out what the library makes use of, by trying. The modules of
// sock_diag are left to the tests: a look here would have them loaded.
func features() []job.Feature {
	f := []job.Feature{{Name: "release", Value: release()}}
	for _, o := range []struct {
		name          string
		level, option int
	}{
		{"IP_LOCAL_PORT_RANGE", unix.SOL_IP, unix.IP_LOCAL_PORT_RANGE},
		{"IP_BIND_ADDRESS_NO_PORT", unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT},
		{"TCP_FASTOPEN_CONNECT", unix.SOL_TCP, unix.TCP_FASTOPEN_CONNECT},
		{"SO_BINDTOIFINDEX", unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX},
		{"SO_NETNS_COOKIE", unix.SOL_SOCKET, unix.SO_NETNS_COOKIE},
	} {
		f = append(f, job.Feature{Name: o.name, Value: option(o.level, o.option)})
	}
	f = append(f,
		job.Feature{Name: "MPTCP", Value: socket(unix.AF_INET, unix.IPPROTO_MPTCP)},
		job.Feature{Name: "IPv6", Value: socket(unix.AF_INET6, 0)},
		job.Feature{Name: "hash table of connected UDP sockets", Value: symbol("udp_lib_hash4")})
	for _, name := range []string{"kernel/unprivileged_userns_clone", "user/max_user_namespaces", "net/ipv4/tcp_fastopen"} {
		f = append(f, job.Feature{Name: strings.ReplaceAll(name, "/", "."), Value: sysctl(name)})
	}
	return append(f, bpf()...)
}

func release() string {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return err.Error()
	}
	return unix.ByteSliceToString(name.Release[:])
}

// option says whether a TCP socket has an option.
func option(level, option int) string {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err.Error()
	}
	defer unix.Close(fd)
	// The cookie is of 64 bits; the others make do with the first 32.
	_, err = unix.GetsockoptUint64(fd, level, option)
	return yesOr(err)
}

// socket says whether there are stream sockets of a family and protocol.
func socket(family, protocol int) string {
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, protocol)
	if err == nil {
		unix.Close(fd)
	}
	return yesOr(err)
}

func yesOr(err error) string {
	if errno, ok := err.(unix.Errno); ok {
		return unix.ErrnoName(errno)
	}
	return "yes"
}

// symbol says whether the kernel has a function, which tells of what cannot be
// tried.
func symbol(name string) string {
	file, err := os.Open("/proc/kallsyms")
	if err != nil {
		return "unknown"
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if fields := strings.Fields(lines.Text()); len(fields) > 2 && fields[2] == name {
			return "yes"
		}
	}
	return "no"
}

func sysctl(name string) string {
	value, err := os.ReadFile("/proc/sys/" + name)
	if err != nil {
		return "-"
	}
	return strings.TrimSpace(string(value))
}
