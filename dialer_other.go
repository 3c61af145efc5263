//go:build !linux

package connectx

import (
	"context"
	"net"
	"syscall"
)

// supported is false where a Dialer is a plain net.Dialer.
const supported = false

// run is the body of the hook on Linux (dialer_linux.go).
func (h *hook) run(ctx context.Context, network, address string, c syscall.RawConn) error {
	return h.userControl(ctx, network, address, c)
}

// dropStrangers has nothing to do here.
func dropStrangers(*net.UDPConn) {}
