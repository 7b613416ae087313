"""The files between the steps: what they hold, how they are read and checked.

Every step hands over a JSONL file and, where it carries pictures, one safetensors file of the same stem beside it
(``round3.jsonl`` + ``round3.safetensors``). Rows point into the tensor ``tokens`` by row number; the tensor file's
header metadata says which model drew the pictures and how. This module does not import torch, so that scripts can check
their input before they pay for that. What is wrong with a file is a `BadInput` that names it, the line and what was expected.
"""

import hashlib
import json
import math
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common.command import BadInput
from common.tokens import Tokens, TokenWriter, tokens_path, write_tokens  # noqa: F401 (rows go with their tokens)

MAX_LINE_BYTES = 16 * 2**20  # a longer JSONL line is a mistake, not a prompt
MAX_DIGITS, MAX_DEPTH = 300, 100  # of an integer and of nesting: what is beyond them crashes whoever uses it


# ---------------------------------------------------------------------------------------------------------------------
# JSONL


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text[:20]} is larger than any number that is kept")
    return number


def short_integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("a key is given twice")
    return row


DECODER = json.JSONDecoder(parse_constant=refuse_constant, parse_float=finite, object_pairs_hook=refuse_duplicates)
LONG_DECODER = json.JSONDecoder(  # of text that is long enough for such an integer: asking about each one takes time
    parse_constant=refuse_constant, parse_float=finite, parse_int=short_integer, object_pairs_hook=refuse_duplicates
)
# Their common part without asking about each number, and without decode()'s searches for white space.
SCAN: Any = vars(json.JSONDecoder(parse_constant=refuse_constant, object_pairs_hook=refuse_duplicates))["scan_once"]
HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair: no text, it cannot be written as UTF-8


def parse_json(text: str) -> Any:
    """`json.loads` that refuses what cannot be meant, or not be written again. Raises ValueError.

    NaN, infinities (1e400 too), a key given twice, half of a surrogate pair, an integer of 300 digits, 100 levels of nesting.
    """
    if len(text) > MAX_DEPTH and text.count("[") + text.count("{") > MAX_DEPTH and depth(text) > MAX_DEPTH:
        raise ValueError("nested too deeply")
    value = plain_row(text)
    if value is None:
        value = (LONG_DECODER if len(text) > MAX_DIGITS else DECODER).decode(text)
    # only an escape makes half a pair of valid UTF-8, so most text need not be looked at again
    if "\\u" in text and HALF.search(json.dumps(value, ensure_ascii=False)):
        raise ValueError("a text holds half of a surrogate pair")
    return value


def plain_row(text: str) -> dict[str, Any] | None:
    """An object of texts and finite numbers, as nearly all rows are, in two thirds of the time; None for anything else."""
    try:
        row, end = SCAN(text, 0)
    except (ValueError, StopIteration):  # a decoder says what is wrong
        return None
    if end != len(text) or type(row) is not dict:
        return None
    for value in row.values():
        kind = type(value)
        if kind is not str and (kind not in (float, int) or not -(2**63) < value < 2**63):
            return None
    return row


