"""A law for what a round gains, made to stand or fall on the rows that the experiments left.

    gain = k (advantage of the data) - c

The advantage: what is trained on is right more often than what stands against it. Of SFT's pictures: the share of right ones
less that of all that the model draws; of DPO's pairs: the share of right ones among the chosen less that among the rejected,
which is P(chosen right and rejected wrong) - P(chosen wrong and rejected right). A judge that accepts right pictures with
probability t and wrong ones with f, of drawings of which a share a is right, gives p - a and p - r, with p = a t /
(a t + (1 - a) f) of the accepted and r = a (1 - t) / (a (1 - t) + (1 - a) (1 - f)) of the rejected. Where there is a row of
the data themselves (data.sh) it is counted in them.

Reads   experiments/results.jsonl, or a directory of row.json
Writes  with --figure docs/law.svg, predicted against measured; with --constants analysis/law.json, which forecast.py reads

    python experiments/law.py experiments/results.jsonl
    python experiments/law.py experiments/results.jsonl --figure docs/law.svg --constants analysis/law.json

k and c are fitted for each family and method on the kinds of data of FITTED, all of one round with the usual settings, by
least squares over runs. What stands beside a kind is predicted by a fit without it and those like it. An interval is 90 %:
1.645 times the root mean square of the errors that the fit's own kinds have when each is left out in turn. Kinds that are
not fitted (other settings, later rounds, other bases) are predicted by the fit on all of FITTED.

a, t and f are the base's, over all its seeds: one model, whose pictures differ. Its own seed's accuracy is what a gain is
measured from, since base and trained model draw with the same noise. A base of another name is a family of another name
(measure.py --family janus-blind): it is foretold by the law of the shipped one.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from analysis.forecast import NORMAL_90, break_even, gain_of
from common.command import BadInput, Parser, run_script
from common.outputs import check_out_file, check_outputs
from common.writing import whole_file, write_json
from experiments.runs import ALIKE, FITTED, SETTINGS, Judge, Row, Run, architecture, base_judges, by_category, read_runs
from experiments.tables import FAMILIES, read_results

METHODS = ("sft", "dpo")
COMMAND = "python experiments/law.py experiments/results.jsonl --constants analysis/law.json"


# ---------------------------------------------------------------------------------------------------------------------
# The law


class Line(NamedTuple):
    """gain = k advantage - c, with standard errors; spread: root mean square error of kinds that are left out."""

    k: float
    c: float
    k_error: float
    c_error: float
    r2: float
    spread: float
    n_runs: int

    def __call__(self, advantage: float) -> float:
        return gain_of(advantage, self.k, self.c)


def fit(runs: list[Run], with_spread: bool = True) -> Line | None:
    """Least squares over runs; None where they do not say both k and c."""
    x, y = (np.array([getattr(run, key) for run in runs]) for key in ("advantage", "gain"))
    if len(runs) < 3 or np.ptp(x) < 0.05:
        return None
    design = np.stack([x, -np.ones(len(x))], 1)
    (k, c), *_ = np.linalg.lstsq(design, y, rcond=None)
    left = y - design @ (k, c)
    variance = left @ left / (len(y) - 2)
    errors = np.sqrt(np.diag(variance * np.linalg.inv(design.T @ design)))
    r2 = 1 - left @ left / ((y - y.mean()) ** 2).sum()
    squares = [(line(run.advantage) - run.gain) ** 2 for run, line in left_out(runs)] if with_spread else []
    spread = float(np.sqrt(np.mean(squares))) if squares else float(np.sqrt(variance))
    return Line(float(k), float(c), *map(float, errors), float(r2), spread, len(runs))


def unlike(kind: str) -> str:
    """What is left out with a kind: those of ALIKE, whose data nearly are the plain run's, go together."""
    return "good data" if kind.startswith(ALIKE) else kind


def left_out(runs: list[Run], with_spread: bool = False) -> list[tuple[Run, Line]]:
    """Each run with the fit on all kinds whose data are not like its own."""
    kinds = {unlike(run.kind) for run in runs}
    lines = {kind: fit([run for run in runs if unlike(run.kind) != kind], with_spread) for kind in kinds}
    return [(run, line) for run in runs if (line := lines[unlike(run.kind)])]


