"""What a round of self-improvement did to a model's drawing and to its judging: before, after, and a verdict.

Reads   --before, --after  scored.jsonl of the base and of the improved model on the same held-out prompts
        --rejudged         the pictures of --before, judged by the model of --after (score.py --rejudge)
        --labels           an independent judge's word on the pictures of --before, --labels-after on those of --after: a
                           labels.jsonl, a person's .csv (columns id, candidate, label 0 or 1, perhaps source), or a
                           scored.jsonl of these very pictures rejudged by a third model
Writes  diagnosis.json beside --after, or --out: every number with its interval and n, the verdict with its evidence

    python diagnose.py --before round0/heldout.jsonl --after round3/heldout.jsonl --rejudged round3/rejudged.jsonl \\
        --labels round0/labels.jsonl --labels-after round3/labels.jsonl

Judging is measured on one fixed set, the pictures of --before, so that a change is a change of the judge. Every prompt
counts once, whatever the number of its pictures; a rate under a condition is a ratio of two such means. Intervals are 95 %
percentile bootstraps over prompts (Efron 1979), those of a difference over the prompts of both sides together. They say
what other prompts would have given, not what another seed of the training would have.

The nonunified score decides nothing: a judge that says yes to everything has a perfect one. Drawing and judging are each
better or worse where the interval of the difference in accuracy excludes 0, unchanged where it lies within --margin of 0,
else unclear, and then the verdict is "cannot tell". So it is without labels, where only the separation of P(yes) for own
prompts and for foils is left to look at; a judge that grows more confident, or begins to accept near misses, widens it too.
A judge that does not answer is named and not believed; one that says the same of foils, only to be the worse one. From the
paper: nonunified score, weak generation, win rate; the rest is ours.
"""

import argparse
import csv
import math
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from records import (
    LABELS,
    SCORED,
    BadInput,
    Parser,
    Tokens,
    check_out_file,
    differences,
    printable,
    read_lines,
    read_rows,
    run_script,
    tokens_path,
    write_json,
)

BINS = 10  # of P(yes), equally wide, for the calibration error
MIN_COVERAGE, MIN_SEPARATION = 0.5, 0.05  # under these a judge's yes and no mean nothing; make_pairs.py's gate has the same
MIN_PROMPTS = 20  # under this the percentile bootstrap's intervals are too narrow to show a change
SAID_BY_HEADER = ("model", "model_hash", "judge", "judge_hash", "questions", "threshold", "guidance", "temperature", "seed")
Key = tuple[str, int]  # (prompt id, candidate)


# ---------------------------------------------------------------------------------------------------------------------
# The numbers. R pictures, P prompts, K columns


class Pictures(NamedTuple):
    """Pictures as one judge sees them; all arrays (R,)."""

    id: np.ndarray  # of the prompt
    category: np.ndarray
    p_yes: np.ndarray
    p_yes_foil: np.ndarray
    coverage: np.ndarray
    label: np.ndarray  # 1: the independent judge says right, 0: wrong, NaN: it has not said
    threshold: float

    def take(self, which: np.ndarray) -> "Pictures":
        """Some of the pictures: `which` is places or a mask."""
        return Pictures(*(column[which] for column in self[:-1]), self.threshold)

    @property
    def accepted(self) -> np.ndarray:
        return self.p_yes > self.threshold


class Estimate(NamedTuple):
    """A number with its 95 % interval, None where there is nothing to measure.

    n_pictures: how many it is a rate of; for a difference, on the side that has fewer.
    """

    value: float | None
    low: float | None
    high: float | None
    n_prompts: int
    n_pictures: int


def mean(means: np.ndarray) -> np.ndarray:
    """(..., 1) -> (...): the mean over prompts itself."""
    return means[..., 0]


def ratio(means: np.ndarray) -> np.ndarray:
    """(..., 2) -> (...): the first mean per unit of the last."""
    return means[..., 0] / means[..., -1]


def summed_gaps(means: np.ndarray) -> np.ndarray:
    """(..., K + 1) -> (...): the sum of K absolute means per unit of the last."""
    return np.abs(means[..., :-1]).sum(-1) / means[..., -1]


def kappa(means: np.ndarray) -> np.ndarray:
    """Cohen's kappa (1960) from (..., 3): shares of agreement, of the first judge's yes, of the second's."""
    agree, first, second = np.moveaxis(means, -1, 0)
    by_chance = first * second + (1 - first) * (1 - second)
    return (agree - by_chance) / (1 - by_chance)


