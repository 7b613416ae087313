"""Files that are whole or not there: written under a temporary name, flushed to disk, renamed; one writer at a time.

This module imports nothing of the project.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor

NAME_BYTES = 200  # of a file's name in that of its temporary file, which has to be a name as well
TEMPORARY = r"\.(?:[0-9a-f]{16}|[0-9]+)\.tmp"  # how such a name ends; of earlier versions in the process id
TRIES = 100
# torch's types and safetensors' names for them, in the order in which its library lays tensors out.
TYPES = {"int64": "I64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def is_temporary(name: str) -> bool:
    """Whether a file is called as `whole_file` calls one that is not whole yet."""
    return re.fullmatch(r"\..+" + TEMPORARY, name, re.DOTALL) is not None


def temporary_path(path: Path) -> Path:
    """A name beside `path` that no two writers share, whatever machine or container they run in."""
    start = os.fsdecode(os.fsencode(path.name)[:NAME_BYTES])
    return path.with_name(f".{start}.{secrets.token_hex(8)}.tmp")


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which takes its final name, replacing what was there, only if all went well.

    A full disk is an OSError that names `path`.
    """
    temporary = temporary_path(path)
    replaced = temporary.with_suffix(".old")
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
    remove_abandoned(path)
    temporary = path
    try:
        with open_temporary(path, mode) as file:
            temporary = Path(file.name)
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
        if temporary != path:
            temporary.unlink(missing_ok=True)


def open_temporary(path: Path, mode: str) -> Any:
    """Open a new file beside `path`, of a name of its own, with the lock that says to `remove_abandoned` that its writer lives.

    Between its opening and its lock it may be taken for abandoned and removed: then there is another one.
    """
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
    for _ in range(TRIES):
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # or the directory itself was removed, by one who had just made it
            file = open(temporary_path(path), mode.replace("w", "x"), encoding=encoding, newline=newline)  # noqa: SIM115
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                if os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
                    return file
            except BaseException:
                file.close()
                raise
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def remove_abandoned(path: Path) -> None:
    """Remove the temporary files of writers of `path` that were killed: those that nobody holds a lock on."""
    start = os.fsdecode(os.fsencode(path.name)[:NAME_BYTES])
    names = re.compile(re.escape(f".{start}") + TEMPORARY)
    for name in os.listdir(path.parent) if path.parent.is_dir() else ():
        if names.fullmatch(name) and os.path.isfile(path.parent / name):
            with (
                contextlib.suppress(FileNotFoundError, BlockingIOError, PermissionError),
                open(path.parent / name, "rb+") as file,
            ):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                (path.parent / name).unlink()


def foreign_file(directory: Path, ours: Callable[[str], object]) -> Path | None:
    """The first of what lies below a directory that is not ours: whose path in it `ours` denies, or that is no plain file."""

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # a process at work there takes files away
            raise error

    for place, folders, names in os.walk(directory, onerror=fail):
        folders.sort()
        for name in sorted([*names, *(name for name in folders if os.path.islink(os.path.join(place, name)))]):
            path = Path(place, name)
            with contextlib.suppress(FileNotFoundError):
                plain = stat.S_ISREG(os.lstat(path).st_mode)
                if not plain or not (is_temporary(name) or ours(str(path.relative_to(directory)))):
                    return path
    return None


def remove_files(directory: Path, ours: Callable[[str], object], last: Iterable[str] = (), keep: Iterable[str] = ()) -> None:
    """Remove those files below a directory that `ours` says are, but `keep`, those of `last` in this order at the end, and
    directories that are empty then, itself as well. What else is there stays, and so does what cannot be removed.
    """
    spared, last = {*keep}, [*last]
    for place, _, names in os.walk(directory, topdown=False):
        for name in names:
            path = Path(place, name)
            inside = str(path.relative_to(directory))
            if inside not in spared and inside not in last and (is_temporary(name) or ours(inside)):
                with contextlib.suppress(OSError):
                    path.unlink()
        if place != str(directory):
            with contextlib.suppress(OSError):
                os.rmdir(place)
    with contextlib.suppress(OSError):
        for name in last:
            if name not in spared:
                (directory / name).unlink(missing_ok=True)
        directory.rmdir()


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


@contextlib.contextmanager
def held_directory(directory: Path) -> Iterator[None]:
    """Hold a directory for the length of a block, and leave no lock file in it."""
    file = hold_directory(directory)
    try:
        yield
    finally:
        if os.fstat(file.fileno()).st_size == 0:  # somebody's file of that name may have been there before
            (directory / "lock").unlink(missing_ok=True)  # a process that waits for it looks again
        file.close()


@contextlib.contextmanager
def made_directory(path: Path) -> Iterator[None]:
    """Make `path`, and what is missing above it; take them away again if the block fails."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise


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
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)  # piece by piece: it may be a hundred megabytes
        file.write("\n")


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


def write_one_by_one(path: Path, tensors: "dict[str, Tensor]", read: "Callable[[str], Tensor]") -> None:
    """Write a safetensors file, byte for byte as its library and transformers do, with one tensor in memory at a time.

    tensors: by name what has the shape and type of each, on the meta device. read: a name -> the tensor itself, on the CPU.
    The file is not flushed: it belongs into a `whole_directory`.
    """
    import torch

    kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: ([*TYPES].index(kinds[name]), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": TYPES[kinds[name]], "shape": [*tensors[name].shape], "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in order:
            tensor = read(name)
            assert (tensor.dtype, tensor.shape) == (tensors[name].dtype, tensors[name].shape), name
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
