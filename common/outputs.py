"""What may be written: nothing that is read, and nothing that is there already and of another kind, is ever replaced.

Every command asks `check_outputs` before its work, with all that it reads and all that it will write.
"""

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from common.command import BadInput


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
    "survey": Kind("a survey", ("files", "labels", "levels"), ("verdict",)),
    "law": Kind("a law's constants", ("source", "families")),
    "forecast": Kind("a forecast", ("files", "labels", "forecast")),
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
