"""The guest of a run: pulse, its memory and its load; and the probe that watches it."""

import dataclasses
import json
import os
import subprocess
import threading
import time

import metrics
from network import CLIENT_ADDRESS, GUEST_ADDRESS, PREFIX_LENGTH

MIB = 1 << 20
HERE = os.path.dirname(os.path.realpath(__file__))
# What the guest itself, its buffers and its table of pages take away from its memory.
OWN_MIB = 16


class GuestError(Exception):
    """The guest does not do what it should; its text is for people."""


@dataclasses.dataclass(frozen=True)
class Guest:
    """What a guest has in its memory and does with it. All sizes in MiB; the rest of its memory is never touched."""

    memory: int = 1024
    cpus: int = 1
    fill: int = 512  # has content
    zero: int = 0  # was written with zeros
    working_set: int = 102  # of what has content: is rewritten
    rate: int = 0  # bytes a second
    pattern: str = "random"
    content: str = "random"

    def cmdline(self):
        room = max(self.memory - self.memory // 1024 * 4 - OWN_MIB, 1)
        fill = min(self.fill, room)
        words = {"ws": f"{min(self.working_set, fill)}M", "fill": f"{fill}M", "zero": f"{min(self.zero, room - fill)}M",
                 "rate": self.rate, "pattern": self.pattern, "content": self.content, "verify": 0, "report": "1s",
                 "ip": f"{GUEST_ADDRESS}/{PREFIX_LENGTH}"}
        return " ".join(f"{key}={value}" for key, value in words.items())

    def touched_bytes(self):
        return min(self.fill + self.zero, self.memory) * MIB

    def nonzero_bytes(self):
        return 0 if self.content == "zero" else min(self.fill, self.memory) * MIB


class Watch:
    """The probe on a guest, from its start to the end of a run."""

    def __init__(self, network, directory, hertz=1000):
        self.network = network
        self.path = os.path.join(directory, "probe.txt")
        self.latest = None
        self.process = subprocess.Popen(
            network.inside("client", "python3", "-B", os.path.join(HERE, "probe.py"), GUEST_ADDRESS, hertz, self.path),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        for line in self.process.stdout:
            self.latest = json.loads(line)

    def wait(self, what, is_so, patience_s=120):
        """Until the guest's latest counters are so; as long as it gets on, patience starts anew."""
        deadline, seen = time.monotonic() + patience_s, None
        while True:
            latest = self.latest
            if latest and is_so(latest):
                return latest
            if latest and (latest["pages_written"], latest["pages_verified"]) != seen:
                seen = (latest["pages_written"], latest["pages_verified"])
                deadline = time.monotonic() + patience_s
            if time.monotonic() > deadline:
                raise GuestError(f"the guest did not get so far: {what} (it last said {latest})")
            time.sleep(0.02)

    def wait_until_filled(self):
        return self.wait("all its memory has content", lambda counters: counters["is_filled"], 60)

    def errors(self):
        """How many pages it finds wrong, once it has looked at all of its memory."""
        self.ask("/work?verify=max")
        now = self.latest["sweeps"]
        return self.wait("two sweeps over its memory", lambda counters: counters["sweeps"] >= now + 2, 60)["errors"]

    def ask(self, path):
        url = f"http://{GUEST_ADDRESS}{path}"
        command = self.network.inside("client", "curl", "-sf", "--max-time", "10", "--interface", CLIENT_ADDRESS, url)
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise GuestError(f"GET {url}: curl ended with status {done.returncode}")
        return done.stdout

    def finish(self):
        """Ends the probe; all its answers."""
        self.process.stdin.close()
        self.process.wait(30)
        with open(self.path) as file:
            return metrics.parse(file)

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
