"""What diagnose.py compares and what it measures of it: two models' pictures, one fixed set judged by both, labels.

Everything in the files that does not fit together is BadInput, naming file and line, before anything is computed. Every
prompt counts once, whatever the number of its pictures; a rate under a condition is a ratio of two means over prompts.
Intervals are 95 % percentile bootstraps over prompts, those of a difference over the prompts of both sides together.

Legend: R pictures, P prompts, K columns.
"""

import csv
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import stats
from common.command import BadInput
from common.records import LABELS, Key, Row, Tokens, differences, read_lines, read_rows, read_scored

MIN_COVERAGE = 0.5  # under this a judge's yes and no mean nothing; make_pairs.py's gate has the same
BINS = 10  # of P(yes), equally wide, for the calibration error
PROVENANCE = "model model_hash judge judge_hash questions threshold guidance temperature steps seed".split()  # in headers


# ---------------------------------------------------------------------------------------------------------------------
# Scored files


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
        """Some of the pictures: `which` is indices or a mask."""
        columns = {name: column[which] for name, column in self._asdict().items() if name != "threshold"}
        return Pictures(**columns, threshold=self.threshold)

    @property
    def accepted(self) -> np.ndarray:
        return self.p_yes > self.threshold


class Scored(NamedTuple):
    """A scored file: its pictures in file order, where each is found, and what texts its judge was asked about."""

    path: Path
    tokens: Tokens
    indices: dict[Key, int]  # of each picture among the pictures
    lines: list[int]  # line numbers, for messages
    token_rows: np.ndarray  # (R,)
    texts: list[tuple[str, str, str]]  # prompt, category, foil
    pictures: Pictures

    @property
    def provenance(self) -> dict[str, str]:
        """What the header says of who drew and judged the pictures, and how."""
        return {key: self.tokens.metadata[key] for key in PROVENANCE if key in self.tokens.metadata}

    @property
    def judge(self) -> tuple[str, str]:
        """Name and hash of the model that judged: the one that drew, where the header names no other."""
        header = self.provenance
        return (header["judge"], header["judge_hash"]) if header.get("judge_hash") else (header["model"], header["model_hash"])


def read_scored_file(path: Path) -> Scored:
    """A scored file, checked as far as it can be by itself; BadInput, naming file and line, for what does not fit."""
    tokens = Tokens(path)
    for key in ("model", "model_hash"):
        if not tokens.metadata.get(key):
            raise BadInput(f"{tokens.path}: metadata {key} is missing: which model drew these pictures?")
    if tokens.metadata.get("judge_hash") and not tokens.metadata.get("judge"):
        raise BadInput(f"{tokens.path}: metadata judge is missing: which model judged these pictures?")
    threshold = tokens.threshold()
    indices: dict[Key, int] = {}
    lines: list[int] = []
    rows: list[Row] = []
    texts: list[tuple[str, str, str]] = []
    known: dict[str, tuple[str, str]] = {}  # prompt id -> prompt, category
    for number, row in read_scored(path, tokens):
        indices[row["id"], row["candidate"]] = len(rows)
        texts.append((row["prompt"], row["category"], row["foil"]))
        if known.setdefault(row["id"], texts[-1][:2]) != texts[-1][:2]:
            raise BadInput(f"{path}:{number}: id {row['id']!r} has another prompt or category here than before")
        lines.append(number)
        rows.append(row)
    names = {key: np.array([row[key] for row in rows], object) for key in ("id", "category")}
    numbers = {key: np.array([row[key] for row in rows], np.float64) for key in ("p_yes", "p_yes_foil", "coverage")}
    pictures = Pictures(**names, **numbers, label=np.full(len(rows), np.nan), threshold=threshold)
    return Scored(path, tokens, indices, lines, np.array([row["row"] for row in rows]), texts, pictures)


