//go:build !linux

package main

import "net"

// startHandshake has nothing to do where there is no Fast Open.
func startHandshake(*net.TCPConn) {}
