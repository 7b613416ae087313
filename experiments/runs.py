"""What each of the experiments' runs trained on, by its name: how much more often right that is than what stands against it.

The law (law.py) is about this number, the data's advantage. Here is what the names mean, and how the advantage comes from
the base's a, t and f by rule, or, where data.sh has left a row of the data themselves, from what the oracle counted in them.
"""

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from analysis.forecast import accepted_right

Row = dict[str, Any]


class Condition(NamedTuple):
    """What a run's name says: its method, kind, data (the ending of their row's name) and how these come about.

    noise: share of the verdicts turned round; inverted: of the pairs. only: all data are by lot or rejected. true: the
    verdicts are the oracle's.
    """

    method: str
    kind: str
    data: str
    noise: float = 0.0
    inverted: float = 0.0
    only: str = ""
    true: bool = False


FITTED = {
    "plain": r"()",
    "noise: 10 to 40 % of the verdicts turned": r"(-noise(?P<noise>[\d.]+))",
    "candidates: 2, 4, 16": r"(-n\d+)",
    "threshold: 0.3, 0.7, 0.9": r"(-t[\d.]+)",
    "pictures by lot": r"(-(?P<only>lot))",
    "rejected pictures": r"(-(?P<only>rejected))",
    "pairs inverted: 20, 50, 100 %": r"(-invert(?P<inverted>[\d.]+))",
    "the oracle's verdicts": r"(-(?P<true>truth))",
    "what draws trained too": r"()-drawing",
}
ALIKE = ("plain", "candidates", "threshold", "what draws trained too")  # their data hardly differ: left out together
SETTINGS = {
    "pictures by lot, a quarter of the steps": r"(-(?P<only>lot))-short",
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
OTHER_ROWS = re.compile(
    r"base|data.*|forecast.*|second-.*|prompts-.*|(?:sft|dpo)-half|likelihood-.*|dynamics-.*|bayes-.*|descent.*|levels-.*|answers-.*|sft-yes"
)
TRUE = "-truth"  # by the oracle's verdicts
LOOPS = {"-once": "the same pictures again", TRUE: "rounds by the oracle's verdicts"}  # others: rounds
LOOPS |= {"-lr5": "rounds at 5 x the rate", "-rejected": "rounds on rejected pictures", "-invert1": "rounds of inverted pairs"}
WRONG = ("-rejected", "-invert1")
FIRST = (TRUE, *WRONG)  # whose first round is a row without a number
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
            return Condition(method[0], kind, data, **shares, only=groups.get("only") or "", true="true" in groups)
    return None


def by_rule(what: Condition, judge: Judge) -> float:
    """The advantage of a run's data by a, t and f."""
    accepted, rejected = (1.0, 0.0) if what.true else judge.turned(what.noise).right()
    if what.only:
        return 0.0 if what.only == "lot" else rejected - judge.a
    return accepted - judge.a if what.method == "sft" else (1 - 2 * what.inverted) * (accepted - rejected)


def counted(what: Condition, each: list[Row]) -> float:
    """The advantage of a run's data as the oracle counts it in them: numbers of data.sh, a seed and category each.

    The mean over categories, which the held-out prompts have equally often and the training prompts have not. A category
    without data neither wins nor loses.
    """
    taken, against = ("sft_right", "drawn_right") if what.method == "sft" else ("chosen_right", "rejected_right")
    return float(np.mean([0.0 if it[taken] is None else it[taken] - it[against] for it in each]))


class Run(NamedTuple):
    """One measured run. before: accuracy of the model that it began from. counted: the advantage is, not by rule."""

    family: str
    method: str
    kind: str
    name: str
    seed: int
    advantage: float
    before: float
    gain: float
    counted: bool


def architecture(family: str) -> str:
    """janus of janus-blind: the family of another base than the shipped one."""
    return family.partition("-")[0]


def read_runs(rows: list[Row]) -> tuple[list[Run], list[str]]:
    """All runs, each once, and the names of rows that are not placed."""
    found = {(row["family"], row["name"], row["seed"]): row for row in rows}
    judges = base_judges(rows)
    runs, unplaced = [], set()
    for (family, name, seed), row in found.items():
        if OTHER_ROWS.fullmatch(name) or SAME_RUN.fullmatch(name):
            continue
        before, what, later = found.get((family, "base", seed)), condition(name), ROUND.fullmatch(name)
        if later and not what:
            first = later[2] in FIRST and later[3] == "2"
            before = found.get((family, f"{later[1]}{later[2]}" + ("" if first else f"-{int(later[3]) - 1}"), seed))
        if "accuracy" not in row or not before or not (what or later):
            unplaced.add(f"{family} {name}")
            continue
        data = counts(rows, family, what) if what else []
        if what:
            kind, advantage = what.kind, counted(what, data) if data else by_rule(what, judges[family])
        else:
            kind, advantage = later_round(later, own_judge([before]), judges[family])
        _, _, other = family.partition("-")
        kind = f"{other}: {kind}" if other else kind
        gain = row["accuracy"] - before["accuracy"]
        runs.append(Run(family, name[:3], kind, name, seed, advantage, before["accuracy"], gain, bool(data)))
    return runs, sorted(unplaced)


def counts(rows: list[Row], family: str, what: Condition, category: str = "") -> list[Row]:
    """What data.sh counted in a condition's data, of each seed and category, or of one category."""
    some = [row["categories"] for row in rows if (row["family"], row["name"]) == (family, f"data{what.data}")]
    return [numbers for categories in some for name, numbers in categories.items() if category in ("", name)]


class Part(NamedTuple):
    """One category of a measured run of one round."""

    family: str
    method: str
    category: str
    name: str
    seed: int
    advantage: float
    gain: float


def by_category(rows: list[Row]) -> list[Part]:
    """The shipped bases' runs of one round with the usual settings that have numbers of each category.

    Their own rows have them, or those of likelihood.sh about the same pictures.
    a, t and f are those of the base's row of the same seed; the data's advantage is counted where data.sh has done it.
    """
    known = {}
    for row in rows:
        if "categories" in row and not row["name"].startswith("data"):
            known[row["family"], row["name"].removeprefix("likelihood-"), row["seed"]] = row["categories"]
    found = []
    for (family, name, seed), after in known.items():
        what, before = condition(name), known.get((family, "base", seed))
        if not what or not before or family != architecture(family) or what.kind not in (*FITTED, "6 candidates"):
            continue
        for category, numbers in after.items():
            base = before[category]
            judge = Judge(base["accuracy"], base["accepted_right"] or 0.0, base["accepted_wrong"] or 0.0)
            data = counts(rows, family, what, category)
            advantage = counted(what, data) if data else by_rule(what, judge)
            found.append(Part(family, name[:3], category, name, seed, advantage, numbers["accuracy"] - judge.a))
    return found


def base_judges(rows: list[Row]) -> dict[str, Judge]:
    """Each family's base."""
    bases: dict[str, list[Row]] = {}
    for row in rows:
        if row["name"] == "base":
            bases.setdefault(row["family"], []).append(row)
    return {family: own_judge(some) for family, some in bases.items()}


def later_round(name: re.Match[str], now: Judge, base: Judge) -> tuple[str, float]:
    """The kind of a second or third round, and its data's advantage by the a, t and f that the round before ended with.

    Trained on the base's pictures again, what stands against SFT's is what the model draws by now.
    """
    method, loop, number = name.groups()
    drew = base if loop == "-once" else now
    accepted, rejected = (1.0, 0.0) if loop == TRUE else drew.right()
    kind = next((kind for form, kind in LOOPS.items() if loop.startswith(form)), f"round {number}")
    kind = f"curricula, {kind}" if loop in CURRICULA else kind
    if loop in WRONG:
        accepted, rejected = rejected, accepted
    return kind, accepted - (now.a if method == "sft" else rejected)
