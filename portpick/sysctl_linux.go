package portpick

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// A Sysctl reads the ephemeral port range of one network namespace. It holds
// the two files of /proc/sys/net/ipv4 open: an open file keeps to its
// namespace, whichever thread reads it.
//
// It is not safe for concurrent use.
type Sysctl struct {
	portRange, reserved int
	buf                 []byte
}

// OpenSysctl opens the sysctls of the calling thread's network namespace.
func OpenSysctl() (*Sysctl, error) {
	portRange, err := openSysctl("ip_local_port_range")
	if err != nil {
		return nil, err
	}
	reserved, err := openSysctl("ip_local_reserved_ports")
	if err != nil {
		unix.Close(portRange)
		return nil, err
	}
	return &Sysctl{portRange: portRange, reserved: reserved, buf: make([]byte, 64)}, nil
}

func openSysctl(name string) (int, error) {
	path := "/proc/sys/net/ipv4/" + name
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

// Close closes the files.
func (s *Sysctl) Close() error {
	return errors.Join(unix.Close(s.portRange), unix.Close(s.reserved))
}

// Ports reads the port range and the reserved ports as they are now. If they
// are the same as in old, which may be nil, it returns old.
func (s *Sysctl) Ports(old *Ports) (*Ports, error) {
	portRange, err := s.read(s.portRange)
	if err != nil {
		return nil, fmt.Errorf("read ip_local_port_range: %w", err)
	}
	reserved, err := s.read(s.reserved)
	if err != nil {
		return nil, fmt.Errorf("read ip_local_reserved_ports: %w", err)
	}
	ports, err := ParsePorts(portRange, reserved)
	if err == nil && old != nil && ports.equal(old) {
		return old, nil
	}
	return ports, err
}

// read returns a whole file. The kernel hands a sysctl out only to reads from
// its start, so a buffer that was too small is made larger and filled anew.
func (s *Sysctl) read(fd int) (string, error) {
	for {
		n, err := unix.Pread(fd, s.buf, 0)
		if err != nil {
			return "", err
		}
		if n < len(s.buf) {
			return string(s.buf[:n]), nil
		}
		s.buf = make([]byte, 2*len(s.buf))
	}
}
