"""What all scripts do alike as commands: arguments, errors on one line, exit codes.

Errors in people's files and arguments are `BadInput` (exit code 2): one line that names the file, the line and what was
expected. This module imports neither torch nor numpy.
"""

import argparse
import contextlib
import errno
import io
import json
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from common.writing import free_bytes

EXIT_FAULT, EXIT_BAD_INPUT, EXIT_GATE, EXIT_SIGINT = 1, 2, 3, 128 + signal.SIGINT
# The name is wrong, or what it names is not this user's, not the disk.
BAD_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EPERM)


class BadInput(Exception):
    """Something is wrong with a file or an argument that a person gave. Scripts print it on one line and exit 2."""

    exit_code = EXIT_BAD_INPUT


class QualityRefusal(BadInput):
    """The data-quality gate said no. Scripts print why on one line and exit 3."""

    exit_code = EXIT_GATE


class Parser(argparse.ArgumentParser):
    """argparse as the scripts use it: the docstring as it stands, no abbreviated flags, an error on one line."""

    def __init__(self, description: str | None = None, **options: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line on stderr; the usage is a `--help` away. Of a machine's processes, one speaks."""
        first = not re.fullmatch("0*[1-9][0-9]*", os.environ.get("LOCAL_RANK", ""))
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: {' '.join(message.split())}\n" if first else None)

    def parse_args(self, *args: Any, **options: Any) -> Any:
        """argparse's own, after a look at what torchrun's variables say: every command refuses there what makes no sense."""
        try:
            process_numbers()
        except BadInput as error:
            self.error(str(error))
        return super().parse_args(*args, **options)


class ProcessNumbers(NamedTuple):
    """Which process of how many this one is, as torchrun says it in the environment; local: its number on this machine."""

    rank: int
    local_rank: int
    world: int


def environment_number(name: str, default: int) -> int:
    """A count in the environment; a variable that is empty is unset. Raises BadInput for what is no number."""
    text = os.environ.get(name, "")
    if text and not re.fullmatch("[0-9]{1,9}", text):
        raise BadInput(f"environment: {name} must be an integer of at least 0, found {text!r}")
    return int(text) if text else default


def process_numbers() -> ProcessNumbers:
    """Raises BadInput where torchrun's variables are no numbers, or do not go together."""
    rank, local_rank = environment_number("RANK", 0), environment_number("LOCAL_RANK", 0)
    world = environment_number("WORLD_SIZE", 1)
    if not rank < world:
        raise BadInput(f"environment: RANK is {rank}, but WORLD_SIZE is {world}")
    return ProcessNumbers(rank, local_rank, world)


def run_script(main: Callable[..., Any], args: Any) -> int:
    """Run `main(args)` and return the process's exit code.

    An exception that carries an `exit_code` (BadInput, and the errors of the other files about checkpoints, prompts,
    memory, ...) becomes one line on stderr, and so do a full disk and its like; any other is a fault of ours and keeps
    its traceback. Of several processes that all fail in the same way, one speaks: rank 0 where the error says that it is
    raised `everywhere`, the first of a machine where it is BadInput, since all of a machine read the same files.
    """
    rank, local_rank, world = process_numbers()  # which Parser has checked
    sys.stdout, sys.stderr = patient(sys.stdout), patient(sys.stderr)
    try:
        check_words(sys.argv)
        main(args)
        if sys.stdout:
            sys.stdout.flush()  # at the interpreter's end a full disk would be a traceback
        code = 0
    except (Exception, KeyboardInterrupt) as error:
        code, message = plain_words(error)
        if message is None:
            if world <= 1:
                raise
            traceback.print_exc()
        elif not ((rank and getattr(error, "everywhere", False)) or (local_rank and isinstance(error, BadInput))):
            message = printable(message)
            print(f"{Path(sys.argv[0]).name}: {f'rank {rank}: ' if world > 1 else ''}{message}", file=sys.stderr)
    if world > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the destructors of gloo's threads abort now and then, long after the work is done
    return code


class Outlet(io.FileIO):
    """Where a stream's bytes go; to nowhere once nobody reads them any more (`| head`): the work is done all the same."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if error.errno != errno.EPIPE:
                raise OSError(error.errno, error.strerror, "standard output") from None
            return len(data)


def patient(stream: Any) -> Any:
    """Standard output or error such that printing cannot fail because of what is printed, or because nobody reads it.

    What its encoding does not have is written as an escape. A stream that a test put in its place is left as it is.
    """
    if type(stream) is not io.TextIOWrapper or stream not in (sys.__stdout__, sys.__stderr__):
        return stream
    stream.flush()
    buffer = io.BufferedWriter(Outlet(stream.fileno(), "wb", closefd=False))
    encoding, live = stream.encoding, stream.line_buffering
    return io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=live, write_through=stream.write_through)


def check_words(words: list[str]) -> None:
    """Raise BadInput for an argument that is not text, such as a path of other bytes: it could not be recorded as a setting."""
    for word in words:
        if re.search("[\ud800-\udfff]", word):
            raise BadInput(f"argument {word!r}: is not UTF-8")


def printable(text: object) -> str:
    """Anything as one line of at most 4,000 characters that a terminal only shows: it may quote anybody's file.

    Escapes of terminals, marks that reverse the direction of writing and other characters that do not show become escapes.
    """
    line = " ".join(str(text).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)[:4000]


def aligned(rows: list[list[str]]) -> str:
    """Rows of cells as a table: the first column, anybody's words, to the left, the others, numbers, to the right."""
    rows = [[printable(name), *numbers] for name, *numbers in rows]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def plain_words(error: BaseException) -> tuple[int, str | None]:
    """The exit code and the one line that an error deserves; None where a traceback says more."""
    if hasattr(error, "exit_code"):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return EXIT_SIGINT, "interrupted; the same command goes on where it can"
    if isinstance(error, OSError) and error.strerror:
        free = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and error.filename:
            free = f" ({free_bytes(error.filename) / 1e9:.3f} GB free)"
        code = EXIT_BAD_INPUT if error.errno in BAD_NAMES else EXIT_FAULT
        return code, f"{error.filename or 'a file'}: {error.strerror}{free}"
    if type(error).__module__ == "sqlite3":  # make_pairs.py's temporary database
        return EXIT_FAULT, f"the temporary database in {tempfile.gettempdir()} (TMPDIR): {error}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return EXIT_FAULT, f"out of memory: {error}"
    if process_numbers().world > 1 and re.search("gloo|NCCL|TCPStore|closed by peer|reset by peer", str(error)):
        return EXIT_FAULT, f"lost the other ranks; if one failed, its own message says why ({str(error)[:300]})"
    return EXIT_FAULT, None


# ---------------------------------------------------------------------------------------------------------------------
# What may be written


class Kind(NamedTuple):
    """What a file has to be for a command to replace it: its name for people, what its first JSON object holds, and what not.

    form: "json" for one object or one a line, "tensors" for safetensors, whose header it is, "page" for HTML.
    """

    name: str
    keys: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    form: str = "json"


PROMPT_KEYS = ("id", "prompt", "category")
KINDS = {
    "prompts": Kind("a round's prompts", PROMPT_KEYS, ("candidate", "row", "chosen", "best_p_yes")),
    "scored": Kind("scored pictures", (*PROMPT_KEYS, "candidate", "p_yes", "foil", "row")),
    "sft": Kind("sft.jsonl", (*PROMPT_KEYS, "p_yes", "row"), ("candidate",)),
    "pairs": Kind("pairs.jsonl", (*PROMPT_KEYS, "chosen", "rejected")),
    "discard": Kind("discard.jsonl", (*PROMPT_KEYS, "best_p_yes")),
    "labels": Kind("labels", ("id", "candidate", "label", "source")),
    "summary": Kind("a run's summary", ("round", "model", "nonunified")),
    "gate": Kind("a verdict of gate.py", ("good", "problems", "coverage")),
    "diagnosis": Kind("a diagnosis", ("verdict", "files", "labels")),
    "dynamics rows": Kind("probes of dynamics.py", (*PROMPT_KEYS, "candidate", "kind", "partner")),
    "dynamics": Kind("a summary of dynamics.py", ("settings", "kinds")),
    "results": Kind("results of experiments", ("name", "family", "seed")),
    "report": Kind("a report", form="page"),
    "pictures": Kind("image tokens", ("__metadata__", "tokens"), form="tensors"),
}
DIRECTORY = "a directory"
PAGE = b'<!doctype html>\n<html lang="en">'  # as report.py begins one
MOST_BYTES = 2**28  # of a file, to see what it is


def check_outputs(reads: Iterable[str | Path | None], writes: dict[Path, str]) -> None:
    """Raise BadInput unless a command that reads these files may write those: before the work, so that nothing is lost.

    writes: for each path, derived ones too, a key of KINDS, or DIRECTORY for a directory that is emptied. What is read, or
    lies beside that as its tensors, is never written, whatever it is called there (links, `..`, another case), and what is
    there already is replaced only by its own kind.
    """
    read = [Path(path) for path in reads if path]
    read += [path.with_suffix(".safetensors") for path in read if path.suffix == ".jsonl"]
    for number, (out, kind) in enumerate(writes.items()):
        check_parent(out)
        if kind == DIRECTORY:
            check_out_directory(out, read)
            continue
        check_out_file(out)
        for path in read:
            if same_path(out, path):
                raise BadInput(f"--out {out}: is also read{'' if same_name(out, path) else f', as {path}'}")
        for other in [*writes][:number]:
            if same_path(out, other):
                raise BadInput(f"--out {out}: would be written twice{'' if same_name(out, other) else f', as {other} too'}")
        if not is_kind(out, KINDS[kind]):
            raise BadInput(f"--out {out}: is there already and is not {KINDS[kind].name}, so it is not replaced")


def check_out_directory(out: Path, read: Iterable[Path]) -> None:
    """Raise BadInput where `out` is something else than a directory, or holds what is read."""
    if out.is_symlink() and not out.exists():
        raise BadInput(f"--out {out}: is a link to {os.readlink(out)}, which is not there")
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out}: is a file, a directory is wanted")
    for path in read:
        if any(same_path(out, place) for place in (path, *Path(os.path.realpath(path)).parents)):
            raise BadInput(f"--out {out}: holds what is read, {path}, which would be removed")


