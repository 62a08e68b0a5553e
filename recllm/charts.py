"""Charts as SVG text: lines, bars with intervals, stacked signed shares. No script and no plotting library."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 400
"""Width of a chart in its own units; the page scales it, so text stays legible from a phone to half a screen."""

CHARACTER = 7.0
"""Width of one character at the charts' 12-unit text, for margins: SVG text cannot be measured without a browser."""

NAME_LENGTH = 22
TICKS = 5

LIGHT: tuple[str, ...] = ("#6b7280", "#3b6fb6", "#16877f", "#8e4ec6", "#d9622b", "#cf4a83", "#a17a00", "#8a5a3c")
LIGHT += ("#4d7c0f", "#b91c1c", "#1e3a8a", "#0284c7", "#701a75", "#0f5132")
"""Colours of the scorers on a white page."""
DARK: tuple[str, ...] = ("#a3abb8", "#7aa8e6", "#4fc0b5", "#bf93ea", "#f0915f", "#ee88b1", "#d8b547", "#c79a7a")
DARK += ("#a3d65c", "#f87171", "#9db4ff", "#56c7f5", "#e9a8f2", "#5fd38d")
"""The same ones on a dark page."""
INK = "--page: #fff; --ink: #1d2430; --muted: #5b6472; --rule: #e1e5ea;"
DARK_INK = "--page: #14181f; --ink: #e6e9ee; --muted: #9aa4b2; --rule: #2b323d;"


def colours_of(scorers: Sequence[str], ink: str) -> str:
    """The CSS properties that charts name: of text and lines, and of each scorer."""
    return ink + "".join(f" --scorer-{place}: {own};" for place, own in enumerate(scorers))


STYLE = """
svg text { font-size: 12px; fill: var(--ink); font-variant-numeric: tabular-nums; }
svg .muted { fill: var(--muted); font-size: 11px; }
svg .grid { stroke: var(--rule); }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .halo { stroke: var(--page); stroke-width: 4; fill: none; }
svg .whisker { stroke: var(--ink); stroke-width: 1.25; fill: none; }
svg .zero { stroke: var(--ink); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
svg .share { stroke: var(--page); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
"""
"""How charts look, on a page or alone."""
ALONE = f"svg {{ {colours_of(LIGHT, INK)} background: #fff; font-family: system-ui, sans-serif; }}{STYLE}"
MARGIN = 16
"""Around a chart that is a file of its own."""


@dataclass(frozen=True)
class Line:
    """One named line; points whose x or y is not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int


@dataclass(frozen=True)
class Bar:
    """One named bar with the ends of its interval."""

    name: str
    value: float
    low: float
    high: float
    colour: int


@dataclass(frozen=True)
class Axis:
    """Maps values low…high to positions start…end; `counts` spaces them by log(1 + value)."""

    low: float
    high: float
    start: float
    end: float
    counts: bool = False

    def place(self, value: float) -> float:
        """Position of `value`."""
        bend: Callable[[float], float] = math.log1p if self.counts else float
        share = (bend(value) - bend(self.low)) / (bend(self.high) - bend(self.low))
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the axis."""
        return count_ticks(self.high) if self.counts else round_ticks(self.low, self.high)


