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
least squares over runs. What stands beside a kind is predicted by a fit that has not seen this kind. An interval is 90 %:
1.645 times the root mean square of the errors that the fit's own kinds have when each is left out in turn. Kinds that are
not fitted (other settings, later rounds, other bases) are predicted by the fit on all of FITTED.

a, t and f are the base's, over all its seeds: one model, whose pictures differ. Its own seed's accuracy is what a gain is
measured from, since base and trained model draw with the same noise.
"""

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from analysis.forecast import NORMAL_90, accepted_right, gain_of

Row = dict[str, Any]
TITLES = {"janus": "Janus", "showo": "Show-o"}
METHODS = ("sft", "dpo")
COMMAND = "python experiments/law.py experiments/results.jsonl --constants analysis/law.json"


# ---------------------------------------------------------------------------------------------------------------------
# What each run trained on


class Condition(NamedTuple):
    """What a run's name says: its method, kind, data (the ending of their row's name) and how these come about.

    noise: share of the verdicts turned round; inverted: of the pairs. only: all data are by lot or rejected.
    """

    method: str
    kind: str
    data: str
    noise: float = 0.0
    inverted: float = 0.0
    only: str = ""


FITTED = {
    "plain": r"()",
    "noise: 10 to 40 % of the verdicts turned": r"(-noise(?P<noise>[\d.]+))",
    "candidates: 2, 4, 16": r"(-n\d+)",
    "threshold: 0.3, 0.7, 0.9": r"(-t[\d.]+)",
    "pictures by lot": r"(-(?P<only>lot))",
    "rejected pictures": r"(-(?P<only>rejected))",
    "pairs inverted: 20, 50, 100 %": r"(-invert(?P<inverted>[\d.]+))",
    "what draws trained too": r"()-drawing",
}
SETTINGS = {
    "half of the layers": r"()-(?:first|last)",
    "3 x the rate": r"()-lr3",
    "5 x the rate": r"()-lr5-1",
    "10 x the rate": r"()-lr10",
    "4 x the steps": r"()-steps4",
    "3 x the steps, 6 candidates": r"(?P<data>)-once",
    "6 candidates": r"(?P<data>)-once-1",
}
ROUND = re.compile(r"(sft|dpo)(-.*)-([123])")  # method, loop, round
SAME_RUN = re.compile(r"(sft|dpo)-(-no-replay|replay|paper|rounds|none)-1")  # as the plain one, or that of two candidates
OTHER_ROWS = re.compile(r"base|data.*|likelihood-.*|dynamics-.*|bayes-.*|descent.*|levels-.*|sft-yes")
LOOPS = {"-once": "the same pictures again", "-lr5": "rounds at 5 x the rate"}  # others: rounds
CURRICULA = ("-paper", "-rounds", "-none")


class Judge(NamedTuple):
    """a, t and f: how often drawings are right, and right and wrong ones accepted."""

    a: float
    t: float
    f: float

    def right(self) -> tuple[float, float]:
        """p and r: how often what it accepts is right, and what it rejects."""
        return accepted_right(*self), accepted_right(self.a, 1 - self.t, 1 - self.f)

    def turned(self, share: float) -> "Judge":
        """The judge of whose verdicts this share is turned round."""
        return self._replace(**{key: x * (1 - share) + (1 - x) * share for key, x in (("t", self.t), ("f", self.f))})


def own_judge(rows: list[Row]) -> Judge:
    """A model on its own held-out pictures, all its seeds together."""
    a, rejected, weak = (
        float(np.mean(column))
        for column in zip(
            *((row["accuracy"], row["nonunified"], row["nonunified"] * (row["weak_generation"] or 0)) for row in rows),
            strict=True,
        )
    )
    return Judge(a, 1 - (rejected - weak) / a, 1 - weak / (1 - a))


def condition(name: str) -> Condition | None:
    """What a name says, or None of a later round, of a row that is no run, and of a name that is not known."""
    if not (method := re.match("sft|dpo", name)):
        return None
    for kind, form in (FITTED | SETTINGS).items():
        if found := re.fullmatch(form, name[3:]):
            groups = found.groupdict()
            data = "-n6" if "data" in groups else found[1]
            shares = {key: float(groups[key]) for key in ("noise", "inverted") if groups.get(key)}
            return Condition(method[0], kind, data, **shares, only=groups.get("only") or "")
    return None


def by_rule(what: Condition, judge: Judge) -> float:
    """The advantage of a run's data by a, t and f."""
    accepted, rejected = judge.turned(what.noise).right()
    if what.only:
        return 0.0 if what.only == "lot" else rejected - judge.a
    return accepted - judge.a if what.method == "sft" else (1 - 2 * what.inverted) * (accepted - rejected)


