"""A training run, all of it but the data and the loss: sft.py and dpo.py have these, and the loop, where they can be read.

    run = TrainingRun("sft.py", args, args.data, tokens, len(examples))  # processes, device, which model, which steps
    if run.already_trained(model_hash(run.model)):                        # refuses what another run has left in --out
        return
    policy = load(run.model, run.device, run.dtype)
    if not run.prepare(policy, examples):                                 # freezes, shards, makes the optimizer
        return
    with run:                                                             # an error inside is told with its step
        run.resume()
        for step in run.steps():                                          # between two steps: states are saved, SIGTERM obeyed
            loss, nonfinite_ids = ...                                     # gradients, by the script
            totals = run.update({"loss": loss}, nonfinite_ids)            # sum over ranks, stop if not finite, clip, AdamW
            run.log(loss=totals["loss"])                                  # progress bar and metrics.jsonl
    run.finish()                                                          # the saved model takes its place

One step is the same on any number of ranks: its examples are shared out (`micro_batches`), every loss is divided once by the
number of tokens or pairs of the whole step, and gradients are summed. Only the order of float32 additions differs. What
decides a step is a function of (seed, step, rank) alone, so that nothing about randomness has to be saved.
"""

import argparse
import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from common import sharding
from common.command import BadInput, printable, progress_bar
from common.memory import memory_advice, out_of_memory, peak_memory_gb
from common.model_card import describe_training, read_history
from common.prompts import find_too_long, text_check
from common.ranks import Ranks
from common.records import Tokens, content_hash
from common.states import RunDirectory
from common.writing import write_tensors

if TYPE_CHECKING:  # torch takes seconds to import; arguments and files are checked before
    import torch
    from torch import Tensor, nn

    from model import UnifiedModel


class TrainingError(RuntimeError):
    """Training cannot go on: a non-finite loss, or a policy that is not its reference at step 0."""

    exit_code = 1
    everywhere = True  # all ranks raise it together


# ---------------------------------------------------------------------------------------------------------------------
# Which model


def check_model(path: str, identity: dict[str, str], tokens: Tokens, allowed: bool) -> None:
    """Refuse to train one model on another's pictures by mistake: DPO's reference is then not what drew them.

    identity is the loaded model's. Raises BadInput naming both models.
    """
    drawn_by = tokens.metadata
    if identity["model_hash"] != (found := drawn_by.get("model_hash")) and not allowed:
        raise BadInput(
            f"{tokens.path}: was drawn by {drawn_by.get('model')} (weights {found}), but --model is {path} "
            f"(weights {identity['model_hash']}); use that model, or add --other-model"
        )
    for key in ("codebook_size", "image_tokens"):
        if drawn_by.get(key) != identity[key]:
            raise BadInput(f"{tokens.path}: {key} is {drawn_by.get(key)}, but {path} has {identity[key]}")


def check_prompts(policy: "UnifiedModel", rows: list[dict], data: Path, wordings: Sequence[str] = ()) -> None:
    """Raise BadInput for a prompt that the model cannot be given, or about which it cannot be asked, before any work."""
    found, words = find_too_long(rows, [f"{data}: id {row['id']!r}" for row in rows], text_check(policy, policy, wordings))
    if found:
        raise BadInput(words)


# ---------------------------------------------------------------------------------------------------------------------
# Order of the data, and what is drawn for it


def batches(n: int, batch_size: int, epochs: int, seed: int, max_steps: int = 0) -> list[np.ndarray]:
    """The examples of each optimizer step, as index arrays: every epoch in a new order, its last batch may be smaller.

    Depends on (n, batch_size, epochs, seed) alone. Nothing is dropped.
    """
    steps = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(n)
        steps += [order[start : start + batch_size] for start in range(0, n, batch_size)]
    return steps[:max_steps] if max_steps else steps


