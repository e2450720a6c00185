"""Tables and pictures from the raw data of a folder of runs: nothing here measures."""

import csv
import json
import os
import statistics

import pictures
from metrics import growth_ms_per_gib, is_predicted, ratio, spread

MIB, GIB = 1 << 20, 1 << 30
BASE = "qemu"  # whom ratios are against


class Results:
    """The raw data, in the order in which it was measured."""

    def __init__(self, out):
        self.out = out
        self.runs = [run for run in read(out, "runs.jsonl") if run["kind"] == "move"]
        self.startup = read(out, "startup.jsonl")
        with open(os.path.join(out, "environment.json")) as file:
            self.environment = json.load(file)
        self.cases = list(dict.fromkeys(run["case"] for run in self.runs))
        self.contestants = list(dict.fromkeys(run["contestant"] for run in self.runs))

    def of(self, case, contestant):
        """The runs that count: those that nobody disturbed, unless there are fewer than three of them."""
        every = [run for run in self.runs if run["case"] == case and run["contestant"] == contestant]
        undisturbed = [run for run in every if not run["is_disturbed"]]
        return undisturbed if len(undisturbed) >= min(3, len(every)) else every

    def completed(self, case, contestant):
        return [run for run in self.of(case, contestant) if run["outcome"] == "completed" and run["seen"]]

    def values(self, case, contestant, figure):
        return [FIGURES[figure](run) for run in self.completed(case, contestant)]

    def median(self, case, contestant, figure):
        found = spread(self.values(case, contestant, figure))
        return found and found["median"]


def read(out, name):
    path = os.path.join(out, name)
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file]


def both(run, field):
    used = run["used"]
    return sum(used[side][field] for side in ("source", "destination"))


def share(of, by):
    return lambda run: run[of] / by(run) if by(run) else None


# Each figure of a run; docs/benchmarks.md defines them.
FIGURES = {
    "silence_ms": lambda run: run["seen"]["network_gap_ms"],
    "guest_blackout_ms": lambda run: run["seen"]["guest_blackout_ms"],
    "own_blackout_ms": lambda run: run["blackout_ms"],
    "predicted_ms": lambda run: run["predicted_ms"],
    "total_ms": lambda run: run["total_ms"],
    "ready_ms": lambda run: run.get("ready_ms"),
    "wire_by_ram": share("bytes_on_wire", lambda run: run["guest"]["memory"] * MIB),
    "wire_by_nonzero": share("bytes_on_wire", lambda run: run["nonzero_bytes"]),
    "throughput_by_iperf3": lambda run: run["bytes_on_wire"] / (run["total_ms"] / 1e3) / run["iperf3_bytes_per_s"],
    "lost_ms": lambda run: run["seen"]["lost_ms"],
    "brownout_percent": lambda run: run["seen"]["brownout_percent"],
    "stall_ms": lambda run: run["seen"]["stall_ms"],
    "hole_outside_ms": lambda run: run["seen"]["hole_outside_ms"],
    "noise_ms": lambda run: run["seen"]["network_noise_ms"],
    "cpu_s": lambda run: both(run, "cpu_s"),
    "peak_beyond_mib": lambda run: max(run["used"][side]["peak_beyond_mib"] for side in ("source", "destination")),
    "errors": lambda run: run["errors"],
}


def number(value, digits=None):
    """A number as people read it."""
    if value is None:
        return "–"
    if digits is None:
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def with_range(values):
    found = spread(values)
    return "–" if not found else f"{number(found['median'])} ({number(found['min'])} to {number(found['max'])})"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def outcomes(runs):
    """Of runs that did not all complete: how they ended."""
    ends = [run["outcome"] for run in runs]
    return ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends) if end != "completed")


def overview(results):
    """The table for the README: the two figures that users feel, against the base."""
    rows = []
    for case in results.cases:
        ours, theirs = ([results.median(case, name, f) for f in ("silence_ms", "guest_blackout_ms", "total_ms")] for name in ("microvm", BASE))
        rows.append([case, *(cell for a, b in zip(ours, theirs) for cell in (number(a), number(b), number(ratio(a, b), 2)))])
    head = ["guest"]
    for figure in ("silence, ms", "guest's blackout, ms", "total, ms"):
        head += [f"{figure}: microvm", BASE, "ratio"]
    return table(head, rows)


