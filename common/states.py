"""Where a training run works, what it keeps to be able to go on, and how its result appears.

    OUT.training/               one run's own directory, gone when the run is done
        settings.json           what decides the result; a command that differs is refused
        metrics.jsonl           one line a step
        reference.safetensors   dpo.py: log-probs of the model before training
        state-00000200/         weights, optimizer and step after 200 steps: the newest whole one is resumed from
        replaced/               with --restart: the result that lay at OUT before
    OUT/                        the result, a checkpoint that plain transformers loads; appears whole
        training/               the record of the run: settings.json, metrics.jsonl, history.json, files.json (all of OUT), ...
        README.md               a model card (model_card.py)

A state is written by all ranks together (`torch.distributed.checkpoint`, safetensors files, no pickle), in the background,
into ``state-00000200.tmp/``; COMPLETE, with size and SHA-256 of every file, comes last; then the directory takes its
final name, and only then the state before it goes. Only trained weights are in it. There is nothing else to keep: the
order of the data, dropped captions, the learning rate and random numbers are functions of the seed and the step.
"""

import contextlib
import errno
import os
import re
import shutil
import signal
import warnings
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.memory import memory_advice
from common.model_card import write_model_card
from common.outputs import DIRECTORY, check_outputs, recognised
from common.ranks import Ranks
from common.records import content_hash, differences, parse_json
from common.writing import (
    check_space,
    foreign_file,
    hold_directory,
    remove_files,
    sync_directory,
    whole_file,
    write_json,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from model import UnifiedModel

BYTES_A_FILE = 4 * 2**30  # of a state: a file is put together in memory before it is written
# Settings that decide speed and memory alone: they may change on the way.
MAY_CHANGE = ("micro_batch", "gradient_checkpointing", "compile", "save_every", "replicate")
MARKS = {"script": r"(sft|dpo)\.py", "data_hash": "[0-9a-f]{16}", "model_hash": ".+"}  # of settings.json
STATE = r"state-[0-9]{8}"
OURS = re.compile(  # of OUT.training; what is saved lies in `model`, and before it is whole in a temporary directory
    rf"lock|settings\.json|metrics\.jsonl|\w+\.safetensors|{STATE}(\.tmp)?/(COMPLETE|[^/]+\.(safetensors|json))"
    r"|(model|replaced|\.model\.[^/]+\.tmp)/.+",
    re.DOTALL,
).fullmatch
FILES = "training/files.json"  # in OUT: the names of all that is in it
LAST = ("settings.json", "lock")  # to be removed: what says whose the directory is goes when the rest has gone


class RunError(ValueError):
    """The output directory does not fit this run; says what differs."""

    exit_code = 2


class Stopped(RuntimeError):
    """SIGTERM came, the step was finished and its state saved."""

    exit_code = 128 + signal.SIGTERM
    everywhere = True


class RunDirectory:
    """``OUT`` and ``OUT.training/`` of one run.

    settings: everything that decides the result, JSON values. Every method is called by all ranks together. `finished`
    is true when OUT holds this very run. Raises RunError when OUT or OUT.training holds another, naming what differs.
    """

    def __init__(
        self, out: Path, settings: dict[str, Any], restart: bool, ranks: Ranks, reads: Iterable[Path | None] = ()
    ) -> None:
        """reads: files and directories that the run reads, so that it does not take them away."""
        self.reads = [*reads]
        self.out, self.settings, self.restart, self.ranks = out, settings, restart, ranks
        self.work = out.with_name(out.name + ".training")
        self._writer = ThreadPoolExecutor(1)
        self._pending: Future | None = None
        self._stop = False  # set by SIGTERM
        ranks.check_restart(restart)
        for other in ranks.gather([settings]):
            if difference := differences(settings, other, MAY_CHANGE):
                raise RunError(f"the ranks do not read the same files or arguments: {difference}")
        self.finished = ranks.on_rank_0(self._is_finished)
        if self.finished:
            ranks.on_rank_0(self._tidy)

    def wait_before(self, error: BaseException | None) -> None:
        """Let a state that is being written become whole before an error goes on that all ranks raise together."""
        if getattr(error, "everywhere", False):
            with contextlib.suppress(OSError):  # the first error is the one to be told
                self.wait()

    def _is_finished(self) -> bool:
        """Whether OUT is finished; RunError if it, or the work directory, is another run's and not to be replaced."""
        check_outputs(self.reads, {self.out: DIRECTORY, self.work: DIRECTORY})
        self._refuse_foreign()
        result, work = self.out / "training" / "settings.json", self.work / "settings.json"
        if self.restart and self.ranks.restarted and any(file.is_file() and not self._differs(file) for file in (result, work)):
            self.restart = False  # torchrun repeats the command: it has been obeyed
        if self.restart:
            if self.out.exists() and not result.is_file():
                raise RunError(f"--out {self.out}: holds no run of this script, so --restart does not replace it")
            refuse_to_replace(self.out)
            return False
        for file, there in ((result, self.out.exists()), (work, self._begun())):
            if there and (difference := self._differs(file)):
                where = self.out if file is result else self.work
                raise RunError(f"{where}: {difference}; choose another --out or add --restart")
            if there and file is result:
                return True
        return False

    def _begun(self) -> bool:
        return foreign_file(self.work, "lock".__eq__) is not None  # a run that was killed at its start leaves a temporary file

    def _refuse_foreign(self) -> None:
        """Raise RunError, which names it, for anything in the work directory, which will be emptied, that no run made."""
        if self.work.is_symlink():
            raise RunError(f"{self.work}: is a link; a run's own directory is wanted, or nothing")
        if self._begun() and not recognised(self.work / "settings.json", MARKS) and self._begun():  # or it has just ended
            raise RunError(f"{self.work}: exists, but holds no run of this script; move it away")
        if foreign := foreign_file(self.work, OURS):
            raise RunError(f"{foreign}: is not of this script, so it is not removed; move it away")

    def _differs(self, file: Path) -> str:
        """In what way `file` does not hold the settings of this run; empty if it does."""
        if not file.is_file():
            return "exists, but holds no run of this script"
        try:
            found = parse_json(file.read_text(encoding="utf-8"))
            difference = differences(found, self.settings, MAY_CHANGE)
        except (ValueError, TypeError, AttributeError):
            return f"{file.name} is not a JSON object"
        return f"holds another run ({difference})" if difference else ""

    def _tidy(self) -> None:
        """Remove the work directory of a finished run that was killed after its last rename."""
        if self._begun():
            self._lock = hold_directory(self.work)
            self._refuse_foreign()
            remove_files(self.work, OURS, LAST)

    # -- begin and end ---------------------------------------------------------------------------------------------------

    def begin(self, n_bytes: int) -> bool:
        """Take hold of the work directory; False if another process finished this very run meanwhile.

        n_bytes: what model and states will need on the disk; OSError if it is not there.
        """
        return self.ranks.on_rank_0(self._begin, n_bytes)

    def _begin(self, n_bytes: int) -> bool:
        self._lock = hold_directory(self.work)
        if self._is_finished():
            remove_files(self.work, OURS, LAST)
            return False
        for file in self.work.iterdir():
            if file.is_dir() and (self.restart or file.suffix == ".tmp" or file.name == "model") and file.name != "replaced":
                shutil.rmtree(file)
            elif self.restart and file.is_file() and file.name not in LAST:
                file.unlink()
        if self.restart and self.out.exists():
            shutil.rmtree(self.work / "replaced", ignore_errors=True)
            os.replace(self.out, self.work / "replaced")  # goes with the work directory, when its successor is whole
        here = sum(file.stat().st_size for file in self.work.glob("state-*/*"))
        check_space(self.work, n_bytes - here, "the trained model and the states on the way to it")
        write_json(self.work / "settings.json", self.settings)
        return True

    def finish(self, policy: "UnifiedModel", dtype: str, history: list[dict[str, Any]]) -> None:
        """Save the model with the record of the run inside it, move it to OUT and drop the work directory.

        history: of all its trainings, for the model card.
        """
        signal.signal(signal.SIGTERM, self._before)  # nothing is lost by dying here: the command repeats this
        self.wait()
        gather_weights(policy, self.ranks)
        self.ranks.on_rank_0(self._finish, policy, dtype, history)

    def _finish(self, policy: "UnifiedModel", dtype: str, history: list[dict[str, Any]]) -> None:
        import torch

        done = self.work / "model"
        policy.save(done, dtype=getattr(torch, dtype))
        (done / "training").mkdir()
        for file in self.work.iterdir():
            if file.is_file() and file.name != "lock":
                with whole_file(done / "training" / file.name) as copy:
                    copy.write(file.read_bytes())
        write_model_card(done, history)
        names = [str(file.relative_to(done)) for file in done.rglob("*") if not file.is_dir()]
        write_json(done / FILES, sorted([*names, FILES]))
        sync_directory(done)
        os.replace(done, self.out)
        sync_directory(self.out.parent)
        remove_files(self.work, OURS, LAST)

    # -- states ----------------------------------------------------------------------------------------------------------

    def resume(self, trained: dict[str, "nn.Parameter"], optimizer: "torch.optim.Optimizer") -> int:
        """Load the newest state into weights and optimizer; returns its step, 0 without one.

        Any number of ranks can read what any other wrote. From now on SIGTERM is obeyed in `after`.
        """
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process needs no group
        self._trained, self._optimizer = trained, optimizer
        self._before = signal.signal(signal.SIGTERM, self._on_sigterm)
        with memory_advice("making the optimizer's moments", "more ranks", self.ranks.device):
            tensors = state_tensors(trained, optimizer)
        state = self.ranks.on_rank_0(self._newest)
        if state is None:
            return 0
        reader = HuggingFaceStorageReader(str(state))
        dcp.load(tensors, storage_reader=reader, process_group=self.ranks.control, no_dist=self.ranks.world == 1)
        step = int(state.name.removeprefix("state-"))
        for parameter in trained.values():
            optimizer.state[parameter]["step"].fill_(step)
        print(f"resumed        after step {step}, from {state}")
        return step

    def _newest(self) -> Path | None:
        """The newest state, checked against its COMPLETE; RunError if it is damaged."""
        states = sorted(self.work.glob("state-" + "[0-9]" * 8))
        if not states:
            return None
        files = {file.name: fingerprint(file) for file in states[-1].glob("*.safetensors")}
        try:
            wanted = parse_json((states[-1] / "COMPLETE").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{states[-1]}: its COMPLETE cannot be read ({error}); add --restart to begin anew") from None
        if difference := ", ".join(name for name in sorted({*files, *wanted}) if files.get(name) != wanted.get(name)):
            raise RunError(f"{states[-1]}: not as it was written ({difference}); add --restart to begin anew")
        return states[-1]

    def after(self, step: int, every: int) -> None:
        """What follows each finished step: a state every `every` steps (0: never), and SIGTERM's wish.

        step: how many are done. Raises Stopped, once the state is on the disk, if any rank was asked to stop.
        """
        failed = self._pending is not None and self._pending.done() and self._pending.exception() is not None
        asked = self.ranks.sum({"stop": float(self._stop), "failed": float(failed)})
        stop = asked["stop"] > 0
        if asked["failed"]:
            self.wait()  # raises: a full disk is worth knowing now
        if stop or (every and step % every == 0):
            self._save(step)
        if stop:
            self.wait()
            raise Stopped(
                f"stopped by SIGTERM after step {step}, whose state is saved in {self.work}; the same command goes on"
            )

    def _on_sigterm(self, *_: Any) -> None:
        self._stop = True

    def _save(self, step: int) -> None:
        """Copy the state to host memory and write it in the background."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

        self.wait()
        tensors = state_tensors(self._trained, self._optimizer)
        directory = self.work / f"state-{step:08d}.tmp"
        n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self.ranks.on_rank_0(self._make_room, directory, n_bytes)
        files, size = {}, 0
        for name, tensor in tensors.items():
            files[name] = size // BYTES_A_FILE + 1
            size += tensor.numel() * tensor.element_size()
        writer = HuggingFaceStorageWriter(str(directory), fqn_to_index_mapping=files, save_distributed=True)
        alone = self.ranks.world == 1
        with memory_advice("copying the state to host memory", "more ranks, or --save-every 0", self.ranks.device):
            saving: Any = dcp.async_save(tensors, storage_writer=writer, process_group=self.ranks.background, no_dist=alone)
        self._pending = self._writer.submit(self._complete, getattr(saving, "upload_completion", saving), directory, n_bytes)

    def _make_room(self, directory: Path, n_bytes: int) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        check_space(self.work, n_bytes, f"the state after step {int(directory.stem[-8:])}")
        directory.mkdir()
        if (metrics := self.work / "metrics.jsonl").exists():
            with open(metrics, "rb") as file:
                os.fsync(file.fileno())

    def _complete(self, saving: Future, directory: Path, n_bytes: int) -> None:
        """In the background: wait for all ranks' files, then (rank 0) COMPLETE, the final name, and away with the old."""
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            saving.result()
        except CheckpointException as error:  # no Exception; holds one error a rank
            raise write_error(error, directory) from error
        if not self.ranks.is_rank_0:
            return
        files = {file.name: fingerprint(file) for file in sorted(directory.glob("*.safetensors"))}
        if (found := sum(size for size, _ in files.values())) < n_bytes:
            raise OSError(errno.EIO, f"the state holds {found} bytes instead of {n_bytes}", str(directory))
        write_json(directory / "COMPLETE", files)
        sync_directory(directory)
        os.replace(directory, directory.with_suffix(""))
        sync_directory(self.work)
        for state in self.work.iterdir():
            if re.fullmatch(rf"{STATE}(\.tmp)?", state.name) and state != directory.with_suffix(""):
                shutil.rmtree(state)

    def wait(self) -> None:
        """Until the state being written is whole; raises on all ranks what went wrong with it on any."""
        pending, self._pending = self._pending, None
        error = pending.exception() if pending is not None else None
        for failure in self.ranks.gather([error] if error else []):  # of one rank or of all
            failure.everywhere = True
            raise failure


def refuse_to_replace(out: Path) -> None:
    """Raise RunError, which names it, for anything in a result that its run did not put there."""
    if not out.exists():
        return
    if out.is_symlink() or not recognised(out / "training" / "settings.json", MARKS):
        raise RunError(f"--out {out}: is a link, or training/settings.json no run's, so --restart does not replace it")
    try:
        ours = {*map(str, parse_json((out / FILES).read_text(encoding="utf-8")))}
    except (OSError, ValueError, TypeError) as error:  # earlier versions kept no list
        raise RunError(f"{out / FILES}: no list of the run's files ({error}), so --restart does not replace them") from None
    if foreign := foreign_file(out, ours.__contains__):
        raise RunError(f"{foreign}: is not of the run in {out}, so --restart does not replace it; move it away")


def state_tensors(trained: dict[str, "nn.Parameter"], optimizer: "torch.optim.Optimizer") -> dict[str, "Tensor"]:
    """The tensors of a state by name: each trained weight and AdamW's two moments of it, created where there are none."""
    import torch

    tensors = {}
    for name, parameter in trained.items():
        if not optimizer.state[parameter]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
        moments = optimizer.state[parameter]
        tensors[f"{name}.weight"] = parameter.detach()
        tensors[f"{name}.exp_avg"], tensors[f"{name}.exp_avg_sq"] = moments["exp_avg"], moments["exp_avg_sq"]
    return tensors


def gather_weights(policy: "UnifiedModel", ranks: Ranks) -> None:
    """Undo sharding: rank 0's policy holds whole weights afterwards, on the CPU. The last thing done with the others'."""
    if ranks.world == 1:
        return
    from torch import nn
    from torch.distributed.tensor import DTensor

    branch: Any = policy.branch  # sharding.shard has made it one of FSDP's
    branch.reshard()
    for module in policy.model.modules():
        parameters: dict[str, Any] = module._parameters
        for name, parameter in parameters.items():
            if isinstance(parameter, DTensor):
                own: Any = parameter.detach()
                whole = own.full_tensor()  # all ranks take part
                if ranks.is_rank_0:
                    parameters[name] = nn.Parameter(whole.cpu(), requires_grad=False)


def fingerprint(file: Path) -> list[Any]:
    """Size in bytes and hash of a file, as JSON values."""
    return [file.stat().st_size, content_hash(file)]


def write_error(error: Any, directory: Path) -> OSError:
    """The file system's error inside a CheckpointException, which every rank gets; EIO if there is none."""
    causes = [cause for cause, _ in error.failures.values()]
    code = next((cause.errno for cause in causes if isinstance(cause, OSError)), errno.EIO)
    return OSError(code, f"the state cannot be written: {causes[0]}", str(directory))
