"""Supervised fine-tuning of a unified model on its own pictures: those that its own judge accepted.

Reads   sft.jsonl + sft.safetensors (make_pairs.py): prompts and the image tokens of accepted candidates
Writes  a checkpoint directory that transformers loads, with training/{settings.json,metrics.jsonl} inside

    python   sft.py --data round1/sft.jsonl
    torchrun sft.py --data round1/sft.jsonl --out round1/model

Only the language model's decoder layers learn (`--train` widens that). Departure from the paper: `--uncond-prob` of the
captions are dropped, because guidance at sampling time needs an unconditional row that has learnt along.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import train
from records import SFT, BadInput, Parser, Tokens, content_hash, read_rows, run_script

if TYPE_CHECKING:
    from torch import Tensor


# ---------------------------------------------------------------------------------------------------------------------
# The mathematics


def sft_loss(logps: "Tensor", mask: "Tensor") -> "Tensor":
    """Negative log-likelihood of each picture: -log p(x given y), summed over its image tokens.

    logps (B, T): log-probs of the tokens. mask (B, T), bool or 0/1: tokens that count. Returns (B,), in nats.
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
    rows, tokens = read_data(args.data)
    name = train.model_name(args.model, tokens.path, tokens.metadata)
    steps = train.batches(len(rows), args.batch_size, args.epochs, args.seed, args.max_steps)

    import torch  # after the cheap checks: it takes seconds

    from model import load, resolve, weights_hash

    settings = train.run_settings(args, "sft.py", content_hash(args.data, tokens.path), weights_hash(resolve(name)))
    run = train.RunDirectory(args.out, settings, args.restart)
    if run.finished:
        print(f"already trained\n{args.out}")
        return
    policy = load(name, device=args.device, dtype=torch.float32)
    train.check_model(name, policy.identity(), tokens.metadata, args.data, args.other_model)
    run.begin()
    print(f"examples       {len(rows)} pictures of {len({row['id'] for row in rows})} prompts, {tokens.length} tokens each")
    print(f"steps          {len(steps)} of {args.batch_size} pictures ({args.micro_batch} a forward pass)")
    trained = train.prepare(policy, args)
    optimizer = train.make_optimizer(trained, args.weight_decay)

    progress = train.Progress(run.work / "metrics.jsonl", len(steps), ("loss", "grad_norm", "images_per_s"))
    for step, indices in enumerate(steps):
        n_tokens = len(indices) * tokens.length  # of the whole step: the loss's one denominator
        dropped = train.dropped_captions(indices, args.uncond_prob, args.seed, step)
        total = 0.0
        for part, drop in zip(
            train.micro_batches(indices, args.micro_batch), train.micro_batches(dropped, args.micro_batch), strict=True
        ):
            prompts = [rows[i]["prompt"] for i in part]
            images = torch.from_numpy(tokens[[rows[i]["row"] for i in part]]).to(policy.device)  # (b, T)
            with train.compute_type(policy.device):
                logps = policy.logps(prompts, images, unconditional=torch.from_numpy(drop))  # (b, T)
            loss = sft_loss(logps, torch.ones_like(logps)).sum() / n_tokens
            loss.backward()
            total += loss.item()
        train.check_finite(step, [rows[i]["id"] for i in indices], loss=total)
        rate = train.learning_rate(step, len(steps), args.lr, args.warmup)
        norm = train.update(optimizer, trained, rate, args.max_grad_norm).item()
        train.check_finite(step, [rows[i]["id"] for i in indices], grad_norm=norm)
        progress.step(
            len(indices),
            step=step,
            loss=total,
            lr=rate,
            grad_norm=norm,
            peak_memory_gb=train.peak_memory_gb(policy.device),
        )
    progress.close()

    run.finish(policy, args.save_dtype)
    print(args.out)


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