def round_ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from `low` to `high`, about five of them."""
    step = tick_step(low, high)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def count_ticks(high: float) -> list[float]:
    """0, 1, 3, 10, 30, … up to `high`: even spacing on an axis of log(1 + n)."""
    powers = range(math.ceil(math.log10(max(high, 1))) + 1)
    return [0.0, *(tick for power in powers for tick in (10.0**power, 3 * 10.0**power) if tick <= high)]


def tick_step(low: float, high: float) -> float:
    """The step between ticks: 1, 2 or 5 times a power of ten."""
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= rough * (1 - 1e-9))


def widened(values: Iterable[float]) -> tuple[float, float]:
    """The range of `values`, opened to whole ticks; never empty."""
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        # Ranges below what floats tell apart would make steps of zero.
        low, high = low - max(abs(low), 1.0) * 0.1, high + max(abs(high), 1.0) * 0.1
    step = tick_step(low, high)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def number(value: float, step: float | None = None) -> str:
    """A number to read: three significant digits, or as many decimals as `step` has; – where there is none."""
    if not math.isfinite(value):
        return "–"
    size = step or (abs(value) / 100 or 1.0)
    decimals = min(max(0, -math.floor(math.log10(size) + 1e-9)), 9)
    text = f"{value:,.{decimals}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else f"{0:.{decimals}f}"


def signed(value: float) -> str:
    """`number` with its sign written out, two decimals."""
    return ("+" if round(value, 2) > 0 else "") + number(value, 0.01)


def line_chart(title: str, lines: Sequence[Line], x_label: str, y_label: str, *, counts: bool = False) -> str:
    """Lines over a common x axis, each named at its right end; `counts` spaces x by log(1 + x)."""
    points = [[(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(x + y)] for line in lines]
    shown = [(line, some) for line, some in zip(lines, points, strict=True) if some]
    every = [point for _, some in shown for point in some]
    right = WIDTH - _margin(line.name for line, _ in shown)
    # The x axis ends at the last point; only y is opened to whole ticks.
    ends = [x for x, _ in every] or [0.0, 1.0]
    first, last = (0.0 if counts else min(ends)), max(ends)
    x_axis = Axis(first, last if last > first else first + 1, 44, right, counts)
    y_axis = Axis(*widened(y for _, y in every), 176, 24)
    body = [_grid(x_axis, y_axis), _text(0, 12, y_label, "muted"), _text(right, 212, x_label, "muted", "end")]
    for line, some in shown:
        places = " ".join(f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}" for x, y in some)
        body.append(f'<polyline class="line" stroke="{colour(line.colour)}" points="{places}"/>')
        if len(some) == 1:
            x, y = places.split(",")
            body.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour(line.colour)}"/>')
    body.append(_end_labels([(line, y_axis.place(some[-1][1])) for line, some in shown], right + 6))
    facts = "; ".join(f"{line.name}: {number(some[0][1])} to {number(some[-1][1])}" for line, some in shown)
    return _svg(220, title, f"{y_label} against {x_label}. {facts}.", "".join(body))


def interval_bars(title: str, bars: Sequence[Bar]) -> str:
    """Horizontal bars from zero, each with its interval as a whisker and its value written beside it."""
    left = _margin(bar.name for bar in bars)
    ends = [end for bar in bars for end in (bar.value, bar.low, bar.high)]
    axis = Axis(*widened([0.0, *ends]), left, WIDTH - 48)
    height = 26 * len(bars) + 24
    body = [_vertical(axis, 0, height - 20)]
    for row, bar in enumerate(bars):
        body.append(_bar(bar, axis, 26 * row))
    facts = "; ".join(f"{bar.name} {number(bar.value)} ({number(bar.low)} to {number(bar.high)})" for bar in bars)
    return _svg(height, title, f"{facts}.", "".join(body))


def share_bar(title: str, shares: Mapping[str, float], low: float, high: float, colours: Mapping[str, int]) -> str:
    """One bar that stacks positive shares to the right of zero and negative ones to the left, on the scale low…high."""
    axis = Axis(low, high, 0, WIDTH)
    ends = {1: 0.0, -1: 0.0}
    body = []
    for name, share in shares.items():
        if not math.isfinite(share) or share == 0:
            continue
        side = 1 if share > 0 else -1
        start, ends[side] = ends[side], ends[side] + share
        left, right = sorted((axis.place(start), axis.place(ends[side])))
        body.append(
            f'<rect class="share" x="{left:.1f}" y="1" width="{right - left:.1f}" height="14" '
            f'fill="{colour(colours[name])}"><title>{escape(name)} {signed(share)}</title></rect>'
        )
    zero = axis.place(0)
    body.append(f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="16"/>')
    facts = "; ".join(f"{name} {signed(share)}" for name, share in shares.items())
    # Only boxes in it, so it may be stretched to the width of its column.
    return _svg(16, title, facts, "".join(body), 'class="shares" preserveAspectRatio="none"')


def colour(index: int) -> str:
    """The colour of scorer `index`; behind the last one they begin anew."""
    return f"var(--scorer-{index % len(LIGHT)})"


def picture(chart: str) -> str:
    """A chart as a file of its own, with its colours, on white."""
    height = int(chart.split(f'viewBox="0 0 {WIDTH} ', 1)[1].split('"', 1)[0])
    wide, high = WIDTH + 3 * MARGIN, height + 2 * MARGIN
    place = f'x="{MARGIN}" y="{MARGIN}" width="{WIDTH}" height="{height}" overflow="visible"'
    inner = chart.replace("<svg ", f"<svg {place} ", 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{2 * wide}" height="{2 * high}">'
        f'<style>{ALONE}</style><rect width="{wide}" height="{high}" fill="#fff"/>{inner}</svg>\n'
    )


def _svg(height: int, title: str, description: str, body: str, attributes: str = "") -> str:
    head = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    return f'<svg role="img" viewBox="0 0 {WIDTH} {height}" {attributes}>{head}{body}</svg>'


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{escape(text)}</text>'


def _shortened(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"


def _margin(names: Iterable[str]) -> float:
    return 14 + CHARACTER * max((len(_shortened(name)) for name in names), default=0)


def _vertical(axis: Axis, top: float, bottom: float) -> str:
    ticks = axis.ticks()
    step = None if axis.counts else tick_step(axis.low, axis.high)
    marks = []
    for tick in ticks:
        x = axis.place(tick)
        marks.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        marks.append(_text(x, bottom + 15, number(tick, 1.0 if axis.counts else step), "muted", "middle"))
    return "".join(marks)


def _grid(x_axis: Axis, y_axis: Axis) -> str:
    marks = [_vertical(x_axis, y_axis.end, y_axis.start)]
    for tick in y_axis.ticks():
        y = y_axis.place(tick)
        marks.append(f'<line class="grid" x1="{x_axis.start}" x2="{x_axis.end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(_text(x_axis.start - 6, y + 4, number(tick, tick_step(y_axis.low, y_axis.high)), "muted", "end"))
    return "".join(marks)


def _end_labels(labels: Sequence[tuple[Line, float]], x: float) -> str:
    """Names at the lines' ends, pushed apart where they would overlap."""
    text, free = [], 8.0
    for rank, (line, y) in enumerate(sorted(labels, key=lambda label: label[1])):
        below = len(labels) - 1 - rank
        place = max(free, min(y + 4, 176 - 14 * below))  # above the ticks
        free = place + 14
        text.append(f'<rect x="{x:.1f}" y="{place - 8:.1f}" width="4" height="8" fill="{colour(line.colour)}"/>')
        text.append(_text(x + 7, place, _shortened(line.name)))
    return "".join(text)


def _bar(bar: Bar, axis: Axis, top: float) -> str:
    middle = top + 13
    name = _text(axis.start - 8, middle + 4, _shortened(bar.name), "", "end")
    if not math.isfinite(bar.value):
        return name + _text(axis.place(0) + 6, middle + 4, "–", "muted")
    left, right = sorted((axis.place(0), axis.place(bar.value)))
    box = f'<rect x="{left:.1f}" y="{top + 4}" width="{right - left:.1f}" height="18" fill="{colour(bar.colour)}"/>'
    reach, whisker = right, ""
    if math.isfinite(bar.low + bar.high):
        start, end = axis.place(bar.low), axis.place(bar.high)
        reach = max(right, end)
        ticks = "".join(f"M{x:.1f} {middle - 4}v8" for x in (start, end))
        drawn = f'd="M{start:.1f} {middle}H{end:.1f}{ticks}"/>'
        whisker = f'<path class="halo" {drawn}<path class="whisker" {drawn}'  # seen inside the bar, too
    return name + box + whisker + _text(reach + 6, middle + 4, number(bar.value))
