// Package holders has other processes hold sockets, so that measurements can
// fill a port range that is larger than the number of descriptors a process may
// have. It is for Linux.
package holders
