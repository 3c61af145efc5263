# Opens as many sockets as it is told to each of so many destinations, as a
# program does that knows of nothing, and checks that each gets its own bytes.
import socket
import sys

peers, each = int(sys.argv[1]), int(sys.argv[2])
held = []
for peer in range(peers):
    for n in range(each):
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        s.settimeout(30)
        try:
            s.connect(("127.2.0.%d" % (peer + 1), 5353))
        except BlockingIOError:  # EAGAIN: there is no port
            continue
        held.append(s)
answered = 0
for n, s in enumerate(held):
    s.send(b"%d" % n)
for n, s in enumerate(held):
    answered += s.recv(100) == b"%d" % n
print(answered, "answered")
