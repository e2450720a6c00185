"""What is computed from the probe's answers; no I/O here. `docs/benchmarks.md` defines each figure in words.

All times are nanoseconds of the client's clock unless a name says otherwise; results are milliseconds.
"""

import bisect
import statistics
from typing import NamedTuple

MS = 1_000_000
# Within so long after the blackout the guest's next answers are looked at for what it says of it.
NEXT_NS = 50 * MS


class Answer(NamedTuple):
    """One answer of the guest (probe.py)."""

    asked: int
    came: int
    guest_ns: int
    sweeps: int
    written: int
    verified: int
    errors: int
    hole_ns: int
    is_filled: int


def parse(lines):
    """The probe's answers, in order of arrival."""
    answers = [Answer(*map(int, line.split())) for line in lines]
    answers.sort(key=lambda answer: answer.came)
    return answers


def silences(answers, begin, end):
    """Times with a question and without an answer that overlap `begin` to `end`: (from, to), in order.

    Each begins with the first question that had no answer, and not with the answer before it: a probe that asks late sees no
    silence of its own making.
    """
    found = ((max(a.came, b.asked), b.came) for a, b in zip(answers, answers[1:]))
    return [span for span in found if span[1] >= begin and span[0] <= end]


def longest(spans):
    return max(spans, key=lambda span: span[1] - span[0], default=(0, 0))


def length_ms(span):
    return (span[1] - span[0]) / MS


def hidden_ms(answers, begin, end):
    """Time that was taken out of the guest's clock: how far it fell behind the client's between before and after.

    An answer that was delayed on its way shows the guest's clock too far back, never too far ahead: the largest difference of
    many counts.
    """
    before = [a.guest_ns - a.came for a in answers if a.came < begin]
    after = [a.guest_ns - a.came for a in answers if a.came > end]
    if not before or not after:
        return None
    return (max(before[-500:]) - max(after[:500])) / MS


def value_at(answers, times, at, field):
    """A counter at a time, between the two answers around it."""
    index = bisect.bisect_left(times, at)
    if index == 0:
        return getattr(answers[0], field)
    if index == len(answers):
        return getattr(answers[-1], field)
    a, b = answers[index - 1], answers[index]
    share = (at - a.came) / (b.came - a.came) if b.came > a.came else 1
    return getattr(a, field) + share * (getattr(b, field) - getattr(a, field))


def work(answers, begin, end, blackout_ns, baseline_ns, tail_ns):
    """Pages that the guest would have written at the pace before the move, and did not."""
    times = [a.came for a in answers]
    first = max(times[0], begin - baseline_ns)
    at = lambda when: value_at(answers, times, when, "written")
    rate = (at(begin) - at(first)) / max(begin - first, 1)
    last = min(end + tail_ns, times[-1])
    if rate <= 0 or last <= begin:
        return {"rate_pages_per_s": 0.0, "lost_ms": None, "lost_outside_ms": None, "brownout_percent": None}
    lost_ns = (rate * (last - begin) - (at(last) - at(begin))) / rate
    outside_ns = lost_ns - blackout_ns
    running_ns = max(end - begin - blackout_ns, 1)
    return {
        "rate_pages_per_s": rate * 1e9,
        "lost_ms": lost_ns / MS,
        "lost_outside_ms": outside_ns / MS,
        "brownout_percent": 100 * outside_ns / running_ns,
    }


def curve(answers, begin, end, step_ns, before_ns, after_ns):
    """Pages a second in steps of time around a move: [[ms from begin, pages a second], …]."""
    times = [a.came for a in answers]
    first, last = max(times[0], begin - before_ns), min(times[-1], end + after_ns)
    points, at = [], first
    while at + step_ns <= last:
        pages = value_at(answers, times, at + step_ns, "written") - value_at(answers, times, at, "written")
        points.append([round((at + step_ns / 2 - begin) / MS, 1), round(pages * 1e9 / step_ns)])
        at += step_ns
    return points


def seen(answers, begin, end, baseline_ns=500 * MS, tail_ns=300 * MS):
    """All that the probe saw of a move that was asked for at `begin` and was over at `end`."""
    during = silences(answers, begin, end + tail_ns)
    before = silences(answers, begin - baseline_ns, begin)
    if not during or not before:
        return None
    blackout = longest(during)
    others = [span for span in during if span != blackout]
    # The hole that the blackout made comes with one of the next answers: a guest that was stopped after it had looked at its clock
    # finishes an answer first.
    next_ones = [a for a in answers if blackout[1] <= a.came <= blackout[1] + NEXT_NS]
    last = max(next_ones, key=lambda a: a.hole_ns, default=None)
    outside = [a.hole_ns for a in answers if begin <= a.came <= end + tail_ns and a is not last]
    quiet = [a.hole_ns for a in answers if begin - baseline_ns <= a.came < begin]
    hidden = hidden_ms(answers, blackout[0], blackout[1] + 5 * MS)
    hole = last.hole_ns / MS if last else 0.0
    return {
        "network_gap_ms": length_ms(blackout),
        "network_noise_ms": length_ms(longest(before)),
        "guest_hole_ms": hole,
        "hidden_ms": hidden,
        "guest_blackout_ms": None if hidden is None else hole + max(hidden, 0.0),
        "hole_noise_ms": max(quiet, default=0) / MS,
        "stall_ms": max((length_ms(span) for span in others), default=0.0),
        "hole_outside_ms": max(outside, default=0) / MS,
        "blackout_begins_ms": (blackout[0] - begin) / MS,
        **work(answers, begin, end, blackout[1] - blackout[0], baseline_ns, tail_ns),
    }


def spread(values):
    """Median, least, most and how many, of those that are there."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def ratio(a, b):
    """How many times b is a; None where that says nothing."""
    return a / b if a is not None and b else None


def is_predicted(predicted_ms, measured_ms):
    """Whether a prediction was within 30 % or 1 ms."""
    return abs(predicted_ms - measured_ms) <= max(1.0, 0.3 * measured_ms)


def growth_ms_per_gib(points):
    """Slope of a straight line through (GiB, ms), least squares."""
    n = len(points)
    if len({x for x, _ in points}) < 2:
        return None
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
