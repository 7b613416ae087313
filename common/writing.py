"""Files that are whole or not there: written under a temporary name, flushed to disk, renamed; one writer at a time.

This module imports nothing of the project.
"""

import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which takes its final name, replacing what was there, only if all went well.

    A full disk is an OSError that names `path`.
    """
    temporary, replaced = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        for entry in (temporary, *temporary.rglob("*")):
            if entry.is_file():
                entry.chmod(0o666 & ~umask)  # the safetensors library leaves its files to their owner alone
            descriptor = os.open(entry, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        if path.exists():  # moved aside first: a half-deleted model must not lie under its name
            os.replace(path, replaced)
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        full = "No space left" in str(error) or getattr(error, "errno", None) == errno.ENOSPC
        code = errno.ENOSPC if full else getattr(error, "errno", None) or errno.EIO
        raise OSError(code, f"the model cannot be saved: {error}", str(path)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def whole_file(path: str | Path, mode: str = "wb") -> Iterator[Any]:
    """Open `path` for writing under a temporary name beside it; it takes its final name only if the block succeeds.

    A file that exists is therefore complete. Missing directories above it are made. The data is flushed to disk before the
    rename, and the directory after. An OSError of the block (a full disk) names `path`. What a killed writer of the same file
    left behind is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
    try:
        with open(temporary, mode, encoding=encoding, newline=newline) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # says to `remove_abandoned` that its writer lives
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        if error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_abandoned(path: Path) -> None:
    """Remove the temporary files of writers of `path` that were killed: those that nobody holds a lock on."""
    for name in glob.glob(f".{glob.escape(path.name)}.*.tmp", root_dir=path.parent):
        with contextlib.suppress(FileNotFoundError, BlockingIOError, IsADirectoryError), open(path.parent / name, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (path.parent / name).unlink()


def free_bytes(path: str | Path) -> int:
    """Free space, for this user, of the disk that `path` is on or will be on."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def check_space(path: str | Path, wanted: int, what: str) -> None:
    """Raise OSError (ENOSPC) with both numbers unless the disk of `path` has room for `wanted` more bytes of `what`."""
    free = free_bytes(path)
    if wanted > free:
        numbers = f"{what} will need {wanted / 1e9:.3f} GB"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {numbers}", str(path))


def hold_directory(directory: Path) -> Any:
    """Make `directory` and hold it for this process until it ends; waits, and says so, while another process does.

    Returns the open lock file. A killed process lets go by itself; one that finished may have removed the directory,
    so look again at what is there.
    """
    told = False
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            file = open(directory / "lock", "a+", encoding="utf-8")  # noqa: SIM115 (held until the process ends)
        except FileNotFoundError:  # removed in between
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not told:
                print(f"waiting        for the process that is at work in {directory}", file=sys.stderr)
            told = True
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(directory / "lock")):
                return file
        file.close()


def sync_directory(path: str | Path) -> None:
    """Flush a directory's entries to disk, so that a rename inside it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Any) -> None:
    """Write one JSON value, indented for people to read."""
    with whole_file(path, "w") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as JSONL, streaming; returns their number. NaN is refused (ValueError)."""
    count = 0
    with whole_file(path, "w") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def write_tensors(path: str | Path, tensors: "dict[str, Tensor]") -> None:
    """Write torch tensors by name as a safetensors file."""
    from safetensors.torch import save

    with whole_file(path) as file:
        file.write(save(tensors))
