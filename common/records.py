"""The files between the steps: what they hold, how they are read and checked.

Every step hands over a JSONL file and, where it carries pictures, one safetensors file of the same stem beside it
(``round3.jsonl`` + ``round3.safetensors``). Rows point into the tensor ``tokens`` by row number; the tensor file's
header metadata says which model drew the pictures and how. This module does not import torch, so that scripts can check
their input before they pay for that. What is wrong with a file is a `BadInput` that names it, the line and what was expected.
"""

import hashlib
import json
import math
import mmap
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from common.command import BadInput
from common.writing import whole_file

MAX_LINE_BYTES = 16 * 2**20  # a longer JSONL line is a mistake, not a prompt


# ---------------------------------------------------------------------------------------------------------------------
# JSONL


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("a key is given twice")
    return row


DECODER = json.JSONDecoder(parse_constant=refuse_constant, object_pairs_hook=refuse_duplicates)


def parse_json(text: str) -> Any:
    """`json.loads` that refuses what JSON does not have: NaN, infinities and a key given twice. Raises ValueError."""
    try:
        return DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


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
        if not isinstance(value, str) or not value.strip():
            return "must be a non-empty string"
        if not value.isascii() and re.search("[\ud800-\udfff]", value):
            return "must be text, but holds half of a surrogate pair"
    elif kind == "count":
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
            return "must be an integer of at least 0"
    elif kind == "probability":
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            return "must be a number from 0 to 1"
    elif kind == "nats":
        if isinstance(value, bool) or not isinstance(value, int | float) or not -sys.float_info.max <= value <= 0:
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
# What score.py --foils both adds: another prompt of the category, and P(yes) for it.
EASY = {"easy_foil": "text", "p_yes_easy_foil": "probability"}
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
# Image tokens


def tokens_path(jsonl: str | Path) -> Path:
    """The safetensors file that belongs to a JSONL file: the same stem, beside it."""
    if not Path(jsonl).name:
        raise BadInput(f"{str(jsonl)!r} is not the name of a file")
    return Path(jsonl).with_suffix(".safetensors")


