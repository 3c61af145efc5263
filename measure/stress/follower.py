"""Dials UDP with shared source ports, as connectx does, and is told what to do.

While a bound UDP socket has SO_REUSEADDR off, nobody else can bind its port. So
bind with the flag on, take it off, and ask the kernel which socket would receive
what the peer sends: only if it is this one, connect. Then set the flag again.
"""
import errno
import socket
import struct
import sys
import time

SO_COOKIE = 57
NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST = 1
NLMSG_ERROR = 2

diag = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG)
diag.bind((0, 0))


def lookup(family, local, remote):
    """Return cookie and peer of the socket that would receive, or None.

    The request is a struct inet_diag_req_v2 with one exact 4-tuple, not a dump.
    Its source is that of the datagram: the remote address.
    """
    def packed(host):
        return socket.inet_pton(family, host).ljust(16, b"\0")

    body = struct.pack("=BBBBI", family, socket.IPPROTO_UDP, 0, 0, 0xFFFFFFFF)
    body += struct.pack(">HH", remote[1], local[1]) + packed(remote[0]) + packed(local[0])
    body += struct.pack("=IQ", 0, 0xFFFFFFFFFFFFFFFF)
    header = struct.pack("=IHHII", 16 + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 1, 0)
    diag.send(header + body)
    reply = diag.recv(4096)
    kind = struct.unpack_from("=H", reply, 4)[0]
    if kind == NLMSG_ERROR:
        code = -struct.unpack_from("=i", reply, 16)[0]
        if code == errno.ENOENT:
            return None
        raise OSError(code, "sock_diag")
    port = struct.unpack_from(">H", reply, 16 + 6)[0]
    size = 4 if family == socket.AF_INET else 16
    peer = socket.inet_ntop(family, reply[16 + 24:16 + 24 + size])
    cookie = struct.unpack_from("=Q", reply, 16 + 44)[0]
    return cookie, (peer, port)


def attempt(local, remote):
    """Try one 4-tuple: a socket, or why there is none."""
    family = socket.AF_INET6 if ":" in local[0] else socket.AF_INET
    s = socket.socket(family, socket.SOCK_DGRAM)
    cookie = struct.unpack("=Q", s.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))[0]
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        s.bind(local)
    except OSError as e:
        s.close()
        if e.errno != errno.EADDRINUSE:
            raise
        return "locked"
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    found = lookup(family, local, remote)
    if found is None or found[0] != cookie:
        s.close()
        return "conflict" if found and found[1] == remote else "locked"
    s.connect(remote)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # What came while the socket was open to everybody.
    s.setblocking(False)
    try:
        while True:
            s.recv(1)
    except BlockingIOError:
        pass
    s.settimeout(10)
    return s


def dial(source, destination, port, *candidates):
    """Try the source ports in turn; a single one for as long as it is locked."""
    remote = (destination, int(port))
    tries = 200 if len(candidates) == 1 else 1
    for candidate in candidates:
        for _ in range(tries):
            got = attempt((source, int(candidate)), remote)
            if got != "locked":
                break
            time.sleep(0.0002)
        if not isinstance(got, str):
            held[got.fileno()] = got
            return "connected %d %s" % (got.fileno(), candidate)
    return got if len(candidates) == 1 else "exhausted"


def receive(s):
    try:
        return "answer " + s.recv(256).hex()
    except OSError as e:
        return "error %s" % e


held = {}
for line in sys.stdin:
    command, *words = line.split()
    if command == "ready":
        answer = command
    elif command == "dial":
        answer = dial(*words)
    elif command == "echo":
        held[int(words[0])].send(bytes.fromhex(words[1]))
        answer = receive(held[int(words[0])])
    elif command == "more":
        answer = receive(held[int(words[0])])
    else:
        held.pop(int(words[0])).close()
        answer = "closed"
    print(answer, flush=True)