def micro_batches(n: int, size: int, ranks: Ranks) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Share n examples of a step out among the ranks and cut a rank's share into forward passes of at most `size`.

    Yields (indices, counted): which of the n examples, int (b,), and whether each is to be counted, bool (b,). Sharded
    ranks must run equally many passes; one whose share is used up runs an example that is not counted.
    """
    mine = np.arange(ranks.rank, n, ranks.world)
    for start in range(0, -(-n // ranks.world), size):  # the first rank's share is the largest
        part = mine[start : start + size]
        yield (part, np.ones(len(part), bool)) if len(part) else (np.zeros(1, int), np.zeros(1, bool))


def draw_seeds(indices: Iterable[int], seed: int, step: int = 0) -> list[int]:
    """A seed an example, from (seed, step, its index in the data): for families whose log-probs are estimated from draws."""
    states = [np.random.SeedSequence([seed, step, int(index), 3]).generate_state(1, np.uint64) for index in indices]
    return [int(state[0]) for state in states]


def dropped_captions(indices: np.ndarray, probability: float, seed: int, step: int) -> np.ndarray:
    """Which of a step's examples see the unconditional prompt: bool (B,), from (seed, step) alone."""
    return np.random.default_rng([seed, step, 1]).random(len(indices)) < probability


def restart_randomness(seed: int, step: int, rank: int) -> None:
    """Make torch's own random numbers a function of the step: nothing about them is left to be saved and restored.

    Nothing draws any in training as it is now (`sharding.to_training` turns dropout off).
    """
    import torch

    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank, 2]).generate_state(1, np.uint64)[0] >> 1))


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer and schedule


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


def check_finite(step: int, numbers: dict[str, float], ids: list[str], ranks: Ranks, nonfinite_ids: Sequence[str] = ()) -> None:
    """Stop with TrainingError if a number of a step is NaN or infinite; all ranks call it with the same numbers.

    ids: the step's examples. nonfinite_ids: those on this rank known to be the cause; where no rank knows any, all are named.
    """
    for name, value in numbers.items():
        if not math.isfinite(value):
            named = sorted(set(ranks.gather(list(nonfinite_ids)))) or ids
            raise TrainingError(f"step {step}: {name} is {value}; examples: {', '.join(named)}; the last state is kept")


# ---------------------------------------------------------------------------------------------------------------------
# The run


class Step(NamedTuple):
    """One optimizer step: its number from 0, its examples, int (B,), and which of them lose their caption, bool (B,)."""

    number: int
    indices: np.ndarray
    dropped: np.ndarray


