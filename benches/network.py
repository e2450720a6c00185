"""Two hosts, the wire between them, and a client: network namespaces of this machine.

    host1 ── wire ── host2        migrations; shaped by tc, and where bytes are counted
      └── switch ──┘              the guests' network; not shaped
            │
          client                  where the probe is

With the link "loopback" both hosts are one namespace, and migrations go over its `lo`.
"""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time

PREFIX = "mvbench"
GUEST_ADDRESS, CLIENT_ADDRESS, PREFIX_LENGTH = "10.98.0.100", "10.98.0.254", 24
GUEST_MAC = "52:54:00:62:00:64"

# Bits a second that tc lets through; None: whatever the CPUs carry.
LINKS = {"loopback": None, "veth": None, "10gbit": 10**10, "1gbit": 10**9, "100mbit": 10**8}


class NetworkError(Exception):
    """The network could not be made; its text is for people."""


def run(command, given=None, timeout=60):
    """Runs a command to its end; its standard output."""
    done = subprocess.run(command, input=given, stdin=None if given else subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=timeout)
    if done.returncode:
        raise NetworkError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip() or done.returncode}")
    return done.stdout


class Network:
    """The namespaces and a folder for what is temporary; made by `up`, all gone after `down`, with every process in them."""

    def __init__(self):
        self.link = "veth"
        self.made = []

    def name(self, place):
        return f"{PREFIX}-{os.getpid()}-{place}"

    def up(self):
        remove_leftovers()
        # Short: paths of sockets are.
        tempfile.tempdir = f"/tmp/{self.name('')}"
        os.makedirs(tempfile.tempdir)
        for place in ("switch", "host1", "host2", "client"):
            run(["ip", "netns", "add", self.name(place)])
            self.made.append(self.name(place))
            self.ip(place, "link set lo up")
        bridge = "link add br0 type bridge forward_delay 0 mcast_snooping 0"
        self.ip("switch", bridge, "link set br0 up")
        for number, host in enumerate(("host1", "host2"), 1):
            self.ip(host, bridge, f"link set br0 address 52:54:00:62:00:{number:02x} up")
            self._plug(host, "uplink")
            self.ip(host, "link set uplink master br0")
        self._plug("client", "eth0")
        # The client knows the guest's hardware address: a question that waits for ARP would wait for a second. The switch still has
        # to learn where the guest is.
        self.ip("client", f"addr add {CLIENT_ADDRESS}/{PREFIX_LENGTH} dev eth0",
                f"neigh add {GUEST_ADDRESS} lladdr {GUEST_MAC} nud permanent dev eth0")
        self.ip("host1", f"link add wire type veth peer name wire netns {self.name('host2')}")
        for number, host in enumerate(("host1", "host2"), 1):
            self.ip(host, f"addr add 10.97.0.{number}/24 dev wire", "link set wire up")

    def _plug(self, place, interface):
        self.ip("switch", f"link add to-{place} type veth peer name {interface} netns {self.name(place)}",
                f"link set to-{place} master br0 up")
        self.ip(place, f"link set {interface} up")

    def ip(self, place, *lines):
        run(["ip", "-n", self.name(place), "-batch", "-"], given="\n".join(lines) + "\n")

    def set_link(self, link):
        """Shapes the wire. A token bucket on both ends; its queue holds 10 ms, as a switch port might."""
        self.link = link
        bits = LINKS[link]
        for host in ("host1", "host2"):
            tc = ["tc", "-n", self.name(host), "qdisc"]
            subprocess.run([*tc, "del", "dev", "wire", "root"], capture_output=True)
            if bits:
                # A burst of a few large segments (64 KiB): a smaller one would not let them through.
                burst = max(256 << 10, bits // 8 // 1000)
                run([*tc, "add", "dev", "wire", "root", "tbf", "rate", str(bits), "burst", str(burst), "latency", "10ms"])

    def forget(self):
        """Bridges forget where they saw the last guest: the next one has its hardware address."""
        for place in ("switch", "host1", "host2"):
            self.ip(place, "link set br0 type bridge fdb_flush")

    def place(self, host):
        """The namespace's short name of host 0 or 1."""
        return "host1" if self.link == "loopback" or host == 0 else "host2"

    def address(self, host):
        return "127.0.0.1" if self.link == "loopback" else f"10.97.0.{host + 1}"

    def inside(self, place, *command):
        """The command that runs `command` there."""
        return ["ip", "netns", "exec", self.name(place), *map(str, command)]

    def on_host(self, host, *command):
        return self.inside(self.place(host), *command)

    def bytes_on_wire(self):
        """Bytes that migrations have sent so far, both directions, with headers as the kernel counts them."""
        interface = "lo" if self.link == "loopback" else "wire"
        said = run(["ip", "-n", self.name("host1"), "-s", "-j", "link", "show", "dev", interface])
        stats = json.loads(said)[0]["stats64"]
        return stats["tx"]["bytes"] + (0 if interface == "lo" else stats["rx"]["bytes"])

    def down(self):
        for name in self.made:
            remove(name)
        self.made = []
        if tempfile.tempdir:
            shutil.rmtree(tempfile.tempdir, ignore_errors=True)


def remove_leftovers():
    """What runs that were killed have left."""
    is_dead = lambda name: name.startswith(f"{PREFIX}-") and not os.path.exists(f"/proc/{name.split('-')[1]}")
    for name in filter(is_dead, (line.split()[0] for line in run(["ip", "netns", "list"]).splitlines())):
        remove(name)
    for name in filter(is_dead, os.listdir("/tmp")):
        shutil.rmtree(f"/tmp/{name}", ignore_errors=True)


def remove(name):
    """A namespace and the processes in it; only ours are."""
    for attempt in range(100):
        pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
        if not pids:
            break
        for pid in pids:
            try:
                os.kill(int(pid), signal.SIGTERM if attempt < 20 else signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.05)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
