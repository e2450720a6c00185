"""Runs the probes in the client's network, and says what they saw in a stretch of time."""

import json
import os
import subprocess
import sys
import threading
import time

from hosts import HERE, DemoError

MS = 1_000_000


class Watch:
    def __init__(self, hosts, mac):
        self.hosts = hosts
        self.lock = threading.Lock()
        self.sent = []  # times, by number
        self.answered = {}  # number: time
        self.tcp = []  # (time, bytes sent, bytes checked)
        self.tcp_error = None
        self.announced = []  # (time, kind)
        self.heard = set()
        seed = int.from_bytes(os.urandom(4), "big")
        self.start("capture", hosts.client_interface, mac)
        self.start("ping", hosts.guest_ip, str(hosts.ping_ms))
        self.start("tcp", hosts.guest_ip, str(seed))

    def start(self, kind, *arguments):
        command = self.hosts.in_client(sys.executable, "-B", os.path.join(HERE, "probe.py"), kind, *arguments)
        child = self.hosts.start(command, stdout=subprocess.PIPE)
        threading.Thread(target=self.read, args=(kind, child.stdout), daemon=True).start()

    def read(self, kind, lines):
        for line in lines:
            message = json.loads(line)
            with self.lock:
                self.heard.add(kind)
                if "error" in message and kind != "tcp":
                    self.heard.add(f"{kind}: {message['error']}")
                elif "error" in message:
                    self.tcp_error = message["error"]
                elif kind == "ping":
                    self.sent.extend(at for _, at in message["sent"])
                    self.answered.update((number, at) for number, at in message["answered"])
                elif kind == "tcp":
                    self.tcp.append((message["time"], message["sent"], message["checked"]))
                elif "announced" in message:
                    self.announced.append((message["time"], message["announced"]))
        if kind == "tcp":
            self.tcp_error = self.tcp_error or "the prober ended"

    def wait_until_it_works(self):
        deadline = time.monotonic() + self.hosts.patience_s
        while True:
            with self.lock:
                if "capture" in self.heard and self.answered and self.tcp and self.tcp[-1][2] > 0:
                    return
                if self.tcp_error:
                    raise DemoError(f"TCP connection to the guest: {self.tcp_error}")
            if time.monotonic() > deadline:
                raise DemoError(f"the guest does not answer pings and TCP (heard of: {', '.join(sorted(self.heard)) or 'nothing'})")
            time.sleep(0.02)

    def tcp_goes_on(self):
        """Whether the one connection still brings back, unchanged, what is sent from now on. Waits for it."""
        deadline = time.monotonic() + self.hosts.patience_s
        with self.lock:
            base = self.tcp[-1][1]
        while time.monotonic() < deadline:
            with self.lock:
                if self.tcp_error:
                    return False
                if self.tcp[-1][2] > base + (64 << 10):
                    return True
            time.sleep(0.02)
        return False

    def between(self, begin, end):
        """What was seen from `begin` to `end` (ns): see docs/demo.md."""
        with self.lock:
            numbers = [n for n, at in enumerate(self.sent) if begin <= at <= end]
            pings = [(self.sent[n], self.answered.get(n)) for n in numbers]
            arrivals = sorted(at for at in self.answered.values() if begin <= at <= end)
            announced = sorted((at, kind) for at, kind in self.announced if begin <= at <= end)
            tcp = [sample for sample in self.tcp if begin <= sample[0] <= end]
        # A silence that lasts until the end counts as well.
        edges = [begin, *arrivals, end]
        gap = max(zip(edges, edges[1:]), key=lambda pair: pair[1] - pair[0])
        # The switchover's silence is the one in which pings were lost: what comes to a host that has paused the guest is gone.
        lost = [at for at, answer in pings if answer is None]
        pairs = [(sum(a <= at < b for at in lost), b - a, (a, b)) for a, b in zip(edges, edges[1:])]
        switchover = max(pairs)[2] if lost else None
        return {
            "pings": pings,
            "gap": gap,
            "switchover": switchover,
            "announced": announced,
            "tcp": tcp,
            "probe": {
                "pings_sent": len(pings),
                "pings_lost": sum(answer is None for _, answer in pings),
                "longest_gap_ms": round(max(0, gap[1] - gap[0] - self.hosts.ping_ms * MS) / MS, 3),
            },
            "announce_seen": {kind: sum(k == kind for _, k in announced) for kind in ("garp", "rarp", "na")},
        }
