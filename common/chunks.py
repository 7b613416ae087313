"""Scored pictures in the making: ``OUT.chunks/`` holds the finished pieces of a run, which are joined to OUT at its end.

    OUT.chunks/
        settings.json           the run's settings; pieces of another run are refused
        000017.jsonl            a piece: judged pictures, and
        000017.safetensors      their tokens
        replaced.*              with --restart: the result that lay at OUT before

Every piece is written whole by whichever rank made it, so a run that was killed goes on, on any number of ranks.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from common.answers import name_form
from common.command import BadInput, progress_bar
from common.outputs import recognised
from common.ranks import Ranks
from common.records import (
    EASY,
    LIKELIHOOD,
    READOUTS,
    REPLIES,
    SCORED,
    Row,
    Tokens,
    TokenWriter,
    differences,
    parse_json,
    read_rows,
    stable_seed,
    tokens_path,
    write_tokens,
)
from common.writing import check_space, foreign_file, hold_directory, remove_files, whole_file, write_json, write_rows

BYTES_A_ROW = 800  # of JSONL, generously
OURS = re.compile(r"lock|settings\.json|[0-9]{6,}\.(jsonl|safetensors)|replaced\.(jsonl|safetensors)").fullmatch
LAST = ("settings.json", "lock")  # to be removed: what says whose the directory is goes when the rest has gone
MARKS = {"kind": "scored", "work": "[0-9a-f]{16}"}  # of settings.json
WRITTEN = (*SCORED, *EASY, *READOUTS, *LIKELIHOOD, *REPLIES)  # columns, of whatever a row holds besides
Make = Callable[[list[Row], Callable[[float], None]], tuple[list[Row], np.ndarray]]


class Chunks:
    """``OUT.chunks/``: finished pieces of one run, each a JSONL file and its tokens.

    metadata decides the content; a directory that holds another run's pieces is refused. The tensor file is written
    last, with a hash over both files' content in its header: a chunk is used only if all of it is what was written.
    """

    def __init__(self, out: Path, work: list[Row], per_chunk: int, metadata: dict[str, str], ranks: Ranks) -> None:
        """work: a row for each prompt to draw or picture to judge, which is cut into pieces of `per_chunk` rows."""
        self.out, self.metadata, self.ranks = out, metadata, ranks
        self.work = [work[start : start + per_chunk] for start in range(0, len(work), per_chunk)]
        self.directory = out.with_name(out.name + ".chunks")

    def run(
        self, make: Make, restart: bool, pictures: int, bytes_a_picture: int, check: Callable[[], object] = lambda: None
    ) -> None:
        """Make the chunks that are missing, each on one of the ranks, and join them to the result.

        make: some rows of work, and a function to call with the number of pictures done meanwhile -> judged rows, tokens.
        pictures: of a row of work. bytes_a_picture: of its tokens. One bar counts the pictures of all ranks. check: called
        before the result takes its name.
        """
        for other in self.ranks.gather([self.metadata]):
            if difference := differences(self.metadata, other):
                raise BadInput(f"the ranks do not read the same files: {difference}")
        self.ranks.check_restart(restart)
        missing = self.ranks.on_rank_0(self.begin, restart, self.ranks.restarted)
        if missing is None:
            print("already scored")
            return
        total, done = pictures * sum(map(len, self.work)), pictures * self.n_done()
        wanted = 2 * total * (bytes_a_picture + BYTES_A_ROW)
        self.ranks.on_rank_0(check_space, self.out, wanted, f"{total} pictures, in chunks and joined,")
        started = time.perf_counter()
        with progress_bar(total, "picture", self.ranks.is_rank_0, done) as bar:

            def advance(n: float) -> None:
                bar.update(min(n, total - bar.n))

            def show_finished() -> None:
                bar.update(pictures * self.n_done() - bar.n)  # those of all ranks, instead of what this one is at

            for index in missing[self.ranks.rank :: self.ranks.world]:
                self.write(index, *make(self.work[index], advance))
                if self.ranks.is_rank_0:
                    show_finished()
            self.ranks.barrier(show_finished if self.ranks.is_rank_0 else None)
            if self.ranks.is_rank_0:
                show_finished()
        if total > done:
            print(f"speed          {speed(total - done, time.perf_counter() - started)}")
        self.ranks.on_rank_0(check)
        self.ranks.on_rank_0(self.merge)

    def path(self, index: int) -> Path:
        return self.directory / f"{index:06d}.jsonl"

    def finished(self) -> bool:
        """Whether the result is there already; BadInput if it is another run's."""
        if not self.out.exists():
            return False
        refuse_other_run(self.out, name_form(Tokens(self.out).metadata), self.metadata, ["versions"])
        return True

    def _begun(self) -> dict[str, str]:
        """The settings of the run whose chunks these are; OSError where there are none."""
        return name_form(read_settings(self.directory / "settings.json"))

    def _check(self, restart: bool) -> bool:
        """`restart` itself; without it BadInput if result or chunks are another run's; with it too if chunks are nobody's."""
        refuse_foreign(self.directory)
        if not restart and not self.finished():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # another process may just be done with it
                refuse_other_run(self.directory, self._begun(), self.metadata)
        return restart

    def _ours(self) -> bool:
        """Whether result or chunks are those of this run."""
        try:
            return self.finished() or self._begun() == self.metadata
        except (BadInput, OSError):
            return False

    def rows(self) -> list[Row]:
        """The rows of the finished result."""
        rows = [row for _, row in read_rows(self.out, SCORED, EASY | REPLIES)]
        if len(rows) != Tokens(self.out).rows:
            raise BadInput(f"{self.out}: has {len(rows)} rows, but {tokens_path(self.out).name} {Tokens(self.out).rows}")
        return rows

    def begin(self, restart: bool, restarted: bool) -> list[int] | None:
        """Take hold of the directory; returns the chunks to make, None if the result is there.

        restart: replace what is there; restarted: torchrun has started this command before, which may have obeyed.
        Chunks that are damaged are removed and made again. BadInput for another run's.
        """
        self._check(restart)
        if not restart and self.out.exists() and not self.directory.exists():
            return None
        self._lock = hold_directory(self.directory)
        restart = self._check(restart and not (restarted and self._ours()))  # again: another process may have held it
        if self.out.exists() and not restart:
            remove_files(self.directory, OURS, LAST)
            return None
        if restart:
            remove_files(self.directory, OURS, keep=("replaced.jsonl", "replaced.safetensors", *LAST))
            for file in (self.out, tokens_path(self.out)):  # they go with the directory, when their successors are whole
                if file.exists():
                    os.replace(file, self.directory / f"replaced{file.suffix}")
        write_json(self.directory / "settings.json", self.metadata)
        missing, damaged = [], 0
        for index in range(len(self.work)):
            try:
                self.read(index)
            except BadInput:
                missing.append(index)
                damaged += self.path(index).exists() and tokens_path(self.path(index)).exists()
                self.path(index).unlink(missing_ok=True)
                tokens_path(self.path(index)).unlink(missing_ok=True)
        if len(missing) < len(self.work) or damaged:
            again = f", {damaged} damaged and made again" if damaged else ""
            print(f"resumed        {len(self.work) - len(missing)} of {len(self.work)} chunks are there{again}")
        return missing

    def write(self, index: int, rows: list[Row], tokens: np.ndarray) -> None:
        rows = [{**row, "row": i} for i, row in enumerate(rows)]
        write_rows(self.path(index), rows)
        write_tokens(tokens_path(self.path(index)), tokens, self.metadata | {"chunk": self._hash(index, rows, tokens)})

    def _hash(self, index: int, rows: list[Row], tokens: np.ndarray) -> str:
        content = np.ascontiguousarray(tokens, dtype="<u2").tobytes()
        return f"{stable_seed(index, json.dumps(rows), hashlib.sha256(content).hexdigest()):016x}"

    def read(self, index: int) -> tuple[list[Row], np.ndarray]:
        """Rows and tokens of a finished chunk; raises BadInput unless it is there, of this run and exactly as written."""
        rows = [row for _, row in read_rows(self.path(index), SCORED)]
        tokens = Tokens(self.path(index))
        block = tokens[:]
        if name_form(tokens.metadata) != self.metadata | {"chunk": self._hash(index, rows, block)}:
            raise BadInput(f"{self.path(index)}: not as it was written; start again to have it made again")
        return rows, block

    def n_done(self) -> int:
        """How many pictures all ranks together have finished: those of the chunks whose last file is there."""
        done = {file.stem for file in self.directory.glob("[0-9]*.safetensors")}
        return sum(len(work) for index, work in enumerate(self.work) if self.path(index).stem in done)

    def merge(self) -> None:
        """Join all chunks, in order, into the final two files and remove the chunks. The JSONL comes last."""
        length = Tokens(self.path(0)).length
        with whole_file(self.out, "w") as lines, whole_file(tokens_path(self.out)) as tensors:
            writer = TokenWriter(tensors, sum(Tokens(self.path(i)).rows for i in range(len(self.work))), length, self.metadata)
            row = 0
            for index in range(len(self.work)):
                rows, tokens = self.read(index)
                writer.write(tokens)
                for values in rows:
                    whole = {key: values[key] for key in WRITTEN if key in values} | {"row": row}
                    lines.write(json.dumps(whole, ensure_ascii=False, allow_nan=False) + "\n")
                    row += 1
            writer.close()
        remove_files(self.directory, OURS, LAST)


