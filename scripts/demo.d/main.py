"""The demo itself: see ../demo."""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time

import picture
import screen
from guests import NAME, Linux, Pulse, parse_size
from hosts import CHECKOUT, MICROVM, DemoError, Lab, Namespaces
from watch import MS, Watch

# Pings before and after that are drawn.
BEFORE_NS, AFTER_NS = 150 * MS, 400 * MS


def arguments():
    parser = argparse.ArgumentParser(prog="demo", add_help=False, allow_abbrev=False)
    parser.add_argument("--pulse", action="store_true")
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--memory", default="256M", type=size)
    parser.add_argument("--rate", type=size)
    parser.add_argument("--hosts", choices=("namespaces", "lab"))
    parser.add_argument("--svg", default="demo.svg")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.usage = "scripts/demo --help tells how"
    args = parser.parse_args()
    if not 1 <= args.times <= 100:
        parser.error("--times: 1 to 100")
    directory = os.path.dirname(os.path.abspath(args.svg))
    if not os.path.isdir(directory):
        parser.error(f"--svg: there is no directory {directory}")
    if not args.hosts:
        args.hosts = "namespaces" if can_run_here(args.pulse) else "lab"
    if not args.rate:
        args.rate = {("namespaces", True): "100M", ("namespaces", False): "20M", ("lab", True): "2M",
                     ("lab", False): "1M"}[args.hosts, args.pulse]
    return args


def size(text):
    parse_size(text)
    return text


def can_run_here(pulse):
    if not os.path.exists("/dev/kvm"):
        return False
    with open("/proc/cpuinfo") as cpus:
        flags = {flag for line in cpus if line.startswith("flags") for flag in line.split()}
    return pulse or bool(flags & {"vmx", "svm"})


def migrate(hosts, guest, watch, source):
    """One migration, and all that was seen of it."""
    before = guest.status()
    destination = 1 - source
    command = hosts.in_host(source, "migrate", NAME, "--to", hosts.addresses[destination], "--json",
                            "--max-downtime", hosts.max_downtime)
    begin = time.monotonic_ns()
    child = hosts.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    notes = []  # (time, line): what the program said meanwhile, and when
    reader = threading.Thread(target=lambda: notes.extend((time.monotonic_ns(), line.strip()) for line in child.stderr))
    reader.start()
    said = child.stdout.read()
    status = child.wait()
    end = time.monotonic_ns()
    reader.join()
    if status or not said:
        told = [line.removeprefix("microvm: ") for _, line in notes if line.startswith(("microvm: ", "  ", "what to do"))]
        told = told or [line for _, line in notes[-3:]]
        raise Failed("\n".join(told) or f"microvm migrate: status {status}", said)
    time.sleep(hosts.settle_s)
    result = {"report": json.loads(said), "names": (hosts.names[source], hosts.names[destination]), "begin": begin,
              "end": end, "notes": notes, "watched_until": time.monotonic_ns()}
    result["tcp_survived"] = watch.tcp_goes_on()
    result["guest_errors"] = guest.errors_after(before)
    return result


class Failed(DemoError):
    """A migration that did not complete."""

    def __init__(self, told, said):
        super().__init__(told)
        try:
            self.report = json.loads(said)
        except ValueError:
            self.report = None


def complete(result, watch):
    """Adds what the probes saw; late, so that late answers count as answers."""
    seen = watch.between(result["begin"], result["watched_until"])
    seen["probe"]["tcp_survived"] = result["tcp_survived"]
    result.update(seen)
    drawn = watch.between(result["begin"] - BEFORE_NS, min(result["end"] + AFTER_NS, result["watched_until"]))
    result["drawn"] = {key: drawn[key] for key in ("pings", "tcp", "announced")}


def is_good(result):
    return (result["report"]["outcome"] == "completed" and result["guest_errors"] == 0
            and result["probe"]["tcp_survived"])


def as_json(result):
    keys = ("probe", "guest_errors", "announce_seen")
    return {**result["report"], **{key: result[key] for key in keys}}


def demo(args, note):
    """All migrations; the results, and what ended it early."""
    hosts = {"namespaces": Namespaces, "lab": Lab}[args.hosts](note)
    guest = (Pulse if args.pulse else Linux)(hosts, args.memory, args.rate)
    results, failure = [], None
    title = f"{guest.what}, {args.memory} of memory, writing {args.rate} a second; {hosts.what}"
    try:
        if isinstance(guest, Linux):
            note("fetching a kernel and building the guest")
            guest.prepare(os.environ.get("MICROVM_CACHE", os.path.join(CHECKOUT, ".cache")))
        note(f"making {hosts.what}")
        hosts.up()
        note(f"booting {guest.what}")
        guest.boot()
        watch = Watch(hosts, guest.mac)
        watch.wait_until_it_works()
        time.sleep(0.5)
        try:
            for turn in range(2 * args.times):
                source = turn % 2
                note(f"{hosts.names[source]} → {hosts.names[1 - source]}")
                results.append(migrate(hosts, guest, watch, source))
        except DemoError as error:
            failure = error
        time.sleep(0.3)
        for result in results:
            complete(result, watch)
            result["tcp_error"] = watch.tcp_error
        return title, hosts, results, failure
    finally:
        # Once more Ctrl-C must not leave half of it behind.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        note("clearing up")
        hosts.down()
        if isinstance(guest, Linux):
            guest.clear()
        note(None)


def main():
    args = arguments()
    if args.check:
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    if not os.access(MICROVM, os.X_OK):
        raise DemoError(f"there is no {MICROVM}: start scripts/demo instead, which builds it")
    title, hosts, results, failure = demo(args, screen.notes())
    if results:
        with open(args.svg, "w") as file:
            file.write(picture.draw(title, results, hosts.ping_ms))
    if args.json:
        migrations = [as_json(result) for result in results]
        if isinstance(failure, Failed) and failure.report:
            migrations.append({**failure.report, "probe": None, "guest_errors": None, "announce_seen": None})
        print(json.dumps({"host_kind": hosts.kind, "migrations": migrations}))
    else:
        screen.show(title, results, hosts.ping_ms, args.svg)
    if failure:
        raise failure
    return 0 if all(map(is_good, results)) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        sys.exit(130)
