"""What sft.py and dpo.py share: arguments, the order of the data, the schedule, the optimizer, the record of a run.

The losses and the loops stay in the two scripts, where they can be read. A training run works in ``OUT.training/``
(its arguments, metrics and caches) and its result appears at ``OUT`` whole, as a checkpoint that plain transformers
loads, with the record of the run in ``OUT/training/``.
"""

import argparse
import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # torch takes seconds to import; arguments and files are checked before
    import torch
    from torch import Tensor, nn


class TrainingError(RuntimeError):
    """Training cannot go on: a non-finite loss, or a policy that is not its reference at step 0."""

    exit_code = 1


class RunError(ValueError):
    """The output directory or the model does not fit this run; says what differs."""

    exit_code = 2


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def add_arguments(parser: argparse.ArgumentParser, data_flag: str, epochs: int, learning_rate: float) -> None:
    """The flags that sft.py and dpo.py have in common."""
    files = parser.add_argument_group("files")
    files.add_argument("--model", help=f"checkpoint to train (default: the model that drew {data_flag}, by its header)")
    files.add_argument("--out", type=Path, help=f"directory to make (default: beside {data_flag}, named after it)")
    files.add_argument("--other-model", action="store_true", help="allow a --model that did not draw the pictures")
    files.add_argument("--restart", action="store_true", help="replace what --out and its work directory hold")
    files.add_argument(
        "--save-dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="storage type (default float32: small updates are less than a bfloat16 weight can show)",
    )
    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--epochs", type=int, default=epochs, help=f"passes over the data (default {epochs}, as the paper)")
    optimization.add_argument("--max-steps", type=int, default=0, help="stop after so many steps; 0 = no limit (default 0)")
    optimization.add_argument("--batch-size", type=int, default=64, help="examples per optimizer step, all ranks together (default 64)")
    optimization.add_argument("--micro-batch", type=int, help="examples per forward pass and rank (default 8, or the batch size)")
    optimization.add_argument("--lr", type=float, default=learning_rate, help=f"peak learning rate (default {learning_rate:g})")
    optimization.add_argument("--warmup", type=float, default=0.05, help="share of the steps with a rising rate (default 0.05)")
    optimization.add_argument("--weight-decay", type=float, default=0.0, help="AdamW's decoupled weight decay (default 0)")
    optimization.add_argument("--max-grad-norm", type=float, default=1.0, help="gradients are clipped to this norm (default 1)")
    optimization.add_argument("--seed", type=int, default=0, help="order of the data and caption dropout (default 0)")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--train",
        choices=["language-model", "drawing"],
        default="language-model",
        help="what learns: the decoder layers and final norm (default, the paper's best), or also the image-token "
        "embeddings, aligner and head",
    )
    model.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        help="recompute activations: less memory, a third slower (default: on a GPU)",
    )
    model.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with code 2, naming the flag and the value, for numbers that cannot be trained with."""
    if args.micro_batch is None:
        args.micro_batch = min(8, args.batch_size)
    for name in ("epochs", "batch_size", "micro_batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, found {getattr(args, name)}")
    for name in ("lr", "max_grad_norm"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be greater than 0, found {getattr(args, name)}")
    for name in ("weight_decay", "max_steps", "seed"):
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be at least 0, found {getattr(args, name)}")
    if not 0 <= args.warmup < 1:
        parser.error(f"--warmup must be at least 0 and less than 1, found {args.warmup}")
    if not 0 <= args.uncond_prob < 1:
        parser.error(f"--uncond-prob must be at least 0 and less than 1, found {args.uncond_prob}")
    if args.micro_batch > args.batch_size:
        parser.error(f"--micro-batch {args.micro_batch} is more than --batch-size {args.batch_size}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error(f"training runs as one process, but WORLD_SIZE is {os.environ['WORLD_SIZE']}")


# ---------------------------------------------------------------------------------------------------------------------
# The run's directory


def output_directory(parser: argparse.ArgumentParser, out: Path | None, flag: str, data: Path, suffix: str) -> Path:
    """--out, or the directory beside the data that is named after it."""
    if not data.name:
        parser.error(f"{flag} {data}: a file name is wanted")
    out = out or data.with_name(data.stem + suffix)
    if not out.name:
        parser.error(f"--out {out}: a directory's name is wanted")
    return out


def model_name(given: str | None, data: Path, metadata: dict[str, str]) -> str:
    """--model, or the model that drew the data; raises RunError where neither is there."""
    name = given or metadata.get("model")
    if not name:
        raise RunError(f"{data}: its header names no model; give --model")
    if not given and Path(name).is_absolute() and not Path(name).is_dir():
        raise RunError(f"{data}: was drawn by {name}, which is not there any more; give --model")
    return name


class RunDirectory:
    """Where a run works (``OUT.training/``) and where its result appears (``OUT``).

    settings: everything that decides the result, JSON values. `finished` is true when OUT already holds this very run.
    Raises RunError when OUT or its work directory holds another one, naming what differs.
    """

    def __init__(self, out: Path, settings: dict[str, Any], restart: bool):
        self.out, self.settings = out, settings
        self.work = out.with_name(out.name + ".training")
        if not out.parent.is_dir():
            raise RunError(f"--out {out}: its parent directory {out.parent} does not exist")
        self.finished = False
        self._stale = restart and self.work.exists()
        if restart:
            if out.exists() and not (out / "training" / "settings.json").is_file():
                raise RunError(f"--out {out}: holds no run of this script, so --restart does not replace it")
            return
        self.finished = out.exists() and self._same(out / "training" / "settings.json")
        if not self.finished and self.work.is_dir() and any(self.work.iterdir()):
            self._same(self.work / "settings.json")

    def _same(self, file: Path) -> bool:
        """True if `file` holds these settings; RunError with the list of differences otherwise."""
        where = file.parent.parent if file.parent.name == "training" else file.parent
        if not file.is_file():
            raise RunError(f"{where}: exists, but holds no run of this script; choose another --out or add --restart")
        found = json.loads(file.read_text(encoding="utf-8"))
        differences = [
            f"{key} was {found.get(key)!r}, now {self.settings.get(key)!r}"
            for key in sorted({*found, *self.settings})
            if found.get(key) != self.settings.get(key)
        ]
        if differences:
            raise RunError(f"{where}: holds another run ({'; '.join(differences)}); choose another --out or add --restart")
        return True

    def begin(self) -> None:
        """Make the work directory and save the settings in it."""
        if self._stale:
            shutil.rmtree(self.work)
        self.work.mkdir(exist_ok=True)
        unfinished = self.work / "settings.json.tmp"
        unfinished.write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(self.work / "settings.json")
        (self.work / "metrics.jsonl").unlink(missing_ok=True)

    def finish(self, policy: Any, dtype: str | None) -> None:
        """Save the model with the record of the run inside it, then move it to OUT and drop the work directory."""
        import torch

        done = self.work / "model"
        policy.save(done, dtype=getattr(torch, dtype) if dtype else None)
        (done / "training").mkdir()
        for file in self.work.iterdir():
            if file.is_file():
                shutil.copy2(file, done / "training")
        if self.out.exists():
            shutil.rmtree(self.out)
        os.replace(done, self.out)
        shutil.rmtree(self.work)


def run_settings(args: argparse.Namespace, script: str, data_hash: str, model_hash: str) -> dict[str, Any]:
    """Everything that decides the trained weights, as JSON values: a run is reused only if all of it agrees."""
    places = ("data", "pairs", "model", "out", "restart", "device", "other_model")
    flags = {key: value for key, value in vars(args).items() if key not in places}
    return flags | {"script": script, "data_hash": data_hash, "model_hash": model_hash}


def check_model(path: str, identity: dict[str, str], metadata: dict[str, str], data: Path, allowed: bool) -> None:
    """Refuse to train one model on another's pictures by mistake: DPO's reference is then not what drew them.

    identity is the loaded model's, metadata the data's header. Raises RunError naming both models.
    """
    if identity["model_hash"] != metadata.get("model_hash") and not allowed:
        raise RunError(
            f"{data}: was drawn by {metadata.get('model')} (weights {metadata.get('model_hash')}), but --model is {path} "
            f"(weights {identity['model_hash']}); use that model, or add --other-model"
        )
    for key in ("codebook_size", "image_tokens"):
        if metadata.get(key) != identity[key]:
            raise RunError(f"{data}: {key} is {metadata.get(key)}, but {path} has {identity[key]}")


# ---------------------------------------------------------------------------------------------------------------------
# Order, schedule, optimizer


def batches(n: int, batch_size: int, epochs: int, seed: int, max_steps: int = 0) -> list[np.ndarray]:
    """The examples of each optimizer step, as index arrays: every epoch in a new order, its last batch may be smaller.

    Depends on (n, batch_size, epochs, seed) alone. Nothing is dropped.
    """
    steps = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(n)
        steps += [order[start : start + batch_size] for start in range(0, n, batch_size)]
    return steps[:max_steps] if max_steps else steps


def micro_batches(indices: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Cut one step's examples into forward passes."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def dropped_captions(indices: np.ndarray, probability: float, seed: int, step: int) -> np.ndarray:
    """Which of a step's examples see the unconditional prompt: bool (B,), from (seed, step) alone."""
    return np.random.default_rng([seed, step, 1]).random(len(indices)) < probability


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear rise over the first warmup * steps, then a cosine fall that would reach 0 one step after the last."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising + 1) / (steps - rising + 1)))