def refuse_foreign(directory: Path) -> None:
    """Raise BadInput, which names it, for anything in a directory of chunks, which will be emptied, that is none of ours."""
    if directory.is_symlink():
        raise BadInput(f"{directory}: is a link; the chunks' directory is wanted, or nothing")
    made = directory / "settings.json"
    foreign = foreign_file(directory, "lock".__eq__)
    if foreign and recognised(made, MARKS):  # looked at last: another process may have begun meanwhile
        foreign = foreign_file(directory, OURS)
    if foreign and not os.path.lexists(foreign):  # a process that has just finished takes its chunks away, settings.json last
        return refuse_foreign(directory)
    if foreign == made:
        raise BadInput(f"{made}: not of this script, so nothing beside it is touched; move {directory.name} away")
    if foreign:
        raise BadInput(f"{foreign}: is none of the chunks of this script, so it is not removed; move it away")


def batch_begun_with(out: Path) -> int | None:
    """The --batch in the header of a run that is to go on, of its result or chunks; 0 if there is none, None without a run."""
    try:
        header = Tokens(out).metadata if out.exists() else read_settings(out.with_name(out.name + ".chunks") / "settings.json")
        return int(header.get("batch", 0))
    except (BadInput, OSError, ValueError, AttributeError):  # no run, or none of ours: told where it is looked at
        return None


def speed(pictures: int, seconds: float) -> str:
    """Pictures a second, or seconds a picture where that is more than one, for people to read."""
    rate = pictures / seconds
    return f"{rate:.1f} pictures/s" if rate >= 1 else f"{1 / rate:.1f} s a picture"


def read_settings(path: Path) -> dict[str, str]:
    """The settings.json of a directory of chunks; raises BadInput if it is not one."""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path}: not JSON: {error}; move it away") from None


def refuse_other_run(where: Path, found: dict[str, str], wanted: dict[str, str], ignored: Sequence[str] = ()) -> None:
    """Raise BadInput with the list of differences if `where` was made with other settings."""
    if difference := differences(found, wanted, ignored):
        raise BadInput(f"{where}: holds another run ({difference}); choose another --out or add --restart")