class Forecast(NamedTuple):
    """What was said of a run that the fit had not seen. half: of the 90 % interval."""

    run: Run
    gain: float
    half: float
    fitted: bool  # its kind is one of FITTED

    @property
    def error(self) -> float:
        return self.gain - self.run.gain

    @property
    def within(self) -> bool:
        return abs(self.error) <= self.half


def groups(runs: list[Run]) -> dict[tuple[str, str], list[Run]]:
    """The runs of each architecture and method, in the order of the tables."""
    keys = [(name, method) for name in FAMILIES for method in METHODS]
    some = {key: [run for run in runs if (architecture(run.family), run.method) == key] for key in keys}
    return {key: group for key, group in some.items() if fit([run for run in group if run.kind in FITTED], False)}


def foretell(runs: list[Run]) -> tuple[dict[tuple[str, str], Line], list[Forecast]]:
    """The law of each architecture and method, and every run as a fit without its kind foretells it."""
    lines, said = {}, []
    for key, group in groups(runs).items():
        known = [run for run in group if run.kind in FITTED]
        lines[key] = line = fit(known)
        pairs = [(run, other, True) for run, other in left_out(known, with_spread=True)]
        pairs += [(run, line, False) for run in group if run.kind not in FITTED]
        said += [Forecast(run, it(run.advantage), NORMAL_90 * it.spread, fitted) for run, it, fitted in pairs]
    return lines, said


def iterate(line: Line, judge: Judge, method: str, rounds: int = 3) -> list[float]:
    """The accuracy after each round, by the law alone: a moves, t and f stay the base's."""
    found = []
    for _ in range(rounds):
        accepted, rejected = judge.right()
        gain = line(accepted - judge.a if method == "sft" else accepted - rejected)
        judge = judge._replace(a=min(max(judge.a + gain, 0.01), 0.99))
        found.append(judge.a)
    return found


def on_another_base(run: Run) -> bool:
    """Whether it is one round at the usual settings on another base than the shipped one."""
    return run.family != architecture(run.family) and run.kind.partition(": ")[2] in FITTED


NOTHING_GAINED = {"sft": "sft-lot", "dpo": "dpo-invert0.5"}  # runs whose data have an advantage of 0, or nearly


def with_own_c(lines: dict[tuple[str, str], Line], runs: list[Run]) -> list[tuple[Forecast, Forecast]]:
    """The runs of other bases by the shipped one's law, and by its k with a c of the base's own, which costs one run more.

    That c: what NOTHING_GAINED lost there, by its advantage, mostly one run of one seed. It is measured from the same drawings
    of the base as the runs foretold, so that part of what it mends is their chance. Runs of one round at the usual settings,
    that one left out; the interval is the law's in both.
    """
    found = []
    for family, method in sorted({(run.family, run.method) for run in runs if run.family != architecture(run.family)}):
        line = lines.get((architecture(family), method))
        mine = [run for run in runs if (run.family, run.method) == (family, method)]
        cost = [run for run in mine if run.name == NOTHING_GAINED[method]]
        if not line or not cost:
            continue
        own = line._replace(c=float(np.mean([line.k * run.advantage - run.gain for run in cost])))
        some = [run for run in mine if on_another_base(run) and run not in cost]
        found += [tuple(Forecast(run, it(run.advantage), NORMAL_90 * line.spread, False) for it in (line, own)) for run in some]
    return found


def constants(rows: list[Row]) -> dict[str, Any]:
    """What forecast.py reads: k, c and spread of each architecture and method, and where they come from.

    counted: of how many of the runs the data's advantage is counted in the data, and not by rule. spread: of kinds left out or
    of other bases, whichever is wider; a model that the law was not fitted on is another base.
    """
    runs, _ = read_runs(rows)
    lines, said = foretell(runs)
    found: dict[str, Any] = {"source": COMMAND, "families": {}}
    for (name, method), line in lines.items():
        others = [
            it for it in said if (architecture(it.run.family), it.run.method) == (name, method) and on_another_base(it.run)
        ]
        line = line._replace(spread=max(line.spread, rms(others) if others else 0.0))
        numbers = {key: round(getattr(line, key), 4) for key in ("k", "c", "spread")}
        counted = sum(run.counted for run in groups(runs)[name, method] if run.kind in FITTED)
        found["families"].setdefault(name, {})[method] = numbers | {"runs": line.n_runs, "counted": counted}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def seeds_differ(runs: list[Run]) -> float:
    """The standard deviation of a gain between the seeds of one condition, all conditions together."""
    groups: dict[str, list[float]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run.gain)
    squares = [(gain - np.mean(gains)) ** 2 for gains in groups.values() for gain in gains]
    return float(np.sqrt(np.sum(squares) / max(len(runs) - len(groups), 1)))


