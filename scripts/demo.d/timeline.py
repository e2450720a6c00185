"""Where the parts of a migration lie in time, and how they are called."""

from watch import MS

# The parts of the blackout in their order (docs/migration-protocol.md); save runs beside the transfer's beginning.
PHASES = ("pause", "collect", "save", "hash", "transfer", "load", "verify", "prepare-journal", "decide-journal",
          "commit", "commit-journal", "start")
MIB = 1 << 20


def phases(report):
    """(name, ms) of the blackout's parts, in order; a part nobody here has heard of comes last."""
    parts = report["blackout"]
    order = [name for name in PHASES if name in parts] + [name for name in parts if name not in PHASES]
    return [(name, parts[name]) for name in order]


def spans(result):
    """Rounds as (begin, end, round) and the blackout as (begin, end) or None; ms since the command's start.

    How long each took is the program's report. Where round 1 begins is when the program said so, on this machine's clock.
    """
    report = result["report"]
    said = next((at for at, line in result["notes"] if "pre-copy" in line), None)
    at = (said - result["begin"]) / MS if said else 0.0
    rounds = []
    for one in report["rounds"][:-1]:
        rounds.append((at, at + one["ms"], one))
        at += one["ms"]
    blackout = None
    if report["blackout_ms"] is not None:
        blackout = (at, at + report["blackout_ms"])
    for one in report["rounds"][-1:]:
        # The last round runs in the blackout.
        first = at + report["blackout"].get("pause", 0) + report["blackout"].get("collect", 0)
        rounds.append((first, first + one["ms"], one))
    return rounds, blackout



def silence_ms(result, ping_ms):
    """How long no ping was answered at the switchover, less the time between two pings."""
    begin, end = result["switchover"] or (0, 0)
    return round(max(0.0, (end - begin) / MS - ping_ms), 3)


def tcp_stall_ms(result):
    """The longest time in which nothing came back on the connection."""
    times, last = [], None
    for at, _, checked in result["tcp"]:
        if checked != last:
            times.append(at)
            last = checked
    return max((b - a for a, b in zip(times, times[1:])), default=0) / MS


def tcp_bytes(result):
    return result["tcp"][-1][2] - result["tcp"][0][2] if result["tcp"] else 0
