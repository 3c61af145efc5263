//go:build !linux

package connectx

import (
	"context"
	"errors"
	"net"
	"runtime"
	"syscall"
)

// supported is false where a Dialer is a plain net.Dialer.
const supported = false

// run is the body of the hook on Linux (dialer_linux.go).
func (h *hook) run(ctx context.Context, network, address string, c syscall.RawConn) error {
	if protocolOf(network) == "" && !isIP(network) {
		return h.userControl(ctx, network, address, c)
	}
	if len(h.sources) > 0 {
		return &fieldError{field: "SourceAddrs", value: addrList(h.sources), problem: "needs Linux, not " + runtime.GOOS, err: errors.ErrUnsupported}
	}
	return &fieldError{field: "PortRange", value: h.ports.String(), problem: "needs Linux, not " + runtime.GOOS, err: errors.ErrUnsupported}
}

// runIP is the same for raw IP sockets.
func (h *hook) runIP(ctx context.Context, network, address string, c syscall.RawConn) error {
	return h.run(ctx, network, address, c)
}

// dropStrangers has nothing to do here.
func dropStrangers(*net.UDPConn) {}