def calibration_gaps(pictures: Pictures) -> np.ndarray:
    """P(yes) - label, in the column of P(yes)'s bin, 0 elsewhere: (R, BINS).

    Expected calibration error = sum over bins of |mean over all pictures of this|: the usual sum of (share of pictures
    in the bin) |mean P(yes) - share of right ones| (Naeini et al. 2015), for P(yes) as the probability of "right".
    Resampling adds noise to every bin, so its interval lies rather high.
    """
    bins = np.minimum((pictures.p_yes * BINS).astype(int), BINS - 1)  # the last bin holds P(yes) = 1
    return np.where(bins[:, None] == np.arange(BINS), (pictures.p_yes - pictures.label)[:, None], 0.0)


def per_prompt(ids: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Means over each prompt's pictures: ids (R,), columns (R, K) -> (P, K), prompts in the order of their ids."""
    _, index = np.unique(ids, return_inverse=True)
    return np.stack([np.bincount(index, column) for column in columns.T], 1) / np.bincount(index)[:, None]


def resampled_means(columns: np.ndarray, seed: int = 0, resamples: int = 2000) -> np.ndarray:
    """(resamples, K): the means of columns (P, K) over P prompts drawn with replacement.

    The draws are those of records.bootstrap_interval, so that a rate has here the interval that score.py prints.
    """
    generator = np.random.default_rng(seed)
    n_prompts = len(columns)
    means = np.empty((resamples, columns.shape[1]))
    for start in range(0, resamples, 100):
        block = means[start : start + 100]
        picks = generator.integers(0, n_prompts, (len(block), n_prompts))
        picks += n_prompts * np.arange(len(block))[:, None]  # so that one count serves all resamples of the block
        counts = np.bincount(picks.ravel(), minlength=picks.size).reshape(picks.shape)
        block[:] = counts @ columns / n_prompts
    return means


def estimate(statistic: Callable, columns: np.ndarray, n_pictures: int) -> Estimate:
    """`statistic` of the mean over prompts of columns (P, K). Resamples in which it is undefined are left out."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value, draws = statistic(columns.mean(0)), statistic(resampled_means(columns))
    if not np.isfinite(value):
        return Estimate(None, None, None, len(columns), n_pictures)
    low, high = np.percentile(draws[np.isfinite(draws)], [2.5, 97.5])
    return Estimate(*(round(float(number), 6) for number in (value, low, high)), len(columns), n_pictures)


class Measure(NamedTuple):
    """A rate of pictures: `values` (R,) or (R, K) over those that are `given` (R,); `labelled`: of labelled ones only."""

    values: Callable[[Pictures], np.ndarray]
    given: Callable[[Pictures], np.ndarray] = lambda x: np.ones(len(x.id), bool)
    labelled: bool = False
    statistic: Callable[[np.ndarray], np.ndarray] = ratio

    def __call__(self, before: Pictures, after: Pictures) -> dict[str, Estimate]:
        """before, after and difference, over the prompts that both have; one side alone where the other has no label."""
        sides = {"before": before, "after": after}
        if self.labelled:
            sides = {name: side.take(~np.isnan(side.label)) for name, side in sides.items()}
        ids = [set(side.id) for side in sides.values() if len(side.id)]
        shared = set.intersection(*ids) if ids else set()
        tables, found = [], {}
        for name, side in sides.items():
            side = side.take(np.array([id in shared for id in side.id], bool))
            if not len(side.id):
                continue
            given = self.given(side)
            values = self.values(side).reshape(len(side.id), -1) * given[:, None]  # (R, K)
            tables.append(per_prompt(side.id, np.column_stack([values, given])))  # (P, K + 1)
            found[name] = estimate(self.statistic, tables[-1], int(given.sum()))
        if len(tables) == 2:
            fewer = min(side.n_pictures for side in found.values())
            found["difference"] = estimate(self.change, np.hstack(tables), fewer)
        return found

    def change(self, means: np.ndarray) -> np.ndarray:
        """(..., 2 (K + 1)) -> (...): the statistic of the second half minus that of the first."""
        first, second = np.split(means, 2, axis=-1)
        return self.statistic(second) - self.statistic(first)


# Of each model's own pictures, judged by itself.
DRAWN = {
    "nonunified": Measure(lambda x: ~x.accepted),
    "foil_yes_rate": Measure(lambda x: x.p_yes_foil > x.threshold),
    "separation": Measure(lambda x: x.p_yes - x.p_yes_foil),
    "coverage": Measure(lambda x: x.coverage),
    "drawing_accuracy": Measure(lambda x: x.label, labelled=True),
    "weak_generation": Measure(lambda x: x.label == 0, lambda x: ~x.accepted, labelled=True),
}
# Of the pictures of --before, as the judge before and the judge after see them.
JUDGED = {
    "yes_rate": Measure(lambda x: x.accepted),
    "foil_yes_rate": DRAWN["foil_yes_rate"],
    "separation": DRAWN["separation"],
    "coverage": DRAWN["coverage"],
    "judge_accuracy": Measure(lambda x: x.accepted == x.label, labelled=True),
    "false_positive_rate": Measure(lambda x: x.accepted, lambda x: x.label == 0, labelled=True),
    "false_negative_rate": Measure(lambda x: ~x.accepted, lambda x: x.label == 1, labelled=True),
    "separation_if_right": Measure(lambda x: x.p_yes - x.p_yes_foil, lambda x: x.label == 1, labelled=True),
    "calibration_error": Measure(calibration_gaps, labelled=True, statistic=summed_gaps),
}
BY_CATEGORY = ("nonunified", "drawing_accuracy", "judge_accuracy")  # printed so; the JSON has all of them


def drift(first: Pictures, second: Pictures) -> Estimate:
    """How far the judges' P(yes) of a picture lie apart, on average."""
    return estimate(mean, per_prompt(first.id, np.abs(second.p_yes - first.p_yes)[:, None]), len(first.id))


def shift(first: Pictures, second: Pictures) -> Estimate:
    """How much higher the second judge's P(yes) is, on average."""
    return estimate(mean, per_prompt(first.id, (second.p_yes - first.p_yes)[:, None]), len(first.id))


def agreement(first: Pictures, second: Pictures) -> Estimate:
    """The share of pictures that both judges accept or both reject."""
    return estimate(mean, per_prompt(first.id, (first.accepted == second.accepted)[:, None]), len(first.id))


def chance_corrected(first: Pictures, second: Pictures) -> Estimate:
    """Cohen's kappa of the judges' answers."""
    answers = np.column_stack([first.accepted == second.accepted, first.accepted, second.accepted])
    return estimate(kappa, per_prompt(first.id, answers), len(first.id))


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a binomial share (Wilson 1927), for at least one trial."""
    z = statistics.NormalDist().inv_cdf(0.975)
    share, room = successes / trials, z * z / trials
    middle = share + room / 2
    half = z * math.sqrt(share * (1 - share) / trials + room / (4 * trials))
    return max(0.0, (middle - half) / (1 + room)), min(1.0, (middle + half) / (1 + room))


def win_rate(first: Pictures, second: Pictures) -> Estimate:
    """Of the labelled pictures on which the judges disagree, the share where the second is right; Wilson interval.

    Counted in pictures: those of one prompt are alike, so the interval is rather too narrow.
    """
    disputed = ~np.isnan(first.label) & (first.accepted != second.accepted)
    wins, count = int((second.accepted == second.label)[disputed].sum()), int(disputed.sum())
    n_prompts = len(set(first.id[disputed]))
    if not count:
        return Estimate(None, None, None, 0, 0)
    return Estimate(*(round(number, 6) for number in (wins / count, *wilson_interval(wins, count))), n_prompts, count)


# Of the same pictures, between the judge before and the judge after.
BETWEEN = {"drift": drift, "shift": shift, "agreement": agreement, "kappa": chance_corrected, "win_rate": win_rate}


def measure_all(measures: dict[str, Callable[..., Any]], *sides: Pictures) -> dict[str, dict[str, Any]]:
    """What each of `measures` says of all pictures, and of those of each category."""
    categories = {name: [side.take(side.category == name) for side in sides] for name in sorted(set(sides[0].category))}
    return {
        name: {"all": measure(*sides), "categories": {category: measure(*some) for category, some in categories.items()}}
        for name, measure in measures.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# The verdict

# (what drawing did, what judging did) -> verdict; any other pair: cannot tell.
VERDICTS = {
    ("better", "better"): "co-improvement",
    ("worse", "worse"): "co-degradation",
    ("better", "unchanged"): "generation only",
    ("unchanged", "better"): "understanding only",
    ("unchanged", "unchanged"): "no change",
    ("worse", "unchanged"): "generation only, for the worse",
    ("unchanged", "worse"): "understanding only, for the worse",
    ("better", "worse"): "generation at the cost of understanding",
    ("worse", "better"): "understanding at the cost of generation",
}
WIDTHS = {"better": "wider", "worse": "narrower", "unchanged": "unchanged", "unclear": "unclear"}  # of separation


def verdict(generation: str, understanding: str) -> str:
    """The verdict on two directions: better, worse, unchanged, unclear (not shown either way) or unknown (not measured)."""
    return VERDICTS.get((generation, understanding), "cannot tell")


def direction(change: Estimate | None, margin: float) -> str:
    """What a difference (larger is better) shows: better, worse, unchanged, unclear or, where there is none, unknown.

    unchanged: the whole interval is within `margin` of 0, and so is 3 / n_pictures: of n pictures of which none changed,
    that share still may (rule of three, Hanley & Lippman-Hand 1983), which a bootstrap of zeros cannot see.
    """
    if change is None or change.value is None:
        return "unknown"
    if change.n_prompts < MIN_PROMPTS:
        return "unclear"
    if change.low > 0 or change.high < 0:
        return "better" if change.low > 0 else "worse"
    return "unchanged" if max(-change.low, change.high, 3 / change.n_pictures) <= margin else "unclear"


def believed(understanding: str, unanswered: bool, blind_before: bool, blind_after: bool) -> str:
    """The direction of understanding, or unclear where the judges' answers mean nothing.

    unanswered: one of them hardly says yes or no. A blind judge, one that says of right pictures the same for a foil as for
    the prompt, may often be right by luck (yes to everything, where most are right): it is believed only to be the worse.
    """
    lucky = (blind_before and understanding != "better") or (blind_after and understanding != "worse")
    return "unclear" if understanding != "unknown" and (unanswered or lucky) else understanding


def judge_warnings(name: str, measures: dict[str, dict[str, Estimate]], side: str) -> list[str]:
    """What says that a judge's answers mean nothing, a sentence each."""
    coverage, separation = (measures[measure][side].value for measure in ("coverage", "separation"))
    warnings = []
    if coverage < MIN_COVERAGE:
        warnings.append(f"{name} has coverage {coverage:.3f}, under {MIN_COVERAGE:g}: its answers are not yes or no")
    if separation < MIN_SEPARATION:
        why = "it says the same of foils, or hardly a picture is right"
        warnings.append(f"{name} has separation {separation:.3f}, under {MIN_SEPARATION:g}: {why}")
    return warnings


def describe(name: str, numbers: dict[str, Estimate], shown: str) -> str:
    """One piece of evidence: before, after, the difference with its interval, and what it shows."""
    before, after, change = (numbers[key] for key in ("before", "after", "difference"))
    few = f" (fewer than {MIN_PROMPTS})" if change.n_prompts < MIN_PROMPTS else ""
    return (
        f"{name} {before.value:.3f} -> {after.value:.3f}, {change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}] "
        f"over {change.n_prompts} prompts{few}: {shown}"
    )


def judge_drawing(drawn: dict[str, Any], margin: float) -> tuple[str, list[str]]:
    """The direction of generation, and the evidence."""
    shown = direction(drawn["drawing_accuracy"].get("difference"), margin)
    if shown == "unknown":
        return shown, ["drawing unknown (that takes labels of both models' pictures, of the same prompts)"]
    return shown, [describe("drawing accuracy", drawn["drawing_accuracy"], shown)]


def judge_judging(judged: dict[str, Any], margin: float) -> tuple[str, list[str]]:
    """The direction of understanding, and the evidence; `judged` is empty without --rejudged."""
    if not judged:
        return "unknown", ["judging unknown (that takes --rejudged, and labels of the pictures before)"]
    found = direction(judged["judge_accuracy"].get("difference"), margin)
    if found == "unknown":
        shown = WIDTHS[direction(judged["separation"]["difference"], margin)]
        evidence = describe("without labels, separation on the pictures before", judged["separation"], shown)
        return found, ["judging unknown (that takes labels of the pictures before)", evidence]
    unanswered = any(judged["coverage"][side].value < MIN_COVERAGE for side in ("before", "after"))
    blind = ((judged["separation_if_right"][side].value or 0) < MIN_SEPARATION for side in ("before", "after"))
    shown = believed(found, unanswered, *blind)
    doubt = "" if shown == found else " (a judge does not answer, or is blind)"
    return shown, [describe("judge accuracy on the pictures before", judged["judge_accuracy"], shown) + doubt]


def conclude(drawn: dict[str, Any], judged: dict[str, Any], margin: float) -> dict[str, Any]:
    """The verdict with its evidence, from the measures over all prompts; `judged` is empty without --rejudged."""
    generation, of_drawing = judge_drawing(drawn, margin)
    understanding, of_judging = judge_judging(judged, margin)
    warnings = judge_warnings("the judge before", drawn, "before") + judge_warnings("the judge after", drawn, "after")
    if judged:
        warnings += judge_warnings("the judge after, on the pictures before,", judged, "after")
    return {
        "verdict": verdict(generation, understanding),
        "generation": generation,
        "understanding": understanding,
        "margin": margin,
        "evidence": of_drawing + of_judging,
        "warnings": warnings,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class Scored(NamedTuple):
    """A scored file: its pictures in file order, where each is, and what its judge was asked."""

    path: Path
    tokens: Tokens
    places: dict[Key, int]
    lines: list[int]  # line numbers, for messages
    rows: np.ndarray  # of the tokens (R,)
    asked: list[tuple[str, str, str]]  # prompt, category, foil
    pictures: Pictures

    @property
    def said(self) -> dict[str, str]:
        """What the header says of who drew and judged the pictures, and how."""
        return {key: self.tokens.metadata[key] for key in SAID_BY_HEADER if key in self.tokens.metadata}

    @property
    def judge(self) -> tuple[str, str]:
        """Name and hash of the model that judged: the one that drew, where the header names no other."""
        said = self.said
        return (said["judge"], said["judge_hash"]) if said.get("judge_hash") else (said["model"], said["model_hash"])


def read_scored(path: Path) -> Scored:
    """A scored file, checked as far as it can be by itself; BadInput, naming file and line, for what does not fit."""
    tokens = Tokens(path)
    for key in ("model", "model_hash"):
        if not tokens.metadata.get(key):
            raise BadInput(f"{tokens.path}: metadata {key} is missing: which model drew these pictures?")
    if tokens.metadata.get("judge_hash") and not tokens.metadata.get("judge"):
        raise BadInput(f"{tokens.path}: metadata judge is missing: which model judged these pictures?")
    threshold = tokens.threshold()
    places: dict[Key, int] = {}
    lines, rows, asked, texts = [], [], [], {}
    for number, row in read_rows(path, SCORED):
        where = f"{path}:{number}"
        tokens.check_row(row["row"], where)
        if places.setdefault((row["id"], row["candidate"]), len(rows)) != len(rows):
            raise BadInput(f"{where}: candidate {row['candidate']} of id {row['id']!r} is given twice")
        asked.append((row["prompt"], row["category"], row["foil"]))
        if texts.setdefault(row["id"], asked[-1][:2]) != asked[-1][:2]:
            raise BadInput(f"{where}: id {row['id']!r} has another prompt or category here than before")
        lines.append(number)
        rows.append(row)
    if not rows:
        raise BadInput(f"{path}: holds no scored candidate")
    tokens.check_values()
    texts = [np.array([row[key] for row in rows], object) for key in ("id", "category")]
    numbers = [np.array([row[key] for row in rows], np.float64) for key in ("p_yes", "p_yes_foil", "coverage")]
    pictures = Pictures(*texts, *numbers, np.full(len(rows), np.nan), threshold)
    return Scored(path, tokens, places, lines, np.array([row["row"] for row in rows]), asked, pictures)


def file_facts(scored: Scored) -> dict[str, Any]:
    """Which file, of how many pictures, and what its header says."""
    counts = {"n_pictures": len(scored.rows), "n_prompts": len(set(scored.pictures.id))}
    return {"path": str(scored.path), **counts, **scored.said, "judge": scored.judge[0], "judge_hash": scored.judge[1]}


def check_comparable(before: Scored, after: Scored) -> None:
    """Raise BadInput unless both hold a model's word on its own pictures, made alike, of at least one common prompt."""
    for scored in (before, after):
        if scored.judge[1] != scored.said["model_hash"]:
            raise BadInput(
                f"{scored.path}: drawn by {scored.said['model']}, but judged by {scored.judge[0]}; --before and --after "
                "take models' words on their own pictures, --rejudged another's"
            )
    check_same_settings(before, after, ("questions", "threshold", "guidance", "temperature"))
    known = {id: before.asked[place] for (id, _), place in before.places.items()}
    for (id, _), place in after.places.items():
        if id in known and known[id][:2] != after.asked[place][:2]:
            raise BadInput(f"{after.path}:{after.lines[place]}: id {id!r} has another prompt or category in {before.path}")
    if known.keys().isdisjoint(after.pictures.id):
        raise BadInput(f"{after.path}: has no prompt id in common with {before.path}")


def check_same_settings(one: Scored, other: Scored, keys: tuple[str, ...]) -> None:
    """Raise BadInput if two files were drawn or judged with other settings: a difference could come from that."""
    if told := differences({key: one.said.get(key) for key in keys}, {key: other.said.get(key) for key in keys}):
        raise BadInput(f"{other.path}: not made like {one.path}, so they cannot be compared: {told}")


def places_in(scored: Scored, drawn: Scored) -> np.ndarray:
    """Where in `drawn` each picture of `scored` is, (R,); BadInput for one that is not there or is another picture."""
    places = np.empty(len(scored.rows), np.int64)
    for key, place in scored.places.items():
        where = f"{scored.path}:{scored.lines[place]}"
        if key not in drawn.places:
            raise BadInput(f"{where}: candidate {key[1]} of id {key[0]!r} is not in {drawn.path}")
        places[place] = drawn.places[key]
        if scored.asked[place] != drawn.asked[places[place]]:
            raise BadInput(f"{where}: id {key[0]!r} has another prompt, category or foil in {drawn.path}")
    if scored.tokens.length != drawn.tokens.length:
        raise BadInput(
            f"{scored.tokens.path}: {scored.tokens.length} tokens a picture, but {drawn.tokens.path} has {drawn.tokens.length}"
        )
    step = max(1, 2**19 // drawn.tokens.length)  # 4 MiB at a time
    for start in range(0, len(places), step):
        block = slice(start, start + step)
        same = (scored.tokens[scored.rows[block]] == drawn.tokens[drawn.rows[places[block]]]).all(1)
        if not same.all():
            line = scored.lines[start + int(same.argmin())]
            raise BadInput(f"{scored.path}:{line}: its image tokens are not those of this candidate in {drawn.path}")
    return places


def read_rejudged(path: Path, before: Scored, after: Scored) -> Scored:
    """The pictures of `before` as the model of `after` judges them, in the order of `before`."""
    rejudged = read_scored(path)
    if rejudged.judge[1] != after.judge[1]:
        raise BadInput(f"{path}: judged by {rejudged.judge[0]}, not by {after.judge[0]}, which drew and judged {after.path}")
    check_same_settings(before, rejudged, ("questions", "threshold"))
    places = places_in(rejudged, before)
    if missing := before.places.keys() - rejudged.places.keys():
        raise BadInput(f"{path}: lacks {len(missing)} pictures of {before.path}, first {min(missing)}")
    return rejudged._replace(pictures=rejudged.pictures.take(np.argsort(places)))


def read_labels(paths: list[Path], drawn: Scored, judges: list[Scored]) -> tuple[np.ndarray, dict[str, int]]:
    """Labels of the pictures of `drawn`, (R,), NaN where there is none; and how many come from each source."""
    labels, sources = np.full(len(drawn.rows), np.nan), {}
    for path in paths:
        empty = True
        for number, id, candidate, label, source in label_rows(path, drawn, judges):
            place = drawn.places.get((id, candidate))
            if place is None:
                raise BadInput(f"{path}:{number}: candidate {candidate} of id {id!r} is not in {drawn.path}")
            if not np.isnan(labels[place]):
                raise BadInput(f"{path}:{number}: candidate {candidate} of id {id!r} is labelled twice")
            labels[place] = label
            sources[source] = sources.get(source, 0) + 1
            empty = False
        if empty:
            raise BadInput(f"{path}: holds no label")
    return labels, sources


def label_rows(path: Path, drawn: Scored, judges: list[Scored]) -> Iterator[tuple[int, str, int, int, str]]:
    """(line number, id, candidate, label, source) of any of the three kinds of label files."""
    if not path.is_file():  # a pipe cannot be looked into and then read from its beginning
        raise BadInput(f"{path}: cannot be read: not a file")
    if path.suffix.lower() == ".csv":
        yield from csv_rows(path)
        return
    first = next(read_rows(path, {}), (0, {}))[1]
    if "label" not in first and "p_yes" in first:
        yield from judged_rows(path, drawn, judges)
        return
    for number, row in read_rows(path, LABELS):
        yield number, row["id"], row["candidate"], row["label"], row["source"]


def csv_rows(path: Path) -> Iterator[tuple[int, str, int, int, str]]:
    """A person's labels: a CSV file with columns id, candidate, label and perhaps source, in any order, and any others."""
    table = csv.reader((text for _, text in read_lines(path)), strict=True)
    try:
        header = [name.strip() for name in next(table, [])]
        if not {"id", "candidate", "label"} <= set(header) or len(set(header)) < len(header):
            raise BadInput(f"{path}:1: expected the columns id,candidate,label (and source), found {','.join(header)[:60]!r}")
        for cells in table:
            if not any(cells):
                continue
            where = f"{path}:{table.line_num}"
            if len(cells) != len(header):
                raise BadInput(f"{where}: {len(cells)} columns, but the header has {len(header)}")
            row = dict(zip(header, (cell.strip() for cell in cells), strict=True))
            if not re.fullmatch("[0-9]{1,15}", row["candidate"]):
                raise BadInput(f"{where}: candidate must be an integer of at least 0, found {row['candidate'][:60]!r}")
            if row["label"] not in ("0", "1"):
                raise BadInput(f"{where}: label must be 0 or 1, found {row['label'][:60]!r}")
            source = row.get("source") or "a person"
            yield table.line_num, row["id"], int(row["candidate"]), int(row["label"]), source
    except csv.Error as error:
        raise BadInput(f"{path}:{table.line_num}: not CSV: {error}") from None


def judged_rows(path: Path, drawn: Scored, judges: list[Scored]) -> Iterator[tuple[int, str, int, int, str]]:
    """An independent judge's labels: a scored.jsonl of the same pictures; right is a P(yes) over its own threshold."""
    scored = read_scored(path)
    if (coverage := scored.pictures.coverage.mean()) < MIN_COVERAGE:
        raise BadInput(f"{path}: coverage is {coverage:.3f}, under {MIN_COVERAGE:g}: {scored.judge[0]} says neither yes nor no")
    for other in judges:
        if scored.judge[1] == other.judge[1]:
            raise BadInput(f"{path}: judged by {scored.judge[0]}, which also judged {other.path}: not independent of it")
    places_in(scored, drawn)
    for (id, candidate), place in scored.places.items():
        yield scored.lines[place], id, candidate, int(scored.pictures.accepted[place]), "{} ({})".format(*scored.judge)


# ---------------------------------------------------------------------------------------------------------------------
# The report


def plain(found: Any) -> Any:
    """Estimates, however nested in dictionaries, as JSON objects."""
    if isinstance(found, Estimate):
        return found._asdict()
    return {key: plain(value) for key, value in found.items()} if isinstance(found, dict) else found


def table_lines(found: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    """A line a measure, and below the most important ones a line a category: name, n, numbers, interval."""
    for name, numbers in found.items():
        if not numbers["all"]:  # no label
            continue
        yield [name.replace("_", " "), *cells(numbers["all"])]
        if name in BY_CATEGORY and len(numbers["categories"]) > 1:
            yield from (["  " + printable(category), *cells(each)] for category, each in numbers["categories"].items())


def cells(numbers: dict[str, Estimate] | Estimate) -> list[str]:
    """Prompts, and before, after, difference and its interval; of a single number itself and its interval."""
    if isinstance(numbers, Estimate):
        return [str(numbers.n_prompts), cell(numbers), interval_cell(numbers, "")]
    sides = [numbers.get(side) for side in ("before", "after")]
    change = numbers.get("difference")
    n_prompts = max((side.n_prompts for side in sides if side), default=0)
    return [str(n_prompts), *map(cell, sides), cell(change, "+"), interval_cell(change, "+")]


def cell(number: Estimate | None, sign: str = "") -> str:
    return "-" if number is None or number.value is None else f"{number.value:{sign}.3f}"


def interval_cell(number: Estimate | None, sign: str) -> str:
    return "-" if number is None or number.value is None else f"{number.low:{sign}.3f} .. {number.high:{sign}.3f}"


def print_table(title: str, headings: tuple[str, ...], found: dict[str, dict[str, Any]]) -> None:
    """An aligned table: names to the left, numbers to the right."""
    lines = [[title, *headings, "95 % interval"], *table_lines(found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print()
    for name, *numbers in lines:
        print("  ".join([name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])]))


def print_report(diagnosis: dict[str, Any]) -> None:
    """Whose pictures these are, what labels there are of them, what has no counterpart, and the tables."""
    for name, file in diagnosis["files"].items():
        pictures = f"{file['n_pictures']} pictures of {file['n_prompts']} prompts"
        print(f"{name:<15}{pictures}, drawn by {printable(file['model'])}, judged by {printable(file['judge'])}")
    for side, labels in diagnosis["labels"].items():
        sources, n_pictures = labels["sources"], diagnosis["files"][side]["n_pictures"]
        told = "".join(f", {count} by {printable(source)}" for source, count in sources.items())
        print(f"{f'labels {side}':<15}{sum(sources.values())} of {n_pictures} pictures{told}")
    alone = diagnosis["unpaired_prompts"]
    print(f"{'unpaired':<15}{alone['before']} prompts of before and {alone['after']} of after: left out of own pictures")
    compared = ("prompts", "before", "after", "change")
    print_table("own pictures, judged by the model that drew them", compared, diagnosis["drawn"])
    if diagnosis["judged"]:
        print_table("pictures of before, judged by each model", compared, diagnosis["judged"])
        print_table("the same, between the two judges", ("prompts", "value"), diagnosis["between_judges"])
    found = diagnosis["verdict"]
    told = [*found["evidence"], *(f"warning: {warning}" for warning in found["warnings"])]
    print(f"\n{'verdict':<15}{found['verdict']}: {'; '.join(told)}")


# ---------------------------------------------------------------------------------------------------------------------
# Command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--before", type=Path, required=True, metavar="FILE", help="scored.jsonl of the base model")
    files.add_argument("--after", type=Path, required=True, metavar="FILE", help="scored.jsonl of the improved model")
    files.add_argument("--rejudged", type=Path, metavar="FILE", help="the pictures of --before judged by the model of --after")
    files.add_argument("--labels", type=Path, nargs="+", default=[], metavar="FILE", help="labels of the pictures of --before")
    files.add_argument("--labels-after", type=Path, nargs="+", default=[], metavar="FILE", help="labels of those of --after")
    files.add_argument("--out", type=Path, metavar="FILE", help="JSON to write (default: diagnosis.json beside --after)")
    parser.add_argument(
        "--margin",
        type=float,
        default=0.02,
        help="a difference counts as no change if its whole interval is this near 0 (default 0.02)",
    )
    args = parser.parse_args(argv)
    if not 0 < args.margin < 1:
        parser.error(f"--margin must lie between 0 and 1, found {args.margin}")
    return args


def check_out(args: argparse.Namespace) -> Path:
    """Where the diagnosis goes; BadInput if it cannot, or if it is one of the files that are read."""
    given = [args.before, args.after, *([args.rejudged] if args.rejudged else []), *args.labels, *args.labels_after]
    beside = [tokens_path(path) for path in given]
    out = check_out_file(args.out or args.after.with_name("diagnosis.json"))
    if os.path.realpath(out) in map(os.path.realpath, [*given, *beside]):
        raise BadInput(f"--out {out}: is also read")
    for path in args.labels:
        if os.path.realpath(path) in map(os.path.realpath, args.labels_after):
            raise BadInput(f"{path}: given as --labels and as --labels-after, but these are other pictures")
    return out


def main(args: argparse.Namespace) -> None:
    out = check_out(args)
    before, after = read_scored(args.before), read_scored(args.after)
    check_comparable(before, after)
    files = {"before": before, "after": after}
    if args.rejudged:
        files["rejudged"] = read_rejudged(args.rejudged, before, after)
    labels_before, sources_before = read_labels(args.labels, before, [before, after])
    labels_after, sources_after = read_labels(args.labels_after, after, [before, after])
    base = before.pictures._replace(label=labels_before)
    improved = after.pictures._replace(label=labels_after)

    diagnosis = {
        "verdict": {},
        "files": {name: file_facts(scored) for name, scored in files.items()},
        "labels": {
            "before": {"paths": list(map(str, args.labels)), "sources": sources_before},
            "after": {"paths": list(map(str, args.labels_after)), "sources": sources_after},
        },
        "calibration_bins": BINS,
        "unpaired_prompts": {"before": len({*base.id} - {*improved.id}), "after": len({*improved.id} - {*base.id})},
        "drawn": measure_all(DRAWN, base, improved),
        "judged": {},
        "between_judges": {},
    }
    if args.rejudged:
        again = files["rejudged"].pictures._replace(label=labels_before)
        diagnosis |= {"judged": measure_all(JUDGED, base, again), "between_judges": measure_all(BETWEEN, base, again)}
    overall = ({name: numbers["all"] for name, numbers in diagnosis[part].items()} for part in ("drawn", "judged"))
    diagnosis["verdict"] = conclude(*overall, args.margin)
    write_json(out, plain(diagnosis))
    print_report(diagnosis)
    print(out)


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
