//go:build linux

package connectx_test

import "golang.org/x/sys/unix"

// sysStat is the number of the call that stat(3) makes.
const sysStat = unix.SYS_FSTATAT
