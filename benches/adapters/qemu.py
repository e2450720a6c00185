"""QEMU's microvm machine: two processes, driven through QMP as a management tool does it."""

import json
import os
import socket
import subprocess
import time

import machine
from adapters import Contestant, ContestantError, Move
from network import GUEST_MAC, LINKS

PORT = 7500
POLL_S = 0.005


class Qmp:
    """A connection to a QEMU's monitor."""

    def __init__(self, path, process):
        deadline = time.monotonic() + 20
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                self.socket.connect(path)
                break
            except OSError:
                self.socket.close()
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ContestantError("QEMU did not start") from None
                time.sleep(0.01)
        self.socket.settimeout(60)
        self.file = self.socket.makefile("rw")
        json.loads(self.file.readline())
        self("qmp_capabilities")

    def __call__(self, command, **arguments):
        self.file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.file.flush()
        while True:
            line = self.file.readline()
            if not line:
                raise ContestantError(f"QEMU ended at {command}")
            answer = json.loads(line)
            if "error" in answer:
                raise ContestantError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def close(self):
        self.socket.close()


class Qemu(Contestant):
    """One process on each host; the destination's is started before a move, which does not count."""

    def __init__(self, programs, name, what, is_best=False):
        self.program, self.firmware, self.kernel = programs["qemu"], programs["qemu_firmware"], programs["pulse"]
        self.name, self.what, self.is_best = name, what, is_best
        self.processes, self.monitors = [None, None], [None, None]

    def version(self):
        return machine.version([self.program, "--version"]) if self.program else None

    def open(self, network, directory):
        self.network, self.directory = network, directory

    def arguments(self, guest):
        firmware = [argument for path in self.firmware for argument in ("-L", path)]
        return [self.program, *firmware, "-name", "bench,debug-threads=on", "-M", "microvm,acpi=off,isa-serial=on", "-accel", "kvm",
                "-cpu", "max,-arch-capabilities", "-m", f"{guest.memory}M", "-smp", str(guest.cpus), "-nodefaults", "-no-user-config",
                "-nographic", "-no-reboot", "-kernel", self.kernel, "-append", guest.cmdline()]

    def launch(self, host, *more):
        place, tap = self.network.place(host), f"qemu{host}"
        self.network.ip(place, f"tuntap add dev {tap} mode tap", f"link set {tap} master br0 up")
        monitor = os.path.join(self.directory, f"qmp{host}")
        log = open(os.path.join(self.directory, f"qemu{host}.log"), "w")
        command = [*self.arguments(self.guest), "-serial", f"file:{self.directory}/serial{host}.log",
                   "-device", f"virtio-net-device,netdev=n,mac={GUEST_MAC}",
                   "-netdev", f"tap,id=n,ifname={tap},script=no,downscript=no", "-qmp", f"unix:{monitor},server=on,wait=off", *more]
        process = subprocess.Popen(self.network.on_host(host, *command), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        log.close()
        self.processes[host] = process
        self.monitors[host] = Qmp(monitor, process)

    def start(self, guest, streams):
        self.guest, self.streams = guest, streams
        self.launch(0)

    def configure(self, monitor, is_source):
        channels = self.streams or (2 if self.is_best else 1)
        on = ["multifd"] if self.is_best or channels > 1 else []
        monitor("migrate-set-capabilities", capabilities=[{"capability": name, "state": True} for name in on])
        parameters = {"max-bandwidth": 0} if is_source else {}
        if on:
            # Its pages have channels of their own beside the main one.
            parameters["multifd-channels"] = channels
        if self.is_best and is_source:
            parameters["downtime-limit"] = 20
            # In 9.0 and later; elsewhere it was not there to set.
            known = monitor("query-migrate-parameters")
            if "zero-page-detection" in known:
                parameters["zero-page-detection"] = "multifd"
            if "avail-switchover-bandwidth" in known and LINKS[self.network.link]:
                parameters["avail-switchover-bandwidth"] = LINKS[self.network.link] // 8
        if parameters:
            monitor("migrate-set-parameters", **parameters)

    def prepare(self):
        self.launch(1, "-incoming", "defer")
        self.configure(self.monitors[1], False)
        self.uri = f"tcp:{self.network.address(1)}:{PORT}"
        self.monitors[1]("migrate-incoming", uri=self.uri)
        self.configure(self.monitors[0], True)

    def move(self, limit_s):
        monitor = self.monitors[0]
        deadline = time.monotonic() + limit_s
        monitor("migrate", uri=self.uri)
        predicted, stopped = None, False
        while True:
            said = monitor("query-migrate")
            status = said.get("status")
            predicted = said.get("expected-downtime", predicted)
            if status in ("completed", "failed", "cancelled"):
                break
            if time.monotonic() > deadline and not stopped:
                monitor("migrate_cancel")
                stopped = True
            time.sleep(POLL_S)
        outcome = {"completed": "completed", "cancelled": "stopped"}.get(status, "failed")
        return Move(outcome, said.get("error-desc", ""), said.get("total-time"), said.get("downtime"), predicted, said)

    def source_pid(self):
        return self.processes[0].pid

    def destination_pid(self):
        return self.processes[1].pid if self.processes[1] else None

    def stop(self):
        for host in (0, 1):
            if self.monitors[host]:
                self.monitors[host].close()
            if self.processes[host]:
                self.processes[host].kill()
                self.processes[host].wait()
                self.network.ip(self.network.place(host), f"link del qemu{host}")
        self.processes, self.monitors = [None, None], [None, None]

    def run_command(self, guest, directory, tap):
        return [*self.arguments(guest), "-serial", "stdio", "-monitor", "none", "-device", f"virtio-net-device,netdev=n,mac={GUEST_MAC}",
                "-netdev", f"tap,id=n,ifname={tap},script=no,downscript=no"]

    def idle_command(self, guest, directory, number):
        console = f"{directory}/{number}"
        return [*self.arguments(guest), "-serial", f"file:{console}", "-monitor", "none"], console
