"""Charts as SVG, written by hand: curves and bars that need no script.

A colour is the name of one of the page's CSS variables (page.py), so that a chart is light or dark as the page is.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from analysis.page import escape, short

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 190, 38, 46, 12, 30


# ---------------------------------------------------------------------------------------------------------------------
# Points and ticks


def thin(values: list[float], most: int) -> list[tuple[float, float]]:
    """(place, value) of at most `most` points: means over equal stretches, each at its stretch's middle."""
    size = max(1, math.ceil(len(values) / most))
    stretches = [(start, values[start : start + size]) for start in range(0, len(values), size)]
    return [(start + (len(stretch) - 1) / 2, float(np.mean(stretch))) for start, stretch in stretches]


def nice_ticks(low: float, high: float, least: float = 0.0) -> list[float]:
    """Round numbers, evenly spaced by `least` or more, about five, that enclose low .. high."""
    rough = max((high - low) / 5, least, abs(high) / 1000, 1e-6)
    power = 10.0 ** math.floor(math.log10(rough) + 1e-9)
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


# ---------------------------------------------------------------------------------------------------------------------
# Charts


class Line(NamedTuple):
    """One curve: points (x, y), and where there is an interval (x, low, high). color: a CSS variable. Its last value is
    written beside it if it has a name."""

    name: str
    color: str
    points: list[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()


def line_chart(lines: list[Line], x_ticks: list[tuple[float, str]], y_ticks: list[float], said: str) -> str:
    """An SVG of curves over common axes. said: the same in words, for those who do not see it."""
    xs = [x for x, _ in x_ticks] + [x for line in lines for x, _ in line.points]
    left, right, low, high = min(xs), max(max(xs), min(xs) + 1e-9), y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def path(points: Iterable[tuple[float, float]]) -> str:
        return " ".join("{},{}".format(*place(x, y)) for x, y in points)

    parts = []
    for tick in y_ticks:
        y = place(left, tick)[1]
        label = f"{tick:,.0f}" if abs(tick) >= 10 else f"{tick:.10g}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">{label}</text>')
    for tick, label in x_ticks:
        x = place(tick, low)[0]
        parts.append(f'<text class="tick" x="{x}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{escape(label)}</text>')
    for line in lines:
        color = f"var(--{line.color})"
        edge = [(x, y) for x, _, y in line.band] + [(x, y) for x, y, _ in reversed(line.band)]
        parts.append(f'<polygon points="{path(edge)}" fill="{color}" stroke="{color}" stroke-width="1" opacity=".2"/>')
        parts.append(f'<polyline points="{path(line.points)}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        for x, y in line.points if len(line.points) <= 12 else []:
            parts.append('<circle cx="{}" cy="{}" r="3" fill="{}"/>'.format(*place(x, y), color))
    beside = -math.inf
    for line in sorted((line for line in lines if line.name), key=lambda line: -line.points[-1][1]):
        x, y = place(*line.points[-1])
        beside = max(y + 3.5, beside + 13)  # values that are close are written apart
        value = short(line.points[-1][1])
        parts.append(f'<text class="value" x="{x + 7}" y="{beside}" fill="var(--{line.color})">{value}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(said)}">{"".join(parts)}</svg>'


def bar_chart(groups: list[tuple[str, list[float | None]]], color: str, said: str) -> str:
    """An SVG of bars from 0 to 1: for each (name, values) one bar a value, the last one in full colour."""
    thick, most, y, parts = 11, WIDTH - RIGHT, 15, []
    for name, values in groups:
        parts.append(f'<text class="name" x="0" y="{y}">{escape(name if len(name) <= 40 else name[:39] + "…")}</text>')
        y += 6
        for value, opacity in zip(values, (1,) if len(values) == 1 else (0.38, 1), strict=True):
            full = f'fill="var(--{color})" opacity="{opacity}"'
            for width, filled in ((most, 'fill="var(--wash)"'), ((value or 0) * most, full)):
                parts.append(f'<rect x="0" y="{y}" width="{width:.1f}" height="{thick}" {filled}/>')
            parts.append(f'<text class="tick" x="{most + 6}" y="{y + 9.5}">{short(value)}</text>')
            y += thick + 3
        y += 20
    return f'<svg viewBox="0 0 {WIDTH} {y - 12}" role="img" aria-label="{escape(said)}">{"".join(parts)}</svg>'


def figure(title: str, chart: str, caption: str, lines: Sequence[Line] = ()) -> str:
    """A chart with its heading, a legend where there are several lines, and a sentence on what to look for."""
    keys = [f'<span class="key"><i style="background:var(--{line.color})"></i>{escape(line.name)}</span>' for line in lines]
    legend = f'<p class="legend">{"".join(keys)}</p>' if len(keys) > 1 else ""
    return f'<figure class="chart"><h3>{escape(title)}</h3>{chart}{legend}<figcaption>{caption}</figcaption></figure>'