class TrainingRun:
    """What sft.py and dpo.py do alike around their losses; used as at the top of this file.

    `model` is the name of the checkpoint to train, `device` and `dtype` are what to load it with. Every method is called by
    all ranks together.
    """

    def __init__(
        self, script: str, args: argparse.Namespace, data: Path, tokens: Tokens, n_examples: int, pictures_per_example: int = 1
    ) -> None:
        """script: its name, for settings.json. From here on processes other than rank 0 print nothing."""
        self.ranks = Ranks()
        self.script, self.args, self.data, self.tokens, self.pictures = script, args, data, tokens, pictures_per_example
        self.model = tokens.model_name(args.model)
        self.schedule = batches(n_examples, args.batch_size, args.epochs, args.seed, args.max_steps)
        self.ranks.join(args.device)
        self.device, self.dtype = self.ranks.device, sharding.weight_type(args, self.ranks.device)
        self.base: str | None = None  # DPO's reference, where it is not the model to train
        self.start = 0  # steps that are already done
        self._during = "before step 0"
        self._log: ProgressLog | None = None

    def reference(self, given: str | None, hash_of: Callable[[str], str]) -> str | None:
        """The name of DPO's reference; None if it is the model to be trained, as it is before the first step.

        Of pictures that several models drew it is the base, which drew the first of them. hash_of: `model.model_hash`.
        Raises BadInput for another one that did not draw them, or from which no training on the model's way began.
        """
        tokens, header = self.tokens, self.tokens.metadata
        if not given and "base_hash" not in header:
            return None
        name = tokens.model_name(given, "base", "--reference")
        found, wanted = hash_of(name), header.get("base_hash", header.get("model_hash"))
        itself = found == hash_of(self.model)
        if found != wanted and not (itself and "base_hash" not in header):
            base = header.get("base", header.get("model"))
            raise BadInput(f"{tokens.path}: its reference is {base} (weights {wanted}), but {name} has weights {found}")
        if itself:
            return None
        if found not in [one.get("model_hash") for one in read_history(self.model)] and not self.args.other_model:
            raise BadInput(
                f"{self.model}: by its record none of its trainings began with the reference {name} (weights {found}); "
                "train a model of that run, or add --other-model"
            )
        print(f"reference      {name} (weights {found})")
        self.base, self.base_hash = name, found
        return name

    def already_trained(self, model_hash: str) -> bool:
        """Open --out and its work directory: whether this very run lies there, finished. RunError if another does."""
        places = ("data", "pairs", "model", "reference", "out", "restart", "device", "other_model")
        settings = {key: value for key, value in vars(self.args).items() if key not in places}
        settings |= {"script": self.script, "data_hash": content_hash(self.data, self.tokens.path), "model_hash": model_hash}
        settings |= {"reference_hash": self.base_hash} if self.base else {}
        reads = [self.data, self.tokens.path, *(Path(name) for name in (self.model, self.base) if name and Path(name).is_dir())]
        self.directory = RunDirectory(self.args.out, settings, self.args.restart, self.ranks, reads)
        if self.directory.finished:
            print(f"already trained\n{printable(self.args.out)}")
        return self.directory.finished

    def prepare(self, policy: "UnifiedModel", examples: list[dict]) -> bool:
        """Check that model and data fit, freeze, adapt and shard, make the optimizer, take hold of the work directory.

        Returns False if another process has finished this very run meanwhile.
        """
        self.policy, self.examples = policy, examples
        check_model(self.model, policy.identity(), self.tokens, self.args.other_model)
        check_prompts(policy, examples, self.data)
        settings, header = self.directory.settings, self.tokens.metadata
        this = describe_training(self.script, settings, self.model, examples, len(self.schedule), header, self.ranks.world)
        self.history = [*read_history(self.model), this]  # for the model card
        print(f"steps          {len(self.schedule)} of {self.args.batch_size} examples, {self.tokens.length} tokens a picture")
        self.trained = sharding.prepare(policy, self.args, self.ranks, self.pictures)
        self.optimizer = make_optimizer(self.trained, self.args.weight_decay)
        if self.directory.begin(sharding.disk_bytes(policy, self.trained, self.args)):
            return True
        print(f"already trained, by another process meanwhile\n{printable(self.args.out)}")
        return False

    def resume(self) -> int:
        """Load the newest saved state, if there is one; returns how many steps are done. From now on SIGTERM is obeyed."""
        self.start = self.directory.resume(self.trained, self.optimizer)
        return self.start

    def steps(self) -> Iterator[Step]:
        """The steps that are left. When the loop asks for the next one, the one before is over: a state every --save-every.

        Raises Stopped after a step in which SIGTERM came, once its state is saved.
        """
        args = self.args
        self._log = ProgressLog(self.directory.work / "metrics.jsonl", self.start, len(self.schedule), self.ranks.is_rank_0)
        for number in range(self.start, len(self.schedule)):
            indices = self.schedule[number]
            self._step = Step(number, indices, dropped_captions(indices, args.uncond_prob, args.seed, number))
            self._during = f"at step {number}"
            restart_randomness(args.seed, number, self.ranks.rank)
            yield self._step
            self.directory.after(number + 1, args.save_every)

    def update(self, sums: dict[str, float], nonfinite_ids: list[str]) -> dict[str, float]:
        """Take the optimizer's step with the gradients that are there; returns `sums`, added up over all ranks.

        sums: this rank's share of the loss and of what else is logged. nonfinite_ids: of examples whose own loss is not
        finite. Raises TrainingError, before weights change, if a sum or the gradient norm is not finite.
        """
        number, ids = self._step.number, [self.examples[i]["id"] for i in self._step.indices]
        totals = self.ranks.sum(sums)
        check_finite(number, totals, ids, self.ranks, nonfinite_ids)
        rate = learning_rate(number, len(self.schedule), self.args.lr, self.args.warmup)
        with memory_advice(f"at step {number} in the optimizer", "more ranks", self.device):
            norm = update(self.optimizer, self.trained, rate, self.args.max_grad_norm).item()
        check_finite(number, {"grad_norm": norm}, ids, self.ranks)
        self._numbers = {"lr": rate, "grad_norm": norm}
        return totals

    def log(self, **numbers: float) -> None:
        """Show the step's numbers on the progress bar and append them to metrics.jsonl."""
        assert self._log is not None
        numbers |= self._numbers | {"peak_memory_gb": peak_memory_gb(self.device)}
        self._log.write(self.pictures * len(self._step.indices), step=self._step.number, **numbers)

    def compute_once(self, name: str, compute: Callable[[], "Tensor"]) -> "Tensor":
        """`compute()`, by all ranks together; kept in the run's own directory and read from there where it has been before.

        The directory belongs to one set of data and one model (see `already_trained`), so what these decide may be kept.
        """
        from safetensors.torch import load_file

        file = self.directory.work / f"{name}.safetensors"
        if self.ranks.on_rank_0(file.exists):
            return next(iter(load_file(file).values()))
        tensor = compute()
        self.ranks.on_rank_0(write_tensors, file, {name: tensor})
        return tensor

    def logged(self, name: str) -> list[float]:
        """What was logged under a name in the steps so far, those before a resumption included; rank 0's, [] elsewhere."""
        lines = (self.directory.work / "metrics.jsonl").read_text().splitlines() if self.ranks.is_rank_0 else []
        return [row[name] for row in map(json.loads, lines) if name in row]

    def finish(self) -> None:
        """Save the trained model with the record of the run inside; it takes its place at --out, whole."""
        self.ranks.on_rank_0(self.tokens.check_unchanged)
        self.directory.finish(self.policy, self.args.save_dtype, self.history)
        print(printable(self.args.out))

    def __enter__(self) -> "TrainingRun":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Close the bar; let a state that is being written become whole; turn running out of memory into advice."""
        if self._log is not None:
            self._log.close()
        self.directory.wait_before(error)
        if isinstance(error, RuntimeError | MemoryError) and not hasattr(error, "exit_code"):
            doing = f"{self._during} with --micro-batch {self.args.micro_batch}"
            if advice := out_of_memory(error, doing, sharding.memory_hint(self.args), self.device):
                raise advice from None


class ProgressLog:
    """A progress bar with the numbers that matter, and all of them in metrics.jsonl, one line a step; rank 0's."""

    SHOWN = ("loss", "margin", "accuracy", "grad_norm", "images_per_s")

    def __init__(self, path: Path, start: int, steps: int, shown: bool) -> None:
        """start: steps already done, whose lines are kept; later ones belong to steps that will be done again."""
        self._before, self._shown = time.perf_counter(), shown
        if shown:
            self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
            self._file.seek(0)
            for _ in range(start):
                self._file.readline()
            self._file.truncate(self._file.tell())
        self._bar = progress_bar(steps, "step", shown, start)

    def write(self, images: int, **numbers: float) -> None:
        """Record one step in which `images` pictures were trained on, by all ranks together."""
        if not self._shown:
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
        shown = {key: f"{numbers[key]:.3g}" for key in self.SHOWN if key in numbers}
        if numbers["images_per_s"] < 1:
            shown["s_per_image"] = f"{1 / float(shown.pop('images_per_s')):.3g}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()  # an error's line starts a new one
        if self._shown:
            with contextlib.suppress(OSError):  # what could not be flushed has been told
                self._file.close()
