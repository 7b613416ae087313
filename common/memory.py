"""How much memory there is, and one line of advice where it is not enough: what was being done, the numbers, what to try."""

import argparse
import contextlib
import re
import resource
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # torch takes seconds to import; arguments and files are checked before
    import torch

Result = TypeVar("Result")


class OutOfMemory(RuntimeError):
    """A batch that does not fit; says how much was wanted, how much is free and which flag to turn."""

    exit_code = 1


@contextlib.contextmanager
def memory_advice(doing: str, advice: str, device: "torch.device") -> Iterator[None]:
    """Turn running out of memory inside the block into OutOfMemory: what was being done, the numbers, what to try."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if found := out_of_memory(error, doing, advice, device):
            raise found from None
        raise


def out_of_memory(error: BaseException | None, doing: str, advice: str, device: "torch.device") -> OutOfMemory | None:
    """The error to raise instead of an allocator's; None for any other error, and for none."""
    if not (wanted := bytes_wanted(error)):
        return None
    return OutOfMemory(f"out of memory {doing} ({wanted} wanted; {free_memory(device)}); try {advice}")


def bytes_wanted(error: BaseException | None) -> str | None:
    """What an error of an allocator says it wanted, for people to read; None for another error."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):  # "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."
        found = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        return found[1] if found else str(error).split(". ")[0]
    if isinstance(error, MemoryError):
        return str(error) or "host memory"
    if match := re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", str(error)):
        return f"{int(match[1]) / 1e9:.2f} GB"
    return None


def memory(device: "torch.device") -> tuple[int, int] | None:
    """Free and total bytes of a GPU, what this process could use again included, or of the machine; None where unknown."""
    import torch

    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
    except OSError:  # no Linux
        return None
    free, total = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))  # given in kB
    return free, total


def free_memory(device: "torch.device") -> str:
    """Free and total memory of a device, for people to read."""
    found = memory(device)
    return f"{found[0] / 1e9:.1f} of {found[1] / 1e9:.1f} GB free" if found else "free memory unknown"


def peak_memory_gb(device: "torch.device") -> float:
    """The most memory held so far, in GB: the GPU's allocator, or the process's resident set on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def release_memory(device: "torch.device") -> None:
    """Give back what a GPU's allocator keeps for later."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()


def batch_matters(device: "torch.device") -> bool:
    """Whether pictures depend on how many are drawn at once: on a GPU, whose kernels round as their number of rows has it."""
    return device.type == "cuda"


def batch_size(text: str) -> int | str:
    """The value of --batch."""
    if text != "auto" and (not text.isdecimal() or int(text) < 1):
        raise argparse.ArgumentTypeError(f"must be auto or at least 1, found {text}")
    return text if text == "auto" else int(text)


def with_less_memory(make: Callable[..., Result], policy: Any, args: argparse.Namespace, rank: int) -> Callable[..., Result]:
    """`make` with --batch halved, and a line said, as often as memory runs out; OutOfMemory where one is too many."""

    def make_or_halve(rows: list[Any], advance: Callable[[float], None]) -> Result:
        from tqdm import tqdm

        while True:
            try:
                with memory_advice(f"drawing and judging with --batch {args.batch}", "a smaller model", policy.device):
                    return make(rows, advance)
            except OutOfMemory as error:
                if args.batch == 1:
                    raise
                reason = str(error).split(";")[0]
            args.batch //= 2  # outside the handler: the traceback holds on to what did not fit
            release_memory(policy.device)
            tqdm.write(f"rank {rank}: {reason}); going on with --batch {args.batch}", file=sys.stderr)

    return make_or_halve