def file_facts(scored: Scored) -> dict[str, Any]:
    """Which file, of how many pictures, and what its header says."""
    counts = {"n_pictures": len(scored.lines), "n_prompts": len(set(scored.pictures.id))}
    return {"path": str(scored.path), **counts, **scored.provenance, "judge": scored.judge[0], "judge_hash": scored.judge[1]}


# ---------------------------------------------------------------------------------------------------------------------
# Whether they can be compared


def check_comparable(before: Scored, after: Scored) -> None:
    """Raise BadInput unless both hold a model's word on its own pictures, made alike, of at least one common prompt."""
    for scored in (before, after):
        if scored.judge[1] != scored.provenance["model_hash"]:
            raise BadInput(
                f"{scored.path}: drawn by {scored.provenance['model']}, but judged by {scored.judge[0]}; --before and --after "
                "take models' words on their own pictures, --rejudged another's"
            )
    check_same_settings(before, after, ("questions", "threshold", "guidance", "temperature", "steps"))
    known = {id: before.texts[i] for (id, _), i in before.indices.items()}
    for (id, _), i in after.indices.items():
        if id in known and known[id][:2] != after.texts[i][:2]:
            raise BadInput(f"{after.path}:{after.lines[i]}: id {id!r} has another prompt or category in {before.path}")
    if known.keys().isdisjoint(after.pictures.id):
        raise BadInput(f"{after.path}: has no prompt id in common with {before.path}")


def check_same_settings(one: Scored, other: Scored, keys: tuple[str, ...]) -> None:
    """Raise BadInput if two files were drawn or judged with other settings: a difference could come from that."""
    settings, others = ({key: scored.provenance.get(key) for key in keys} for scored in (one, other))
    if differing := differences(settings, others):
        raise BadInput(f"{other.path}: not made like {one.path}, so they cannot be compared: {differing}")