def counted(what: Condition, rows: list[Row]) -> float:
    """The advantage of a run's data as the oracle counts it in them: rows of data.sh, a seed each."""
    if what.method == "sft":
        return float(np.mean([row["sft_right"] - row["drawn_right"] for row in rows]))
    return float(np.mean([row["chosen_right"] - row["rejected_right"] for row in rows]))


class Run(NamedTuple):
    """One measured run. before: accuracy of the model that it began from."""

    family: str
    method: str
    kind: str
    name: str
    seed: int
    advantage: float
    before: float
    gain: float


def architecture(family: str) -> str:
    """janus of janus-blind: the family of another base than the shipped one."""
    return family.partition("-")[0]


def read_runs(rows: list[Row]) -> tuple[list[Run], list[str]]:
    """All runs, each once, and the names of rows that are not placed."""
    found = {(row["family"], row["name"], row["seed"]): row for row in rows}
    bases = {family: [row for row in rows if (row["family"], row["name"]) == (family, "base")] for family, _, _ in found}
    judges = {family: own_judge(some) for family, some in bases.items() if some}
    runs, unplaced = [], set()
    for (family, name, seed), row in found.items():
        if OTHER_ROWS.fullmatch(name) or SAME_RUN.fullmatch(name):
            continue
        base, what, later = found.get((family, "base", seed)), condition(name), ROUND.fullmatch(name)
        earlier = later and found.get((family, f"{later[1]}{later[2]}-{int(later[3]) - 1}", seed))
        if "accuracy" not in row or not base or not (what or earlier):
            unplaced.add(f"{family} {name}")
            continue
        if what:
            data = [it for it in rows if (it["family"], it["name"]) == (family, f"data{what.data}")]
            advantage, before = counted(what, data) if data else by_rule(what, judges[family]), base
            kind = what.kind
        else:
            loop, number = later[2], later[3]
            kind = next((kind for form, kind in LOOPS.items() if loop.startswith(form)), f"round {number}")
            kind = f"curricula, {kind}" if loop in CURRICULA else kind
            now = own_judge([earlier])
            drew = judges[family]._replace(a=now.a) if loop == "-once" else now
            accepted, rejected = (judges[family] if loop == "-once" else now).right()
            advantage = accepted - (drew.a if later[1] == "sft" else rejected)
            before = earlier
        _, _, other = family.partition("-")
        kind = f"{other}: {kind}" if other else kind
        runs.append(
            Run(family, name[:3], kind, name, seed, advantage, before["accuracy"], row["accuracy"] - before["accuracy"])
        )
    return runs, sorted(unplaced)


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


def left_out(runs: list[Run], with_spread: bool = False) -> list[tuple[Run, Line]]:
    """Each run with the fit on all other kinds."""
    lines = {kind: fit([run for run in runs if run.kind != kind], with_spread) for kind in {run.kind for run in runs}}
    return [(run, line) for run in runs if (line := lines[run.kind])]


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
    keys = [(name, method) for name in TITLES for method in METHODS]
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


def constants(rows: list[Row]) -> dict[str, Any]:
    """What forecast.py reads: k, c and spread of each architecture and method, and where they come from."""
    lines, _ = foretell(read_runs(rows)[0])
    found: dict[str, Any] = {"source": COMMAND, "families": {}}
    for (name, method), line in lines.items():
        numbers = {key: round(getattr(line, key), 4) for key in ("k", "c", "spread")}
        found["families"].setdefault(name, {})[method] = numbers | {"runs": line.n_runs}
    return found
