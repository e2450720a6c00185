"""One measured move, from booting a guest to knowing that it lost nothing; and the order of many."""

import dataclasses
import gzip
import json
import os
import shutil
import sys
import tempfile
import time

import limits
import machine
import metrics
from adapters import ContestantError
from guests import GuestError, Watch
from machine import Interference, Meter
from network import NetworkError

# Before a move the guest is watched for so long, to know its pace; and after it, to see it get back to it.
BASELINE_S, TAIL_S = 0.7, 0.5
# How long a move may take before it counts as one that does not end.
LIMIT_S = 30


class Runs:
    """Measures what is missing in a file of runs."""

    def __init__(self, network, contestants, out, options, note):
        self.network, self.contestants, self.options, self.note = network, contestants, options, note
        self.out = out
        self.path = os.path.join(out, "runs.jsonl")
        self.done = set()
        if os.path.exists(self.path):
            with open(self.path) as file:
                self.done = {key(json.loads(line)) for line in file}

    def record(self, run):
        with open(self.path, "a") as file:
            file.write(json.dumps(run, separators=(",", ":")) + "\n")

    def all(self, cases, times):
        """Every case, contestant after contestant in turn, `times` times."""
        links = list(dict.fromkeys(case.link for case in cases))
        for link in links:
            here = [case for case in cases if case.link == link]
            if all((case.name, c.name, n) in self.done for case in here for c in self.contestants for n in range(times)):
                continue
            self.network.set_link(link)
            # One after the other: an agent of one must not be in another's way.
            with Opened(self.contestants, self.network):
                for case in here:
                    capacity = limits.iperf3(self.network)
                    self.record({"kind": "link", "case": case.name, "link": link, "bytes_per_s": capacity})
                    for number in range(times):
                        # A different one first each time: nobody always follows the same.
                        first = number % len(self.contestants)
                        for contestant in self.contestants[first:] + self.contestants[:first]:
                            if (case.name, contestant.name, number) not in self.done:
                                self.one(case, contestant, number, capacity)

    def one(self, case, contestant, number, capacity):
        reason = contestant.cannot(case)
        if reason:
            if number == 0:
                self.note(f"skipped: {case.name} with {contestant.name}: {reason}")
            return
        for attempt in range(1 + self.options.retries):
            quiet = Interference.wait_for_quiet(self.options.patience)
            run = {"kind": "move", "case": case.name, "contestant": contestant.name, "number": number, "attempt": attempt,
                   "link": case.link, "iperf3_bytes_per_s": capacity, "before": quiet}
            try:
                run.update(self.measure(case, contestant, capacity))
            except (ContestantError, GuestError, NetworkError, OSError) as error:
                run.update({"outcome": "error", "message": str(error)})
            finally:
                contestant.stop()
            run["after"] = Interference.now()
            run["is_disturbed"] = is_disturbed(run)
            if not run["is_disturbed"] or attempt == self.options.retries:
                break
        self.record(run)
        self.tell(run)

    def measure(self, case, contestant, capacity):
        guest = case.with_rate(capacity)
        if guest.memory * 2**20 * 2.3 > machine.free_bytes():
            raise GuestError(f"two guests of {guest.memory} MiB do not fit this machine's free memory")
        directory = tempfile.mkdtemp()
        watch = warmth = None
        try:
            self.network.forget()
            contestant.start(guest, case.streams)
            watch = Watch(self.network, directory, self.options.hertz)
            watch.wait_until_filled()
            begin = time.monotonic_ns()
            contestant.prepare()
            ready_ms = (time.monotonic_ns() - begin) / metrics.MS
            # A destination may look first whether its guest fits; what is held here counts as taken then.
            room = machine.free_bytes() - guest.memory * 2**20 - (512 << 20)
            warmth = machine.Warmth(min(guest.touched_bytes() + (64 << 20), max(room, 0)))
            time.sleep(BASELINE_S)
            meter = Meter(contestant.source_pid(), contestant.destination_pid(), guest.memory * 2**20)
            wire = self.network.bytes_on_wire()
            stat = Interference.times()
            first_touch = warmth.release()
            reported = machine.reporting().get("reported_kib")
            begin = time.monotonic_ns()
            move = contestant.move(LIMIT_S)
            end = time.monotonic_ns()
            warmth.stop()
            stolen = Interference.between(stat, Interference.times())["stolen"]
            reported = reported and (int(machine.reporting()["reported_kib"]) - int(reported)) / 1024
            wire = self.network.bytes_on_wire() - wire
            is_there = move.outcome == "completed"
            used = meter.finish(contestant.destination_pid() if is_there else None)
            time.sleep(TAIL_S)
            errors = watch.errors() if is_there else None
            answers = watch.finish()
            self.keep(watch, case, contestant, begin, end)
            return {
                "guest": dataclasses.asdict(guest), "streams": case.streams, "cmdline": guest.cmdline(),
                "touched_bytes": guest.touched_bytes(), "nonzero_bytes": guest.nonzero_bytes(),
                **dataclasses.asdict(move), "ready_ms": ready_ms, "command_ms": (end - begin) / metrics.MS, "bytes_on_wire": wire, "stolen": stolen,
                "first_touch_s_per_gib": first_touch, "reported_mib": reported, "used": used, "errors": errors,
                "seen": metrics.seen(answers, begin, end) if is_there else None,
                "curve": metrics.curve(answers, begin, end, 10 * metrics.MS, 400 * metrics.MS, 400 * metrics.MS) if is_there else [],
            }
        finally:
            if watch:
                watch.kill()
            if warmth:
                warmth.drop()
            shutil.rmtree(directory, ignore_errors=True)

    def keep(self, watch, case, contestant, begin, end):
        """All answers of the probe, where they are wanted, after a line that says when the move was."""
        if self.options.keep_probes:
            name = f"{case.name}-{contestant.name}-{begin}".replace(" ", "_").replace("/", "")
            os.makedirs(os.path.join(self.out, "probes"), exist_ok=True)
            with open(watch.path, "rb") as source, gzip.open(os.path.join(self.out, "probes", name + ".gz"), "wb") as file:
                file.write(json.dumps({"begin": begin, "end": end}).encode() + b"\n")
                shutil.copyfileobj(source, file)

    def tell(self, run):
        seen = run.get("seen")
        if not seen:
            self.note(f"{run['case']} · {run['contestant']}: {run['outcome']} {run.get('message', '')}")
            return
        disturbed = ", disturbed" if run["is_disturbed"] else ""
        errors = f", {run['errors']} MEMORY ERRORS" if run["errors"] else ""
        blackout = "" if seen["guest_blackout_ms"] is None else f", guest {seen['guest_blackout_ms']:.1f}"
        self.note(f"{run['case']} · {run['contestant']}: silent {seen['network_gap_ms']:.1f} ms{blackout}, says "
                  f"{run['blackout_ms']} ms; total {run['total_ms']:.0f} ms, {run['bytes_on_wire'] / 2**20:.0f} MiB{errors}{disturbed}")


def is_disturbed(run):
    """Whether others have used CPUs or memory that the move needed."""
    return not (Interference.is_quiet(run["before"]) and Interference.is_quiet(run["after"])
                and run.get("stolen", 0) <= Interference.MOST_STOLEN
                and run.get("first_touch_s_per_gib", {}).get("sample after", 0) <= machine.Warmth.MOST_AFTER)


class Opened:
    """Contestants that are ready for a link; closed whatever happens."""

    def __init__(self, contestants, network):
        self.contestants, self.network = contestants, network
        self.directories = []

    def __enter__(self):
        try:
            for contestant in self.contestants:
                self.directories.append(tempfile.mkdtemp())
                contestant.open(self.network, self.directories[-1])
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, *_):
        for contestant in self.contestants:
            contestant.stop()
            contestant.close()
        for directory in self.directories:
            shutil.rmtree(directory, ignore_errors=True)


def key(run):
    return (run["case"], run.get("contestant"), run.get("number"))