def markdown(lines: list[list[str]]) -> str:
    rows = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([rows[0], "|---" * len(lines[0]) + "|", *rows[1:]])


def within(said: list[Forecast]) -> str:
    return f"{sum(it.within for it in said)} of {len(said)}"


def right_where_sure(said: list[Forecast]) -> str:
    """Of the runs whose interval lies on one side of 0, how many gained or lost as it says."""
    sure = [it for it in said if abs(it.gain) > it.half]
    return f"{sum((it.gain > 0) == (it.run.gain > 0) for it in sure)} of {len(sure)}"


def rms(said: list[Forecast]) -> float:
    return float(np.sqrt(np.mean([it.error**2 for it in said])))


def fits_table(rows: list[Row]) -> str:
    """k and c of each architecture and method, how far off they are on kinds left out, and from where on a round pays."""
    runs, _ = read_runs(rows)
    lines, said = foretell(runs)
    head = ["", "runs", "k", "c", "R²", "error on kinds left out", "seeds differ by", "within its 90 %", "sure, and right"]
    head += ["a round pays from an advantage of", "SFT pays while f is under"]
    table = [head]
    for (name, method), line in lines.items():
        some = [it for it in said if it.fitted and (architecture(it.run.family), it.run.method) == (name, method)]
        judge = base_judges(rows)[name]
        least = f"{break_even(judge.a, judge.t, line.k, line.c):.2f}" if method == "sft" else "-"
        numbers = [f"{x:.3f} ± {e:.3f}" for x, e in ((line.k, line.k_error), (line.c, line.c_error))]
        spreads = [f"{line.r2:.2f}", f"{line.spread:.3f}", f"{seeds_differ([it.run for it in some]):.3f}"]
        spreads += [within(some), right_where_sure(some)]
        pays = f"{max(line.c / line.k, 0):.2f}"
        table.append([f"{FAMILIES[name]}, {method.upper()}", str(line.n_runs), *numbers, *spreads, pays, least])
    return markdown(table)


def of_base(kind: str) -> str:
    """A kind as it is shown: of another base one line for runs that differ in their data alone, and one for all others."""
    base, _, its = kind.partition(": ")
    if kind in FITTED or not its:
        return kind
    return f"another base, {base}" + ("" if its in FITTED else ": other settings, later rounds")


def kinds_table(name: str, said: list[Forecast]) -> str:
    """One architecture's kinds of runs: what was foretold without them, and measured."""
    table = [[FAMILIES[name], "runs", "advantage", "foretold", "measured", "error", "within its 90 %"]]
    order = [*FITTED, *SETTINGS]
    for method in METHODS:
        some = [it for it in said if (architecture(it.run.family), it.run.method) == (name, method)]
        present = {of_base(it.run.kind) for it in some}
        kinds = [kind for kind in order if kind in present] + sorted(present - {*order})
        for kind in kinds:
            these = [it for it in some if of_base(it.run.kind) == kind]
            means = [float(np.mean(x)) for x in zip(*((it.run.advantage, it.gain, it.run.gain) for it in these), strict=True)]
            label = f"{method.upper()}, {kind}{'' if these[0].fitted else ' (not fitted)'}"
            table.append([label, str(len(these)), *(f"{x:+.3f}" for x in means), f"{rms(these):.3f}", within(these)])
    return markdown(table)


def costs_table(rows: list[Row]) -> str:
    """Other bases, half-trained ones and finished ones, by the shipped one's law and with a c of their own."""
    runs, _ = read_runs(rows)
    pairs = with_own_c(foretell(runs)[0], runs)
    table = [["", "runs", "error by the law", "within its 90 %", "error with a c of its own", "within"]]
    for name, method in itertools.product(FAMILIES, METHODS):
        for label, early in (("stopped early", True), ("other bases", False)):
            some = [
                pair
                for pair in pairs
                if (architecture(pair[0].run.family), pair[0].run.method) == (name, method)
                and ("-early" in pair[0].run.family) == early
            ]
            if some:
                cells = [cell for said in zip(*some, strict=True) for cell in (f"{rms(list(said)):.3f}", within(list(said)))]
                table.append([f"{FAMILIES[name]}, {method.upper()}, {label}", str(len(some)), *cells])
    return markdown(table)


