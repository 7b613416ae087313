"""The processes of one run: who this one is, on which device, and what they do together.

torchrun starts the processes and says in the environment who each of them is; `torch.distributed` lets them talk.
Without torchrun a script is one process, no group is made, and every method below does the obvious thing.

    ranks = Ranks()                # from the environment; processes other than the first fall silent
    ranks.join(args.device)        # device and process group; imports torch, so after the cheap checks
    ranks.is_rank_0, ranks.rank, ranks.world, ranks.device
"""

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from common.command import BadInput, environment_number, process_numbers

if TYPE_CHECKING:  # torch takes seconds to import; arguments and files are checked before
    import torch
    from torch import Tensor

# How long ranks wait for each other. Over gloo for ever: one may have hours of work more than another, and rank 0 may wait
# for another process's lock; a peer that died is noticed by its closed connection. Over NCCL they only train, in step.
GLOO_PATIENCE, NCCL_PATIENCE = timedelta(days=365), timedelta(hours=1)


class DeviceError(ValueError):
    """--device names what this machine does not have."""

    exit_code = 2


class LaunchError(ValueError):
    """The way in which torchrun was called does not go with the arguments."""

    exit_code = 2
    everywhere = True


class Ranks:
    """This process among the `world` processes of one run. `rank` is its number, `is_rank_0` says whether that is 0.

    Constructing it for another rank than 0 closes standard output there: a run prints once. Errors still go to stderr.
    """

    def __init__(self) -> None:
        self.rank, self.local_rank, self.world = process_numbers()  # local: which GPU, nothing else
        self.restarted = environment_number("TORCHELASTIC_RESTART_COUNT", 0) > 0  # by torchrun --max-restarts
        self.is_rank_0 = self.rank == 0
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if self.world > 1 else ():
            if not os.environ.get(name):
                raise BadInput(f"WORLD_SIZE is {self.world}, but {name} is not set: start it with torchrun, or unset both")
        if self.world > 1 and environment_number("MASTER_PORT", 0) > 65535:
            raise BadInput(f"MASTER_PORT is {os.environ['MASTER_PORT']}, but ports end at 65535")
        if not self.is_rank_0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)

    def join(self, device: str | None) -> None:
        """Choose the device ("cuda", "cpu", None for the best there is) and make the process group.

        The group talks over gloo, and on GPUs over NCCL as well. A second gloo group is kept for saving in the
        background, so that its messages never mix with training's. Raises DeviceError.
        """
        import torch

        self.device = self._choose(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # for one process too: what is made without naming a device is made there
        self.control = self.background = None  # process groups; None is the default one
        if self.world == 1:
            return
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        patience = NCCL_PATIENCE if self.device.type == "cuda" else GLOO_PATIENCE
        store, _, _ = next(rendezvous("env://", timeout=NCCL_PATIENCE))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(self.world):
            # torchrun keeps its store over a restart, with the dead ranks' addresses in it (pytorch issue 135712). Their
            # number tells attempts apart on one machine; on several it differs by machine: see docs/when-it-breaks.md.
            store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        group = {"store": store, "rank": self.rank, "world_size": self.world, "timeout": patience}
        dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo", **group)
        self.control = dist.new_group(backend="gloo", timeout=GLOO_PATIENCE)
        self.background = dist.new_group(backend="gloo", timeout=GLOO_PATIENCE)
        self.restarted = self.sum({"restarted": float(self.restarted)})["restarted"] > 0  # on whichever machine it was

    def _choose(self, device: str | None) -> "torch.device":
        import torch

        try:
            chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError:
            raise DeviceError(f"--device {device}: no such kind of device; cuda or cpu") from None
        if chosen.type == "cpu":
            return torch.device("cpu")
        if chosen.type != "cuda" or not torch.cuda.is_available():
            raise DeviceError(f"--device {device}: not there; this machine has {_devices()}")
        index = self.local_rank if chosen.index is None else chosen.index
        if index >= torch.cuda.device_count():
            raise DeviceError(f"rank {self.rank} wants GPU {index}, but this machine has {_devices()}")
        if self.world > 1 and index != self.local_rank:
            raise DeviceError(f"--device {device}: with several processes each takes its own GPU; say cuda")
        return torch.device("cuda", index)

    def check_restart(self, restart: bool) -> None:
        """Raise LaunchError for --restart where a second start could not be told from the first, which would lose work."""
        several = environment_number("GROUP_WORLD_SIZE", 1) > 1
        if restart and several and environment_number("TORCHELASTIC_MAX_RESTARTS", 0) > 0:
            raise LaunchError("--restart and --max-restarts on several nodes: a node that joins anew would begin anew; use one")

    def on_rank_0(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run `function` on rank 0 alone; what it returned or raised, all ranks return or raise."""
        if self.world == 1:
            return function(*args)
        import torch.distributed as dist

        outcome: list[Any] = [None, None]
        if self.is_rank_0:
            try:
                outcome[0] = function(*args)
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        if outcome[1] is not None:
            outcome[1].everywhere = True  # one report is enough
            raise outcome[1]
        return outcome[0]

    def sum(self, numbers: dict[str, float]) -> dict[str, float]:
        """Each number summed over the ranks, in float64. All ranks give the same keys in the same order."""
        if self.world == 1:
            return numbers
        import torch

        totals = self.sum_tensor(torch.tensor(list(numbers.values()), dtype=torch.float64))
        return dict(zip(numbers, totals.tolist(), strict=True))

    def sum_tensor(self, tensor: "Tensor") -> "Tensor":
        """A CPU tensor summed over the ranks, in place."""
        if self.world > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor, group=self.control)
        return tensor

    def gather(self, values: list[Any]) -> list[Any]:
        """The lists of all ranks, joined in rank order."""
        if self.world == 1:
            return values
        import torch.distributed as dist

        lists: list[Any] = [None] * self.world
        dist.all_gather_object(lists, values, group=self.control)
        return [value for part in lists for value in part]

    def barrier(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Wait until all ranks are here, calling `meanwhile` now and then."""
        if self.world == 1:
            return
        import torch.distributed as dist

        waiting = dist.barrier(group=self.control, async_op=True)
        while meanwhile is not None and not waiting.is_completed():
            meanwhile()
            time.sleep(0.2)
        waiting.wait()


def _devices() -> str:
    import torch

    count = torch.cuda.device_count()
    return f"{count} GPU{'s' if count != 1 else ''}" if count else "no GPU"
