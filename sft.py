"""Supervised fine-tuning of a unified model on its own pictures: those that its own judge accepted.

Reads   sft.jsonl + sft.safetensors (make_pairs.py): prompts and the image tokens of accepted candidates
Writes  a checkpoint directory that transformers loads, with training/{settings.json,metrics.jsonl} inside

    python   sft.py --data round1/sft.jsonl
    torchrun sft.py --data round1/sft.jsonl --out round1/model

Only the language model's decoder layers learn (`--train` widens that). Departure from the paper: `--uncond-prob` of the
captions are dropped, because guidance at sampling time needs an unconditional row that has learnt along.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common import training as train
from common.checkpoint import RunDirectory
from common.command import BadInput, Parser, run_script
from common.ranks import Ranks, memory_advice
from common.records import SFT, Tokens, content_hash, read_rows

if TYPE_CHECKING:
    from torch import Tensor

    from model import UnifiedModel


# ---------------------------------------------------------------------------------------------------------------------
# The mathematics


def sft_loss(logps: "Tensor", mask: "Tensor") -> "Tensor":
    """Negative log-likelihood of each picture: -log p(x given y), summed over its image tokens.

    logps (B, T): log-probs of the tokens. mask (B, T) or (B, 1), bool or 0/1: tokens that count. Returns (B,), in nats.
    Divide the sum by the number of counted tokens of the whole step (all micro-batches and ranks), once: a mean of
    means weights pictures by the size of the batch they happen to share.
    """
    return -(logps * mask).sum(dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def read_data(path: Path) -> tuple[list[dict], Tokens]:
    """The rows of sft.jsonl and their tokens; raises BadInput for anything that cannot be trained on."""
    tokens = Tokens(path)
    rows = []
    for number, row in read_rows(path, SFT):
        tokens.check_row(row["row"], f"{path}:{number}")
        rows.append(row)
    if not rows:
        raise BadInput(f"{path}: holds no example to train on")
    tokens.check_values()
    return rows, tokens


def accumulate(
    policy: "UnifiedModel", examples: list[dict], dropped: np.ndarray, tokens: Tokens, micro_batch: int, ranks: Ranks
) -> tuple[float, list[str]]:
    """Add one step's gradient to the weights' `.grad`: this rank's share of `examples`, one forward pass after the other.

    examples: rows with the `seed` of their log-probs' draws, for families that make any. dropped: bool (len(examples),),
    those that see the unconditional prompt. Returns this rank's part of the step's loss, in nats a token, and the ids whose
    own loss is not finite.
    """
    import torch

    n_tokens = len(examples) * tokens.length  # of the whole step, all ranks: the loss's one denominator
    total, guilty = 0.0, []
    for part, counted in train.passes(len(examples), micro_batch, ranks.rank, ranks.world):
        rows = [examples[i] for i in part]
        images = torch.from_numpy(tokens[[row["row"] for row in rows]]).to(policy.device)  # (b, T)
        with train.compute_type(policy.device):
            prompts, seeds = [row["prompt"] for row in rows], [row["seed"] for row in rows]
            logps = policy.logps(prompts, images, seeds, unconditional=torch.from_numpy(dropped[part]))
        losses = sft_loss(logps, torch.from_numpy(counted)[:, None].to(policy.device))  # (b,)
        (losses.sum() / n_tokens).backward()
        total += losses.sum().item() / n_tokens
        guilty += [row["id"] for row, loss in zip(rows, losses.tolist(), strict=True) if not math.isfinite(loss)]
    return total, guilty


# ---------------------------------------------------------------------------------------------------------------------
# Command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="sft.jsonl, its safetensors beside it")
    loss = parser.add_argument_group("loss")
    loss.add_argument("--uncond-prob", type=float, default=0.1, help="share of captions dropped (default 0.1)")
    train.add_arguments(parser, "--data", epochs=20, learning_rate=1e-5)
    args = parser.parse_args(argv)
    train.check_arguments(parser, args)
    args.out = train.output_directory(parser, args.out, "--data", args.data, "-sft")
    return args


def main(args: argparse.Namespace) -> None:
    ranks = Ranks()
    rows, tokens = read_data(args.data)
    name = train.model_name(args.model, tokens.path, tokens.metadata)
    steps = train.batches(len(rows), args.batch_size, args.epochs, args.seed, args.max_steps)

    from families.pretrained import resolve, weights_hash
    from model import load  # after the cheap checks: torch takes seconds

    ranks.join(args.device)
    settings = train.run_settings(args, "sft.py", content_hash(args.data, tokens.path), weights_hash(resolve(name)))
    run = RunDirectory(args.out, settings, args.restart, ranks)
    if run.finished:
        print(f"already trained\n{args.out}")
        return
    policy = load(name, ranks.device, train.weight_type(args, ranks.device), draws=args.mask_draws)
    train.check_model(name, policy.identity(), tokens.metadata, args.data, args.other_model)
    train.check_prompts(policy, rows)
    print(f"examples       {len(rows)} pictures of {len({row['id'] for row in rows})} prompts, {tokens.length} tokens each")
    print(f"steps          {len(steps)} of {args.batch_size} pictures")
    trained = train.prepare(policy, args, ranks, pictures=1)
    optimizer = train.make_optimizer(trained, args.weight_decay)
    if not run.begin(train.disk_bytes(policy, trained, args)):
        print(f"already trained, by another process meanwhile\n{args.out}")
        return

    start = run.resume(trained, optimizer)
    shown = ("loss", "grad_norm", "images_per_s")
    with run, train.Progress(run.work / "metrics.jsonl", start, len(steps), shown, ranks.first) as progress:
        for step in range(start, len(steps)):
            indices = steps[step]
            seeds = train.draw_seeds(indices, args.seed, step)
            examples = [rows[i] | {"seed": seed} for i, seed in zip(indices, seeds, strict=True)]
            dropped = train.dropped_captions(indices, args.uncond_prob, args.seed, step)
            train.restart_randomness(args.seed, step, ranks.rank)
            with memory_advice(f"at step {step} with --micro-batch {args.micro_batch}", train.memory_hint(args), ranks.device):
                loss, guilty = accumulate(policy, examples, dropped, tokens, args.micro_batch, ranks)
            loss = ranks.sum({"loss": loss})["loss"]
            ids = [row["id"] for row in examples]
            train.check_finite(step, {"loss": loss}, ids, ranks, guilty)
            rate = train.learning_rate(step, len(steps), args.lr, args.warmup)
            with memory_advice(f"at step {step} in the optimizer", "more ranks", ranks.device):
                norm = train.update(optimizer, trained, rate, args.max_grad_norm).item()
            train.check_finite(step, {"grad_norm": norm}, ids, ranks)
            memory = train.peak_memory_gb(policy.device)
            progress.step(len(indices), step=step, loss=loss, lr=rate, grad_norm=norm, peak_memory_gb=memory)
            run.after(step + 1, args.save_every)

    run.finish(policy, args.save_dtype)
    print(args.out)


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
