"""What diagnose.py compares: scored files of the same prompts, the same pictures judged again, and labels of three kinds.

Everything that does not fit together is BadInput, naming file and line, before anything is computed.
"""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from analysis.measures import Pictures
from common.command import BadInput
from common.judgements import Key, Row
from common.judgements import read_scored as read_checked
from common.records import LABELS, Tokens, differences, read_lines, read_rows

MIN_COVERAGE = 0.5  # under this a judge's yes and no mean nothing; make_pairs.py's gate has the same
SAID_BY_HEADER = "model model_hash judge judge_hash questions threshold guidance temperature steps seed".split()


# ---------------------------------------------------------------------------------------------------------------------
# Scored files


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
    lines: list[int] = []
    rows: list[Row] = []
    asked: list[tuple[str, str, str]] = []
    known: dict[str, tuple[str, str]] = {}  # prompt id -> prompt, category
    for number, row in read_checked(path, tokens):
        places[row["id"], row["candidate"]] = len(rows)
        asked.append((row["prompt"], row["category"], row["foil"]))
        if known.setdefault(row["id"], asked[-1][:2]) != asked[-1][:2]:
            raise BadInput(f"{path}:{number}: id {row['id']!r} has another prompt or category here than before")
        lines.append(number)
        rows.append(row)
    texts = {key: np.array([row[key] for row in rows], object) for key in ("id", "category")}
    numbers = {key: np.array([row[key] for row in rows], np.float64) for key in ("p_yes", "p_yes_foil", "coverage")}
    pictures = Pictures(**texts, **numbers, label=np.full(len(rows), np.nan), threshold=threshold)
    return Scored(path, tokens, places, lines, np.array([row["row"] for row in rows]), asked, pictures)


def file_facts(scored: Scored) -> dict[str, Any]:
    """Which file, of how many pictures, and what its header says."""
    counts = {"n_pictures": len(scored.rows), "n_prompts": len(set(scored.pictures.id))}
    return {"path": str(scored.path), **counts, **scored.said, "judge": scored.judge[0], "judge_hash": scored.judge[1]}


# ---------------------------------------------------------------------------------------------------------------------
# Whether they can be compared


def check_comparable(before: Scored, after: Scored) -> None:
    """Raise BadInput unless both hold a model's word on its own pictures, made alike, of at least one common prompt."""
    for scored in (before, after):
        if scored.judge[1] != scored.said["model_hash"]:
            raise BadInput(
                f"{scored.path}: drawn by {scored.said['model']}, but judged by {scored.judge[0]}; --before and --after "
                "take models' words on their own pictures, --rejudged another's"
            )
    check_same_settings(before, after, ("questions", "threshold", "guidance", "temperature", "steps"))
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


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def read_labels(paths: list[Path], drawn: Scored, judges: list[Scored]) -> tuple[np.ndarray, dict[str, int]]:
    """Labels of the pictures of `drawn`, (R,), NaN where there is none; and how many come from each source."""
    labels = np.full(len(drawn.rows), np.nan)
    sources: dict[str, int] = {}
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