def details(results):
    head = ["guest", "who", "runs", "silence, ms", "guest's blackout, ms", "own figure, ms", "total, ms", "made ready before, ms", "wire ÷ RAM", "wire ÷ non-zero",
            "÷ iperf3", "work lost, ms", "brownout, %", "longest stall outside, ms", "noise before, ms", "CPU, s", "peak beyond RAM, MiB"]
    rows = []
    for case in results.cases:
        for name in results.contestants:
            runs = results.of(case, name)
            if not runs:
                continue
            said = outcomes(runs)
            marks = "" if not any(run["is_disturbed"] for run in runs) else "*"
            wrong = sum(run["errors"] or 0 for run in runs if run.get("errors"))
            cells = [with_range(results.values(case, name, figure)) for figure in ("silence_ms", "guest_blackout_ms", "own_blackout_ms", "total_ms")]
            cells.append(number(results.median(case, name, "ready_ms")))
            cells += [number(results.median(case, name, figure), 2) for figure in ("wire_by_ram", "wire_by_nonzero", "throughput_by_iperf3")]
            cells += [number(results.median(case, name, figure)) for figure in
                      ("lost_ms", "brownout_percent", "stall_ms", "noise_ms", "cpu_s", "peak_beyond_mib")]
            rows.append([case, name, f"{len(runs)}{marks}" + (f" ({said})" if said else "") + (f" **{wrong} wrong pages**" if wrong else ""), *cells])
    return table(head, rows)


def phases(results):
    """Where our blackout goes, by what the program reports."""
    found = [(case, results.completed(case, "microvm")) for case in results.cases]
    found = [(case, [run["report"]["blackout"] for run in runs]) for case, runs in found if runs]
    names = sorted({name for _, parts in found for part in parts for name in part},
                   key=lambda name: -statistics.median(part.get(name, 0) for _, parts in found for part in parts))
    return table(["guest", *names], [[case, *(number(statistics.median(part.get(name, 0) for part in parts), 2) for name in names)]
                                     for case, parts in found])


def starts(results):
    rows = []
    for name in dict.fromkeys(line["contestant"] for line in results.startup):
        begun = [line for line in results.startup if line["contestant"] == name and line["kind"] == "start"]
        idle = next((line for line in results.startup if line["contestant"] == name and line["kind"] == "idle"), None)
        rows.append([name, with_range([line["first_byte_ms"] for line in begun]), with_range([line["http_ms"] for line in begun]),
                     with_range([line["beyond_kib"] / 1024 for line in begun]),
                     *((idle["vms"], number(idle["beyond_kib_each"] / 1024), number(idle["free_memory_used_kib_each"] / 1024),
                        number(idle["cpu_percent_each"])) if idle else ("–",) * 4)])
    return table(["who", "exec to first byte, ms", "exec to first HTTP answer, ms", "one idle process beyond the guest's RAM, MiB", "many: VMs",
                  "each beyond RAM, MiB", "each, free memory gone, MiB", "each, % of a CPU"], rows)


def targets(results):
    """What was aimed at, what was measured, and whether it was met."""
    ours = lambda case, figure: results.median(case, "microvm", figure)
    theirs = lambda case, figure: results.median(case, BASE, figure)
    against = lambda case, figure: ratio(ours(case, figure), theirs(case, figure))
    idle, half, load, zeros = "idle, 1 GiB", "1 Gb/s, load 50 %, 256 MiB", "load 30 %, 1 GiB", "1 GiB of zeros"
    every = [run for case in results.cases for run in results.completed(case, "microvm")]
    predicted = [is_predicted(run["predicted_ms"], run["blackout_ms"]) for run in every if run["predicted_ms"] and run["blackout_ms"]]
    memory = results.environment["memory"]["read_bytes_per_s"]
    scans = [run["report"]["rounds"][0] for run in results.completed(zeros, "microvm")]
    scan = spread([first["zero_pages"] * 4096 / (first["ms"] / 1e3) / memory for first in scans if first["ms"]])
    sizes = [(run["guest"]["memory"] / 1024, run["seen"]["guest_blackout_ms"]) for run in every
             if run["case"].startswith("idle") and run["seen"]["guest_blackout_ms"] is not None]
    begun = {name: [line for line in results.startup if (line["contestant"], line["kind"]) == (name, "start")]
             for name in ("microvm", BASE)}
    first_byte = {name: spread([line["first_byte_ms"] for line in lines]) for name, lines in begun.items()}
    beyond = spread([line["beyond_kib"] / 1024 for line in begun["microvm"]])
    one_stream, two_streams = "1 streams, 1 GiB, all non-zero", "idle, 1 GiB, 100 % non-zero"
    carried = lambda case, name: first_round(results, case, name)
    plain = carried(one_stream, "microvm")
    wanted = [
        ("blackout of an idle guest, ms", ours(idle, "guest_blackout_ms"), 1.0),
        ("the same ÷ QEMU's", against(idle, "guest_blackout_ms"), 0.25),
        ("its growth with memory, ms a GiB", growth_ms_per_gib(sizes), 0.1),
        ("blackout at a load of half the link ÷ QEMU's", against(half, "guest_blackout_ms"), 0.25),
        ("total time then ÷ QEMU's", against(half, "total_ms"), 1.0),
        ("total time, idle, half zero (never touched) ÷ QEMU's", against(idle, "total_ms"), 0.5),
        ("total time, idle, half zero (written) ÷ QEMU's", against("idle, 1 GiB, half of it written with zeros", "total_ms"), 0.5),
        ("longest stall outside the blackout at a load of 30 %, ms", ours(load, "stall_ms"), 1.0),
        ("work lost outside the blackout then, %", ours(load, "brownout_percent"), 5.0),
        ("exec to first byte ÷ QEMU's", all(first_byte.values()) and ratio(*(found["median"] for found in first_byte.values())) or None, 0.5),
        ("idle process beyond the guest's RAM, MiB", beyond and beyond["median"], 5.0),
    ]
    at_least = [
        ("first round's throughput over one stream ÷ iperf3's one, all non-zero", plain, 0.95),
        ("the same with TLS ÷ without", ratio(carried(one_stream, "microvm-tls"), plain), 0.6),
        ("the same over two streams, the default, ÷ iperf3's one", carried(two_streams, "microvm"), 0.95),
        ("the same with TLS ÷ without, two streams", ratio(carried(two_streams, "microvm-tls"), carried(two_streams, "microvm")), 0.6),
        ("zero scan ÷ one core's read bandwidth", scan and scan["median"], 0.8),
        ("predictions within 30 % or 1 ms", sum(predicted) / len(predicted) if predicted else None, 0.9),
    ]
    verdict = lambda value, is_met: "not measured" if value is None else "yes" if is_met else "**no**"
    rows = [[what, number(value), f"≤ {limit:g}", verdict(value, value is not None and value <= limit)] for what, value, limit in wanted]
    rows += [[what, number(value), f"≥ {limit:g}", verdict(value, value is not None and value >= limit)] for what, value, limit in at_least]
    return table(["target", "measured", "wanted", "met"], rows)