class Tokens:
    """The image tokens that belong to a JSONL file, read by row without loading the file.

    `metadata` is the header's: model, model_hash, codebook_size and what the writing step adds, all strings.
    `tokens[rows]` gives int64 (len(rows), T) and raises BadInput for a token outside the codebook.
    """

    def __init__(self, jsonl: str | Path) -> None:
        self.path = tokens_path(jsonl)
        if not os.path.isfile(self.path):
            raise BadInput(f"{self.path}: not found; {Path(jsonl).name} needs it beside it")
        try:
            with safe_open(self.path, framework="np") as file:
                self.metadata: dict[str, str] = dict(file.metadata() or {})
                if list(file.keys()) != ["tokens"]:
                    raise BadInput(f"{self.path}: expected the one tensor 'tokens', found {sorted(file.keys())}")
                tensor = file.get_slice("tokens")
                shape, dtype = tensor.get_shape(), tensor.get_dtype()
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{self.path}: not a readable safetensors file: {error}") from None
        if dtype != "U16" or len(shape) != 2 or shape[1] == 0:
            raise BadInput(f"{self.path}: tokens must be uint16 (rows, image tokens), found {dtype} {tuple(shape)}")
        self.rows, self.length = shape
        self.codebook_size = self._positive_integer("codebook_size")
        if self.codebook_size > 2**16:
            raise BadInput(f"{self.path}: metadata codebook_size is {self.codebook_size}, but tokens of 16 bits end at 65535")
        if (image_tokens := self.metadata.get("image_tokens", str(self.length))) != str(self.length):
            raise BadInput(f"{self.path}: metadata image_tokens is {image_tokens[:20]!r}, but rows have {self.length} tokens")
        # The library has checked that the header's one tensor fills the file exactly; mapping it lets rows be read
        # one by one, in any order, without a copy of the whole.
        with open(self.path, "rb") as file:
            self._pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        count = self.rows * self.length
        self._map = np.frombuffer(self._pages, "<u2", count, offset=len(self._pages) - 2 * count).reshape(shape)

    def _positive_integer(self, key: str) -> int:
        text = self.metadata.get(key, "")
        if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
            raise BadInput(f"{self.path}: metadata {key} must be a positive integer, found {text[:20]!r}")
        return int(text)

    def __getitem__(self, rows: list[int] | np.ndarray | slice) -> np.ndarray:
        block = np.asarray(self._map[rows], dtype=np.int64)  # (len(rows), T)
        self._pages.madvise(mmap.MADV_DONTNEED)  # or the process seems to grow by every page that it has ever read
        if block.size and block.max() >= self.codebook_size:
            raise BadInput(
                f"{self.path}: token {block.max()} is outside the codebook of {self.codebook_size} that its header names"
            )
        return block

    def threshold(self) -> float:
        """The P(yes) above which score.py took a picture for aligned; BadInput unless that is a number from 0 to 1."""
        text = self.metadata.get("threshold", "0.5")
        try:
            threshold = float(text)
        except ValueError:
            threshold = math.nan
        if not 0 <= threshold < 1:
            raise BadInput(f"{self.path}: metadata threshold must be a number from 0 to 1, found {text[:20]!r}")
        return threshold

    def model_name(self, given: str | None = None) -> str:
        """`given`, or else the model that drew the pictures, by the header; BadInput where there is none, or it has gone."""
        name = given or self.metadata.get("model")
        if not name:
            raise BadInput(f"{self.path}: its header names no model; give --model")
        if not given and os.path.isabs(name) and not os.path.isdir(name):
            raise BadInput(f"{self.path}: was drawn by {name}, which is not there any more; give --model")
        return name

    def check_codebook(self, policy: Any, name: str) -> None:
        """Raise BadInput for a model, called `name`, to which the tokens mean something else."""
        if (self.codebook_size, self.length) != (policy.codebook_size, policy.image_tokens):
            raise BadInput(
                f"{self.path}: holds pictures of {self.length} tokens of a codebook of {self.codebook_size}, "
                f"but {name} draws {policy.image_tokens} of {policy.codebook_size}"
            )

    def check_values(self) -> None:
        """Read every token once: raises BadInput for one outside the codebook."""
        step = max(1, 2**19 // self.length)  # 4 MiB at a time
        for start in range(0, self.rows, step):
            self[start : start + step]

    def check_row(self, row: int, where: str, name: str = "row") -> None:
        """Raise BadInput unless `row` exists; `where` is 'file:line' and `name` the column it came from."""
        if row >= self.rows:
            raise BadInput(f"{where}: {name} is {row}, but {self.path.name} has {self.rows} rows")


class TokenWriter:
    """Write `tokens` (rows, T) uint16 block by block into a safetensors file whose number of rows is known at the start.

    The safetensors library writes a tensor from memory only. Its format is eight bytes of header length, a JSON header
    and the raw data, so a million pictures can be streamed instead; the tests read the result with the library.
    Use inside `whole_file`.
    """

    def __init__(self, file: Any, rows: int, length: int, metadata: dict[str, str]) -> None:
        self._file, self._shape, self._left = file, (rows, length), rows
        tensor = {"dtype": "U16", "shape": [rows, length], "data_offsets": [0, 2 * rows * length]}
        header = json.dumps({"__metadata__": metadata, "tokens": tensor}, sort_keys=True).encode()
        header += b" " * (-len(header) % 8)
        file.write(len(header).to_bytes(8, "little") + header)

    def write(self, block: np.ndarray) -> None:
        """Append (B, T) integer tokens."""
        assert block.ndim == 2 and block.shape[1] == self._shape[1] and len(block) <= self._left, block.shape
        self._left -= len(block)
        self._file.write(np.ascontiguousarray(block, dtype="<u2").tobytes())

    def close(self) -> None:
        """Check that every promised row was written."""
        assert self._left == 0, f"{self._left} of {self._shape[0]} rows were never written"


def write_tokens(path: str | Path, tokens: np.ndarray, metadata: dict[str, str]) -> None:
    """Write (R, T) integer tokens with their metadata as a safetensors file, whole or not at all."""
    rows, length = tokens.shape
    with whole_file(path) as file:
        writer = TokenWriter(file, rows, length, metadata)
        writer.write(tokens)
        writer.close()


# ---------------------------------------------------------------------------------------------------------------------
# Rows with their pictures, checked

Key = tuple[str, int]  # (prompt id, candidate)
Row = dict[str, Any]


def read_scored(
    path: Path, tokens: Tokens, columns: dict[str, str] = SCORED, optional: dict[str, str] | None = None
) -> Iterator[tuple[int, Row]]:
    """(line number, row) of a scored file, whose rows point into `tokens`; columns and optional as in `read_rows`.

    Raises BadInput, naming file and line, for a row whose picture is not there, for a picture given twice, for a token
    outside the codebook, and for a file without rows.
    """
    seen: set[Key] = set()
    for number, row in read_rows(path, columns, optional):
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


def read_examples(path: Path, columns: dict[str, str], sides: tuple[str, ...]) -> tuple[list[Row], Tokens]:
    """Training data: rows whose columns `sides` name pictures, and their tokens; raises BadInput for bad ones, and for none.

    Of pairs both sides are to be named: they must differ.
    """
    tokens, rows = Tokens(path), []
    for number, row in read_rows(path, columns):
        for side in sides:
            tokens.check_row(row[side], f"{path}:{number}", side)
        if len({row[side] for side in sides}) < len(sides):
            raise BadInput(f"{path}:{number}: {' and '.join(sides)} are the same row, {row[sides[0]]}")
        rows.append(row)
    if not rows:
        raise BadInput(f"{path}: holds no example to train on")
    tokens.check_values()
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
