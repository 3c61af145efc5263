package main

import (
	"net"

	"golang.org/x/sys/unix"
)

// startHandshake has a connection whose handshake waits for the first Write begin
// with it, and returns when it is over. Before that, the kernel takes CloseWrite
// for the wish to give the connection up (inet_shutdown in net/ipv4/af_inet.c).
func startHandshake(conn *net.TCPConn) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return
	}
	_, _ = conn.Write(nil)
	_ = raw.Write(func(fd uintptr) bool {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		return err != nil || info.State != unix.BPF_TCP_SYN_SENT
	})
}
