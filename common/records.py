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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common.command import BadInput
from common.tokens import Tokens, TokenWriter, tokens_path, write_tokens  # noqa: F401 (rows go with their tokens)

MAX_LINE_BYTES = 16 * 2**20  # a longer JSONL line is a mistake, not a prompt
BLOCK = 2**15  # characters of a JSONL file that are parsed at a time
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
# Their common part without asking about each number, for `plain_rows`.
SCAN: Any = vars(json.JSONDecoder(parse_constant=refuse_constant, object_pairs_hook=refuse_duplicates))["scan_once"]
HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair: no text, it cannot be written as UTF-8


def parse_json(text: str) -> Any:
    """`json.loads` that refuses what cannot be meant, or not be written again. Raises ValueError.

    NaN, infinities (1e400 too), a key given twice, half of a surrogate pair, an integer of 300 digits, 100 levels of nesting.
    """
    if len(text) > MAX_DEPTH and text.count("[") + text.count("{") > MAX_DEPTH and depth(text) > MAX_DEPTH:
        raise ValueError("nested too deeply")
    value = (LONG_DECODER if len(text) > MAX_DIGITS else DECODER).decode(text)
    # only an escape makes half a pair of valid UTF-8, so most text need not be looked at again
    if "\\u" in text and HALF.search(json.dumps(value, ensure_ascii=False)):
        raise ValueError("a text holds half of a surrogate pair")
    return value


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


# What a value of each kind of the tables below must be: its types, the least and the largest, and the same in words.
NUMBER = {int, float}
KINDS: dict[str, tuple[set[type], float, float, str]] = {
    "text": ({str}, 0, 0, "must be a non-empty string"),
    "string": ({str}, 0, 0, "must be a string"),
    "count": ({int}, 0, 2**53 - 1, "must be an integer of at least 0"),
    "probability": (NUMBER, 0, 1, "must be a number from 0 to 1"),
    "nats": (NUMBER, -sys.float_info.max, 0, "must be a log-probability, a number of at most 0"),
    "bit": ({int}, 0, 1, "must be 0 or 1"),
}


def check_value(value: Any, kind: str) -> str | None:
    """Say what is wrong with `value` as a `kind` of the tables below, or None if it is fine."""
    return None if all_of_kind([value], kind) else KINDS[kind][3]


def all_of_kind(values: Sequence[Any], kind: str | None) -> bool:
    """Whether all values of a column are of a kind; None: text, or numbers of which any reader can make 64 bits."""
    types = set(map(type, values))
    if kind is None:
        return types == {str} or (types <= NUMBER and min(values) > -(2**63) and max(values) < 2**63)
    allowed, low, high, _ = KINDS[kind]
    if not types <= allowed:
        return False
    if allowed == {str}:
        return kind == "string" or all(map(str.strip, values))
    return low <= min(values) and max(values) <= high


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

    Each row is checked against `columns`, which it must have, and `optional`, which it may have. Rows are parsed and checked
    some at a time, in half the time; no more than these are in memory. Raises BadInput, naming file and line, for anything
    that is not such a row, when the rows before it have been taken.
    """
    path, kinds = Path(path), columns | (optional or {})
    for numbers, lines, error in read_blocks(path):
        rows = plain_rows(lines, columns, kinds)
        if rows is None:  # one by one: there may be nothing wrong, but if there is, this says in which line
            rows = []
            try:
                for number, line in zip(numbers, lines, strict=True):
                    rows.append(read_row(line, f"{path}:{number}", columns, kinds))
            except BadInput as found:
                error = found
        yield from zip(numbers, rows, strict=False)
        if error:
            raise error


def read_blocks(path: Path) -> Iterator[tuple[list[int], list[str], BadInput | None]]:
    """(line numbers, lines) of a JSONL file, some at a time, without blank lines; and what is wrong with the line after."""
    lines, error, ended = read_lines(path), None, False
    while not (ended or error):
        numbers: list[int] = []
        block: list[str] = []
        size, ended = 0, True
        try:
            for number, line in lines:
                if line and not line.isspace():
                    numbers.append(number)
                    block.append(line)
                if (size := size + len(line)) > BLOCK:
                    ended = False
                    break
        except BadInput as found:
            error = found
        yield numbers, block, error


def plain_rows(lines: list[str], columns: dict[str, str], kinds: dict[str, str]) -> list[dict[str, Any]] | None:
    """The rows of some lines, checked, where all have the same keys and hold texts and numbers alone; None for anything else.

    The lines are parsed as one array, so that Python makes each key once, not once a line. Each row is then a line: no string
    holds a line break, and the comma before a line that begins with `{` parts two rows, where no value is a list or an object.
    """
    text = ",\n".join(lines)
    if not all(line.startswith("{") for line in lines):
        return None
    try:
        rows, end = SCAN(f"[{text}]", 0)
    except (ValueError, StopIteration, RecursionError):
        return None
    if end != len(text) + 2 or len(rows) != len(lines) or len(keys := set(map(tuple, rows))) != 1:
        return None
    found = dict(zip(keys.pop(), zip(*map(dict.values, rows), strict=True), strict=True))  # key -> its values
    if not columns.keys() <= found.keys() or not all(all_of_kind(found[key], kinds.get(key)) for key in found):
        return None
    return None if "\\u" in text and HALF.search(json.dumps(rows, ensure_ascii=False)) else rows


def read_row(line: str, where: str, columns: dict[str, str], kinds: dict[str, str]) -> dict[str, Any]:
    """One row, checked; BadInput, which begins with `where`, for anything that is not such a row."""
    try:
        row = parse_json(line)
    except ValueError as error:
        raise BadInput(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadInput(f"{where}: expected a JSON object, found {type(row).__name__}")
    for key, kind in kinds.items():
        if key not in row:
            if key in columns:
                raise BadInput(f"{where}: key {key!r} is missing")
        elif problem := check_value(row[key], kind):
            raise BadInput(f"{where}: {key} {problem}, found {json.dumps(row[key])[:60]}")
    return row


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
