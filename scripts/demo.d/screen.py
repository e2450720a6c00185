"""What the terminal shows."""

import os
import shutil
import sys
from itertools import groupby

from timeline import MIB, MS, phases, silence_ms, spans, tcp_bytes, tcp_stall_ms

EIGHTHS = " ▏▎▍▌▋▊▉█"


def painter(stream):
    if not stream.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb":
        return lambda _, text: text
    codes = {"bold": "1", "dim": "2", "good": "32", "bad": "31", "busy": "34", "still": "33"}
    return lambda style, text: f"\x1b[{codes[style]}m{text}\x1b[0m"


def notes():
    """A function that says on standard error what goes on; on a terminal one line, which it wipes in the end."""
    err = sys.stderr
    if err.isatty():
        def note(text):
            err.write(f"\r\x1b[K{'demo: ' + text + ' …' if text else ''}")
            err.flush()
    else:
        def note(text):
            if text:
                print(f"demo: {text}", file=err, flush=True)
    return note


def bar(begin, end, scale, width):
    """A bar from begin to end (ms) on a line of `width` columns; at least an eighth of a column can be seen."""
    first, last = begin * scale, max(end * scale, begin * scale + 0.125)
    cells = []
    for column in range(width):
        lo, hi = max(first, column), min(last, column + 1)
        eighths = round(max(0.0, hi - lo) * 8)
        if 0 < hi - lo and eighths == 0:
            eighths = 1
        # A bar that begins inside a column is drawn from its left edge: there are no blocks for the other way.
        cells.append(EIGHTHS[eighths])
    return "".join(cells)


def answers(result, begin_ms, end_ms, width):
    """One sign a column: █ all pings were answered, ▒ some, · none; a space where none was sent."""
    columns = [[0, 0] for _ in range(width)]
    for sent, answer in result["pings"]:
        at = (sent - result["begin"]) / MS
        if begin_ms <= at < end_ms:
            column = columns[int((at - begin_ms) / (end_ms - begin_ms) * width)]
            column[0] += 1
            column[1] += answer is not None
    return [" " if not n else "█" if ok == n else "·" if not ok else "▒" for n, ok in columns]


def show(title, results, ping_ms, svg):
    paint = painter(sys.stdout)
    out = []
    out.append(paint("bold", title))
    width = max(20, min(60, shutil.get_terminal_size((100, 0)).columns - 46))
    for result in results:
        out += ["", *one(result, paint, width, ping_ms)]
    if results:
        out += ["", *table(results, paint, ping_ms)]
        out += ["", f"picture: {svg}"]
    print("\n".join(out), flush=True)


def one(result, paint, width, ping_ms):
    report = result["report"]
    rounds, blackout = spans(result)
    total = max([report["total_ms"], *(end for _, end, _ in rounds)])
    scale = width / total
    lines = [f"{paint('bold', ' → '.join(result['names']))}  {report['outcome']} in {report['total_ms']:.0f} ms"]
    for begin, end, one in rounds:
        is_last = one is rounds[-1][2]
        text = f"{one['ms']:8.1f} ms  {one['pages']:,} pages"
        text += f", {one['dirty_pages_after']:,} dirtied meanwhile" if not is_last else " while paused"
        lines.append(f"  round {one['n']:<4}{paint('still' if is_last else 'busy', bar(begin, end, scale, width))}{text}")
    if blackout:
        lines.append(f"  blackout  {paint('bad', bar(*blackout, scale, width))}{report['blackout_ms']:8.1f} ms")
    row = answers(result, 0, total, width)
    signs = "".join(paint("good" if good else "bad", "".join(run)) for good, run in groupby(row, lambda sign: sign == "█"))
    lines.append(f"  pings     {signs}{silence_ms(result, ping_ms):8.1f} ms without an answer")
    parts = phases(report)
    if parts:
        lines.append(paint("dim", "  in the blackout (ms): " + " · ".join(f"{name} {ms:.2f}" for name, ms in parts)))
    return lines


def table(results, paint, ping_ms):
    def verdict(good, text):
        return ("good" if good else "bad", text)

    def row(name, value):
        cells = [value(result) for result in results]
        return [("dim", name), *(cell if isinstance(cell, tuple) else (None, cell) for cell in cells)]

    rows = [
        [("dim", ""), *(("bold", " → ".join(result["names"])) for result in results)],
        row("outcome", lambda r: verdict(r["report"]["outcome"] == "completed", r["report"]["outcome"])),
        row("rounds", lambda r: str(len(r["report"]["rounds"]))),
        row("sent", lambda r: f"{r['report']['bytes_sent'] / MIB:.1f} of {r['report']['ram_bytes'] / MIB:.0f} MiB"),
        row("blackout", lambda r: "none" if r["report"]["blackout_ms"] is None else f"{r['report']['blackout_ms']:.1f} ms"),
        row("silence then", lambda r: "none seen" if not r["switchover"] else f"{silence_ms(r, ping_ms):.1f} ms"),
        row("longest silence", lambda r: f"{r['probe']['longest_gap_ms']:.1f} ms"),
        row("pings lost", lambda r: f"{r['probe']['pings_lost']} of {r['probe']['pings_sent']}"),
        row("TCP connection", lambda r: verdict(True, f"alive, {tcp_bytes(r) / MIB:.1f} MiB checked")
            if r["probe"]["tcp_survived"] else verdict(False, r.get("tcp_error") or "stuck")),
        row("  its longest stall", lambda r: f"{tcp_stall_ms(r):.1f} ms"),
        row("memory errors", lambda r: verdict(r["guest_errors"] == 0, f"{r['guest_errors']}")),
        row("announcements seen", lambda r: "{garp} ARP, {rarp} RARP, {na} NA".format(**r["announce_seen"])),
    ]
    # Many migrations do not fit next to each other.
    if len(results) > 4:
        rows = [list(column) for column in zip(*rows)]
    widths = [max(len(row[i][1]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(paint(style, text.ljust(width)) if style else text.ljust(width)
                             for (style, text), width in zip(row, widths)).rstrip() for row in rows]