def first_round(results, case, name):
    found = spread([run["report"]["rounds"][0]["bytes_sent"] / (run["report"]["rounds"][0]["ms"] / 1e3) / run["iperf3_bytes_per_s"]
                    for run in results.completed(case, name)])
    return found and found["median"]


def write_csv(results):
    with open(os.path.join(results.out, "runs.csv"), "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["case", "contestant", "number", "outcome", "is_disturbed", *FIGURES])
        for run in results.runs:
            is_there = run["outcome"] == "completed" and run["seen"]
            out.writerow([run["case"], run["contestant"], run["number"], run["outcome"], run["is_disturbed"],
                          *(figure(run) if is_there else "" for figure in FIGURES.values())])


def write(out):
    """All tables and pictures; the path of the tables."""
    results = Results(out)
    write_csv(results)
    environment = results.environment
    drawn = {
        "blackout.svg": pictures.dots("What the guest's users notice",
                                      "longest time without an answer from the guest, ms (less the probe's own pace)",
                                      results.cases, results.contestants, lambda case, name: results.values(case, name, "silence_ms")),
        "total.svg": pictures.dots("How long a move takes", "from the command to its end, ms", results.cases, results.contestants,
                                   lambda case, name: results.values(case, name, "total_ms")),
    }
    busiest = next((case for case in ("load 30 %, 1 GiB", *results.cases) if typical(results, case)), None)
    if busiest:
        drawn["brownout.svg"] = pictures.curves(f"What the guest gets done meanwhile: {busiest}", typical(results, busiest))
    for name, text in drawn.items():
        with open(os.path.join(out, name), "w") as file:
            file.write(text)
    settings = "\n".join(f"- **{name}**: {environment['versions'].get(name)}; {what}" for name, what in environment["settings"].items())
    disturbed = sum(run["is_disturbed"] for run in results.runs)
    sections = [
        "# Runs", f"{environment['cpu']}, {environment['cpus']} CPUs, KVM: {environment['kvm']}, kernel {environment['kernel']}, "
        f"{environment['versions']['iperf3']}.", settings,
        f"{len(results.runs)} moves; {disturbed} of them were disturbed by other work on the machine, and count only where fewer than three were "
        "not (marked `*`). Medians, with least and most in parentheses. [docs/benchmarks.md](../../../docs/benchmarks.md) defines the figures.",
        "## Overview", overview(results), "![silence](blackout.svg)", "![total](total.svg)",
        *(["![work](brownout.svg)"] if busiest else []), "## Everything", details(results),
        "## Where the blackout of microvm goes, ms", phases(results),
        *(["## Starting, and doing nothing", starts(results)] if results.startup else []),
        "## Targets", targets(results), ""]
    path = os.path.join(out, "tables.md")
    with open(path, "w") as file:
        file.write("\n\n".join(sections))
    return path


def typical(results, case):
    """Of each contestant the run whose work lost is the median one: its name, curve and when it was over."""
    found = []
    for name in results.contestants:
        runs = [run for run in results.completed(case, name) if run["seen"]["lost_ms"] is not None]
        runs.sort(key=lambda run: run["seen"]["lost_ms"])
        if runs:
            run = runs[len(runs) // 2]
            found.append((name, run["curve"], run["command_ms"]))
    return found
