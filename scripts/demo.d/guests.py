"""The guests: how each is started, and how it tells that nothing was lost."""

import json
import os
import time

from hosts import HERE, DemoError, run

NAME = "demo"


class Guest:
    """A guest that answers pings, echoes TCP at port 7, checks its own memory, and tells about it by HTTP."""

    def __init__(self, hosts, memory, rate):
        self.hosts, self.memory, self.rate = hosts, memory, rate

    def boot(self):
        """Starts it on the first host; its MAC address."""
        hosts = self.hosts
        net = f"bridge=br0,ip={hosts.guest_ip}/{hosts.prefixes[0]},ip={hosts.guest_ip6}/{hosts.prefixes[1]}"
        said = hosts.microvm(0, "run", "--name", NAME, "--detach", "--json", "--memory", self.memory, "--net", net,
                             *self.boot_arguments(), timeout=120)
        self.mac = ":".join(f"{byte:02x}" for byte in json.loads(said)["nets"][0]["mac"])
        deadline = time.monotonic() + hosts.patience_s
        while True:
            try:
                if self.is_ready(self.status()):
                    return
            except DemoError as error:
                if time.monotonic() > deadline:
                    raise DemoError(f"the guest does not serve HTTP: {error}\n{self.last_words()}") from None
            time.sleep(0.1)

    def last_words(self):
        try:
            return "\n".join(self.hosts.microvm(0, "logs", NAME).splitlines()[-8:])
        except DemoError as error:
            return str(error)

    def status(self):
        said = self.hosts.get(f"http://{self.hosts.guest_ip}{self.status_path}")
        try:
            return json.loads(said)
        except ValueError:
            raise DemoError(f"the guest's status is no JSON: {said[:200]!r}") from None

    def errors_after(self, before):
        """How many errors it has found since `before`, once it has looked at all of its memory; and what it looked at."""
        deadline = time.monotonic() + self.hosts.patience_s
        checked = first = None
        while True:
            try:
                status = self.status()
            except DemoError as error:
                if time.monotonic() > deadline:
                    raise DemoError(f"the guest does not tell whether its memory is right: {error}") from None
                continue
            first = first or status
            if self.looked_at_all(first, status):
                return self.errors(status) - self.errors(before)
            if self.checked(status) != checked:
                checked = self.checked(status)
                deadline = time.monotonic() + self.hosts.patience_s
            if time.monotonic() > deadline:
                raise DemoError("the guest runs, but does not get on with checking its memory")
            time.sleep(0.05)


class Pulse(Guest):
    """The built-in guest (docs/pulse.md)."""

    what = "the built-in guest"
    status_path = "/status"

    def boot_arguments(self):
        hosts = self.hosts
        words = [f"ws={working_set(self.memory)}", f"rate={self.rate}", "pattern=random", "verify=128M",
                 f"ip={hosts.guest_ip}/{hosts.prefixes[0]}", f"ip6={hosts.guest_ip6}/{hosts.prefixes[1]}"]
        return ["--cmdline", " ".join(words)]

    def is_ready(self, status):
        return status["sweeps"] >= 1

    def errors(self, status):
        return status["errors"]

    def checked(self, status):
        return status["pages_verified"]

    def looked_at_all(self, since, status):
        # The sweep that was under way does not count.
        return status["sweeps"] >= since["sweeps"] + 2 and status["pages_written"] > since["pages_written"]


class Linux(Guest):
    """A stock Debian kernel with the self-checking initrd (docs/lab.md)."""

    what = "a stock Linux guest"
    status_path = "/cgi-bin/status"

    def prepare(self, cache):
        scripts = os.path.dirname(HERE)
        kernel = run([os.path.join(scripts, "kernels"), "6.1-cloud"], "scripts/kernels", 900).strip()
        os.makedirs(cache, exist_ok=True)
        # Another demo may be building its own.
        self.initrd = os.path.join(cache, f"demo-{os.getpid()}.cpio")
        run([os.path.join(scripts, "guest-initrd"), "--kernel", kernel, self.initrd], "scripts/guest-initrd", 300)
        self.kernel = os.path.join(kernel, "vmlinuz")

    def clear(self):
        if os.path.exists(getattr(self, "initrd", "")):
            os.remove(self.initrd)

    def boot_arguments(self):
        hosts = self.hosts
        words = ["console=ttyS0", "quiet", f"microvm.ip={hosts.guest_ip}/{hosts.prefixes[0]}",
                 f"microvm.ip6={hosts.guest_ip6}/{hosts.prefixes[1]}", f"microvm.rate={self.rate}",
                 f"microvm.ws={'8M' if hosts.kind == 'lab' else working_set(self.memory)}",
                 f"microvm.still={'2M' if hosts.kind == 'lab' else '8M'}"]
        return ["--kernel", self.kernel, "--initrd", self.initrd, "--cmdline", " ".join(words)]

    def is_ready(self, status):
        worker = status["worker"]
        return worker is not None and worker["busy"]["written"] > worker["busy"]["pages"]

    def errors(self, status):
        return status["worker"]["errors"]

    def checked(self, status):
        return [status["worker"][region]["checked"] for region in ("busy", "still")]

    def looked_at_all(self, since, status):
        since, now = since["worker"], status["worker"]
        return all(now[region]["checked"] >= since[region]["checked"] + since[region]["pages"] for region in ("busy", "still"))


def working_set(memory):
    """A quarter of the memory; no more than can be checked again in some seconds."""
    return f"{min(parse_size(memory) // 4, 128 << 20) >> 10}K"


def parse_size(text):
    """Bytes of 256M and the like; raises ValueError."""
    unit = {"K": 10, "M": 20, "G": 30}.get(text[-1:].upper())
    value = int(text[:-1] if unit else text)
    if value <= 0:
        raise ValueError(text)
    return value << (unit or 0)
