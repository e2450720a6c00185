"""The benchmark itself: see scripts/bench."""

import argparse
import datetime
import fnmatch
import hashlib
import json
import os
import signal
import sys
import time

import cases
import limits
import machine
import report
import startup
from adapters import ContestantError, contestants
from guests import GuestError
from network import Network, NetworkError
from runs import Opened, Runs

CHECKOUT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))


def arguments():
    parser = argparse.ArgumentParser(prog="bench", add_help=False, allow_abbrev=False, usage="scripts/bench --help tells how")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--contestants", default="")
    parser.add_argument("--out", default=os.path.join(CHECKOUT, "benches", "runs", str(datetime.date.today())))
    parser.add_argument("--patience", type=float, default=20)
    parser.add_argument("--retries", type=int, default=1)
    parser.add_argument("--hertz", type=int, default=1000)
    parser.add_argument("--idle", type=int, default=100)
    parser.add_argument("--keep-probes", action="store_true")
    parser.add_argument("--no-startup", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--check", action="store_true")
    return parser.parse_args()


def selected(options):
    """The cases that were asked for."""
    every = cases.grid()
    if options.only:
        chosen = [case for case in every if any(fnmatch.fnmatch(case.name, pattern) for pattern in options.only)]
        if not chosen:
            raise GuestError(f"no case is called so: {', '.join(options.only)} (see --list)")
        return chosen
    return [case for case in every if options.full or case.is_short]


def programs():
    """What runs, by the environment that scripts/bench sets."""
    firmware = os.environ.get("BENCH_QEMU_FIRMWARE", "").split(":")
    return {"microvm": os.environ.get("BENCH_MICROVM", os.path.join(CHECKOUT, "target/release/microvm")),
            "pulse": os.environ["BENCH_PULSE"], "qemu": os.environ.get("BENCH_QEMU"),
            "qemu_firmware": [path for path in firmware if path]}


def note(text):
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def describe(options, able, used):
    """The environment of the runs, into the folder of the runs."""
    with open(used["pulse"], "rb") as elf:
        digest = hashlib.sha256(elf.read()).hexdigest()
    versions = {contestant.name: contestant.version() for contestant in able}
    versions["iperf3"] = machine.version(["iperf3", "--version"])
    environment = machine.environment(versions)
    environment["pulse_sha256"] = digest
    environment["settings"] = {contestant.name: contestant.what for contestant in able}
    environment["arguments"] = sys.argv[1:]
    environment["probe_hertz"] = options.hertz
    environment["memory"] = limits.memory_bandwidth()
    with open(os.path.join(options.out, "environment.json"), "w") as file:
        json.dump(environment, file, indent=1)


def startups(network, able, options):
    """Starts, in turn, and idle VMs; kept apart from the moves."""
    path = os.path.join(options.out, "startup.jsonl")
    if os.path.exists(path):
        return
    network.set_link("veth")
    lines = []
    one_of_each = [c for c in able if c.name in ("microvm", "qemu")]
    with Opened(one_of_each, network):
        for number in range(options.times):
            for contestant in one_of_each:
                lines.append({"kind": "start", "contestant": contestant.name, "number": number, **startup.start(contestant, network)})
                note(f"start · {contestant.name}: first byte after {lines[-1]['first_byte_ms']:.0f} ms, "
                     f"HTTP after {lines[-1]['http_ms']:.0f} ms, {lines[-1]['beyond_kib'] / 1024:.1f} MiB beyond the guest's")
    if options.idle:
        for contestant in one_of_each:
            lines.append({"kind": "idle", "contestant": contestant.name, **startup.idle(contestant, network, options.idle)})
            note(f"{options.idle} idle VMs · {contestant.name}: {lines[-1]['beyond_kib_each'] / 1024:.1f} MiB and "
                 f"{lines[-1]['cpu_percent_each']:.2f} % of a CPU each")
    with open(path, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def bench(options):
    used = programs()
    everyone = contestants(used)
    wanted = options.contestants.split(",") if options.contestants else [c.name for c in everyone]
    able = []
    for contestant in everyone:
        if contestant.name not in wanted:
            continue
        if contestant.version():
            able.append(contestant)
        else:
            note(f"skipped: {contestant.name} is not installed")
    os.makedirs(options.out, exist_ok=True)
    describe(options, able, used)
    network = Network()
    try:
        network.up()
        if not options.no_startup:
            startups(network, able, options)
        Runs(network, able, options.out, options, note).all(selected(options), options.times)
    finally:
        # Once more Ctrl-C must not leave half of it behind.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        network.down()


def main():
    options = arguments()
    if options.list:
        for case in cases.grid():
            print(f"{'short' if case.is_short else 'full ':5}  {case.name}")
        return 0
    chosen = selected(options)
    if options.check:
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    if not options.report:
        note(f"{len(chosen)} cases, {options.times} times each")
        bench(options)
    print(report.write(options.out))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ContestantError, GuestError, NetworkError) as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("bench: interrupted; what was measured is kept, and the same call goes on from there", file=sys.stderr)
        sys.exit(130)
