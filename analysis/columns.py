"""Scored files as columns: a picture as a dictionary takes 700 bytes, here about 80, and a million of them fit into memory.

Legend: R pictures.
"""

import itertools
import sys
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.command import BadInput
from common.records import LABELS, LIKELIHOOD, SCORED, Row, Tokens, note_once, read_rows, read_scored

TEXTS, COUNTS, NUMBERS = ("id", "prompt", "category", "foil"), ("candidate", "row"), ("p_yes", "coverage", "p_yes_foil")
TYPES = dict.fromkeys(TEXTS, object) | dict.fromkeys(("line", *COUNTS), np.int64) | dict.fromkeys(NUMBERS, np.float64)
MIN_COVERAGE = 0.5  # under this a judge's yes and no mean nothing; make_pairs.py's gate has the same
BLOCK = 64  # rows held as dictionaries at a time: few enough to stay in the cache


def read_columns(path: Path, tokens: Tokens) -> dict[str, np.ndarray]:
    """The columns of a scored file and `line`, their line numbers, (R,) each; equal texts are one object.

    With those of LIKELIHOOD where the header says that they are there.
    Raises BadInput, as `read_scored` does, and for an id that has two prompts or categories.
    """
    known: dict[str, tuple[str, str]] = {}  # prompt id -> prompt, category
    blocks: list[dict[str, np.ndarray]] = []
    likelihood = LIKELIHOOD if "likelihood" in tokens.metadata else {}
    types = TYPES | dict.fromkeys(likelihood, np.float64)
    rows = read_scored(path, tokens, SCORED | likelihood)
    while block := list(itertools.islice(rows, BLOCK)):
        columns: dict[str, list] = {key: [row[key] for _, row in block] for key in types if key != "line"}
        columns["line"] = [number for number, _ in block]
        for key in TEXTS:
            columns[key] = list(map(sys.intern, columns[key]))  # shared between files, of which there may be five
        texts = zip(columns["prompt"], columns["category"], strict=True)
        for number, id, both in zip(columns["line"], columns["id"], texts, strict=True):
            if known.setdefault(id, both) != both:
                raise BadInput(f"{path}:{number}: id {id!r} has another prompt or category here than before")
        blocks.append({key: np.array(columns[key], kind) for key, kind in types.items()})
    return {key: np.concatenate([some[key] for some in blocks]) for key in types}


class Places:
    """Where the picture of a prompt id and candidate number is, among pictures without duplicates."""

    def __init__(self, ids: np.ndarray, candidates: np.ndarray) -> None:
        self._prompts = {id: number for number, id in enumerate(dict.fromkeys(ids))}
        self._candidates = np.unique(candidates)
        keys = self._keys(ids, candidates)
        self._order = np.argsort(keys)
        self._sorted = keys[self._order]

    def _keys(self, ids: Iterable[str], candidates: np.ndarray) -> np.ndarray:
        """A number for each pair, (R,); -1 for what is not there."""
        prompts = np.array([self._prompts.get(id, -1) for id in ids], np.int64)
        ranks = np.searchsorted(self._candidates, candidates).clip(max=len(self._candidates) - 1)
        there = (prompts >= 0) & (self._candidates[ranks] == candidates)
        return np.where(there, prompts * len(self._candidates) + ranks, -1)

    def find(self, ids: Iterable[str], candidates: np.ndarray) -> np.ndarray:
        """Indices of pictures, (R,); -1 for one that is not there."""
        keys = self._keys(ids, candidates)
        at = np.searchsorted(self._sorted, keys).clip(max=len(self._sorted) - 1)
        return np.where(self._sorted[at] == keys, self._order[at], -1)


class Labels(NamedTuple):
    """An independent judge's word on pictures: where each is, whether it is right (R,), and who says so."""

    places: Places
    right: np.ndarray
    sources: list[str]


def read_labels(path: Path) -> Labels:
    """A labels.jsonl; BadInput for a picture labelled twice, and for no label. A scored file is its judge's labels."""
    first = next(read_rows(path, {}), (0, {}))[1]
    if "label" not in first and "p_yes" in first:
        return judges_labels(path)
    ids: list[str] = []
    candidates, right = array("q"), array("b")
    sources: set[str] = set()
    seen: dict[str, set[int]] = {}
    for number, row in read_rows(path, LABELS):
        note_once(row, seen, path, number)
        ids.append(sys.intern(row["id"]))
        candidates.append(row["candidate"])
        right.append(row["label"])
        sources.add(row["source"])
    if not ids:
        raise BadInput(f"{path}: holds no label")
    return Labels(Places(np.array(ids, object), np.array(candidates)), np.array(right, bool), sorted(sources))


def judges_labels(path: Path) -> Labels:
    """The word of an independent judge on another model's pictures; right is a P(yes) over its threshold."""
    tokens = Tokens(path)
    header, columns = tokens.metadata, read_columns(path, tokens)
    judge = header.get("judge") or header.get("model", "")
    if header.get("judge_hash", header.get("model_hash")) == header.get("model_hash"):
        raise BadInput(f"{path}: judged by {judge}, which drew these pictures: not independent of it")
    if (coverage := columns["coverage"].mean()) < MIN_COVERAGE:
        raise BadInput(f"{path}: coverage is {coverage:.3f}, under {MIN_COVERAGE:g}: {judge} says neither yes nor no")
    places = Places(columns["id"], columns["candidate"])
    return Labels(places, columns["p_yes"] > tokens.threshold(), [judge])


class Pictures:
    """Judged pictures as a sequence of rows, made when they are asked for; `columns` (R,) holds what they are made of.

    A row is a scored row with accepted (bool), label (bool, or None where nobody has said) and tokens (where its row points).
    """

    def __init__(self, columns: dict[str, np.ndarray], accepted: np.ndarray, label: np.ndarray, tokens: Tokens | None) -> None:
        self.columns, self.accepted, self.label, self.tokens = columns, accepted, label, tokens  # label: 1, 0 or NaN

    def __len__(self) -> int:
        return len(self.accepted)

    def __getitem__(self, i: int) -> Row:
        row = {key: self.columns[key][i] for key in SCORED if key in self.columns}
        row = {key: value if isinstance(value, str) else value.item() for key, value in row.items()}
        label = None if np.isnan(self.label[i]) else bool(self.label[i])
        return row | {"accepted": bool(self.accepted[i]), "label": label, "tokens": self.tokens}

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))

    def take(self, which: np.ndarray) -> "Pictures":
        """Some of the pictures: `which` is indices or a mask."""
        columns = {key: column[which] for key, column in self.columns.items()}
        return Pictures(columns, self.accepted[which], self.label[which], self.tokens)
