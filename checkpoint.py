"""Where a training run works, what it keeps to be able to go on, and how its result appears.

    OUT.training/               one run's own directory, gone when the run is done
        settings.json           what decides the result; a command that differs is refused
        metrics.jsonl           one line a step
        reference.safetensors   dpo.py: log-probs of the model before training
        state-00000200/         weights, optimizer and step after 200 steps: the newest whole one is resumed from
    OUT/                        the result, a checkpoint that plain transformers loads; appears whole
        training/               the record of the run: settings.json, metrics.jsonl, ...

A state is written by all ranks together (`torch.distributed.checkpoint`, safetensors files, no pickle), in the background,
into ``state-00000200.tmp/``; COMPLETE, with size and SHA-256 of every file, comes last; then the directory takes its
final name, and only then the state before it goes. Only trained weights are in it. There is nothing else to keep: the
order of the data, dropped captions and the learning rate are functions of the seed and the step.
"""

import errno
import json
import os
import shutil
import signal
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from records import check_parent, check_space, content_hash, hold_directory, parse_json, sync_directory, write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ranks import Ranks

BYTES_A_FILE = 4 * 2**30  # of a state: a file is put together in memory before it is written
HOW = ("micro_batch", "gradient_checkpointing", "save_every", "replicate")  # decide speed and memory: may change on the way


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

    def __init__(self, out: Path, settings: dict[str, Any], restart: bool, ranks: "Ranks"):
        self.out, self.settings, self.ranks = out, settings, ranks
        self.work = out.with_name(out.name + ".training")
        self.restart = restart and not ranks.restarted  # once: torchrun's restarts repeat the command
        self._writer = ThreadPoolExecutor(1)
        self._pending: Future | None = None
        self._stop = False  # set by SIGTERM
        self.finished = ranks.on_first(self._look)

    def _look(self) -> bool:
        check_parent(self.out)
        if self.restart:
            if self.out.exists() and not (self.out / "training" / "settings.json").is_file():
                raise RunError(f"--out {self.out}: holds no run of this script, so --restart does not replace it")
            return False
        if self.out.exists():
            self._compare(self.out / "training" / "settings.json")
            shutil.rmtree(self.work, ignore_errors=True)  # killed after the last rename
            return True
        if self.work.is_dir() and any(file.name != "lock" for file in self.work.iterdir()):
            self._compare(self.work / "settings.json")
        return False

    def _compare(self, file: Path) -> None:
        """Raise RunError with the list of differences unless `file` holds these settings."""
        where = file.parent.parent if file.parent.name == "training" else file.parent
        if not file.is_file():
            raise RunError(f"{where}: exists, but holds no run of this script; choose another --out or add --restart")
        try:
            found = parse_json(file.read_text(encoding="utf-8"))
            keys = sorted({*found, *self.settings} - {*HOW})
        except (ValueError, TypeError):
            raise RunError(f"{file}: not a JSON object; choose another --out or add --restart") from None
        differences = [
            f"{key} was {found.get(key)!r}, now {self.settings.get(key)!r}"
            for key in keys
            if found.get(key) != self.settings.get(key)
        ]
        if differences:
            raise RunError(f"{where}: holds another run ({'; '.join(differences)}); choose another --out or add --restart")

    # -- begin and end ---------------------------------------------------------------------------------------------------

    def begin(self, n_bytes: int) -> bool:
        """Take hold of the work directory; False if another process finished this very run meanwhile.

        n_bytes: what model and states will need on the disk; OSError if it is not there.
        """
        return self.ranks.on_first(self._begin, n_bytes)

    def _begin(self, n_bytes: int) -> bool:
        self._lock = hold_directory(self.work)
        if self._look():
            return False
        for file in self.work.iterdir():
            if file.is_dir() and (self.restart or file.suffix == ".tmp" or file.name == "model"):
                shutil.rmtree(file)
            elif self.restart and file.name != "lock":
                file.unlink()
        here = sum(file.stat().st_size for file in self.work.rglob("*") if file.is_file())
        check_space(self.work, n_bytes - here, "the trained model and the states on the way to it")
        write_json(self.work / "settings.json", self.settings)
        return True

    def finish(self, policy: Any, dtype: str) -> None:
        """Save the model with the record of the run inside it, move it to OUT and drop the work directory."""
        signal.signal(signal.SIGTERM, self._before)  # nothing is lost by dying here: the command repeats this
        self.wait()
        gather_weights(policy, self.ranks)
        self.ranks.on_first(self._finish, policy, dtype)

    def _finish(self, policy: Any, dtype: str) -> None:
        import torch

        done = self.work / "model"
        policy.save(done, dtype=getattr(torch, dtype))
        (done / "training").mkdir()
        for file in self.work.iterdir():
            if file.is_file() and file.name != "lock":
                shutil.copy2(file, done / "training")
        if self.out.exists():
            shutil.rmtree(self.out)
        os.replace(done, self.out)
        sync_directory(self.out.parent)
        shutil.rmtree(self.work, ignore_errors=True)

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
        tensors = state_tensors(trained, optimizer)
        state = self.ranks.on_first(self._newest)
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
        """The newest state, checked against its COMPLETE."""
        states = sorted(self.work.glob("state-" + "[0-9]" * 8))
        if not states:
            return None
        wanted = parse_json((states[-1] / "COMPLETE").read_text(encoding="utf-8"))
        if damaged := [name for name, entry in wanted.items() if fingerprint(states[-1] / name) != entry]:
            raise RunError(f"{states[-1]}: {damaged[0]} is not as it was written; add --restart to begin anew")
        return states[-1]

    def after(self, step: int, every: int) -> None:
        """What follows each finished step: a state every `every` steps (0: never), and SIGTERM's wish.

        step: how many are done. Raises Stopped, once the state is on the disk, if any rank was asked to stop.
        """
        stop = self.ranks.sum({"stop": float(self._stop)})["stop"] > 0
        if stop or (every and step % every == 0):
            self._save(step)
        elif self._pending is not None and self._pending.done():
            self._pending.result()  # a full disk is worth knowing now
        if stop:
            self.wait()
            raise Stopped(f"stopped by SIGTERM after step {step}, whose state is saved in {self.work}; the same command goes on")

    def _on_sigterm(self, *_: Any) -> None:
        self._stop = True

    def _save(self, step: int) -> None:
        """Copy the state to host memory and write it in the background."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

        self.wait()
        tensors = state_tensors(self._trained, self._optimizer)
        directory = self.work / f"state-{step:08d}.tmp"
        self.ranks.on_first(self._make_room, directory, sum(t.numel() * t.element_size() for t in tensors.values()))
        files, size = {}, 0
        for name, tensor in tensors.items():
            files[name] = size // BYTES_A_FILE + 1
            size += tensor.numel() * tensor.element_size()
        writer = HuggingFaceStorageWriter(str(directory), fqn_to_index_mapping=files, save_distributed=True)
        alone = self.ranks.world == 1
        saving = dcp.async_save(tensors, storage_writer=writer, process_group=self.ranks.background, no_dist=alone)
        self._pending = self._writer.submit(self._complete, getattr(saving, "upload_completion", saving), directory)

    def _make_room(self, directory: Path, n_bytes: int) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        check_space(self.work, n_bytes, f"the state after step {int(directory.stem[-8:])}")
        directory.mkdir()
        if (metrics := self.work / "metrics.jsonl").exists():
            with open(metrics, "rb") as file:
                os.fsync(file.fileno())

    def _complete(self, saving: Future, directory: Path) -> None:
        """In the background: wait for all ranks' files, then (rank 0) COMPLETE, the final name, and away with the old."""
        try:
            saving.result()
        except BaseException as error:  # CheckpointException is no Exception; it holds one error a rank
            raise write_error(error, directory) from error
        if not self.ranks.first:
            return
        files = sorted(directory.glob("*.safetensors"))
        write_json(directory / "COMPLETE", {file.name: fingerprint(file) for file in files})
        sync_directory(directory)
        os.replace(directory, directory.with_suffix(""))
        sync_directory(self.work)
        for state in self.work.glob("state-*"):
            if state != directory.with_suffix(""):
                shutil.rmtree(state)

    def wait(self) -> None:
        """Until the state being written is whole; raises what went wrong with it."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()
        self.ranks.barrier()


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


def gather_weights(policy: Any, ranks: "Ranks") -> None:
    """Undo sharding: rank 0's policy holds whole weights afterwards, on the CPU. The last thing done with the others'."""
    if ranks.world == 1:
        return
    from torch import nn
    from torch.distributed.tensor import DTensor

    policy.branch.reshard()
    for module in policy.model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                whole = parameter.detach().full_tensor()  # all ranks take part
                if ranks.first:
                    module._parameters[name] = nn.Parameter(whole.cpu(), requires_grad=False)


def fingerprint(file: Path) -> list[Any]:
    """Size in bytes and hash of a file, as JSON values; of one that is not there, [0, ""]."""
    return [file.stat().st_size, content_hash(file)] if file.is_file() else [0, ""]


def write_error(error: BaseException, directory: Path) -> OSError:
    """The file system's error inside one of torch.distributed.checkpoint's, which every rank gets; EIO if there is none."""
    causes = [cause for cause, _ in getattr(error, "failures", {}).values()]
    code = next((cause.errno for cause in causes if isinstance(cause, OSError)), errno.EIO)
    told = OSError(code, f"the state cannot be written: {causes[0] if causes else error}", str(directory))
    told.everywhere = True  # type: ignore[attr-defined]
    return told
