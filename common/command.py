"""What all scripts do alike as commands: arguments, errors on one line, exit codes.

Errors in people's files and arguments are `BadInput` (exit code 2): one line that names the file, the line and what was
expected. This module imports neither torch nor numpy.
"""

import argparse
import errno
import io
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

EXIT_FAULT, EXIT_BAD_INPUT, EXIT_GATE, EXIT_UNDECIDED, EXIT_SIGINT = 1, 2, 3, 4, 128 + signal.SIGINT
STDOUT = "standard output"  # in errors, where a file has its name
# The name is wrong, or what it names is not this user's, not the disk.
BAD_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EPERM)


class BadInput(Exception):
    """Something is wrong with a file or an argument that a person gave. Scripts print it on one line and exit 2."""

    exit_code = EXIT_BAD_INPUT


class QualityRefusal(BadInput):
    """The data-quality gate said no. Scripts print why on one line and exit 3."""

    exit_code = EXIT_GATE


class Undecided(BadInput):
    """A gate cannot say whether a round was good or bad. Scripts print why on one line and exit 4."""

    exit_code = EXIT_UNDECIDED


class Parser(argparse.ArgumentParser):
    """argparse as the scripts use it: the docstring as it stands, no abbreviated flags, an error on one line."""

    def __init__(self, description: str | None = None, **options: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line on stderr; the usage is a `--help` away. Of a machine's processes, one speaks."""
        first = not re.fullmatch("0*[1-9][0-9]*", os.environ.get("LOCAL_RANK", ""))
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: {printable(message)}\n" if first else None)

    def parse_args(self, *args: Any, **options: Any) -> Any:
        """argparse's own, after a look at what torchrun's variables say: every command refuses there what makes no sense."""
        try:
            process_numbers()
        except BadInput as error:
            self.error(str(error))
        return super().parse_args(*args, **options)


def check_left_out(categories: list[str], found: Iterable[str]) -> list[str]:
    """The categories of --leave-out, each once. Raises BadInput for one that no prompt has, and where no other is left."""
    wanted, there = list(dict.fromkeys(categories)), sorted(set(found))
    for category in wanted:
        if category not in there:
            raise BadInput(f"--leave-out {category}: no prompt is of this category; there are {', '.join(there)}")
    if len(wanted) == len(there):
        raise BadInput(f"--leave-out {' '.join(wanted)}: leaves no prompt")
    return wanted


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
                raise OSError(error.errno, error.strerror, STDOUT) from None
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
    line = re.sub(r"[^\S ]\s*", " ", str(text)).rstrip()  # blanks stay, since a path may have two
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
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and error.filename not in (None, STDOUT):
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
