"""Charts as inline SVG: lines with bands, stacked bars, histograms. Colours are classes of page.css."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 440.0, 230.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 10.0, 10.0, 30.0
MOST_POINTS = 600  # of a line; more are averaged in bins
LARGEST = 1e300  # that is drawn: differences of larger numbers overflow
COLOURS = 10  # in page.css; the next series begins again
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Values over steps. `low` and `high`: the band around them, as points too."""

    label: str
    points: Sequence[Point]
    colour: int = 0
    dash: int = 0
    low: Sequence[Point] = ()
    high: Sequence[Point] = ()
    dots: bool = False


@dataclass(frozen=True)
class Axes:
    """Range of both axes, and the place of a value in the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]
    logarithmic: bool = False

    def locate(self, point: Point) -> Point:
        """Return the coordinates of a point."""
        x, y = point
        across = (x - self.x[0]) / (self.x[1] - self.x[0] or 1.0)
        if self.logarithmic:
            low, high, y = (math.log10(max(value, 1e-30)) for value in (*self.y, y))
        else:
            low, high = self.y
        up = (y - low) / (high - low or 1.0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def ticks(self) -> list[float]:
        """Return the values with a line across the chart."""
        if not self.logarithmic:
            return round_steps(*self.y)
        low, high = (math.floor(math.log10(max(value, 1e-30))) for value in self.y)
        decades = [10.0**power for power in range(low, high + 1, max((high - low) // 5, 1))]
        fine = [factor * value for value in decades for factor in (1, 2, 5)]
        candidates = [[value for value in values if self.y[0] <= value <= self.y[1]] for values in (decades, fine)]
        return next((values for values in candidates if len(values) > 1), list(self.y))


@dataclass(frozen=True)
class Chart:
    """A chart of lines. `bounds`: range of the y axis where it is known, such as (0, 1) for shares."""

    title: str
    series: Sequence[Series]
    note: str = ""
    meaning: str = ""  # of the metrics, shown with the title
    x_label: str = "step"
    bounds: tuple[float, float] | None = None
    x_bounds: tuple[float, float] | None = None
    logarithmic: bool = False
    guides: Sequence[tuple[Point, Point]] = field(default_factory=tuple)  # straight lines to compare with


def round_steps(low: float, high: float, steps: int = 4) -> list[float]:
    """Return round numbers from `low` to `high`, about `steps` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / steps
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def format_value(value: float) -> str:
    """Return a number in at most six characters where that is possible."""
    size = abs(value)
    if size >= 1e9 or 0 < size < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    for limit, unit in ((1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (limit if unit == 'M' else 1e3):.3g}{unit}"
    return f"{value:.4g}"


def finite(points: Sequence[Point]) -> list[Point]:
    """Return the points whose value is a number that can be drawn."""
    return [(x, y) for x, y in points if math.isfinite(x) and abs(y) < LARGEST]


def thin(points: Sequence[Point]) -> list[Point]:
    """Return at most MOST_POINTS points: means of equally many neighbours."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return list(points)
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in bins]


def draw_lines(chart: Chart) -> str:
    """Return a figure with one line per series, "" without values."""
    series = [(line, thin(finite(line.points))) for line in chart.series]
    series = [(line, points) for line, points in series if points]
    if not series:
        return ""
    axes = _axes(
        chart, [point for line, points in series for point in (*points, *finite(line.low), *finite(line.high))]
    )
    parts = [_frame(axes, chart.x_label)]
    for start, stop in chart.guides:
        parts.append(f'<path class="guide" d="{_path([axes.locate(start), axes.locate(stop)])}"/>')
    for line, points in series:
        parts.append(_line(axes, line, points))
    legend = _legend([(line.label, line.colour, line.dash, points[-1][1]) for line, points in series])
    values = [{"label": line.label, "points": [[x, _short(y)] for x, y in points]} for line, points in series]
    spoken = "; ".join(f"{line.label}: last {format_value(points[-1][1])}" for line, points in series)
    return _figure(
        chart.title, _svg(parts, f"{chart.title}. {spoken}", values, axes), legend, chart.note, chart.meaning
    )


def _axes(chart: Chart, points: Sequence[Point]) -> Axes:
    xs, ys = [x for x, _ in finite(points)], [y for _, y in finite(points)]
    logarithmic = chart.logarithmic and min(ys) > 0
    low, high = chart.bounds or (min(ys), max(ys))
    if chart.bounds is None and not logarithmic:
        margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        low, high = low - margin if low < 0 or low > (high - low) else 0.0, high + margin
    if logarithmic and low == high:
        low, high = low / 2, high * 2
    first, last = chart.x_bounds or (min(xs), max(xs))
    return Axes((first, last if last > first else first + 1), (low, high), logarithmic)


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _line(axes: Axes, line: Series, points: Sequence[Point]) -> str:
    placed, style = [axes.locate(point) for point in points], f"c{line.colour % COLOURS}"
    band = ""
    if line.low and line.high:
        edge = [axes.locate(point) for point in (*finite(line.low), *reversed(finite(line.high)))]
        band = f'<path class="band {style}" d="{_path(edge)}Z"/>'
    dots = "".join(f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in placed)
    stroke = f'<path class="line {style} d{line.dash % 4}" d="{_path(placed)}"/>'
    return band + stroke + (dots if line.dots or len(points) == 1 else "")


def _frame(axes: Axes, x_label: str) -> str:
    """Return grid, numbers and the label of the x axis."""
    parts = []
    for value in axes.ticks():
        y = axes.locate((axes.x[0], value))[1]
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text class="number" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{format_value(value)}</text>'
        )
    for value in round_steps(*axes.x, steps=5):
        x = axes.locate((value, axes.y[0]))[0]
        parts.append(
            f'<text class="number" x="{x:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{format_value(value)}</text>'
        )
    parts.append(_text("axis", WIDTH - RIGHT, HEIGHT - 2, "end", x_label))
    return "".join(parts)


def _text(kind: str, x: float, y: float, anchor: str, text: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def draw_stack(title: str, labels: Sequence[str], rows: Sequence[tuple[float, Sequence[float]]], note: str = "") -> str:
    """Return a figure with a stacked bar for each row (x, line value per label)."""
    if not rows or not any(any(values) for _, values in rows):
        return ""
    size = -(-len(rows) // 120)  # steps of line bar
    bars = [_mean_row(rows[start : start + size]) for start in range(0, len(rows), size)]
    top = max(sum(values) for _, values in bars)
    edges = _edges([x for x, _ in bars])
    axes = Axes((edges[0], edges[-1]), (0.0, top * 1.04))
    parts = [_frame(axes, "step")]
    for (left, right), (_, values) in zip(pairwise(edges), bars, strict=True):
        base, gap = 0.0, (right - left) * 0.04
        for number, value in enumerate(values):
            parts.append(_bar(axes, (left + gap, right - gap), (base, base + value), number))
            base += value
    means = [sum(values[number] for _, values in bars) / len(bars) for number in range(len(labels))]
    legend = _legend(
        [(label, number, -1, mean) for number, (label, mean) in enumerate(zip(labels, means, strict=True))]
    )
    data = [{"label": label, "points": [[x, _short(row[n])] for x, row in bars]} for n, label in enumerate(labels)]
    return _figure(title, _svg(parts, title, data, axes), legend, note)


def _edges(xs: Sequence[float]) -> list[float]:
    """Return the ends of bars around rising numbers: half way to the neighbours."""
    inner = [(left + right) / 2 for left, right in pairwise(xs)]
    first, last = (xs[1] - xs[0], xs[-1] - xs[-2]) if len(xs) > 1 else (1.0, 1.0)
    return [xs[0] - first / 2, *inner, xs[-1] + last / 2]


def _mean_row(rows: Sequence[tuple[float, Sequence[float]]]) -> tuple[float, list[float]]:
    columns = zip(*(values for _, values in rows), strict=True)
    return sum(x for x, _ in rows) / len(rows), [sum(column) / len(rows) for column in columns]


def _bar(axes: Axes, xs: tuple[float, float], ys: tuple[float, float], colour: int) -> str:
    (left, bottom), (right, top) = axes.locate((xs[0], ys[0])), axes.locate((xs[1], ys[1]))
    size = f'x="{left:.1f}" y="{top:.1f}" width="{max(right - left, 0.5):.1f}" height="{max(bottom - top, 0):.1f}"'
    return f'<rect class="bar c{colour % COLOURS}" {size}/>'


def draw_histogram(title: str, groups: Sequence[tuple[str, Sequence[int]]], x_label: str, note: str = "") -> str:
    """Return a figure with counts in equal bins of [0, 1], the groups beside each other; "" without counts."""
    groups = [group for group in groups if any(group[1])]
    if not groups:
        return ""
    bins = len(groups[0][1])
    shares = [[count / sum(counts) for count in counts] for _, counts in groups]
    axes = Axes((0.0, 1.0), (0.0, max(max(row) for row in shares) * 1.05))
    width, parts = 0.9 / bins / len(groups), [_frame(axes, x_label)]
    for number, row in enumerate(shares):
        for bin_number, share in enumerate(row):
            left = (bin_number + 0.05) / bins + number * width
            parts.append(_bar(axes, (left, left + width), (0.0, share), number))
    legend = _legend([(f"{label}: {sum(counts)}", n, -1, None) for n, (label, counts) in enumerate(groups)])
    return _figure(title, _svg(parts, title, [], axes), legend, note)


def _svg(parts: Sequence[str], spoken: str, values: Sequence[object], axes: Axes) -> str:
    data = escape(json.dumps(values), quote=True)
    ends = f"{axes.x[0]} {axes.x[1]}"
    return (
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{escape(spoken, quote=True)}" '
        f'data-x="{ends}" data-values="{data}">{"".join(parts)}<path class="cursor" d=""/></svg>'
    )


def _legend(entries: Sequence[tuple[str, int, int, float | None]]) -> str:
    """Return the list of series; `dash` -1: a filled square."""
    items = []
    for label, colour, dash, value in entries:
        style = f"c{colour % COLOURS}"
        shape = f'<rect class="bar {style}" width="12" height="10"/>'
        if dash >= 0:
            shape = f'<path class="line {style} d{dash % 4}" d="M0 5H22"/>'
        mark = f'<svg class="key" viewBox="0 0 22 10" aria-hidden="true">{shape}</svg>'
        number = "" if value is None else f' <b class="value">{format_value(value)}</b>'
        items.append(f"<li>{mark}<span>{escape(label)}</span>{number}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _figure(title: str, drawing: str, legend: str, note: str, meaning: str = "") -> str:
    caption = f'<p class="note">{escape(note)}</p>' if note else ""
    hint = f' title="{escape(meaning, quote=True)}"' if meaning else ""
    return f"<figure><figcaption{hint}>{escape(title)}</figcaption>{drawing}{legend}{caption}</figure>"
