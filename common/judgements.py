"""What scored files and labels say, row by row, checked: for every script that reads verdicts on pictures.

A scored file is score.py's: a row a picture, its tokens beside it. A labels file is an independent judge's word on them.
Imports neither torch nor transformers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.command import BadInput
from common.records import LABELS, SCORED, Tokens, read_rows

Key = tuple[str, int]  # (prompt id, candidate)
Row = dict[str, Any]


def read_scored(path: Path, tokens: Tokens, columns: dict[str, str] = SCORED) -> Iterator[tuple[int, Row]]:
    """(line number, row) of a scored file, whose rows point into `tokens`.

    Raises BadInput, naming file and line, for a row whose picture is not there, for a picture given twice, for a token
    outside the codebook, and for a file without rows.
    """
    seen: set[Key] = set()
    for number, row in read_rows(path, columns):
        where = f"{path}:{number}"
        tokens.check_row(row["row"], where)
        note_once(row, seen, where)
        yield number, row
    if not seen:
        raise BadInput(f"{path}: holds no scored candidate")
    tokens.check_values()


def note_once(row: Row, seen: set[Key], where: str) -> Key:
    """The row's picture, noted in `seen`; BadInput if it was there."""
    key = row["id"], row["candidate"]
    if key in seen:
        raise BadInput(f"{where}: candidate {key[1]} of id {key[0]!r} is given twice")
    seen.add(key)
    return key


def read_labels(path: Path) -> tuple[dict[Key, bool], list[str]]:
    """labels.jsonl as (id, candidate) -> right, and who says so; BadInput for a picture labelled twice, and for no label."""
    labels: dict[Key, bool] = {}
    sources: set[str] = set()
    seen: set[Key] = set()
    for number, row in read_rows(path, LABELS):
        labels[note_once(row, seen, f"{path}:{number}")] = bool(row["label"])
        sources.add(row["source"])
    if not labels:
        raise BadInput(f"{path}: holds no label")
    return labels, sorted(sources)
