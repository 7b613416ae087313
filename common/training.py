"""What sft.py and dpo.py share: arguments, the order of the data, the schedule, sharding, the optimizer, what is printed.

The losses and the loops stay in the two scripts, where they can be read. Where a run keeps its files: checkpoint.py.

One step is the same on any number of ranks: its examples are shared out (`passes`), every loss is divided once by the
number of tokens or pairs of the whole step, and gradients are summed. Only the order of float32 additions differs.
"""

import argparse
import contextlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.command import BadInput
from common.ranks import Ranks, memory

if TYPE_CHECKING:  # torch takes seconds to import; arguments and files are checked before
    import torch
    from torch import Tensor, nn

    from model import UnifiedModel


class TrainingError(RuntimeError):
    """Training cannot go on: a non-finite loss, or a policy that is not its reference at step 0."""

    exit_code = 1
    everywhere = True  # all ranks raise it together


class DataError(ValueError):
    """The data and the model do not belong together; names both."""

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
    optimization.add_argument(
        "--epochs", type=int, default=epochs, help=f"passes over the data (default {epochs}, as the paper)"
    )
    optimization.add_argument("--max-steps", type=int, default=0, help="stop after so many steps; 0 = no limit (default 0)")
    optimization.add_argument(
        "--batch-size", type=int, default=64, help="examples per optimizer step, all ranks together (default 64)"
    )
    optimization.add_argument(
        "--micro-batch",
        type=int,
        help="examples per forward pass and rank; Show-o runs each in --mask-draws copies (default 8, or the batch size)",
    )
    optimization.add_argument("--lr", type=float, default=learning_rate, help=f"peak learning rate (default {learning_rate:g})")
    optimization.add_argument("--warmup", type=float, default=0.05, help="share of the steps with a rising rate (default 0.05)")
    optimization.add_argument("--weight-decay", type=float, default=0.0, help="AdamW's decoupled weight decay (default 0)")
    optimization.add_argument("--max-grad-norm", type=float, default=1.0, help="gradients are clipped to this norm (default 1)")
    optimization.add_argument(
        "--seed", type=int, default=0, help="order of the data, caption dropout and, for Show-o, masks (default 0)"
    )
    optimization.add_argument(
        "--mask-draws",
        type=int,
        help="random masks that a picture's log-probs are estimated from, for families that estimate them: time and memory "
        "grow with it, the variance falls (default the family's own)",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--train",
        choices=["language-model", "drawing"],
        default="language-model",
        help="what learns: the decoder layers and final norm (default, the paper's best), or also the image-token "
        "embeddings, aligner and head (of Show-o: the tables at both ends, which words share)",
    )
    model.add_argument(
        "--layers",
        type=layer_range,
        metavar="FIRST-LAST",
        help="of what learns only these decoder layers, counted from 0 (default: all)",
    )
    model.add_argument(
        "--lora-rank",
        type=int,
        default=0,
        help="train additions of this rank to the decoder layers' matrices, merged when saved: for small GPUs, and with ten "
        "times the --lr; 0 = train the matrices themselves (default 0)",
    )
    model.add_argument("--lora-alpha", type=float, help="the addition's scale is this over the rank (default twice the rank)")
    model.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        help="recompute activations: less memory, a third slower (default: on a GPU where they would not fit)",
    )
    model.add_argument("--compile", action="store_true", help="torch.compile the decoder layers: minutes at first, then faster")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    machine.add_argument(
        "--save-every", type=int, default=100, help="steps from state to state; 0 = only on SIGTERM (default 100)"
    )
    machine.add_argument(
        "--replicate",
        type=int,
        default=1,
        help="groups of ranks that each hold the whole model; within a group it is sharded. The number of nodes, where the "
        "network between them is slow (default 1: sharded over all ranks)",
    )


