"""Supervised fine-tuning of a unified model on its own pictures: those that its own judge accepted.

Reads   sft.jsonl + sft.safetensors (make_pairs.py): prompts and the image tokens of accepted candidates
Writes  a checkpoint directory that transformers loads, with training/{settings.json,metrics.jsonl} inside

    python sft.py --data round1/sft.jsonl
    torchrun --nproc-per-node 8 sft.py --data round1/sft.jsonl --out round1/model

Only the language model's decoder layers learn (`--train` widens that). Departure from the paper: `--uncond-prob` of the
captions are dropped, because guidance at sampling time needs an unconditional row that has learnt along.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.command import Parser, run_script
from common.flags import add_training_flags, check_training_flags
from common.records import SFT, read_examples
from common.sharding import compute_type
from common.training import TrainingRun, draw_seeds, micro_batches

if TYPE_CHECKING:  # torch takes seconds to import; arguments and files are checked before
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
# From pictures to the loss


def accumulate(policy: "UnifiedModel", examples: list[dict], dropped: np.ndarray, run: TrainingRun) -> tuple[float, list[str]]:
    """Add one step's gradient to the weights' `.grad`: this rank's share of `examples`, one forward pass after the other.

    examples: rows with the `seed` of their log-probs' draws, for families that make any. dropped: bool (len(examples),),
    those that see the unconditional prompt. Returns this rank's part of the step's loss, in nats a token, and the ids whose
    own loss is not finite.
    """
    import torch

    n_tokens = len(examples) * run.tokens.length  # of the whole step, all ranks: the loss's one denominator
    ids, losses = [], []  # of what this rank runs
    for part, counted in micro_batches(len(examples), run.args.micro_batch, run.ranks):
        rows = [examples[i] for i in part]
        prompts, seeds = [row["prompt"] for row in rows], [row["seed"] for row in rows]
        with compute_type(policy.device):
            logps = policy.logps(prompts, run.tokens[[row["row"] for row in rows]], seeds, dropped[part])  # (b, T)
        loss = sft_loss(logps, torch.from_numpy(counted)[:, None].to(policy.device))  # (b,)
        (loss.sum() / n_tokens).backward()
        ids += [row["id"] for row in rows]
        losses.append(loss.detach())
    found = torch.cat(losses).double().cpu()  # once a step: whoever waits for a GPU leaves it idle afterwards
    return found.sum().item() / n_tokens, [ids[i] for i in (~found.isfinite()).nonzero().flatten()]


# ---------------------------------------------------------------------------------------------------------------------
# Command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="sft.jsonl, its safetensors beside it")
    loss = parser.add_argument_group("loss")
    loss.add_argument("--uncond-prob", type=float, default=0.1, help="share of captions dropped (default 0.1)")
    add_training_flags(parser, "--data", epochs=20, learning_rate=1e-5)
    args = parser.parse_args(argv)
    check_training_flags(parser, args, args.data, "-sft")
    return args


def main(args: argparse.Namespace) -> None:
    rows, tokens = read_examples(args.data, SFT, ("row",))
    run = TrainingRun("sft.py", args, args.data, tokens, len(rows))  # only rank 0 prints from here on

    from model import load, model_hash  # after the cheap checks: torch takes seconds

    if run.already_trained(model_hash(run.model)):
        return
    policy = load(run.model, run.device, run.dtype, mask_draws=args.mask_draws)
    print(f"examples       {len(rows)} pictures of {len({row['id'] for row in rows})} prompts")
    if not run.prepare(policy, rows):
        return
    with run:
        run.resume()
        for step in run.steps():  # when it is asked for the next one, states are saved and SIGTERM is obeyed
            seeds = draw_seeds(step.indices, args.seed, step.number)
            examples = [rows[i] | {"seed": seed} for i, seed in zip(step.indices, seeds, strict=True)]
            loss, nonfinite_ids = accumulate(policy, examples, step.dropped, run)
            totals = run.update({"loss": loss}, nonfinite_ids)  # gradients summed over ranks, clipped, AdamW's step
            run.log(loss=totals["loss"])
    run.finish()


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