def depth(text: str) -> int:
    """How deep brackets are nested in what may be JSON; those inside of strings do not count."""
    level = deepest = 0
    for found in re.finditer(r'"(?:[^"\\]|\\.)*+"|[\[\]{}]', text):
        level += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        deepest = max(deepest, level)
    return deepest


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text without its line end) of a UTF-8 file; a byte-order mark and CRLF are accepted.

    Raises BadInput for a missing or unreadable file, invalid UTF-8, NUL bytes, and a line of more than 16 MiB. A pipe is
    read where a shell made it (``/dev/stdin``, ``<(...)``); one with a name of its own may wait for its writer for ever.
    """
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode) and not str(path).startswith(("/dev/", "/proc/")):
            raise BadInput(f"{path}: is a named pipe, a file is wanted (or /dev/stdin)")
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise BadInput(f"{path}:{number}: line is longer than {MAX_LINE_BYTES} bytes")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise BadInput(f"{path}:{number}: not UTF-8 (byte {error.start + 1} of the line)") from None
                if "\0" in text:  # UTF-16 without its mark is valid UTF-8, a NUL after every letter
                    raise BadInput(f"{path}:{number}: holds a NUL byte, which text does not (UTF-16?)")
                yield number, text.rstrip("\r\n")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None


def check_value(value: Any, kind: str) -> str | None:
    """Say what is wrong with `value` as a `kind` of the tables below, or None if it is fine."""
    if kind == "text":
        if type(value) is not str or not value.strip():
            return "must be a non-empty string"
    elif kind == "string":
        if type(value) is not str:
            return "must be a string"
    elif kind == "count":
        if type(value) is not int or not 0 <= value < 2**53:
            return "must be an integer of at least 0"
    elif kind == "probability":
        if type(value) not in (int, float) or not 0 <= value <= 1:
            return "must be a number from 0 to 1"
    elif kind == "nats":
        if type(value) not in (int, float) or not -sys.float_info.max <= value <= 0:
            return "must be a log-probability, a number of at most 0"
    elif kind == "bit" and (type(value) is not int or value not in (0, 1)):
        return "must be 0 or 1"
    return None


# What each kind of row must hold. Further keys are allowed and carried along by nobody.
PROMPT = {"id": "text", "prompt": "text", "category": "text"}
SCORED = PROMPT | {
    "candidate": "count",
    "p_yes": "probability",
    "coverage": "probability",
    "foil": "text",
    "p_yes_foil": "probability",
    "row": "count",
}
# What score.py --readouts adds: answers that training never uses, for gate.py. P(yes) for the prompt and the foil in another
# wording, and log p of the prompt, and of the foil, as a caption of the picture.
READOUTS = {"p_yes_again": "probability", "p_yes_foil_again": "probability", "caption": "nats", "caption_foil": "nats"}
# What score.py --readouts likelihood adds: log p of the picture given the prompt, and given the foil; see `log_likelihoods`.
LIKELIHOOD = {"log_likelihood": "nats", "log_likelihood_foil": "nats"}
# What score.py --foils both adds: another prompt of the category, and P(yes) for it.
EASY = {"easy_foil": "text", "p_yes_easy_foil": "probability"}
# What score.py --answer reply adds: what the judge wrote of the prompt and the foils, and how many of these were cut off.
REPLIES = {"reply": "string", "reply_foil": "string", "reply_easy_foil": "string", "replies_cut": "count"}
SFT = PROMPT | {"p_yes": "probability", "row": "count"}
PAIRS = PROMPT | {
    "chosen": "count",
    "rejected": "count",
    "p_yes_chosen": "probability",
    "p_yes_rejected": "probability",
}
DISCARD = PROMPT | {"best_p_yes": "probability"}
LABELS = {"id": "text", "candidate": "count", "label": "bit", "source": "text"}


def read_rows(
    path: str | Path, columns: dict[str, str], optional: dict[str, str] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row) of a JSONL file; blank lines are skipped.

    Each row is checked against `columns`, which it must have, and `optional`, which it may have. One row is in memory at a
    time. Raises BadInput, naming file and line, for anything that is not such a row.
    """
    path, kinds = Path(path), columns | (optional or {})
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise BadInput(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise BadInput(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        for key, kind in kinds.items():
            if key not in row:
                if key in columns:
                    raise BadInput(f"{path}:{number}: key {key!r} is missing")
            elif problem := check_value(row[key], kind):
                raise BadInput(f"{path}:{number}: {key} {problem}, found {json.dumps(row[key])[:60]}")
        yield number, row


# ---------------------------------------------------------------------------------------------------------------------
# Rows with their pictures, checked

Row = dict[str, Any]


def read_scored(
    path: Path, tokens: Tokens, columns: dict[str, str] = SCORED, optional: dict[str, str] | None = None
) -> Iterator[tuple[int, Row]]:
    """(line number, row) of a scored file, whose rows point into `tokens`; columns and optional as in `read_rows`.

    Raises BadInput, naming file and line, for a row whose picture is not there, for a picture given twice, for a token
    outside the codebook, and for a file without rows.
    """
    tokens.check_values()
    seen: dict[str, set[int]] = {}
    for number, row in read_rows(path, columns, optional):
        if row["row"] >= tokens.rows:
            tokens.check_row(row["row"], f"{path}:{number}")
        note_once(row, seen, path, number)
        yield number, row
    if not seen:
        raise BadInput(f"{path}: holds no scored candidate")
    tokens.check_unchanged()


def note_once(row: Row, seen: dict[str, set[int]], path: Path, number: int) -> None:
    """Note the row's picture in `seen`, candidates by prompt id; BadInput if it was there."""
    candidates = seen.get(row["id"])
    if candidates is None:
        seen[row["id"]] = {row["candidate"]}
    elif row["candidate"] in candidates:
        raise BadInput(f"{path}:{number}: candidate {row['candidate']} of id {row['id']!r} is given twice")
    else:
        candidates.add(row["candidate"])


def read_examples(path: Path, columns: dict[str, str], sides: tuple[str, ...]) -> tuple[list[Row], Tokens]:
    """Training data: rows whose columns `sides` name pictures, and their tokens; raises BadInput for bad ones, and for none.

    Of pairs both sides are to be named: they must differ.
    """
    tokens, rows = Tokens(path), []
    tokens.share("nonunified", "0")  # of the model that drew: goes into the card, after hours of training
    tokens.check_values()
    for number, row in read_rows(path, columns):
        for side in sides:
            tokens.check_row(row[side], f"{path}:{number}", side)
        if len({row[side] for side in sides}) < len(sides):
            raise BadInput(f"{path}:{number}: {' and '.join(sides)} are the same row, {row[sides[0]]}")
        rows.append(row)
    if not rows:
        raise BadInput(f"{path}: holds no example to train on")
    return rows, tokens


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that depend on nothing but their inputs


def stable_seed(*parts: str | int) -> int:
    """A 63-bit seed from strings and integers: the same on every machine, rank and Python run (unlike `hash`)."""
    text = json.dumps(parts, ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def content_hash(*paths: str | Path) -> str:
    """16 hex digits of the bytes of some files, in order (SHA-256)."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:16]


def differences(found: dict[str, Any], wanted: dict[str, Any], ignored: Iterable[str] = ()) -> str:
    """What differs between the settings of two runs, for people to read; empty if nothing does."""
    return "; ".join(
        f"{key} was {repr(found.get(key))[:60]}, now {repr(wanted.get(key))[:60]}"
        for key in sorted({*found, *wanted} - {*ignored})
        if found.get(key) != wanted.get(key)
    )
