"""How fast a VM starts, and what one costs that does nothing."""

import os
import shutil
import signal
import subprocess
import tempfile
import time

import machine
from guests import Guest, GuestError
from network import GUEST_ADDRESS

GUEST = Guest(memory=128, fill=1, working_set=1)
TAP = "start0"
IDLE_WATCH_S = 10


def start(contestant, network):
    """Milliseconds from exec to the guest's first byte on its serial port, and to its first HTTP answer; memory when idle.

    A shell waits in the host's namespace for a line and then becomes the program: making the namespace does not count.
    """
    directory = tempfile.mkdtemp()
    network.ip("host1", f"tuntap add dev {TAP} mode tap", f"link set {TAP} master br0 up")
    command = network.inside("host1", "sh", "-c", 'read -r _ && exec "$@" </dev/null', "sh",
                             *contestant.run_command(GUEST, directory, TAP))
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    # Asks until it is answered, each time with a new connection: one whose first packet is lost would wait for a second.
    loop = f"until curl -s -o /dev/null --connect-timeout 0.02 --max-time 1 http://{GUEST_ADDRESS}/status; do :; done"
    client = None
    try:
        time.sleep(0.2)
        client = subprocess.Popen(network.inside("client", "sh", "-c", loop), stdin=subprocess.DEVNULL)
        begin = time.monotonic_ns()
        child.stdin.write(b"\n")
        child.stdin.flush()
        if not child.stdout.read(1):
            raise GuestError(f"{contestant.name}: the guest said nothing")
        first_byte = time.monotonic_ns()
        client.wait(20)
        answered = time.monotonic_ns()
        time.sleep(1)
        vm = vm_process(network)
        memory = machine.memory_beyond_guest(vm, GUEST.memory * 2**20)
        return {"first_byte_ms": (first_byte - begin) / 1e6, "http_ms": (answered - begin) / 1e6, **memory}
    finally:
        if client and client.poll() is None:
            client.kill()
        child.kill()
        child.wait()
        child.stdout.close()
        kill_all(network, "host1")
        shutil.rmtree(directory, ignore_errors=True)
        network.ip("host1", f"link del {TAP}")


def vm_process(network):
    """The process that has the guest's memory, of those in the host's namespace."""
    pids = subprocess.run(["ip", "netns", "pids", network.name("host1")], capture_output=True, text=True).stdout.split()
    for pid in pids:
        if any(size >= GUEST.memory * 1024 // 2 and resident for size, resident, _ in machine.mappings(pid)):
            return int(pid)
    raise GuestError("no process has the guest's memory")


def kill_all(network, place):
    """Every process in a namespace."""
    for _ in range(100):
        pids = subprocess.run(["ip", "netns", "pids", network.name(place)], capture_output=True, text=True).stdout.split()
        if not pids:
            return
        for pid in map(int, pids):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.02)


def wait_for_words(console, patience_s=20):
    """Until a guest has said something."""
    deadline = time.monotonic() + patience_s
    while not (os.path.exists(console) and os.path.getsize(console)):
        if time.monotonic() > deadline:
            raise GuestError(f"a guest said nothing: {console}")
        time.sleep(0.005)


def idle(contestant, network, count):
    """What `count` VMs without anything to do cost together: memory beyond what they use themselves, and CPU time."""
    guest = Guest(memory=64, fill=1, working_set=1)
    directory = tempfile.mkdtemp()
    quiet = machine.Interference.now(2)
    free = machine.free_bytes()
    children = []
    try:
        for number in range(count):
            # One after the other: a hundred at once would not be idle for minutes.
            command, console = contestant.idle_command(guest, directory, number)
            children.append(subprocess.Popen(network.inside("host1", *command), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                             stderr=subprocess.DEVNULL))
            wait_for_words(console)
        time.sleep(2)
        pids = [int(pid) for pid in subprocess.run(["ip", "netns", "pids", network.name("host1")], capture_output=True,
                                                   text=True).stdout.split()]
        vms = []
        for pid in pids:
            memory = machine.memory_beyond_guest(pid, guest.memory * 2**20)
            if memory["guest_kib"]:
                vms.append((pid, memory["beyond_kib"], memory["guest_kib"]))
        if len(vms) != count:
            raise GuestError(f"{contestant.name}: {len(vms)} of {count} VMs run")
        used = free - machine.free_bytes()
        before = sum(machine.cpu_s(pid) for pid in pids)
        time.sleep(IDLE_WATCH_S)
        cpu = sum(machine.cpu_s(pid) for pid in pids) - before
        return {"vms": count, "processes": len(pids), "beyond_kib_each": sum(b for _, b, _ in vms) / count,
                "guest_kib_each": sum(g for _, _, g in vms) / count, "free_memory_used_kib_each": used / 1024 / count,
                "cpu_percent_each": 100 * cpu / IDLE_WATCH_S / count, "before": quiet}
    finally:
        for child in children:
            child.kill()
        for child in children:
            child.wait()
        kill_all(network, "host1")
        shutil.rmtree(directory, ignore_errors=True)
