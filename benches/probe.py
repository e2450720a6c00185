"""Asks the guest for its counters at a steady pace, from outside, and keeps when each answer came (docs/pulse.md, UDP port 8).

    probe.py ADDRESS HERTZ FILE

Says the latest answer on standard output every 50 ms, one JSON object a line. When standard input closes it writes all answers to
FILE and ends. An answer is a line of numbers: when the first question was sent that had no answer until then, and when this answer
came (nanoseconds of CLOCK_MONOTONIC, the latter as the kernel noted it), then the guest's seven words.
"""

import collections
import json
import os
import select
import socket
import struct
import sys
import time

PORT = 8
SO_TIMESTAMPNS = 35
TELL_NS = 50_000_000
WORDS = ("now_ns", "sweeps", "pages_written", "pages_verified", "errors", "max_gap_ns", "is_filled")


def be_punctual():
    """A probe that waits for a CPU would see holes that are its own."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        pass  # then the noise before the move shows it


def arrival(ancillary):
    """When the kernel received a packet, whenever we got to read it."""
    now = time.monotonic_ns()
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS:
            seconds, nanoseconds = struct.unpack("qq", data[:16])
            return now - (time.time_ns() - (seconds * 1_000_000_000 + nanoseconds))
    return now


def ask(address, hertz, tell):
    """All answers until standard input closes."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    sock.setblocking(False)
    be_punctual()
    period = 1_000_000_000 // hertz
    answers, open_questions = [], collections.deque()
    due = told = time.monotonic_ns()
    while True:
        now = time.monotonic_ns()
        if now >= due:
            try:
                sock.sendto(struct.pack("<QQ", now, 0), (address, PORT))
                open_questions.append(now)
            except OSError:
                pass  # nobody there yet
            # What was missed is not made up for: a burst would measure something else.
            due = max(due + period, now)
        readable = select.select([sock, sys.stdin], [], [], max(0, due - time.monotonic_ns()) / 1e9)[0]
        if sys.stdin in readable:
            return answers
        while sock in readable:
            try:
                packet, ancillary, _, _ = sock.recvmsg(256, 256)
            except BlockingIOError:
                break
            except OSError:
                continue  # an ICMP error of a host that is not up yet
            sent, _, *words = struct.unpack("<9Q", packet)
            asked = sent
            while open_questions and open_questions[0] <= sent:
                # An answer to a later question is one to those before it, which were lost.
                asked = min(asked, open_questions.popleft())
            answers.append((asked, arrival(ancillary), *words))
        if answers and now - told >= TELL_NS:
            tell(dict(zip(WORDS, answers[-1][2:])))
            told = now


def main():
    address, hertz, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    answers = ask(address, hertz, lambda latest: print(json.dumps(latest), flush=True))
    with open(path, "w") as file:
        file.writelines(" ".join(map(str, answer)) + "\n" for answer in answers)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):
        pass
