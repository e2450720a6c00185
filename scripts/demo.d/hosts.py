"""Two hosts and a client on one network: network namespaces of this machine, or the lab's emulated machines."""

import os
import shutil
import signal
import subprocess
import tempfile
import time

HERE = os.path.dirname(os.path.realpath(__file__))
CHECKOUT = os.path.dirname(os.path.dirname(HERE))
MICROVM = os.path.join(CHECKOUT, "target", "release", "microvm")
PORT = 7437


class DemoError(Exception):
    """Something that ends the demo; its text is for people."""


def run(command, what, timeout=60, given=None):
    """Runs a command to its end; its standard output."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, start_new_session=True,
                              **({"input": given} if given else {"stdin": subprocess.DEVNULL}))
    except subprocess.TimeoutExpired:
        raise DemoError(f"{what}: no end after {timeout} s") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").removeprefix("microvm: ")
        raise DemoError(f"{what}: {said}")
    return done.stdout


class Hosts:
    """What both kinds have in common. `in_host` and `in_client` make the command that runs there."""

    def __init__(self):
        self.children = []
        # For logs and sockets. Short: paths of sockets are.
        self.directory = tempfile.mkdtemp(prefix="mvdemo-", dir="/tmp")

    def start(self, command, **options):
        """A process that ends with the demo."""
        # Not in our process group: Ctrl-C is ours to handle, in order.
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **options)
        self.children.append(child)
        return child

    def microvm(self, host, *arguments, timeout=60):
        return run(self.in_host(host, *arguments), f"{self.names[host]}: microvm {arguments[0]}", timeout)

    def get(self, url, timeout=10):
        return run(self.in_client("curl", "-sf", "--max-time", str(timeout), url), f"GET {url}", timeout + 20)

    def join_hosts(self):
        """Makes the two hosts a fleet, as anybody would."""
        self.microvm(0, "trust", "init", "--host", self.names[0], "--address", self.addresses[0])
        bundle = self.microvm(0, "trust", "issue", self.names[1], "--address", self.addresses[1])
        run(self.in_host(1, "trust", "import", "-", stdin=True), f"{self.names[1]}: microvm trust import", given=bundle)

    def start_agents(self):
        self.join_hosts()
        for host in (0, 1):
            log = os.path.join(self.directory, f"agent{host + 1}.log")
            with open(log, "w") as out:
                agent = self.start(
                    self.in_host(host, "agent", "--listen", f"{self.addresses[host]}:{PORT}"),
                    stdout=out, stderr=out)
            deadline = time.monotonic() + 30
            while True:
                with open(log) as text:
                    said = text.read()
                if agent.poll() is not None:
                    raise DemoError(f"the agent of {self.names[host]} ended: {said.strip()}")
                if "listening" in said.lower() or self.is_listening(host):
                    break
                if time.monotonic() > deadline:
                    raise DemoError(f"the agent of {self.names[host]} does not listen: {said.strip()}")
                time.sleep(0.05)

    def is_listening(self, host):
        address = f"telnet://{self.addresses[host]}:{PORT}"
        # A connection that says nothing is enough; curl's status 28: it was there, and nothing came.
        command = self.in_client("curl", "-s", "--connect-timeout", "1", "--max-time", "0.05", address)
        return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL).returncode in (0, 28)

    def end_children(self):
        for child in self.children:
            if child.poll() is None:
                child.terminate()
        for child in self.children:
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


class Namespaces(Hosts):
    """Each host is a network namespace with a bridge; a third has the switch between them, a fourth the client."""

    kind = "namespaces"
    names = ("host1", "host2")
    addresses = ("10.98.0.1", "10.98.0.2")
    guest_ip, guest_ip6, prefixes = "10.98.0.100", "fd00:98::100", (24, 64)
    client_interface = "eth0"
    what = "two network namespaces"
    settle_s, patience_s, ping_ms, max_downtime = 2, 15, 2, "50ms"

    def __init__(self, note):
        super().__init__()
        self.prefix = f"mvdemo-{os.getpid()}"
        self.made = []

    def namespace(self, name):
        return f"{self.prefix}-{name}"

    def up(self):
        for name in ("switch", "host1", "host2", "client"):
            self.made.append(self.namespace(name))
            run(["ip", "netns", "add", self.namespace(name)], "making a network namespace")
            self.ip(name, "link set lo up")
        bridge = "link add br0 type bridge forward_delay 0 mcast_snooping 0"
        self.ip("switch", bridge, "link set br0 up")
        for number, (host, address) in enumerate(zip(self.names, self.addresses), 1):
            # An address of its own: else a bridge takes the lowest of its ports, and another one when a VM comes or goes.
            self.ip(host, bridge, f"link set br0 address 52:54:00:62:00:{number:02x} up", f"addr add {address}/24 dev br0")
            self.plug(host, "uplink")
            self.ip(host, "link set uplink master br0")
        self.plug("client", "eth0")
        self.ip("client", "addr add 10.98.0.254/24 dev eth0", "addr add fd00:98::fe/64 dev eth0 nodad")
        self.start_agents()

    def ip(self, name, *lines):
        run(["ip", "-n", self.namespace(name), "-batch", "-"], "setting up the network", given="\n".join(lines) + "\n")

    def plug(self, name, interface):
        self.ip("switch", f"link add to-{name} type veth peer name {interface} netns {self.namespace(name)}",
                f"link set to-{name} master br0 up")
        self.ip(name, f"link set {interface} up")

    def in_host(self, host, *arguments, stdin=False):
        name = self.names[host]
        runtime = os.path.join(self.directory, str(host + 1))
        # With a host name of its own, for its messages.
        return ["ip", "netns", "exec", self.namespace(name), "env", f"MICROVM_RUNTIME_DIR={runtime}",
                f"MICROVM_CONFIG_DIR={runtime}/config",
                "unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name, MICROVM, *arguments]

    def in_client(self, *command):
        return ["ip", "netns", "exec", self.namespace("client"), *command]

    def down(self):
        self.end_children()
        for attempt in range(100):
            left = set()
            for name in self.made:
                pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
                left.update(int(pid) for pid in pids.split())
            if not left:
                break
            for pid in left:
                try:
                    os.kill(pid, signal.SIGTERM if attempt < 20 else signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.05)
        for name in self.made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        shutil.rmtree(self.directory, ignore_errors=True)


class Lab(Hosts):
    """Two hosts in QEMU's emulator (scripts/lab), in a lab of our own. Time there is not time."""

    kind = "lab"
    names = ("host1", "host2")
    addresses = ("10.99.0.1", "10.99.0.2")
    guest_ip, guest_ip6, prefixes = "10.99.0.100", "fd00:99::100", (24, 64)
    client_interface = "lab0"
    what = "two emulated hosts (scripts/lab)"
    settle_s, patience_s, ping_ms, max_downtime = 3, 180, 20, "1s"

    def __init__(self, note):
        super().__init__()
        self.note = note
        self.script = os.path.join(os.path.dirname(HERE), "lab")
        os.environ["MICROVM_LAB"] = f"demo-{os.getpid()}"

    def up(self):
        self.note("booting two hosts in the emulator")
        run([self.script, "up", "2"], "scripts/lab up", timeout=900)
        self.start_agents()

    def in_host(self, host, *arguments, stdin=False):
        return [self.script, "exec", *([] if stdin else ["-n"]), self.names[host], "--", MICROVM, *arguments]

    def in_client(self, *command):
        return [self.script, "net", "--", *command]

    def down(self):
        self.end_children()
        subprocess.run([self.script, "down"], capture_output=True, start_new_session=True)
        shutil.rmtree(self.directory, ignore_errors=True)
