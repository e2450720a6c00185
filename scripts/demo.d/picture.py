"""The picture: what the client saw, what the program reported, and what was announced, on one time axis."""

from html import escape

from timeline import MIB, MS, phases, silence_ms, spans, tcp_bytes

WIDTH, LEFT, RIGHT = 1000, 120, 24
PLOT = WIDTH - LEFT - RIGHT
INK, PALE, GRID = "#1f2430", "#6b7280", "#e5e7eb"
GOOD, LOST, SILENCE = "#2f9e63", "#d64545", "#fde4e1"
ROUND, LAST = "#4c7edb", "#e8943a"
KINDS = {"garp": ("#7048c8", "gratuitous ARP"), "rarp": ("#0f9aa8", "RARP"), "na": ("#c2417f", "neighbour advertisement")}
# One colour for the work at each place: source, the way, destination.
PLACES = {
    "source": ("#4c7edb", ("pause", "collect", "save", "hash", "decide-journal")),
    "on the way": ("#e8943a", ("transfer", "commit")),
    "destination": ("#2f9e63", ("load", "verify", "prepare-journal", "commit-journal", "start")),
}
PANEL = 300


class Drawing:
    def __init__(self):
        self.parts = []

    def rect(self, x, y, width, height, fill, **more):
        self.parts.append(f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(width, 0.8):.2f}" height="{height:.2f}" fill="{fill}"{extra(more)}/>')

    def line(self, x1, y1, x2, y2, stroke, width=1.0, **more):
        self.parts.append(f'<line x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}" stroke="{stroke}" stroke-width="{width}"{extra(more)}/>')

    def text(self, x, y, text, size=12, fill=INK, anchor="start", weight="normal"):
        self.parts.append(f'<text x="{x:.2f}" y="{y:.2f}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" '
                          f'font-weight="{weight}">{escape(text)}</text>')

    def dots(self, points, fill, radius):
        # One path instead of thousands of circles.
        path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
        if path:
            self.parts.append(f'<path d="{path}" stroke="{fill}" stroke-width="{2 * radius}" stroke-linecap="round" fill="none"/>')

    def whole(self, height):
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            'font-family="system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif">',
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>', *self.parts, "</svg>", ""])


def extra(more):
    return "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())


def draw(title, results, ping_ms):
    drawing = Drawing()
    drawing.text(24, 34, "A running guest moves, and comes back", 20, weight="600")
    drawing.text(24, 54, title, 12, PALE)
    legend(drawing, 74)
    y = 92
    for result in results:
        panel(drawing, result, y, ping_ms)
        y += PANEL
    return drawing.whole(y + 4)


def legend(drawing, y):
    x = 24
    entries = [(GOOD, "ping answered"), (LOST, "ping lost"), (ROUND, "round while it runs"), (LAST, "last round (paused)"),
               *KINDS.values()]
    for colour, text in entries:
        drawing.dots([(x + 4, y - 4)], colour, 4)
        drawing.text(x + 13, y, text, 11, PALE)
        x += 34 + 5.7 * len(text)


def panel(drawing, result, top, ping_ms):
    report, probe = result["report"], result["probe"]
    rounds, blackout = spans(result)
    shown = [(at - result["begin"]) / MS for at, _ in result["drawn"]["pings"]] or [0.0]
    first, last = min(shown), max([*shown, *(end for _, end, _ in rounds)])

    def x(ms):
        return LEFT + (min(max(ms, first), last) - first) / (last - first or 1) * PLOT

    drawing.line(24, top, WIDTH - RIGHT, top, GRID)
    drawing.text(24, top + 24, " → ".join(result["names"]), 15, weight="600")
    summary = [f"{report['outcome']} in {report['total_ms']:.0f} ms",
               f"{report['bytes_sent'] / MIB:.0f} MiB sent for {report['ram_bytes'] / MIB:.0f} MiB of memory",
               f"{probe['pings_lost']} of {probe['pings_sent']} pings lost",
               f"TCP {'alive' if probe['tcp_survived'] else 'broken'}, {tcp_bytes(result) / MIB:.1f} MiB checked",
               f"{result['guest_errors']} memory errors"]
    drawing.text(LEFT + 40, top + 24, " · ".join(summary), 12, PALE)

    # Where the guest was silent: through all rows.
    bottom = top + 206
    silence = result["switchover"]
    if silence:
        begin, end = ((at - result["begin"]) / MS for at in silence)
        drawing.rect(x(begin), top + 36, x(end) - x(begin), bottom - top - 36, SILENCE)
    axis(drawing, x, first, last, top + 36, bottom)
    answered(drawing, result, x, top + 42, 74)
    if silence:
        near_end = x(end) > WIDTH - 240
        drawing.text(x(begin) - 6 if near_end else x(end) + 6, top + 126, f"{silence_ms(result, ping_ms):.1f} ms without an answer",
                     11, LOST, "end" if near_end else "start", "600")
    pages(drawing, rounds, x, top + 134, 46)
    drawing.text(24, top + 200, "announced", 11, PALE)
    for number, (kind, (colour, _)) in enumerate(KINDS.items()):
        drawing.dots([(x((at - result["begin"]) / MS), top + 190 + 5 * number) for at, k in result["drawn"]["announced"] if k == kind],
                     colour, 2.2)
    if blackout:
        parts_of(drawing, report, top + 236)