def check_out_file(out: str | Path) -> Path:
    """`out` as a Path under which a file can be written; raises BadInput otherwise."""
    out = Path(out)
    check_parent(out)
    if out.is_dir():
        raise BadInput(f"--out {out}: is a directory, a file name is wanted")
    if out.is_symlink() and not out.exists():
        raise BadInput(f"--out {out}: is a link to {os.readlink(out)}, which is not there")
    if out.exists() and not out.is_file():
        raise BadInput(f"--out {out}: is a device or a pipe, which a file would replace")
    return out


def same_name(one: Path, other: Path) -> bool:
    return os.path.abspath(one) == os.path.abspath(other)


def same_path(one: Path, other: Path) -> bool:
    """Whether two paths lead to one place: by links and `..`, or, of what is there, as two names of one file."""
    if os.path.realpath(one) == os.path.realpath(other):  # not Path.resolve, which has no word for a loop of links
        return True
    with contextlib.suppress(OSError):
        return os.path.samefile(one, other)
    return False


def is_kind(path: Path, kind: Kind) -> bool:
    """Whether nothing would be lost if a file of this kind took the place of what is at `path`: nothing, or such a file."""
    try:
        with open(path, "rb") as file:
            if not file.read(1):
                return True
            file.seek(0)
            if kind.form == "page":
                return file.read(len(PAGE)) == PAGE
            if kind.form == "tensors":
                text = file.read(min(int.from_bytes(file.read(8), "little"), MOST_BYTES))
            else:
                text = file.readline(MOST_BYTES)
                if text.strip() == b"{":  # indented for people
                    text += file.read(MOST_BYTES)
    except FileNotFoundError:
        return True
    except OSError as error:
        raise BadInput(f"--out {path}: cannot be read: {error.strerror}") from None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {*kind.keys} <= found.keys() and found.keys().isdisjoint(kind.never)