def layer_range(text: str) -> list[int]:
    """`FIRST-LAST` as two numbers; argparse reports a ValueError."""
    first, last = map(int, text.split("-"))
    if not 0 <= first <= last:
        raise ValueError
    return [first, last]


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
    for name in ("weight_decay", "max_steps", "seed", "save_every"):
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be at least 0, found {getattr(args, name)}")
    if args.mask_draws is not None and args.mask_draws < 1:
        parser.error(f"--mask-draws must be at least 1, found {args.mask_draws}")
    if args.lora_rank < 0:
        parser.error(f"--lora-rank must be at least 0, found {args.lora_rank}")
    if args.lora_rank and args.train != "language-model":
        parser.error(f"--lora-rank {args.lora_rank} adapts the decoder layers; --train {args.train} wants more")
    if args.lora_alpha is None:
        args.lora_alpha = 2.0 * args.lora_rank
    if not 0 <= args.lora_alpha < math.inf or (args.lora_rank and not args.lora_alpha):
        parser.error(f"--lora-alpha must be greater than 0, found {args.lora_alpha}")
    if not 0 <= args.warmup < 1:
        parser.error(f"--warmup must be at least 0 and less than 1, found {args.warmup}")
    if not 0 <= args.uncond_prob < 1:
        parser.error(f"--uncond-prob must be at least 0 and less than 1, found {args.uncond_prob}")
    if args.micro_batch > args.batch_size:
        parser.error(f"--micro-batch {args.micro_batch} is more than --batch-size {args.batch_size}")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if args.replicate < 1 or world % args.replicate:
        parser.error(f"--replicate must divide the number of processes, {world}, found {args.replicate}")


# ---------------------------------------------------------------------------------------------------------------------
# Which data, which model, which run


def output_directory(parser: argparse.ArgumentParser, out: Path | None, flag: str, data: Path, suffix: str) -> Path:
    """--out, or the directory beside the data that is named after it."""
    if not data.name:
        parser.error(f"{flag} {data}: a file name is wanted")
    out = out or data.with_name(data.stem + suffix)
    if not out.name:
        parser.error(f"--out {out}: a directory's name is wanted")
    return out


def model_name(given: str | None, data: Path, metadata: dict[str, str]) -> str:
    """--model, or the model that drew the data; raises DataError where neither is there."""
    name = given or metadata.get("model")
    if not name:
        raise DataError(f"{data}: its header names no model; give --model")
    if not given and Path(name).is_absolute() and not Path(name).is_dir():
        raise DataError(f"{data}: was drawn by {name}, which is not there any more; give --model")
    return name


def run_settings(args: argparse.Namespace, script: str, data_hash: str, model_hash: str) -> dict[str, Any]:
    """Everything that decides the trained weights, as JSON values: a run is reused only if all of it agrees."""
    places = ("data", "pairs", "model", "out", "restart", "device", "other_model")
    flags = {key: value for key, value in vars(args).items() if key not in places}
    return flags | {"script": script, "data_hash": data_hash, "model_hash": model_hash}


def check_model(path: str, identity: dict[str, str], metadata: dict[str, str], data: Path, allowed: bool) -> None:
    """Refuse to train one model on another's pictures by mistake: DPO's reference is then not what drew them.

    identity is the loaded model's, metadata the data's header. Raises DataError naming both models.
    """
    if identity["model_hash"] != metadata.get("model_hash") and not allowed:
        raise DataError(
            f"{data}: was drawn by {metadata.get('model')} (weights {metadata.get('model_hash')}), but --model is {path} "
            f"(weights {identity['model_hash']}); use that model, or add --other-model"
        )
    for key in ("codebook_size", "image_tokens"):
        if metadata.get(key) != identity[key]:
            raise DataError(f"{data}: {key} is {metadata.get(key)}, but {path} has {identity[key]}")


def check_prompts(policy: "UnifiedModel", rows: list[dict]) -> None:
    """Raise the model's PromptError for a prompt that it cannot be given, before any work is done."""
    for prompt in dict.fromkeys(row["prompt"] for row in rows):
        policy.prompt_ids(prompt)


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


