//go:build linux

package connectx_test

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// setSocketOption returns a Control hook that sets a socket option to a number.
func setSocketOption(level, option, value int) func(network, address string, c syscall.RawConn) error {
	return func(network, address string, c syscall.RawConn) error {
		var err error
		if ctlErr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), level, option, value)
		}); ctlErr != nil {
			return ctlErr
		}
		return err
	}
}