def recognised(file: Path, marks: dict[str, str]) -> bool:
    """Whether a file is a JSON object in which the values of these keys are texts that these regular expressions match."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    texts = found if isinstance(found, dict) else {}
    return all(isinstance(text := texts.get(key), str) and re.fullmatch(mark, text) for key, mark in marks.items())


def check_parent(out: Path) -> None:
    """Raise BadInput unless something can be made at `out`; directories above it that are missing are made when it is."""
    try:
        os.lstat(out)
    except FileNotFoundError:
        pass
    except OSError as error:  # a name too long, a file where a directory should be, a loop of links
        raise BadInput(f"--out {out}: {error.strerror}") from None
    above = out.absolute().parent
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        raise BadInput(f"--out {out}: {above} is not a directory")
    if not os.access(above, os.W_OK | os.X_OK):
        code = errno.EROFS if os.statvfs(above).f_flag & os.ST_RDONLY else errno.EACCES
        raise BadInput(f"--out {out}: its parent directory {above} cannot be written: {os.strerror(code)}")


def progress_bar(total: int, unit: str, shown: bool = True, done: int = 0, name: str | None = None) -> Any:
    """tqdm's bar on stderr, which may be moved by fractions of a unit; where that is no terminal, a line every 30 seconds."""
    from tqdm import tqdm

    class Lines(tqdm):
        def display(self, msg: str | None = None, pos: int | None = None) -> bool:
            if msg != "":
                print(msg or self, file=self.fp, flush=True)
            return False

        def close(self) -> None:
            if not self.disable:
                self.display()  # where it ended
            self.leave = False
            super().close()

    form = "{desc}{percentage:5.1f}%|{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    bar = {"total": total, "initial": done, "unit": unit, "bar_format": form, "disable": not shown}
    bar["desc"] = f"{name}: " if name else None
    return tqdm(**bar, dynamic_ncols=True) if sys.stderr.isatty() else Lines(**bar, mininterval=30)