def passes(n: int, size: int, rank: int, world: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Share n examples of a step out among the ranks and cut a rank's share into forward passes of at most `size`.

    Yields (places, counted): which of the n examples, int (b,), and whether each is to be counted, bool (b,). Sharded
    ranks must run equally many passes; one whose share is used up runs an example that is not counted.
    """
    mine = np.arange(rank, n, world)
    for start in range(0, -(-n // world), size):  # the first rank's share is the largest
        part = mine[start : start + size]
        yield (part, np.ones(len(part), bool)) if len(part) else (np.zeros(1, int), np.zeros(1, bool))


def restart_randomness(seed: int, step: int, rank: int) -> None:
    """Make torch's own random numbers a function of the step: nothing about them is left to be saved and restored.

    No family draws any in training; a checkpoint whose config turns dropout on does.
    """
    import torch

    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank, 2]).generate_state(1, np.uint64)[0] >> 1))


def draw_seeds(indices: Iterable[int], seed: int, step: int = 0) -> list[int]:
    """A seed an example, from (seed, step, its place in the data): for families whose log-probs are estimated from draws."""
    states = [np.random.SeedSequence([seed, step, int(index), 3]).generate_state(1, np.uint64) for index in indices]
    return [int(state[0]) for state in states]


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


def update(optimizer: "torch.optim.Optimizer", parameters: dict[str, "nn.Parameter"], rate: float, max_norm: float) -> "Tensor":
    """Clip, step, clear: returns the gradient norm before clipping, over all ranks. A non-finite one changes nothing."""
    import torch

    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), max_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # sharded gradients
    if torch.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def check_finite(step: int, numbers: dict[str, float], ids: list[str], ranks: Ranks, guilty: Sequence[str] = ()) -> None:
    """Stop with TrainingError if a number of a step is NaN or infinite; all ranks call it with the same numbers.

    ids: the step's examples. guilty: those on this rank known to be the cause; where no rank knows any, all are named.
    """
    for name, value in numbers.items():
        if not math.isfinite(value):
            named = sorted(set(ranks.gather(list(guilty)))) or ids
            raise TrainingError(f"step {step}: {name} is {value}; examples: {', '.join(named)}; the last state is kept")


def weight_type(args: argparse.Namespace, device: "torch.device") -> "torch.dtype":
    """The type to load a model in for training: float32, but bfloat16 for weights that a GPU only reads (--lora-rank)."""
    import torch

    return torch.bfloat16 if args.lora_rank and autocasts(device) else torch.float32


def prepare(policy: "UnifiedModel", args: argparse.Namespace, ranks: Ranks, pictures: int) -> dict[str, "nn.Parameter"]:
    """Freeze what does not learn, adapt, shard, recompute, compile, print the facts; returns the trained parameters by name.

    pictures: how many of them an example holds.
    """
    scope = args.train.replace("-", "_")
    if args.lora_rank:
        from families.lora import add_adapters

        add_adapters(policy.blocks, args.lora_rank, args.lora_alpha, args.seed)
        scope = "adapters"
    trained = only_layers(policy, policy.trainable_parameters(scope), args.layers)
    n_trained = sum(parameter.numel() for parameter in trained.values())
    n_all = sum(parameter.numel() for parameter in policy.model.parameters())
    if ranks.world > 1:
        shard(policy, ranks, args.replicate)
        trained = only_layers(policy, policy.trainable_parameters(scope), args.layers)  # the same names, now sharded
    if args.gradient_checkpointing is None:
        pictures *= args.micro_batch
        args.gradient_checkpointing = ranks.on_first(must_recompute, policy, n_trained, pictures, ranks.world)
    if args.gradient_checkpointing:
        policy.recompute_activations()
    policy.branch.train()  # no dropout in any family; checkpointing is active only in training mode
    if args.compile:
        for block in policy.blocks:  # one by one: they are alike, so one compilation serves them all
            block.compile()
    groups = f", {args.replicate} replicas" if args.replicate > 1 else ""
    what = f"adapters of rank {args.lora_rank}" if args.lora_rank else args.train
    what += f", layers {args.layers[0]} to {args.layers[1]}" if args.layers else ""
    recomputed = ", activations recomputed" if args.gradient_checkpointing else ""
    weights = str(next(iter(policy.branch.parameters())).dtype).removeprefix("torch.")
    print(f"parameters     {n_trained:,} trained ({what}), {n_all - n_trained:,} frozen")
    print(
        f"device         {policy.device}, {'bf16 compute, ' if autocasts(policy.device) else ''}{weights} weights{recomputed}"
    )
    if policy.draws:
        print(f"log-probs      estimated from {policy.draws} masks a picture")
    print(f"ranks          {ranks.world}{groups}; micro-batch {args.micro_batch}, batch {args.batch_size} over all ranks")
    return trained


def only_layers(
    policy: "UnifiedModel", trained: dict[str, "nn.Parameter"], layers: list[int] | None
) -> dict[str, "nn.Parameter"]:
    """Those of the trained parameters that lie in decoder layers first .. last, the others being frozen; all for None."""
    if layers is None:
        return trained
    first, last = layers
    if last >= len(policy.blocks):
        raise BadInput(f"--layers {first}-{last}: {policy.name} has layers 0 to {len(policy.blocks) - 1}")
    kept = {id(parameter) for block in policy.blocks[first : last + 1] for parameter in block.parameters()}
    for parameter in trained.values():
        parameter.requires_grad_(id(parameter) in kept)
    return {name: parameter for name, parameter in trained.items() if id(parameter) in kept}


def must_recompute(policy: "UnifiedModel", n_trained: int, pictures: int, world: int) -> bool:
    """Whether a GPU's free memory cannot hold the activations of so many pictures beside what training them takes.

    A trained weight takes 12 bytes for its gradient and AdamW's moments, shared among the ranks, and 2 for its bfloat16
    copy. A tenth is left free.
    """
    found = memory(policy.device) if autocasts(policy.device) else None
    return found is not None and pictures * policy.activation_bytes + n_trained * (12 / world + 2) > 0.9 * found[0]


def shard(policy: "UnifiedModel", ranks: Ranks, replicate: int) -> None:
    """FSDP2 over all ranks: each keeps a part of every trained weight, its gradient and its moments, in float32.

    A block's weights are gathered (in bfloat16 on a GPU) when it runs. Frozen weights stay whole everywhere. With
    `replicate` groups, each group holds the whole model between its ranks. Gradients are summed over all ranks.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    shape = {"replicate": replicate, "shard": ranks.world // replicate} if replicate > 1 else {"shard": ranks.world}
    mesh = init_device_mesh(policy.device.type, tuple(shape.values()), mesh_dim_names=tuple(shape))
    bfloat16 = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    precision: dict[str, Any] = (
        {"mp_policy": bfloat16} if autocasts(policy.device) else {}
    )  # the activations' types stay autocast's
    frozen = {parameter for parameter in policy.branch.parameters() if not parameter.requires_grad}
    sharded = [fully_shard(block, mesh=mesh, ignored_params=frozen, **precision) for block in policy.blocks]
    sharded += [fully_shard(policy.branch, mesh=mesh, ignored_params=frozen, reshard_after_forward=True, **precision)]
    for module in sharded:  # sum gradients over the ranks: the loss is divided once, in the loop
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def disk_bytes(policy: "UnifiedModel", trained: dict[str, "nn.Parameter"], args: argparse.Namespace) -> int:
    """What a run needs on the disk: the trained model, and two states while one takes the other's place."""
    n_all = sum(parameter.numel() for parameter in policy.model.parameters())
    states = 2 * 3 * 4 * sum(parameter.numel() for parameter in trained.values()) if args.save_every else 0
    return n_all * {"float32": 4, "bfloat16": 2, "float16": 2}[args.save_dtype] + states


def memory_hint(args: argparse.Namespace) -> str:
    """What to try when a training step does not fit."""
    smaller = f"--micro-batch {args.micro_batch // 2}" if args.micro_batch > 1 else "more ranks"
    return smaller if args.gradient_checkpointing else f"{smaller} or --gradient-checkpointing"


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
    """A progress bar with the numbers that matter, and all of them in metrics.jsonl, one line a step; rank 0's."""

    def __init__(self, path: Path, start: int, steps: int, shown: tuple[str, ...], first: bool) -> None:
        """start: steps already done, whose lines are kept; later ones belong to steps that will be done again."""
        from tqdm import tqdm

        self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, disable=not first)
        self._shown, self._before, self._first = shown, time.perf_counter(), first
        if not first:
            return
        self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
        self._file.seek(0)
        for _ in range(start):
            self._file.readline()
        self._file.truncate(self._file.tell())

    def step(self, images: int, **numbers: float) -> None:
        """Record one step in which `images` pictures were trained on, by all ranks together."""
        if not self._first:
            return
        now = time.perf_counter()
        numbers["images_per_s"] = images / (now - self._before)
        self._before = now
        rounded = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in numbers.items()}
        try:
            self._file.write(json.dumps(rounded, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:  # a full disk: the error itself names no file
            raise OSError(error.errno, error.strerror, self._file.name) from error
        self._bar.set_postfix({key: f"{numbers[key]:.3g}" for key in self._shown if key in numbers}, refresh=False)
        self._bar.update()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()  # an error's line starts a new one
        if self._first:
            with contextlib.suppress(OSError):  # what could not be flushed has been told
                self._file.close()