class Told(NamedTuple):
    """What forecast.py said of a round on another base, and what that round gained.

    gain, low, high: by the law of the base's architecture, as law.json had it then; None where nothing could be said. verdict:
    what the laws of all architectures agree on.
    """

    architecture: str
    method: str
    labels: int
    verdict: str
    gain: float | None
    low: float | None
    high: float | None
    measured: float


def read_forecasts(rows: list[Row]) -> list[Told]:
    """Of each base but the shipped ones, of which the law was fitted: rows of `measure.py --forecast` beside their runs."""
    gained = {(run.family, run.name, run.seed): run.gain for run in read_runs(rows)[0]}
    found = []
    for row, method in itertools.product(rows, METHODS):
        name, run = architecture(row["family"]), (row["family"], row["name"].replace("forecast", method), row["seed"])
        if row["name"].startswith("forecast") and row["family"] != name and run in gained:
            it = row[method]
            found.append(Told(name, method, row["labels"], it["verdict"], *it["gains"][name], gained[run]))
    return found


def forecasts_table(rows: list[Row]) -> str:
    """How far off forecast.py was, how often its interval and its verdict held."""
    head = ["", "rounds", "labels of each", "error by its own family's law", "within its 90 %"]
    table = [[*head, "worth it, and gained", "not worth it, and lost", "in doubt"]]
    said = read_forecasts(rows)
    for name, method in itertools.product(FAMILIES, METHODS):
        some = [it for it in said if (it.architecture, it.method) == (name, method) and it.gain is not None]
        if not some:
            continue
        labels = sorted({it.labels for it in some})
        pays, costs = ([it.measured for it in some if it.verdict == word] for word in ("worth it", "not worth it"))
        cells = [
            str(len(some)),
            f"{labels[0]}" if len(labels) == 1 else f"{labels[0]} to {labels[-1]}",
            f"{np.sqrt(np.mean([(it.gain - it.measured) ** 2 for it in some])):.3f}",
            f"{sum(it.low <= it.measured <= it.high for it in some)} of {len(some)}",
            f"{sum(gain > 0 for gain in pays)} of {len(pays)}",
            f"{sum(gain < 0 for gain in costs)} of {len(costs)}",
            str(sum(it.verdict == "in doubt" for it in some)),
        ]
        table.append([f"{FAMILIES[name]}, {method.upper()}", *cells])
    return markdown(table)


def rounds_table(rows: list[Row]) -> str:
    """Accuracy after each of three rounds, as the law iterates it from the base and as measured, mean over seeds."""
    lines, _ = foretell(read_runs(rows)[0])
    table = [["", "base", "round 1", "round 2", "round 3"]]
    for (name, method), line in lines.items():
        judge, title = base_judges(rows)[name], f"{FAMILIES[name]}, {method.upper()}"
        numbers = [judge.a, *iterate(line, judge, method)]
        table.append([f"{title}: by the law", *(f"{x:.3f}" for x in numbers)])
        for loop, label in (("--no-replay", "measured"), ("-replay", "measured, with the curriculum")):
            names = ["base", *(f"{method}{loop}-{number}" for number in (1, 2, 3))]
            groups = [[row["accuracy"] for row in rows if (row["family"], row["name"]) == (name, it)] for it in names]
            if all(groups):
                table.append([f"{title}: {label}", *(f"{np.mean(group):.3f}" for group in groups)])
    return markdown(table)


