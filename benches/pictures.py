"""Pictures, as SVG made by hand: dots for every run, and curves of what a guest got done."""

import math
from html import escape

INK, PALE, GRID = "#1f2430", "#6b7280", "#e5e7eb"
COLOURS = ["#2f6fdb", "#e0862c", "#a35bc4", "#2f9e63", "#c43d5a", "#0f9aa8"]
WIDTH, LEFT, RIGHT = 1000, 280, 40
PLOT = WIDTH - LEFT - RIGHT
FONT = "system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif"


class Drawing:
    def __init__(self):
        self.parts = []

    def rect(self, x, y, width, height, fill):
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"/>')

    def line(self, x1, y1, x2, y2, stroke, width=1.0):
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}" stroke-width="{width}"/>')

    def dot(self, x, y, fill, radius=4.0, opacity=0.55):
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}" fill-opacity="{opacity}"/>')

    def path(self, points, stroke):
        steps = " ".join(f"{'M' if n == 0 else 'L'}{x:.1f} {y:.1f}" for n, (x, y) in enumerate(points))
        self.parts.append(f'<path d="{steps}" fill="none" stroke="{stroke}" stroke-width="1.6" stroke-linejoin="round"/>')

    def text(self, x, y, text, size=12, fill=INK, anchor="start", weight="normal"):
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" '
                          f'font-weight="{weight}">{escape(text)}</text>')

    def whole(self, height):
        return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
                          f'font-family="{FONT}">', f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>', *self.parts, "</svg>", ""])


def legend(drawing, names, y):
    x = LEFT
    for number, name in enumerate(names):
        drawing.dot(x + 4, y - 4, COLOURS[number % len(COLOURS)], 4, 1)
        drawing.text(x + 14, y, name, 12)
        x += 34 + 7.2 * len(name)


def readable(value):
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def dots(title, what, cases, contestants, values):
    """Every run as a dot, its median as a bar; a logarithmic axis."""
    found = {(case, name): [max(value, 0.1) for value in values(case, name) if value is not None] for case in cases for name in contestants}
    every = [value for several in found.values() for value in several] or [1]
    low, high = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)) + 1e-9)
    high = max(high, low + 1)
    lane = 15
    row = lane * len(contestants) + 16
    top, bottom = 96, 96 + row * len(cases)
    x = lambda value: LEFT + (math.log10(value) - low) / (high - low) * PLOT
    drawing = Drawing()
    drawing.text(24, 34, title, 20, weight="600")
    drawing.text(24, 54, what, 12, PALE)
    legend(drawing, contestants, 78)
    for power in range(low, high + 1):
        for factor in range(1, 10):
            value = factor * 10.0**power
            if value <= 10.0**high * 1.001:
                drawing.line(x(value), top, x(value), bottom, GRID, 1.2 if factor == 1 else 0.5)
        drawing.text(x(10.0**power), bottom + 18, readable(10.0**power), 11, PALE, "middle")
    for place, case in enumerate(cases):
        y = top + place * row
        if place:
            drawing.line(24, y, WIDTH - RIGHT, y, GRID)
        drawing.text(24, y + row / 2 + 4, case, 12)
        for number, name in enumerate(contestants):
            colour, middle = COLOURS[number % len(COLOURS)], y + 16 + lane * number
            several = sorted(found[case, name])
            if not several:
                drawing.text(LEFT + 4, middle + 4, "no move completed", 10, colour)
                continue
            drawing.line(x(several[0]), middle, x(several[-1]), middle, colour, 1)
            for value in several:
                drawing.dot(x(value), middle, colour)
            median = several[len(several) // 2] if len(several) % 2 else (several[len(several) // 2 - 1] + several[len(several) // 2]) / 2
            drawing.rect(x(median) - 1.5, middle - 7, 3, 14, colour)
    return drawing.whole(bottom + 34)


def curves(title, runs):
    """What the guest wrote, step by step of time, one panel a contestant on one scale; the move is shaded."""
    panel, left = 130, 90
    plot = WIDTH - left - RIGHT
    first = min(point[0] for _, points, _ in runs for point in points)
    last = max(point[0] for _, points, _ in runs for point in points)
    # The highest steps are bursts after a pause; the scale is for what is usual.
    rates = sorted(point[1] for _, points, _ in runs for point in points)
    most = max(rates[int(len(rates) * 0.98)] * 1.15, 1)
    x = lambda ms: left + (ms - first) / (last - first) * plot
    drawing = Drawing()
    drawing.text(24, 34, title, 20, weight="600")
    drawing.text(24, 54, "MiB a second written by the guest, in steps of 10 ms, as seen from outside; the move is shaded", 12, PALE)
    for number, (name, points, over) in enumerate(runs):
        top = 92 + number * (panel + 34)
        bottom = top + panel
        y = lambda rate: bottom - min(rate, most) / most * panel
        drawing.rect(x(0), top, x(min(over, last)) - x(0), panel, "#eef3fc")
        for part in (0, 0.5, 1):
            drawing.line(left, bottom - part * panel / 1.15, WIDTH - RIGHT, bottom - part * panel / 1.15, GRID)
            drawing.text(left - 8, bottom - part * panel / 1.15 + 4, f"{part * most / 1.15 * 4096 / 2**20:,.0f}", 11, PALE, "end")
        drawing.path([(x(ms), y(rate)) for ms, rate in points], COLOURS[number % len(COLOURS)])
        drawing.text(left, top - 7, name, 13, COLOURS[number % len(COLOURS)], weight="600")
        drawing.text(left + 14 + 8 * len(name), top - 7, f"moved in {over:,.0f} ms", 11, PALE)
    bottom = 92 + len(runs) * (panel + 34) - 34
    step = next((s for s in (50, 100, 200, 500, 1000, 2000, 5000, 10000) if (last - first) / s <= 14), 30000)
    ms = -(-first // step) * step
    while ms <= last:
        drawing.text(x(ms), bottom + 18, f"{ms + 0.0:,.0f} ms".replace("-0 ms", "0 ms"), 11, PALE, "middle")
        ms += step
    return drawing.whole(bottom + 34)
