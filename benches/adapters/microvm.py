"""This project's program. What its command line needs is all in this file."""

import json
import os
import subprocess
import time

from adapters import Contestant, ContestantError, Move
from network import GUEST_ADDRESS, GUEST_MAC, PREFIX_LENGTH

NAME = "bench"


class Microvm(Contestant):
    """`microvm agent` on both hosts, `microvm migrate` from one to the other."""

    def __init__(self, programs, name, what, port, is_trusted=False):
        self.program = programs["microvm"]
        self.name, self.what, self.port, self.is_trusted = name, what, port, is_trusted
        self.agents = []

    def version(self):
        try:
            return subprocess.run([self.program, "--version"], capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    def open(self, network, directory):
        self.network = network
        self.runtime = [os.path.join(directory, str(host)) for host in (0, 1)]
        for host in (0, 1):
            os.makedirs(self.runtime[host], exist_ok=True)
        self.plaintext = [] if self.is_trusted else ["--insecure-plaintext"]
        if self.is_trusted:
            self.call(0, "trust", "init", "--host", "host0", "--address", network.address(0))
            bundle = self.call(0, "trust", "issue", "host1", "--address", network.address(1), "--out", "-")
            self.call(1, "trust", "import", "-", input=bundle)
        for host in (0, 1):
            log = open(os.path.join(directory, f"agent{host}.log"), "w")
            command = self.on(host, "agent", "--listen", self.to(host), *self.plaintext)
            self.agents.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
            log.close()
        time.sleep(0.3)
        for agent in self.agents:
            if agent.poll() is not None:
                raise ContestantError(f"an agent ended: see {directory}")

    def to(self, host):
        # On loopback both hosts have one address.
        return f"{self.network.address(host)}:{self.port + host}"

    def on(self, host, *arguments):
        runtime = self.runtime[host]
        environment = [f"MICROVM_RUNTIME_DIR={runtime}", f"MICROVM_CONFIG_DIR={runtime}/config"]
        return self.network.on_host(host, "env", *environment, self.program, *arguments)

    def call(self, host, *arguments, timeout=60, input=""):
        done = subprocess.run(self.on(host, *arguments), capture_output=True, text=True, timeout=timeout, input=input)
        if done.returncode:
            raise ContestantError(f"microvm {arguments[0]}: {done.stderr.strip()}")
        return done.stdout

    def start(self, guest, streams):
        self.streams = ["--streams", str(streams)] if streams else []
        self.call(0, "run", "-d", "--name", NAME, "--memory", f"{guest.memory}M", "--cpus", str(guest.cpus),
                  "--cmdline", guest.cmdline(), "--net", self.net())

    def net(self):
        return f"bridge=br0,mac={GUEST_MAC},ip={GUEST_ADDRESS}/{PREFIX_LENGTH}"

    def source_pid(self):
        return json.loads(self.call(0, "inspect", NAME, "--json"))["pid"]

    def destination_pid(self):
        try:
            return json.loads(self.call(1, "inspect", NAME, "--json"))["pid"]
        except ContestantError:
            return None

    def move(self, limit_s):
        command = self.on(0, "migrate", NAME, "--to", self.to(1), "--json", "--timeout", f"{limit_s}s", *self.streams,
                          *self.plaintext)
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s + 60, stdin=subprocess.DEVNULL)
        try:
            report = json.loads(done.stdout)
        except ValueError:
            return Move("failed", (done.stderr.strip().splitlines() or ["it said nothing"])[-1])
        message = (report.get("error") or {}).get("message", "")
        if report["outcome"] == "completed":
            outcome = "completed"
        else:
            ends = {"does not converge": "gave up", "before the switchover": "stopped"}
            outcome = next((end for words, end in ends.items() if words in message), "failed")
        return Move(outcome, message, report["total_ms"], report["blackout_ms"], report["predicted_blackout_ms"], report)

    def stop(self):
        for host in (0, 1):
            subprocess.run(self.on(host, "rm", "-f", NAME), capture_output=True, stdin=subprocess.DEVNULL)

    def close(self):
        for agent in self.agents:
            agent.terminate()
            agent.wait()
        self.agents = []

    def run_command(self, guest, directory, tap):
        return self.run(guest, directory, "--net", f"tap={tap},mac={GUEST_MAC},ip={GUEST_ADDRESS}/{PREFIX_LENGTH}")

    def idle_command(self, guest, directory, number):
        name = f"{NAME}{number}"
        return self.run(guest, directory, "-d", "--name", name), f"{directory}/vms/{name}/console.log"

    def run(self, guest, directory, *more):
        return ["env", f"MICROVM_RUNTIME_DIR={directory}", self.program, "run", "--memory", f"{guest.memory}M",
                "--cmdline", guest.cmdline(), *more]
