"""Image tokens: the safetensors file beside a JSONL file, read by row and written block by block, without torch.

Whoever reads it gets the rows of one file: a file that is changed under the reader is refused, see `Tokens`.
"""

import itertools
import json
import math
import os
import re
import stat
import weakref
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from common.command import BadInput
from common.writing import whole_file

NEAR = 4  # rows of which one in so many is wanted are read together: a read costs what some kilobytes do


def file_status(path: str | Path) -> os.stat_result | None:
    """os.stat of a plain file, None where there is none; one that may not be looked at is a PermissionError, not missing."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def tokens_path(jsonl: str | Path) -> Path:
    """The safetensors file that belongs to a JSONL file: the same stem, beside it."""
    if not Path(jsonl).name:
        raise BadInput(f"{str(jsonl)!r} is not the name of a file")
    return Path(jsonl).with_suffix(".safetensors")


class Tokens:
    """The image tokens that belong to a JSONL file, read by row without loading the file.

    `metadata` is the header's: model, model_hash, codebook_size and what the writing step adds, all strings.
    `tokens[rows]` gives int64 (len(rows), T), `tokens.stored(rows)` the same as uint16; both raise BadInput for a token outside
    the codebook, and once one of the two files is not the one that was opened. Rows are read, not mapped: of a mapped file that
    shrinks the process dies.
    """

    def __init__(self, jsonl: str | Path) -> None:
        self.path, self._files = tokens_path(jsonl), (Path(jsonl), tokens_path(jsonl))
        self._open()
        if self._look() != self._opened:  # whole ones of another process have just taken their place: then these
            self._open()
            self._check_opened()  # not of the first: between two looks the rows of a twin may follow their tensors

    def _open(self) -> None:
        """Open the two files and read the header."""
        jsonl = self._files[0]
        if file_status(self.path) is None:
            raise BadInput(f"{self.path}: not found; {jsonl.name} needs it beside it")
        self._opened, self._content = self._look(), (0, 0)
        self._file = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
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
        # The library has checked that the header's one tensor fills the file exactly.
        self._start = os.fstat(self._file).st_size - 2 * self.rows * self.length

    def _positive_integer(self, key: str) -> int:
        text = self.metadata.get(key, "")
        if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
            raise BadInput(f"{self.path}: metadata {key} must be a positive integer, found {text[:20]!r}")
        return int(text)

    def _look(self) -> list[tuple[int, ...] | None]:
        """What tells each of the two files from another one, or from itself after a change; None where there is no file."""
        found = map(file_status, self._files)
        return [it and (it.st_dev, it.st_ino, it.st_size, it.st_mtime_ns) for it in found]

    def _check_opened(self) -> None:
        """Raise BadInput unless both files are still those that were opened."""
        for path, before, now in zip(self._files, self._opened, self._look(), strict=True):
            if before != now:
                raise BadInput(f"{path}: was changed while it was read; start again when nothing writes to it")

    def stored(self, rows: list[int] | np.ndarray | slice) -> np.ndarray:
        """Rows as they are in the file, uint16 (len(rows), T): rows that lie near each other in one go, with those between."""
        wanted = np.arange(*rows.indices(self.rows)) if isinstance(rows, slice) else np.asarray(rows, np.int64)
        spread = int(np.ptp(wanted)) + 1 if len(wanted) else 0
        numbers = wanted.min() + np.arange(spread) if 0 < spread <= NEAR * len(wanted) else wanted
        block = np.zeros((len(numbers), self.length), "<u2")
        bounds = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
        view = block.reshape(-1).view(np.uint8).data
        for first, last in itertools.pairwise(bounds):
            at, end = 2 * self.length * first, 2 * self.length * last
            place = self._start + 2 * self.length * int(numbers[first]) if last > first else 0
            while at < end and (n_read := os.preadv(self._file, [view[at:end]], place)):
                at, place = at + n_read, place + n_read
        self._check_opened()  # also where the file has ended too soon
        if not np.array_equal(numbers, wanted):
            block = block[wanted - numbers[0]]
        if block.size and (highest := block.max()) >= self.codebook_size:
            raise BadInput(
                f"{self.path}: token {highest} is outside the codebook of {self.codebook_size} that its header names"
            )
        return block

    def __getitem__(self, rows: list[int] | np.ndarray | slice) -> np.ndarray:
        return self.stored(rows).astype(np.int64)

    def _read_content(self) -> tuple[int, int]:
        """Checksums of the JSONL file and of all tokens, which are read for it, 4 MiB at a time."""
        checksums, step = [0, 0], max(1, 2**21 // self.length)
        if file_status(self._files[0]):
            with open(self._files[0], "rb") as file:
                while block := file.read(2**20):
                    checksums[0] = zlib.crc32(block, checksums[0])
        for start in range(0, self.rows, step):
            checksums[1] = zlib.crc32(self.stored(slice(start, start + step)).data, checksums[1])
        return checksums[0], checksums[1]

    def check_values(self) -> None:
        """Read both files once: raises BadInput for a token outside the codebook. `check_unchanged` does it again."""
        self._content = self._read_content()

    def check_unchanged(self) -> None:
        """Raise BadInput unless both files are those, with that content, that `check_values` has read: before a result of them
        takes its name. Time and size alone would miss what is written through a map, or has its time set back."""
        if self._read_content() != self._content:
            raise BadInput(f"{self.path}: was changed while it was read, or the rows beside it; start again")

    def threshold(self) -> float:
        """The P(yes) above which score.py took a picture for aligned; BadInput unless that is a number from 0 to 1."""
        if (threshold := self.share("threshold", "0.5")) == 1:
            raise BadInput(f"{self.path}: metadata threshold must be a number under 1, found {threshold:g}")
        return threshold

    def share(self, key: str, default: str) -> float:
        """A number of the header; BadInput unless it is one from 0 to 1."""
        text = self.metadata.get(key, default)
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not 0 <= number <= 1:
            raise BadInput(f"{self.path}: metadata {key} must be a number from 0 to 1, found {text[:20]!r}")
        return number

    def model_name(self, given: str | None = None, key: str = "model", flag: str = "--model") -> str:
        """`given`, or else the model that drew the pictures, by the header; BadInput where there is none, or it has gone.

        key: of the header, "base" for the model that drew the first of them. flag: what is to be given instead.
        """
        name = given or self.metadata.get(key)
        if not name:
            raise BadInput(f"{self.path}: its header names no {key}; give {flag}")
        if not given and os.path.isabs(name) and not os.path.isdir(name):
            raise BadInput(f"{self.path}: was drawn by {name}, which is not there any more; give {flag}")
        return name

    def check_codebook(self, policy: Any, name: str) -> None:
        """Raise BadInput for a model, called `name`, to which the tokens mean something else."""
        if (self.codebook_size, self.length) != (policy.codebook_size, policy.image_tokens):
            raise BadInput(
                f"{self.path}: holds pictures of {self.length} tokens of a codebook of {self.codebook_size}, "
                f"but {name} draws {policy.image_tokens} of {policy.codebook_size}"
            )

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