def make_optimizer(parameters: dict[str, "nn.Parameter"], weight_decay: float) -> "torch.optim.Optimizer":
    """AdamW (Loshchilov and Hutter 2019) with betas 0.9, 0.95; norms and biases, the 1-D tensors, are not decayed."""
    import torch

    groups = [
        {"params": [p for p in parameters.values() if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters.values() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=(0.9, 0.95), fused=True)


def update(
    optimizer: "torch.optim.Optimizer", parameters: dict[str, "nn.Parameter"], rate: float, max_norm: float
) -> "Tensor":
    """Clip, step, clear: returns the gradient norm before clipping. A non-finite gradient changes nothing."""
    import torch

    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), max_norm)
    if torch.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def check_finite(step: int, ids: list[str], **numbers: float) -> None:
    """Stop with TrainingError, naming the step and its examples, if a number is NaN or infinite."""
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise TrainingError(f"step {step}: {name} is {value}; examples of the step: {', '.join(ids)}")


def prepare(policy: Any, args: argparse.Namespace) -> dict[str, "nn.Parameter"]:
    """Freeze what does not learn, switch checkpointing on, print the facts; returns the trained parameters by name."""
    trained = policy.trainable_parameters(args.train.replace("-", "_"))
    checkpointing = args.gradient_checkpointing
    if autocasts(policy.device) if checkpointing is None else checkpointing:
        llama = policy.llama  # the method's name changed in transformers 5
        enable = getattr(llama, "activation_checkpointing_enable", None) or llama.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    policy.llama.train()  # no dropout in Janus; checkpointing is active only in training mode
    n_trained = sum(parameter.numel() for parameter in trained.values())
    n_all = sum(parameter.numel() for parameter in policy.model.parameters())
    print(f"parameters     {n_trained:,} trained ({args.train}), {n_all - n_trained:,} frozen")
    print(f"device         {policy.device}, {'bf16 compute, ' if autocasts(policy.device) else ''}float32 weights")
    return trained