def categories_table(rows: list[Row]) -> str:
    """Each category by itself: what it takes over of its data's advantage, and how far off the law of all of them is there."""
    lines, _ = foretell(read_runs(rows)[0])
    parts = by_category(rows)
    table = [["", "runs", "k of its own", "sign as foretold", "error by the law of all", "of good data: advantage", "gain"]]
    for (name, method), line in lines.items():
        of_method = [it for it in parts if (architecture(it.family), it.method) == (name, method)]
        for category in sorted({it.category for it in of_method}):
            some = [it for it in of_method if it.category == category]
            x, y = np.array([it.advantage for it in some]), np.array([it.gain for it in some])
            foretold = np.array([line(it.advantage) for it in some])
            good = x > 0
            numbers = [
                f"{float(x @ (y + line.c) / (x @ x)):.2f}" if x.any() else "-",
                f"{int(((foretold > 0) == (y > 0)).sum())} of {len(some)}",
            ]
            numbers += [
                f"{float(np.sqrt(np.mean((foretold - y) ** 2))):.3f}",
                *(f"{float(z[good].mean()):+.3f}" if good.any() else "-" for z in (x, y)),
            ]
            table.append([f"{FAMILIES[name]}, {method.upper()}: {category}", str(len(some)), *numbers])
    return markdown(table)


def table(rows: list[Row]) -> str:
    """All of them: what docs/results.md has between its marks."""
    _, said = foretell(read_runs(rows)[0])
    kinds = [kinds_table(name, said) for name in FAMILIES if any(architecture(it.run.family) == name for it in said)]
    by_categories = [categories_table(rows)] if by_category(rows) else []
    about_bases = [it for it in (costs_table(rows), forecasts_table(rows)) if it.count("\n") > 1]  # more than a head
    return "\n\n".join([fits_table(rows), *kinds, *about_bases, *by_categories, rounds_table(rows)])


# ---------------------------------------------------------------------------------------------------------------------
# The figure

STYLE = """text{font:14px system-ui,-apple-system,"Segoe UI",sans-serif;fill:#1f2328}.small{font-size:12px;fill:#59636e}
.axis{stroke:#59636e;fill:none}.grid{stroke:#d1d9e0;fill:none}.band{fill:#8c959f;opacity:.18}.line{fill:none;stroke-width:2}
.full{opacity:.75}.empty{fill:none;stroke-width:1.2}
.janus.full{fill:#0969da}.janus.empty,.janus.line{stroke:#0969da}.showo.full{fill:#bc4c00}.showo.empty,.showo.line{stroke:#bc4c00}
.tar.full{fill:#1a7f37}.tar.empty,.tar.line{stroke:#1a7f37}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9aa4af}.axis{stroke:#9aa4af}.grid{stroke:#30363d}
.janus.full{fill:#58a6ff}.janus.empty,.janus.line{stroke:#58a6ff}.showo.full{fill:#f0883e}.showo.empty,.showo.line{stroke:#f0883e}
.tar.full{fill:#3fb950}.tar.empty,.tar.line{stroke:#3fb950}}"""


class Panel(NamedTuple):
    """A plot's place on the page and its range; both axes from low to high."""

    left: float
    top: float
    size: float
    low: float
    high: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        unit = self.size / (self.high - self.low)
        return round(self.left + (x - self.low) * unit, 1), round(self.top + (self.high - y) * unit, 1)

    def path(self, points: list[tuple[float, float]], look: str) -> str:
        return f'<path class="{look}" d="M{" ".join("{},{}".format(*self.at(*point)) for point in points)}"/>'

    def frame(self, title: str, x: str, y: str, ticks: list[float]) -> list[str]:
        found = [text(self.left, self.top - 14, title)]
        for tick in ticks:
            (across, below), (beside, up) = self.at(tick, self.low), self.at(self.low, tick)
            found += [
                self.path([(tick, self.low), (tick, self.high)], "grid"),
                self.path([(self.low, tick), (self.high, tick)], "grid"),
            ]
            found += [text(across, below + 18, f"{tick:g}", "middle"), text(beside - 6, up + 4, f"{tick:g}", "end")]
        found.append(self.path([(self.low, self.high), (self.low, self.low), (self.high, self.low)], "axis"))
        middle = self.top + self.size / 2
        turned = f'transform="rotate(-90 {self.left - 42} {middle})"'
        found.append(text(self.left + self.size / 2, self.top + self.size + 38, x, "middle"))
        return [*found, text(self.left - 42, middle, y, "middle", turned)]


def text(x: float, y: float, words: str, anchor: str = "start", more: str = "") -> str:
    return f'<text class="small" x="{x:g}" y="{y:g}" text-anchor="{anchor}" {more}>{words}</text>'.replace(" >", ">")


