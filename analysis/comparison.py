"""What diagnose.py compares: two models' pictures, one fixed set judged by both, labels.

Everything in the files that does not fit together is BadInput, naming file and line, before anything is computed.

Legend: R pictures.
"""

import csv
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from analysis.columns import MIN_COVERAGE, Places, read_columns
from common.answers import name_form
from common.command import BadInput
from common.records import LABELS, LIKELIHOOD, Tokens, differences, read_lines, read_rows

LABELS_AT_A_TIME = 50_000  # held and looked up
ASKED = ("answer", "reply_tokens", "questions", "threshold")  # in headers: how a judge was asked
WHOSE = "model model_hash judge judge_hash questions threshold guidance temperature steps seed".split()  # in headers
PROVENANCE = [*WHOSE, "reply_tokens", "likelihood", "answer"]
NOTHING = np.empty(0)


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
    log_likelihood: np.ndarray = NOTHING  # log p of the picture given its prompt, given its foil; empty where nobody has asked
    log_likelihood_foil: np.ndarray = NOTHING

    def take(self, which: np.ndarray) -> "Pictures":
        """Some of the pictures: `which` is indices or a mask."""
        columns = {name: column for name, column in self._asdict().items() if name != "threshold"}
        taken = {name: column if column is NOTHING else column[which] for name, column in columns.items()}
        return Pictures(**taken, threshold=self.threshold)

    @property
    def accepted(self) -> np.ndarray:
        return self.p_yes > self.threshold

    @property
    def likelihood_margin(self) -> np.ndarray:
        """log of w(prompt | x) / w(foil | x), with w of the paper's Proposition 1: yes where it is above 0."""
        return self.log_likelihood - self.log_likelihood_foil


class Scored(NamedTuple):
    """A scored file: its pictures in file order, and what its judge was asked about."""

    path: Path
    tokens: Tokens
    columns: dict[str, np.ndarray]  # of read_columns, (R,) each
    pictures: Pictures

    @property
    def provenance(self) -> dict[str, str]:
        """What the header says of who drew and judged the pictures, and how."""
        header = name_form(self.tokens.metadata)
        return {key: header[key] for key in PROVENANCE if key in header}

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
    columns = read_columns(path, tokens)
    shown = {key: columns[key] for key in ("id", "category", "p_yes", "p_yes_foil", "coverage", *LIKELIHOOD) if key in columns}
    pictures = Pictures(**shown, label=np.full(len(columns["id"]), np.nan), threshold=threshold)
    return Scored(path, tokens, columns, pictures)


def file_facts(scored: Scored) -> dict[str, Any]:
    """Which file, of how many pictures, and what its header says."""
    counts = {"n_pictures": len(scored.pictures.id), "n_prompts": len(set(scored.pictures.id))}
    return {"path": str(scored.path), **counts, **scored.provenance, "judge": scored.judge[0], "judge_hash": scored.judge[1]}


# ---------------------------------------------------------------------------------------------------------------------
# Whether they can be compared


def check_own_judge(scored: Scored) -> None:
    """Raise BadInput unless the model that drew these pictures also judged them."""
    if scored.judge[1] != scored.provenance["model_hash"]:
        raise BadInput(
            f"{scored.path}: drawn by {scored.provenance['model']}, but judged by {scored.judge[0]}; --before and --after "
            "take models' words on their own pictures, --rejudged another's"
        )


def check_comparable(before: Scored, after: Scored) -> None:
    """Raise BadInput unless both hold a model's word on its own pictures, made alike, of at least one common prompt."""
    for scored in (before, after):
        check_own_judge(scored)
    check_same_settings(before, after, (*ASKED, "guidance", "temperature", "steps"))
    known = dict(zip(before.columns["id"], zip(before.columns["prompt"], before.columns["category"], strict=True), strict=True))
    rows = zip(*(after.columns[key] for key in ("line", "id", "prompt", "category")), strict=True)
    for line, id, *texts in rows:
        if known.get(id, tuple(texts)) != tuple(texts):
            raise BadInput(f"{after.path}:{line}: id {id!r} has another prompt or category in {before.path}")
    if known.keys().isdisjoint(after.pictures.id):
        raise BadInput(f"{after.path}: has no prompt id in common with {before.path}")