def autocasts(device: "torch.device") -> bool:
    """Whether forward passes run in bfloat16: on a GPU. Weights, gradients and the optimizer stay float32."""
    return device.type == "cuda"


def compute_type(device: "torch.device") -> "torch.autocast":
    """The context for forward passes: bfloat16 on a GPU, unchanged float32 on a CPU."""
    import torch

    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocasts(device))


# ---------------------------------------------------------------------------------------------------------------------
# What a run says


def peak_memory_gb(device: "torch.device") -> float:
    """The most memory held so far, in GB: the GPU's allocator, or the process's resident set on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Progress:
    """A progress bar with the numbers that matter, and all of them in metrics.jsonl, one line a step."""

    def __init__(self, path: Path, steps: int, shown: tuple[str, ...]):
        from tqdm import tqdm

        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._bar = tqdm(total=steps, unit="step", dynamic_ncols=True)
        self._shown, self._before = shown, time.perf_counter()

    def step(self, images: int, **numbers: float) -> None:
        """Record one step in which `images` pictures were trained on."""
        now = time.perf_counter()
        numbers["images_per_s"] = images / (now - self._before)
        self._before = now
        rounded = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in numbers.items()}
        self._file.write(json.dumps(rounded, allow_nan=False) + "\n")
        self._file.flush()
        self._bar.set_postfix({key: f"{numbers[key]:.3g}" for key in self._shown}, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Finish the bar and the file."""
        self._bar.close()
        self._file.close()
