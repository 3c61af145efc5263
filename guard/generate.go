package guard

// Debian 12 on amd64 has what it takes: clang 14, llvm, libbpf-dev and
// linux-libc-dev. Other versions of clang make another object.
//go:generate go tool bpf2go -target bpfel -type tuple -type denial -type port_set -type counter -type doubt programs bpf/guard.c -- -O2 -mcpu=v3 -Wall -Werror -I/usr/include/x86_64-linux-gnu