def check_same_settings(one: Scored, other: Scored, keys: tuple[str, ...]) -> None:
    """Raise BadInput if two files were drawn or judged with other settings: a difference could come from that."""
    settings, others = ({key: scored.provenance.get(key) for key in keys} for scored in (one, other))
    if differing := differences(settings, others):
        raise BadInput(f"{other.path}: not made like {one.path}, so they cannot be compared: {differing}")


def share_likelihoods(*files: Scored) -> bool:
    """Whether all of them hold likelihoods of pictures, and these are made alike."""
    kinds = {scored.provenance.get("likelihood") for scored in files}
    return len(kinds) == 1 and None not in kinds


def match_pictures(scored: Scored, drawn: Scored) -> np.ndarray:
    """The index in `drawn` of each picture of `scored`, (R,); BadInput for one that is not there or is another picture."""
    ours, theirs = scored.columns, drawn.columns
    matches = Places(theirs["id"], theirs["candidate"]).find(ours["id"], ours["candidate"])
    other = np.any([ours[key] != theirs[key][matches] for key in ("prompt", "category", "foil")], axis=0)
    if (wrong := other | (matches < 0)).any():
        i = int(wrong.argmax())
        where, id = f"{scored.path}:{ours['line'][i]}", ours["id"][i]
        if matches[i] < 0:
            raise BadInput(f"{where}: candidate {ours['candidate'][i]} of id {id!r} is not in {drawn.path}")
        raise BadInput(f"{where}: id {id!r} has another prompt, category or foil in {drawn.path}")
    if scored.tokens.length != drawn.tokens.length:
        raise BadInput(
            f"{scored.tokens.path}: {scored.tokens.length} tokens a picture, but {drawn.tokens.path} has {drawn.tokens.length}"
        )
    step = max(1, 2**19 // drawn.tokens.length)  # 4 MiB at a time
    for start in range(0, len(matches), step):
        block = slice(start, start + step)
        same = (scored.tokens.stored(ours["row"][block]) == drawn.tokens.stored(theirs["row"][matches[block]])).all(1)
        if not same.all():
            line = ours["line"][start + int(same.argmin())]
            raise BadInput(f"{scored.path}:{line}: its image tokens are not those of this candidate in {drawn.path}")
    return matches


def read_rejudged(path: Path, before: Scored, after: Scored) -> Scored:
    """The pictures of `before` as the model of `after` judges them, in the order of `before`."""
    rejudged = read_scored_file(path)
    if rejudged.judge[1] != after.judge[1]:
        raise BadInput(f"{path}: judged by {rejudged.judge[0]}, not by {after.judge[0]}, which drew and judged {after.path}")
    check_same_settings(before, rejudged, ASKED)
    matches = match_pictures(rejudged, before)
    lacking = np.delete(np.arange(len(before.pictures.id)), matches)
    if len(lacking):
        first = min((before.columns["id"][i], int(before.columns["candidate"][i])) for i in lacking)
        raise BadInput(f"{path}: lacks {len(lacking)} pictures of {before.path}, first {first}")
    return rejudged._replace(pictures=rejudged.pictures.take(np.argsort(matches)))


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def read_label_files(paths: list[Path], drawn: Scored, judges: list[Scored]) -> tuple[np.ndarray, dict[str, int]]:
    """Labels of the pictures of `drawn`, (R,), NaN where there is none; and how many come from each source."""
    labels = np.full(len(drawn.pictures.id), np.nan)
    known = bytearray(len(labels))
    sources: dict[str, int] = {}
    pictures = Places(drawn.columns["id"], drawn.columns["candidate"])
    for path in paths:
        rows, empty = label_rows(path, drawn, judges), True
        while block := list(itertools.islice(rows, LABELS_AT_A_TIME)):
            _, ids, candidates, values, _ = zip(*block, strict=True)
            places = pictures.find(ids, np.array(candidates))
            for i, (number, id, candidate, _, source) in zip(places.tolist(), block, strict=True):
                if i < 0:
                    raise BadInput(f"{path}:{number}: candidate {candidate} of id {id!r} is not in {drawn.path}")
                if known[i]:
                    raise BadInput(f"{path}:{number}: candidate {candidate} of id {id!r} is labelled twice")
                known[i] = True
                sources[source] = sources.get(source, 0) + 1
            labels[places] = values
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
    columns = (*(scored.columns[key].tolist() for key in ("line", "id", "candidate")), scored.pictures.accepted.tolist())
    for line, id, candidate, accepted in zip(*columns, strict=True):
        yield line, id, candidate, int(accepted), "{} ({})".format(*scored.judge)