def mark(x: float, y: float, family: str, method: str, fitted: bool) -> str:
    """A run: a circle for SFT, a square for DPO; full where its kind is one of those that are fitted."""
    look = f'class="{family} {"full" if fitted else "empty"}"'
    if method == "sft":
        return f'<circle {look} cx="{x:g}" cy="{y:g}" r="3.5"/>'
    return f'<rect {look} x="{x - 3.2:g}" y="{y - 3.2:g}" width="6.4" height="6.4"/>'


def draw(lines: dict[tuple[str, str], Line], said: list[Forecast], judges: dict[str, Judge]) -> str:
    """Foretold against measured gains of all runs, and the false positive rate at which a round of SFT breaks even, as SVG."""
    values = [x for it in said for x in (it.gain, it.run.gain)]
    low, high = (round(float(end), 1) for end in (np.floor(min(values) * 10) / 10, np.ceil(max(values) * 10) / 10))
    runs = Panel(66, 44, 440, low, high)
    body = runs.frame(
        "Every run",
        "gain foretold, its kind left out",
        "gain measured",
        [tick / 10 for tick in range(round(10 * low), round(10 * high) + 1)],
    )
    half = float(np.median([it.half for it in said if it.fitted]))
    band = [(low, low - half), (low, low + half), (high - half, high), (high, high), (high, high - half), (low + half, low)]
    body.append(runs.path([(max(x, low), max(y, low)) for x, y in band], "band"))
    body.append(runs.path([(low, low), (high, high)], "axis"))
    for it in sorted(said, key=lambda it: it.fitted):
        body.append(mark(*runs.at(it.gain, it.run.gain), architecture(it.run.family), it.run.method, it.fitted))
    pays = Panel(600, 44, 300, 0.0, 1.0)
    body += pays.frame(
        "A round of SFT pays below its line",
        "a: share of right drawings",
        "f: wrong ones accepted",
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0],
    )
    for (name, method), line in lines.items():
        if method == "sft":
            judge = judges[name]
            steps = np.linspace(0.01, 0.99, 99).tolist()
            body.append(pays.path([(a, break_even(a, judge.t, line.k, line.c)) for a in steps], f"{name} line"))
            body.append(mark(*pays.at(judge.a, judge.f), name, "sft", True))
    legend = [(f"{name} {method}", name, method, True) for name, method in lines]
    for number, (_, name, method, fitted) in enumerate(legend):
        y = 418 + 18 * number
        body += [
            mark(606, y - 4, name, method, fitted),
            mark(622, y - 4, name, method, False),
            text(636, y, f"{FAMILIES[name]}, {method.upper()}"),
        ]
    body.append(text(780, 418, "full: fitted kinds"))
    body.append(text(780, 436, "empty: others, later rounds"))
    body.append(text(780, 454, "band: 90 % interval"))
    body.append(text(780, 472, "right: a point is a base"))
    title = "What a round gains, by the law and as measured"
    words = (
        "Left: gains foretold by k times the data's advantage less c, against gains measured, of all runs. Right: the rate of "
        "wrongly accepted pictures from which a round of SFT stops paying, by the share of right drawings."
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 540" role="img" aria-labelledby="title desc">\n'
        f'<title id="title">{title}</title>\n<desc id="desc">{words}</desc>\n<style>\n{STYLE}\n</style>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, help="OUT of the experiments, or their results.jsonl")
    parser.add_argument("--figure", type=Path, help="SVG to draw")
    parser.add_argument("--constants", type=Path, help="JSON of k, c and spread, which forecast.py reads")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    check_outputs([args.runs, args.figure], {args.constants: "law"} if args.constants else {})
    rows = read_results(args.runs)
    runs, unplaced = read_runs(rows)
    lines, said = foretell(runs)
    if not lines:
        raise BadInput(f"{args.runs}: no family has runs on data of different advantages and a base: nothing to fit")
    if args.figure:
        with whole_file(check_out_file(args.figure), "w") as file:
            file.write(draw(lines, said, base_judges(rows)))
    if args.constants:
        write_json(args.constants, constants(rows))
    print(table(rows))
    fitted = [it for it in said if it.fitted]
    others = [it for it in said if not it.fitted]
    for name, some in (("kinds left out", fitted), ("kinds not fitted", others)):
        print(f"\n{name}: {within(some)} runs within the 90 % interval; sure of the sign and right {right_where_sure(some)}")
    if unplaced:
        print(f"not placed, and left out: {', '.join(unplaced)}")


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
