//go:build !linux

package connectx

import (
	"context"
	"errors"
	"net/netip"
)

func usage(context.Context, string, []netip.Addr, netip.AddrPort, PortRange) ([]PortUsage, error) {
	return nil, errors.ErrUnsupported
}