def axis(drawing, x, first, last, top, bottom):
    step = next((s for s in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 60000) if (last - first) / s <= 14), 300000)
    ms = -(-first // step) * step
    while ms <= last:
        drawing.line(x(ms), top, x(ms), bottom, GRID, 0.7)
        drawing.text(x(ms), bottom + 13, f"{ms:g} ms" if ms else "migrate", 10, PALE, "middle")
        ms += step


def answered(drawing, result, x, top, height):
    """Each ping where it was sent; the higher, the longer its answer took."""
    drawing.text(24, top + 34, "pings", 11, PALE)
    pings = result["drawn"]["pings"]
    longest = max([20.0, *((answer - sent) / MS for sent, answer in pings if answer is not None)])
    for ms in (0, longest):
        y = top + height - ms / longest * height
        drawing.text(LEFT - 8, y + 3, f"{ms:.0f} ms", 10, PALE, "end")
        drawing.line(LEFT, y, WIDTH - RIGHT, y, GRID, 0.7)
    drawing.dots([(x((sent - result["begin"]) / MS), top + height - (answer - sent) / MS / longest * height)
                  for sent, answer in pings if answer is not None], GOOD, 1.4)
    for sent, answer in pings:
        if answer is None:
            at = x((sent - result["begin"]) / MS)
            drawing.line(at, top, at, top + height, LOST, 1.2)


def pages(drawing, rounds, x, top, height):
    drawing.text(24, top + 28, "pages sent", 11, PALE)
    drawing.line(LEFT, top + height, WIDTH - RIGHT, top + height, GRID)
    most = max((one["pages"] for _, _, one in rounds), default=1) or 1
    taken = 0.0
    for begin, end, one in rounds:
        is_last = one is rounds[-1][2]
        tall = max(2.0, one["pages"] / most * (height - 6))
        drawing.rect(x(begin), top + height - tall, x(end) - x(begin), tall, LAST if is_last else ROUND, rx=1.5, opacity=0.9)
        text = f"{one['n']}: {one['pages']:,}"
        room = x(end) - x(begin)
        if room > 7 * len(text):
            drawing.text((x(begin) + x(end)) / 2, top + height - min(tall - 4, height - 16) + 8 if tall > 16 else top + height - tall - 4,
                         text, 11, "#ffffff" if tall > 16 else INK, "middle")
        elif x(begin) >= taken:
            drawing.text(x(begin), top + height - tall - 4, text, 10, INK)
            taken = x(begin) + 6.2 * len(text) + 4


def parts_of(drawing, report, top):
    """The blackout, magnified."""
    parts = phases(report)
    total = sum(ms for _, ms in parts) or 1
    drawing.text(24, top + 12, "blackout", 11, PALE)
    drawing.text(24, top + 27, f"{report['blackout_ms']:.2f} ms", 12, LOST, weight="600")
    at, x, y = float(LEFT), float(LEFT), top + 31
    for name, ms in parts:
        colour = next((colour for colour, names in PLACES.values() if name in names), PALE)
        width = ms / total * PLOT
        drawing.rect(at, top, max(width - 0.8, 0.8), 16, colour, rx=1.5)
        if width > 6 * len(name) + 8:
            drawing.text(at + width / 2, top + 12, name, 10, "#ffffff", "middle")
        at += width
        # All of them in words, too.
        text = f"{name} {ms:.2f}"
        long = 6 * len(text) + 22
        if x + long > WIDTH:
            x, y = float(LEFT), y + 14
        drawing.dots([(x + 3, y - 3)], colour, 3)
        drawing.text(x + 10, y, text, 10, INK)
        x += long
    x = WIDTH - RIGHT
    for name, (colour, _) in reversed(PLACES.items()):
        x -= 6.1 * len(name)
        drawing.text(x, top - 5, name, 10, PALE)
        drawing.dots([(x - 7, top - 8)], colour, 3)
        x -= 26