def match_pictures(scored: Scored, drawn: Scored) -> np.ndarray:
    """The index in `drawn` of each picture of `scored`, (R,); BadInput for one that is not there or is another picture."""
    matches = np.empty(len(scored.lines), np.int64)
    for key, i in scored.indices.items():
        where = f"{scored.path}:{scored.lines[i]}"
        if key not in drawn.indices:
            raise BadInput(f"{where}: candidate {key[1]} of id {key[0]!r} is not in {drawn.path}")
        matches[i] = drawn.indices[key]
        if scored.texts[i] != drawn.texts[matches[i]]:
            raise BadInput(f"{where}: id {key[0]!r} has another prompt, category or foil in {drawn.path}")
    if scored.tokens.length != drawn.tokens.length:
        raise BadInput(
            f"{scored.tokens.path}: {scored.tokens.length} tokens a picture, but {drawn.tokens.path} has {drawn.tokens.length}"
        )
    step = max(1, 2**19 // drawn.tokens.length)  # 4 MiB at a time
    for start in range(0, len(matches), step):
        block = slice(start, start + step)
        same = (scored.tokens[scored.token_rows[block]] == drawn.tokens[drawn.token_rows[matches[block]]]).all(1)
        if not same.all():
            line = scored.lines[start + int(same.argmin())]
            raise BadInput(f"{scored.path}:{line}: its image tokens are not those of this candidate in {drawn.path}")
    return matches


def read_rejudged(path: Path, before: Scored, after: Scored) -> Scored:
    """The pictures of `before` as the model of `after` judges them, in the order of `before`."""
    rejudged = read_scored_file(path)
    if rejudged.judge[1] != after.judge[1]:
        raise BadInput(f"{path}: judged by {rejudged.judge[0]}, not by {after.judge[0]}, which drew and judged {after.path}")
    check_same_settings(before, rejudged, ("questions", "threshold"))
    matches = match_pictures(rejudged, before)
    if missing := before.indices.keys() - rejudged.indices.keys():
        raise BadInput(f"{path}: lacks {len(missing)} pictures of {before.path}, first {min(missing)}")
    return rejudged._replace(pictures=rejudged.pictures.take(np.argsort(matches)))


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def read_label_files(paths: list[Path], drawn: Scored, judges: list[Scored]) -> tuple[np.ndarray, dict[str, int]]:
    """Labels of the pictures of `drawn`, (R,), NaN where there is none; and how many come from each source."""
    labels = np.full(len(drawn.lines), np.nan)
    sources: dict[str, int] = {}
    for path in paths:
        empty = True
        for number, id, candidate, label, source in label_rows(path, drawn, judges):
            i = drawn.indices.get((id, candidate))
            if i is None:
                raise BadInput(f"{path}:{number}: candidate {candidate} of id {id!r} is not in {drawn.path}")
            if not np.isnan(labels[i]):
                raise BadInput(f"{path}:{number}: candidate {candidate} of id {id!r} is labelled twice")
            labels[i] = label
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
    scored = read_scored_file(path)
    if (coverage := scored.pictures.coverage.mean()) < MIN_COVERAGE:
        raise BadInput(f"{path}: coverage is {coverage:.3f}, under {MIN_COVERAGE:g}: {scored.judge[0]} says neither yes nor no")
    for other in judges:
        if scored.judge[1] == other.judge[1]:
            raise BadInput(f"{path}: judged by {scored.judge[0]}, which also judged {other.path}: not independent of it")
    match_pictures(scored, drawn)
    for (id, candidate), i in scored.indices.items():
        yield scored.lines[i], id, candidate, int(scored.pictures.accepted[i]), "{} ({})".format(*scored.judge)


# ---------------------------------------------------------------------------------------------------------------------
# Rates, before and after


class Estimate(NamedTuple):
    """A number with its 95 % interval, None where there is nothing to measure.

    n_pictures: how many it is a rate of; for a difference, on the side that has fewer.
    """

    value: float | None
    low: float | None
    high: float | None
    n_prompts: int
    n_pictures: int

    @property
    def interval(self) -> stats.Interval | None:
        """value, low and high, or None."""
        if self.value is None or self.low is None or self.high is None:
            return None
        return self.value, self.low, self.high


def make_estimate(found: stats.Interval | None, n_prompts: int, n_pictures: int) -> Estimate:
    """A number of stats.py as it is written into the file."""
    value, low, high = (round(number, 6) for number in found) if found else (None, None, None)
    return Estimate(value, low, high, n_prompts, n_pictures)


def estimate_over_prompts(statistic: Callable[[np.ndarray], np.ndarray], columns: np.ndarray, n_pictures: int) -> Estimate:
    """`statistic` of the means over prompts of columns (P, K)."""
    return make_estimate(stats.bootstrap_of_means(statistic, columns), len(columns), n_pictures)


class Measure(NamedTuple):
    """A rate of pictures: `values` (R,) or (R, K) over those that meet the `condition` (R,); `labelled`: of labelled ones."""

    values: Callable[[Pictures], np.ndarray]
    condition: Callable[[Pictures], np.ndarray] = lambda x: np.ones(len(x.id), bool)
    labelled: bool = False
    statistic: Callable[[np.ndarray], np.ndarray] = stats.ratio

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
            counted = self.condition(side)
            values = self.values(side).reshape(len(side.id), -1) * counted[:, None]  # (R, K)
            tables.append(stats.per_prompt(side.id, np.column_stack([values, counted])))  # (P, K + 1)
            found[name] = estimate_over_prompts(self.statistic, tables[-1], int(counted.sum()))
        if len(tables) == 2:
            fewer = min(side.n_pictures for side in found.values())
            found["difference"] = estimate_over_prompts(self.difference, np.hstack(tables), fewer)
        return found

    def difference(self, means: np.ndarray) -> np.ndarray:
        """(..., 2 (K + 1)) -> (...): the statistic of the second half minus that of the first."""
        first, second = np.split(means, 2, axis=-1)
        return self.statistic(second) - self.statistic(first)


# Of each model's own pictures, judged by itself.
OWN_PICTURES = {
    "nonunified": Measure(lambda x: ~x.accepted),
    "foil_yes_rate": Measure(lambda x: x.p_yes_foil > x.threshold),
    "separation": Measure(lambda x: x.p_yes - x.p_yes_foil),
    "coverage": Measure(lambda x: x.coverage),
    "drawing_accuracy": Measure(lambda x: x.label, labelled=True),
    "weak_generation": Measure(lambda x: x.label == 0, lambda x: ~x.accepted, labelled=True),
}
# Of the pictures of --before, as the judge before and the judge after see them.
FIXED_PICTURES = {
    "yes_rate": Measure(lambda x: x.accepted),
    "foil_yes_rate": OWN_PICTURES["foil_yes_rate"],
    "separation": OWN_PICTURES["separation"],
    "coverage": OWN_PICTURES["coverage"],
    "judge_accuracy": Measure(lambda x: x.accepted == x.label, labelled=True),
    "false_positive_rate": Measure(lambda x: x.accepted, lambda x: x.label == 0, labelled=True),
    "false_negative_rate": Measure(lambda x: ~x.accepted, lambda x: x.label == 1, labelled=True),
    "separation_if_right": Measure(lambda x: x.p_yes - x.p_yes_foil, lambda x: x.label == 1, labelled=True),
    "calibration_error": Measure(
        lambda x: stats.calibration_gaps(x.p_yes, x.label, BINS), labelled=True, statistic=stats.summed_gaps
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# Between two judges of the same pictures


def mean_over_prompts(ids: np.ndarray, values: np.ndarray) -> Estimate:
    """The mean over prompts of pictures' values (R,)."""
    return estimate_over_prompts(stats.mean_itself, stats.per_prompt(ids, values[:, None]), len(ids))


def drift(first: Pictures, second: Pictures) -> Estimate:
    """How far the judges' P(yes) of a picture lie apart, on average."""
    return mean_over_prompts(first.id, np.abs(second.p_yes - first.p_yes))


def shift(first: Pictures, second: Pictures) -> Estimate:
    """How much higher the second judge's P(yes) is, on average."""
    return mean_over_prompts(first.id, second.p_yes - first.p_yes)


def agreement(first: Pictures, second: Pictures) -> Estimate:
    """The share of pictures that both judges accept or both reject."""
    return mean_over_prompts(first.id, first.accepted == second.accepted)


def cohens_kappa(first: Pictures, second: Pictures) -> Estimate:
    """Their agreement, corrected for what chance would give."""
    answers = np.column_stack([first.accepted == second.accepted, first.accepted, second.accepted])
    return estimate_over_prompts(stats.kappa, stats.per_prompt(first.id, answers), len(first.id))


def win_rate(first: Pictures, second: Pictures) -> Estimate:
    """Of the labelled pictures on which the judges disagree, the share where the second is right; Wilson interval.

    Counted in pictures: those of one prompt are alike, so the interval is rather too narrow.
    """
    disputed = ~np.isnan(first.label) & (first.accepted != second.accepted)
    wins, count = int((second.accepted == second.label)[disputed].sum()), int(disputed.sum())
    n_prompts = len(set(first.id[disputed]))
    return make_estimate(stats.wilson(wins, count), n_prompts, count)


# Of the same pictures, between the judge before and the judge after.
BETWEEN_JUDGES = {"drift": drift, "shift": shift, "agreement": agreement, "kappa": cohens_kappa, "win_rate": win_rate}


def measure_all(
    measures: Mapping[str, Measure | Callable[[Pictures, Pictures], Estimate]], one: Pictures, other: Pictures
) -> dict[str, dict[str, Any]]:
    """What each of `measures` says of all pictures, and of those of each category of the first."""
    sides = {name: (one.take(one.category == name), other.take(other.category == name)) for name in sorted({*one.category})}
    return {
        name: {"all": measure(one, other), "categories": {category: measure(*some) for category, some in sides.items()}}
        for name, measure in measures.items()
    }
