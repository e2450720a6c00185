"""What watches the guest from the client's place in the network. Each kind is a process of its own.

    probe.py ping ADDRESS INTERVAL_MS    ICMP echo requests at a steady pace
    probe.py tcp ADDRESS SEED            one connection to the echo port, every byte checked
    probe.py capture INTERFACE MAC       what is announced in the name of MAC

Each prints JSON objects, one a line; all times are nanoseconds of CLOCK_MONOTONIC.
  ping     {"sent": [[number, time], …], "answered": [[number, time], …]}
  tcp      {"time", "sent", "checked"} in bytes so far; {"error": TEXT} when it broke, then it ends
  capture  {"announced": "garp"|"rarp"|"na", "time"}
"""

import json
import os
import random
import select
import socket
import struct
import sys
import time

REPORT_NS = 50_000_000
SO_TIMESTAMPNS = 35
ECHO_PORT = 7


def say(message):
    sys.stdout.write(json.dumps(message, separators=(",", ":")) + "\n")
    sys.stdout.flush()


def be_punctual():
    """A prober that waits for a CPU would see holes that are its own."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        pass  # then what it says is still true of the client


def arrival(ancillary):
    """When the kernel received a packet, whenever we got to read it."""
    now = time.monotonic_ns()
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS:
            seconds, nanoseconds = struct.unpack("qq", data[:16])
            return now - (time.time_ns() - (seconds * 1_000_000_000 + nanoseconds))
    return now


def checksum(data):
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ping(address, interval_ms):
    interval = int(float(interval_ms) * 1e6)
    sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    sock.setblocking(False)
    be_punctual()
    ident = os.getpid() & 0xFFFF
    cookie = os.urandom(8)
    number, sent, answered = 0, [], []
    due = reported = time.monotonic_ns()
    while True:
        now = time.monotonic_ns()
        if now >= due:
            body = cookie + struct.pack("!Q", number)
            head = struct.pack("!BBHHH", 8, 0, 0, ident, number & 0xFFFF)
            head = struct.pack("!BBHHH", 8, 0, checksum(head + body), ident, number & 0xFFFF)
            try:
                sock.sendto(head + body, (address, 0))
            except OSError:
                pass  # sent, and lost
            sent.append([number, now])
            number += 1
            # What was missed is not made up for: a burst would measure something else.
            due = max(due + interval, now)
        while True:
            try:
                packet, ancillary, _, _ = sock.recvmsg(2048, 256)
            except BlockingIOError:
                break
            message = packet[(packet[0] & 15) * 4 :]
            if len(message) >= 24 and message[0] == 0 and message[8:16] == cookie:
                answered.append([struct.unpack("!Q", message[16:24])[0], arrival(ancillary)])
        if now - reported >= REPORT_NS:
            say({"sent": sent, "answered": answered})
            sent, answered, reported = [], [], now
        select.select([sock], [], [], max(0, due - time.monotonic_ns()) / 1e9)


def tcp(address, seed, bytes_a_second=1 << 20, window=64 << 10):
    """Sends seeded random data at a set pace, with at most `window` bytes on their way, and compares what comes back."""
    out, expected = random.Random(seed), random.Random(seed)
    sock = socket.create_connection((address, ECHO_PORT), timeout=30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setblocking(False)
    chunk, waiting, ahead = 8192, b"", b""
    sent = checked = 0
    begun = reported = time.monotonic_ns()
    say({"time": begun, "sent": 0, "checked": 0})
    try:
        while True:
            now = time.monotonic_ns()
            due = (now - begun) * bytes_a_second // 1_000_000_000
            if due - sent > window:  # after a stall: go on at the pace, do not catch up
                begun, due = begun + (due - sent - window) * 1_000_000_000 // bytes_a_second, sent + window
            if not waiting and due - sent >= chunk and sent - checked <= window - chunk:
                waiting = out.randbytes(chunk)
            read, write, _ = select.select([sock], [sock] if waiting else [], [], 0.002)
            if write:
                n = sock.send(waiting)
                waiting, sent = waiting[n:], sent + n
            if read:
                data = sock.recv(1 << 16)
                if not data:
                    raise ConnectionError("the guest closed the connection")
                while len(ahead) < len(data):
                    ahead += expected.randbytes(chunk)
                if data != ahead[: len(data)]:
                    raise ConnectionError(f"what came back is not what was sent, at or after byte {checked}")
                ahead, checked = ahead[len(data) :], checked + len(data)
            if now - reported >= REPORT_NS // 10:
                say({"time": now, "sent": sent, "checked": checked})
                reported = now
    except OSError as error:
        say({"error": str(error)})


def capture(interface, mac):
    """Only what cannot be an answer to somebody's question counts as announced."""
    mac = bytes.fromhex(mac.replace(":", ""))
    socks = []
    for ethertype in (0x0806, 0x8035, 0x86DD):
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ethertype))
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        sock.bind((interface, ethertype))
        # Multicast to groups that the client is not in.
        membership = struct.pack("iHH8s", socket.if_nametoindex(interface), 1, 0, b"")
        sock.setsockopt(263, 1, membership)  # SOL_PACKET, PACKET_ADD_MEMBERSHIP, promiscuous
        socks.append(sock)
    say({"time": time.monotonic_ns()})
    while True:
        for sock in select.select(socks, [], [])[0]:
            frame, ancillary, _, _ = sock.recvmsg(2048, 256)
            kind = announced(frame, mac)
            if kind:
                say({"announced": kind, "time": arrival(ancillary)})


def announced(frame, mac):
    ethertype = struct.unpack("!H", frame[12:14])[0]
    if ethertype in (0x0806, 0x8035) and len(frame) >= 42:
        sender_mac, sender_ip, target_ip = frame[22:28], frame[28:32], frame[38:42]
        if sender_mac != mac:
            return None
        if ethertype == 0x8035:
            return "rarp"
        return "garp" if sender_ip == target_ip else None
    # ICMPv6 right behind the IPv6 header, neighbour advertisement, not solicited.
    if ethertype == 0x86DD and len(frame) >= 78 and frame[6:12] == mac and frame[20] == 58:
        if frame[54] == 136 and not frame[58] & 0x40:
            return "na"
    return None


if __name__ == "__main__":
    try:
        {"ping": ping, "tcp": tcp, "capture": capture}[sys.argv[1]](*sys.argv[2:])
    except (KeyboardInterrupt, BrokenPipeError):
        pass
    except OSError as error:
        say({"error": str(error)})
