"""The look of report.py's page: the pieces of HTML that it is made of, its charts and its style.

Whatever is quoted from a run's files goes through `quoted` (`isolated` in an attribute or a chart): no prompt becomes markup,
and none that is written from right to left turns the words and numbers around it. Charts are SVG written by hand, which
needs no script. A chart's colour is the name of one of the style's CSS variables: it is light or dark as the page is.
"""

import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from analysis.levels import NAMES, Survey, survey_rows
from analysis.pictures import TINY_SIDE
from common.answers import answer_form, read_reply
from common.records import Row

BREAKS = re.compile("[\\t-\\r\\x1c-\\x1f\\x85\\u2028\\u2029]")  # end a line, and with it what a <bdi> isolates
# What shows nothing, and what sets the direction of writing. Joiners stay: Persian and emoji need them.
DROPPED = re.compile(
    "[\\x00-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff\\ufeff\\ufffe\\uffff]"
)
MAX_CHARACTERS = 240  # of a prompt or setting that are shown
# Of a chart with curves, in SVG units: its size, and its margins, which hold the axes' labels.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 190, 38, 46, 12, 30


# ---------------------------------------------------------------------------------------------------------------------
# Text and numbers


def escape(value: object) -> str:
    """Anything as HTML text, cut to a length that a page can show."""
    words = DROPPED.sub("", BREAKS.sub(" ", str(value)))
    return html.escape(words if len(words) <= MAX_CHARACTERS else words[: MAX_CHARACTERS - 1] + "…")


def quoted(value: object) -> str:
    """Somebody's words as HTML, whose direction of writing ends with them."""
    return f"<bdi>{escape(value)}</bdi>"


def isolated(value: object) -> str:
    """The same where there can be no markup: in an attribute, a title, a chart."""
    return f"\N{FIRST STRONG ISOLATE}{escape(value)}\N{POP DIRECTIONAL ISOLATE}"


def rounded(value: float | None) -> str:
    """A number as tables and curves show it; a dash where it is unknown."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def percent(value: float) -> str:
    return f"{100 * value:.0f}\u00a0%"


# ---------------------------------------------------------------------------------------------------------------------
# Pieces


def section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2>{body}</section>'


def table(headings: list[str], rows: list[list[str]], title: str) -> str:
    """A table that is folded away and scrolls sideways by itself."""
    top = "".join(f'<th scope="col">{quoted(cell)}</th>' for cell in headings)
    body = "".join("<tr>" + "".join(f"<td>{quoted(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<details><summary>{escape(title)}</summary><div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></details>"
    )


def levels_section(surveys: list[tuple[str, Survey]]) -> str:
    """Whose fault it is, at each level of difficulty: of (when, survey) first and last; "" where no category has a level."""
    if not surveys[0][1].levels:
        return ""
    charts = []
    for key, title, color, caption in (
        ("nonunified", "Nonunified score", "model", "Own pictures that the model rejects."),
        ("weak_generation", "Weak generation", "other", "The share of these that the independent judge rejects too."),
    ):
        bars = []
        for level in surveys[0][1].levels:
            rates = [survey.levels.get(level, {}).get(key) for _, survey in surveys]
            bars.append((level, [rate.value if rate else None for rate in rates]))
        if any(value is not None for _, values in bars for value in values):
            chart = bar_chart(bars, color, f"{title} by level; the numbers are in the table below")
            charts.append(chart_figure(title, chart, caption))
    rows = [[when, *row] for when, survey in surveys for row in survey_rows(survey)]
    without = ", ".join(f"{quoted(name)} ({count:,} pictures)" for name, count in surveys[0][1].without_level.items())
    headings = ["when", "level or task", *(f"{name}, 95 % interval" for name in NAMES.values())]
    body = (
        "<p>Is the gap larger where prompts are harder, and is it the drawing's fault? Weak generation is; the rest of what "
        "the model rejects it misunderstands. A level's rates are over all pictures of its tasks.</p>"
    )
    body += f'<div class="charts">{"".join(charts)}</div>{table(headings, rows, "The numbers by level and task")}'
    return section("levels", "By difficulty", body + (f'<p class="count">No level: {without}.</p>' if without else ""))


def document(title: str, body: str, side: int) -> str:
    """A whole page. title and body are HTML; side: of the pictures on it, in pixels."""
    # nothing that the page quotes can load or run anything, whatever it is
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{title}</title>'
        f"<style>{picture_style(side)}{STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Points and ticks of charts


def downsample(values: list[float], n_points: int) -> list[tuple[float, float]]:
    """(index, value) of at most `n_points` points: means over equal stretches, each at its stretch's middle."""
    size = max(1, math.ceil(len(values) / n_points))
    stretches = [(start, values[start : start + size]) for start in range(0, len(values), size)]
    return [(start + (len(stretch) - 1) / 2, float(np.mean(stretch))) for start, stretch in stretches]


