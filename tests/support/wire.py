"""A cable between two network interfaces: frames take their time, and some get lost. What `tc netem` does where the
kernel has it; this needs only raw sockets.

    python -m tests.support.wire plain INTERFACE              # frames of their real size, with their checksums
    python -m tests.support.wire join LEFT RIGHT DELAY LOSS   # seconds in each direction, share of the frames; for ever
"""

import array
import fcntl
import heapq
import random
import select
import socket
import struct
import sys
import time

SIOCETHTOOL = 0x8946
STXCSUM, STSO, SGSO = 0x17, 0x1F, 0x24  # of ethtool: checksums of what is sent, and its cutting, by the card
ALL_PROTOCOLS = 0x0003
OUTGOING = 4  # kind of a packet that was sent on the interface itself


def plain(interface: str) -> None:
    """Switch off what Linux leaves to network cards: frames of 64 KiB, and checksums that are not computed."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for setting in (STSO, SGSO, STXCSUM):
            value = array.array("B", struct.pack("II", setting, 0))
            request = struct.pack("16sP", interface.encode(), value.buffer_info()[0])
            fcntl.ioctl(any_socket.fileno(), SIOCETHTOOL, request)


def join(left: str, right: str, delay: float, loss: float) -> None:
    """Pass frames on for ever."""
    ends = []
    for name in (left, right):
        end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_PROTOCOLS))
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**24)
        end.bind((name, 0))
        ends.append(end)
    sys.stdout.write("joined\n")
    sys.stdout.flush()
    lottery = random.Random(0)
    waiting: list[tuple[float, int, socket.socket, bytes]] = []
    number = 0
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for end in select.select(ends, [], [], pause)[0]:
            frame, address = end.recvfrom(2**16)
            if address[2] == OUTGOING or lottery.random() < loss:
                continue
            number += 1
            other = ends[1 - ends.index(end)]
            heapq.heappush(waiting, (time.monotonic() + delay, number, other, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, other, frame = heapq.heappop(waiting)
            other.send(frame)


if __name__ == "__main__":
    if sys.argv[1] == "plain":
        plain(sys.argv[2])
    else:
        join(sys.argv[2], sys.argv[3], float(sys.argv[4]), float(sys.argv[5]))