def nice_ticks(low: float, high: float, min_step: float = 0.0) -> list[float]:
    """Round numbers, evenly spaced by `min_step` or more, about five, that enclose low .. high."""
    rough = max((high - low) / 5, min_step, abs(high) / 1000, 1e-6)
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


def line_chart(lines: list[Line], x_ticks: list[tuple[float, str]], y_ticks: list[float], description: str) -> str:
    """An SVG of curves over common axes. description: for those who do not see it."""
    xs = [x for x, _ in x_ticks] + [x for line in lines for x, _ in line.points]
    left, right, low, high = min(xs), max(max(xs), min(xs) + 1e-9), y_ticks[0], y_ticks[-1]

    def position(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def path(points: Iterable[tuple[float, float]]) -> str:
        return " ".join("{},{}".format(*position(x, y)) for x, y in points)

    parts = []
    for tick in y_ticks:
        y = position(left, tick)[1]
        label = f"{tick:,.0f}" if abs(tick) >= 10 else f"{tick:.10g}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">{label}</text>')
    for tick, label in x_ticks:
        x = position(tick, low)[0]
        parts.append(f'<text class="tick" x="{x}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{escape(label)}</text>')
    for line in lines:
        color = f"var(--{line.color})"
        edge = [(x, y) for x, _, y in line.band] + [(x, y) for x, y, _ in reversed(line.band)]
        parts.append(f'<polygon points="{path(edge)}" fill="{color}" stroke="{color}" stroke-width="1" opacity=".2"/>')
        parts.append(f'<polyline points="{path(line.points)}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        for x, y in line.points if len(line.points) <= 12 else []:
            parts.append('<circle cx="{}" cy="{}" r="3" fill="{}"/>'.format(*position(x, y), color))
    beside = -math.inf
    for line in sorted((line for line in lines if line.name), key=lambda line: -line.points[-1][1]):
        x, y = position(*line.points[-1])
        beside = max(y + 3.5, beside + 13)  # values that are close are written apart
        value = rounded(line.points[-1][1])
        parts.append(f'<text class="value" x="{x + 7}" y="{beside}" fill="var(--{line.color})">{value}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}">{"".join(parts)}</svg>'


def bar_chart(groups: list[tuple[str, list[float | None]]], color: str, description: str) -> str:
    """An SVG of bars from 0 to 1: for each (name, values) one bar a value, the last one in full colour."""
    thickness, full_width, y, parts = 11, WIDTH - RIGHT, 15, []
    for name, values in groups:
        parts.append(f'<text class="name" x="0" y="{y}">{isolated(name if len(name) <= 40 else name[:39] + "…")}</text>')
        y += 6
        for value, opacity in zip(values, (1,) if len(values) == 1 else (0.38, 1), strict=True):
            bar = ((value or 0) * full_width, f'fill="var(--{color})" opacity="{opacity}"')
            for width, fill in ((full_width, 'fill="var(--wash)"'), bar):
                parts.append(f'<rect x="0" y="{y}" width="{width:.1f}" height="{thickness}" {fill}/>')
            parts.append(f'<text class="tick" x="{full_width + 6}" y="{y + 9.5}">{rounded(value)}</text>')
            y += thickness + 3
        y += 20
    return f'<svg viewBox="0 0 {WIDTH} {y - 12}" role="img" aria-label="{escape(description)}">{"".join(parts)}</svg>'


def chart_figure(title: str, chart: str, caption: str, lines: Sequence[Line] = ()) -> str:
    """A chart with its heading, a legend where there are several lines, and a sentence on how to read it."""
    keys = [f'<span class="key"><i style="background:var(--{line.color})"></i>{escape(line.name)}</span>' for line in lines]
    legend = f'<p class="legend">{"".join(keys)}</p>' if len(keys) > 1 else ""
    return f'<figure class="chart"><h3>{escape(title)}</h3>{chart}{legend}<figcaption>{caption}</figcaption></figure>'


def answered_in_words(row: Row) -> bool:
    """Whether a picture's P(yes) was read off a reply, so that it is 1 or 0 and nothing is surer than another."""
    return answer_form(row["tokens"].metadata) == "reply"


def picture_figure(row: Row, uri: str) -> str:
    """One picture with its judge's verdict, the independent judge's where there is one, and what was written of it."""
    mark, kind, judged = ("✓", "yes", "accepted") if row["accepted"] else ("✗", "no", "rejected")
    sure, said = f" {row['p_yes']:.2f}", f", P(yes) {row['p_yes']:.2f}"
    if answered_in_words(row):  # as the mark says
        sure = said = ""
        if row.get("replies") and read_reply(row["replies"][0][1]) is None:
            sure, said = " unreadable", ": its reply says neither yes nor no"
    description = f"Drawing of: {isolated(row['prompt'][:160])}. The model {judged} it{said}"
    label = ""
    if row["label"] is not None:
        word = "right" if row["label"] else "wrong"
        description += f"; the independent judge calls it {word}"
        label = f' <span class="{"label" if row["label"] == row["accepted"] else "label odd"}">{word}</span>'
    written = ""
    for foil, reply in row.get("replies", []):
        about = f"<i>of the foil {quoted(foil)}:</i> " if foil else ""
        parts = (
            (reply,) if len(reply) <= MAX_CHARACTERS else (reply[:80], "…", reply[80 - MAX_CHARACTERS :])
        )  # the score is last
        written += f'<span class="reply">{about}{" ".join(map(quoted, parts)) if reply else "<i>nothing</i>"}</span>'
    return (
        f'<figure class="picture {kind}"><img src="{uri}" alt="{description}">'
        f"<figcaption><b>{mark}</b>{sure}{label}{written}</figcaption></figure>"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Style


def picture_style(side: int) -> str:
    """How large pictures are shown. Tiny ones, two a row in a group, in whole multiples of their pixels."""
    if side > TINY_SIDE:
        return ":root { --side: 204px; --columns: 1; } @media (max-width: 640px) { :root { --side: 150px; } }"
    wide = max(1, round(96 / max(1, side))) * side
    return (
        f":root {{ --side: {wide}px; --columns: 2; }} @media (max-width: 640px) {{ :root {{ --side: {0.75 * wide:g}px; }} }}"
        " .picture img { image-rendering: pixelated; }"
    )


STYLE = """
:root { --paper: #fff; --ink: #1b1d20; --muted: #59616b; --rule: #dcdfe4; --wash: #f0f2f4;
  --model: #2257b0; --other: #a95500; --yes: #17774a; --no: #b92d25;
  --serif: Charter, "Bitstream Charter", "Iowan Old Style", Georgia, "Liberation Serif", serif;
  --sans: system-ui, -apple-system, "Segoe UI", "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
@media (prefers-color-scheme: dark) { :root { --paper: #141619; --ink: #e7e9ec; --muted: #a1a9b3; --rule: #31363d;
  --wash: #23272c; --model: #7fb0ff; --other: #f2a65a; --yes: #5ccf97; --no: #ff8b80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 0 24px 96px; max-width: 968px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 var(--sans); overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; }
header { padding: 56px 0 8px; }
.eyebrow { margin: 0 0 12px; color: var(--muted); font-size: 13px; letter-spacing: .02em; }
h1 { margin: 0 0 24px; max-width: 25em; font: 600 clamp(27px, 4.2vw, 42px)/1.16 var(--serif); letter-spacing: -.012em;
  text-wrap: balance; }
h2 { margin: 0 0 8px; font: 600 25px/1.2 var(--serif); letter-spacing: -.005em; }
h3 { margin: 0 0 8px; font: 600 15px/1.35 var(--sans); }
h4 { margin: 0 0 6px; color: var(--muted); font: 12.5px/1.4 var(--sans); }
.lead, section > p { max-width: 44em; font: 17px/1.58 var(--serif); }
.lead p { margin: 0 0 14px; }
section { margin-top: 56px; padding-top: 22px; border-top: 1px solid var(--rule); }
section > p { margin: 0 0 6px; }
section > p.count, .reading, .legend { font: 13px/1.5 var(--sans); color: var(--muted); }
.reading { margin: 40px 0 -24px; max-width: 60em; }
.yes b, span.yes { color: var(--yes); }
.no b, span.no { color: var(--no); }
.warning { margin: 0 0 24px; padding: 14px 18px; border-left: 5px solid var(--no); background: var(--wash); font-size: 16px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 20px 24px; margin: 34px 0 0; }
.tiles div { border-top: 2px solid var(--ink); padding-top: 8px; }
.tiles dt { font-size: 13px; font-weight: 600; }
.tiles dd { margin: 2px 0 0; font: 600 25px/1.25 var(--serif); white-space: nowrap;
  font-variant-numeric: lining-nums tabular-nums; }
.tiles .was { color: var(--muted); font-weight: 400; font-size: 16px; }
.tiles small { display: block; margin-top: 3px; color: var(--muted); font: 12.5px/1.4 var(--sans); white-space: normal; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(270px, 100%), 1fr)); gap: 32px 40px;
  margin: 22px 0; }
.chart { margin: 0; max-width: 440px; }
.chart figcaption { margin-top: 4px; color: var(--muted); font-size: 13px; line-height: 1.45; }
.legend { display: flex; gap: 16px; margin: 2px 0 0; }
.key i { display: inline-block; width: 14px; height: 3px; margin-right: 6px; vertical-align: middle; }
svg { display: block; width: 100%; height: auto; font-family: var(--sans); overflow: visible; }
.grid { stroke: var(--rule); }
.tick { fill: var(--muted); font-size: 11px; }
.name { fill: var(--ink); font-size: 12px; }
.value { font-size: 12px; font-weight: 600; }
details { margin-top: 14px; font-size: 14px; }
summary { cursor: pointer; color: var(--muted); width: fit-content; }
.scroll { overflow-x: auto; margin-top: 10px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top;
  white-space: nowrap; }
th { font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
.settings th { color: var(--muted); font-weight: 400; }
.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 12em; }
.cards { display: flex; flex-wrap: wrap; align-items: flex-end; gap: 30px 44px; margin-top: 22px; }
article { min-width: 0; max-width: 100%; }
article h3 { font: italic 16px/1.35 var(--serif); }
.sides { display: flex; flex-wrap: wrap; gap: 14px 28px; }
.strip { display: flex; flex-wrap: wrap; gap: 8px; }
.before-after .sides, .pairs .sides, .recovered .sides { flex-wrap: nowrap; }
.before-after article { width: calc(var(--columns) * 2 * var(--side) + (var(--columns) - 1) * 16px + 28px); }
.before-after .strip { width: calc(var(--columns) * var(--side) + (var(--columns) - 1) * 8px); }
.pairs article, .recovered article { width: calc(2 * var(--side) + 28px); }
.false-positives article, .contradictions article { width: calc(var(--side) + 34px); }
.false-positives, .contradictions { column-gap: 24px; }
.picture { margin: 0; width: var(--side); }
.picture img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--wash); }
.picture.yes { border-bottom: 3px solid var(--yes); }
.picture.no { border-bottom: 3px solid var(--no); }
.picture figcaption { padding: 3px 0 2px; font-size: 12.5px; line-height: 1.35; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.label { color: var(--muted); }
.reply { display: block; white-space: normal; overflow-wrap: anywhere; color: var(--muted); font-size: 11.5px; }
.label.odd { color: var(--other); font-weight: 600; }
@media (max-width: 640px) {
  body { padding: 0 16px 64px; }
  header { padding-top: 28px; }
  section { margin-top: 44px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 18px 16px; }
  .tiles dd { font-size: 22px; }
  .cards { gap: 26px 16px; }
  .sides { gap: 14px 16px; }
  .pairs .sides, .recovered .sides { gap: 10px; }
  .pairs article, .recovered article { width: calc(2 * var(--side) + 22px); }
  .candidates .side { width: 100%; }
  .label { display: block; }
}
"""
