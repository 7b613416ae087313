"""Direct preference optimization of a unified model on its own pictures: those its judge accepted against those it did not.

Reads   pairs.jsonl + pairs.safetensors (make_pairs.py): prompts and the image tokens of a chosen and a rejected candidate
Writes  a checkpoint directory that transformers loads, with training/{settings.json,metrics.jsonl,reference.safetensors}

    python   dpo.py --pairs round3.jsonl
    torchrun dpo.py --pairs round3.jsonl --out round3/model --beta 0.1 --nll-weight 1

The reference is the model before training. Its log-probs are computed once, before the first step, so that no second
model is in memory; at step 0 policy = reference, hence the loss is ln 2 and all rewards are 0: the script checks it and
stops if not. Departures from the paper: in `--uncond-prob` of the pairs the caption is dropped and only the NLL term on
the chosen picture is trained, so that guidance at sampling time keeps working.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import train
from records import PAIRS, BadInput, Parser, Tokens, content_hash, read_rows, run_script

if TYPE_CHECKING:
    from torch import Tensor

LN_2 = math.log(2)
SAME = {"cpu": 1e-3, "cuda": 0.05}  # mean |policy - reference| in nats a token that rounding explains: float32, bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# The mathematics


def dpo_loss(
    policy_chosen_logps: "Tensor",
    policy_rejected_logps: "Tensor",
    reference_chosen_logps: "Tensor",
    reference_rejected_logps: "Tensor",
    beta: float,
) -> "tuple[Tensor, Tensor, Tensor]":
    """DPO loss and implicit rewards of each pair (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    All four inputs (B,): log p(picture given prompt), in nats, summed over the picture's image tokens. beta: strength of
    the pull to the reference, in 1/nats. Returns losses, chosen_rewards, rejected_rewards, each (B,); the rewards carry
    no gradient.

    Sum, not mean: the sum is the log-probability of the picture, which is what the derivation needs. If you pass means
    over T tokens instead, the margin shrinks T-fold and beta must grow T-fold to mean the same: averaged log-probs with
    beta = 57.6 equal summed ones with beta = 0.1 for the 576 tokens of Janus-Pro.
    """
    from torch.nn.functional import logsigmoid

    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps
    losses = -logsigmoid(beta * (chosen_logratios - rejected_logratios))  # eq. 7
    chosen_rewards = beta * chosen_logratios.detach()  # eq. 5, up to a constant of the prompt
    rejected_rewards = beta * rejected_logratios.detach()
    return losses, chosen_rewards, rejected_rewards


def picture_logps(logps: "Tensor", average: bool) -> "Tensor":
    """Token log-probs (..., T) -> one number a picture (...): their sum, or with `average` their mean (see dpo_loss)."""
    return logps.mean(dim=-1) if average else logps.sum(dim=-1)


def kl_to_reference(policy_logps: "Tensor", reference_logps: "Tensor") -> "Tensor":
    """Estimate of KL(reference, policy) in nats a picture: token log-probs (..., T) -> (...).

    Sum over tokens of r - 1 - log r with r = policy / reference: non-negative, low variance (Schulman 2020, "k3"),
    unbiased for pictures drawn from the reference. The pairs are selected and guided, so read it as a trend.
    """
    log_r = policy_logps - reference_logps
    return (log_r.exp() - 1 - log_r).sum(dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def read_pairs(path: Path) -> tuple[list[dict], Tokens]:
    """The rows of pairs.jsonl and their tokens; raises BadInput for anything that cannot be trained on."""
    tokens = Tokens(path)
    pairs = []
    for number, row in read_rows(path, PAIRS):
        for side in ("chosen", "rejected"):
            tokens.check_row(row[side], f"{path}:{number}", side)
        if row["chosen"] == row["rejected"]:
            raise BadInput(f"{path}:{number}: chosen and rejected are the same row, {row['chosen']}")
        pairs.append(row)
    if not pairs:
        raise BadInput(f"{path}: holds no pair to train on")
    tokens.check_values()
    return pairs, tokens


def pair_logps(policy: Any, pairs: list[dict], tokens: Tokens, dropped: np.ndarray | None = None) -> "Tensor":
    """The policy's token log-probs of b pairs: (2, b, T), chosen first. Both sides run in one batch.

    dropped: bool (b,), pairs that see the unconditional prompt.
    """
    import torch

    prompts = [pair["prompt"] for pair in pairs] * 2
    rows = [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]
    unconditional = None if dropped is None else torch.from_numpy(np.concatenate([dropped, dropped]))
    with train.compute_type(policy.device):
        logps = policy.logps(prompts, torch.from_numpy(tokens[rows]), unconditional=unconditional)  # (2 b, T)
    return logps.unflatten(0, (2, len(pairs)))


def reference_logps(policy: Any, pairs: list[dict], tokens: Tokens, micro_batch: int, cache: Path) -> "Tensor":
    """Token log-probs of the model before training, (pairs, 2, T) float32 on the CPU; read from `cache` if it is there.

    `cache` lies in the run's own directory, which belongs to one set of pairs and one model.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from tqdm import tqdm

    if cache.exists():
        return load_file(cache)["logps"]
    blocks = []
    with torch.no_grad():
        for start in tqdm(range(0, len(pairs), micro_batch), desc="reference", unit="batch", dynamic_ncols=True):
            logps = pair_logps(policy, pairs[start : start + micro_batch], tokens)
            blocks.append(logps.transpose(0, 1).cpu())
    logps = torch.cat(blocks)
    unfinished = cache.with_suffix(".tmp")
    save_file({"logps": logps}, unfinished)
    unfinished.replace(cache)  # a cache that is there is whole
    return logps


def check_step_0(policy: Any, pairs: list[dict], tokens: Tokens, reference: "Tensor", args: argparse.Namespace) -> None:
    """Print and check what theory says before the first step: policy = reference, so loss ln 2 and rewards 0.

    Raises train.TrainingError if the policy is not its reference: then the whole run would be meaningless.
    """
    import torch

    with torch.no_grad():
        policy_logps = pair_logps(policy, pairs, tokens)  # (2, b, T)
    reference = reference.transpose(0, 1).to(policy_logps.device)  # (2, b, T)
    sides = [picture_logps(logps, args.average_logps) for logps in (*policy_logps, *reference)]
    losses, chosen_rewards, rejected_rewards = dpo_loss(*sides, args.beta)
    apart = (policy_logps - reference).abs().mean().item()
    print(
        f"step 0         loss {losses.mean():.4f} (theory ln 2 = {LN_2:.4f}), rewards {chosen_rewards.mean():+.4f} and "
        f"{rejected_rewards.mean():+.4f} (theory 0), |policy - reference| {apart:.1e} nats a token"
    )
    if not apart <= SAME[policy.device.type]:
        raise train.TrainingError(
            f"step 0: policy and reference differ by {apart:.3g} nats a token, loss {losses.mean():.4f} instead of {LN_2:.4f}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--pairs", type=Path, required=True, help="pairs.jsonl, its safetensors beside it")
    loss = parser.add_argument_group("loss")
    loss.add_argument("--beta", type=float, default=0.1, help="pull to the reference, per nat of log-prob (default 0.1)")
    loss.add_argument("--nll-weight", type=float, default=1.0, help="weight of the chosen picture's NLL per token (default 1)")
    loss.add_argument(
        "--average-logps", action="store_true", help="mean over image tokens instead of the sum; beta must grow T-fold"
    )
    loss.add_argument(
        "--uncond-prob", type=float, default=0.1, help="share of pairs with a dropped caption, NLL only (default 0.1)"
    )
    train.add_arguments(parser, "--pairs", epochs=30, learning_rate=5e-6)
    args = parser.parse_args(argv)
    train.check_arguments(parser, args)
    if not 0 < args.beta < math.inf:
        parser.error(f"--beta must be greater than 0, found {args.beta}: at 0 the loss is ln 2 for ever")
    if not 0 <= args.nll_weight < math.inf:
        parser.error(f"--nll-weight must be at least 0, found {args.nll_weight}")
    if args.nll_weight == 0:
        args.uncond_prob = 0.0  # a dropped pair trains its NLL only
    args.out = train.output_directory(parser, args.out, "--pairs", args.pairs, "-dpo")
    return args


def main(args: argparse.Namespace) -> None:
    pairs, tokens = read_pairs(args.pairs)
    name = train.model_name(args.model, tokens.path, tokens.metadata)
    steps = train.batches(len(pairs), args.batch_size, args.epochs, args.seed, args.max_steps)

    import torch  # after the cheap checks: it takes seconds

    from model import load, resolve, weights_hash

    settings = train.run_settings(args, "dpo.py", content_hash(args.pairs, tokens.path), weights_hash(resolve(name)))
    run = train.RunDirectory(args.out, settings, args.restart)
    if run.finished:
        print(f"already trained\n{args.out}")
        return
    policy = load(name, device=args.device, dtype=torch.float32)
    train.check_model(name, policy.identity(), tokens.metadata, args.pairs, args.other_model)
    run.begin()
    print(f"pairs          {len(pairs)} of {len({pair['id'] for pair in pairs})} prompts, 2 x {tokens.length} tokens each")
    print(f"steps          {len(steps)} of {args.batch_size} pairs ({args.micro_batch} a forward pass)")
    trained = train.prepare(policy, args)
    reference = reference_logps(policy, pairs, tokens, args.micro_batch, run.work / "reference.safetensors")
    first = steps[0][: args.micro_batch]
    check_step_0(policy, [pairs[i] for i in first], tokens, reference[first], args)
    optimizer = train.make_optimizer(trained, args.weight_decay)

    progress = train.Progress(run.work / "metrics.jsonl", len(steps), ("loss", "margin", "accuracy", "images_per_s"))
    for step, indices in enumerate(steps):
        dropped = train.dropped_captions(indices, args.uncond_prob, args.seed, step)
        sums: dict[str, float] = {}
        for part, drop in zip(
            train.micro_batches(indices, args.micro_batch), train.micro_batches(dropped, args.micro_batch), strict=True
        ):
            policy_logps = pair_logps(policy, [pairs[i] for i in part], tokens, drop)  # (2, b, T)
            keep = torch.from_numpy(~drop).to(policy.device)  # (b,)
            loss, numbers = step_loss(policy_logps, reference[part].transpose(0, 1).to(policy.device), keep, args)
            (loss / len(indices)).backward()  # summed over the pairs above, divided once by the whole step's number
            for key, value in numbers.items():
                sums[key] = sums.get(key, 0.0) + value
        ids = [pairs[i]["id"] for i in indices]
        train.check_finite(step, ids, **sums)
        rate = train.learning_rate(step, len(steps), args.lr, args.warmup)
        norm = train.update(optimizer, trained, rate, args.max_grad_norm).item()
        train.check_finite(step, ids, grad_norm=norm)
        kept = max(1, int((~dropped).sum()))  # preference numbers are means over the pairs that kept their caption
        numbers = {key: value / (len(indices) if key == "nll" else kept) for key, value in sums.items()}
        memory = train.peak_memory_gb(policy.device)
        progress.step(2 * len(indices), step=step, **numbers, lr=rate, grad_norm=norm, peak_memory_gb=memory)
    progress.close()

    warn_if_stuck(run.work / "metrics.jsonl")
    run.finish(policy, args.save_dtype)
    print(args.out)


def step_loss(
    policy_logps: "Tensor", reference: "Tensor", keep: "Tensor", args: argparse.Namespace
) -> "tuple[Tensor, dict[str, float]]":
    """The objective summed over b pairs, and the sums of what is logged.

    policy_logps, reference (2, b, T); keep (b,) bool, pairs whose caption was not dropped: only they have a preference.
    """
    sides = [picture_logps(logps, args.average_logps) for logps in (*policy_logps, *reference)]
    losses, chosen_rewards, rejected_rewards = dpo_loss(*sides, args.beta)  # (b,)
    nll = -policy_logps[0].mean(dim=-1)  # (b,) of the chosen pictures; all have T tokens, so this is over the global count
    loss = losses.where(keep, 0).sum() + args.nll_weight * nll.sum()
    margins = chosen_rewards - rejected_rewards
    logged = {
        "loss": losses,
        "chosen_rewards": chosen_rewards,
        "rejected_rewards": rejected_rewards,
        "margin": margins,
        "accuracy": (margins > 0).float(),
        "chosen_logps": policy_logps[0].sum(dim=-1),
        "rejected_logps": policy_logps[1].sum(dim=-1),
        "kl": kl_to_reference(policy_logps, reference).mean(dim=0),
    }
    sums = {key: values.detach().where(keep, 0).sum().item() for key, values in logged.items()}
    return loss, sums | {"nll": nll.detach().sum().item()}


def warn_if_stuck(metrics: Path) -> None:
    """Say so if the loss of the last tenth of the steps is still ln 2."""
    losses = [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
    last = losses[-max(1, len(losses) // 10) :]
    if abs(np.mean(last) - LN_2) < 0.01:
        print(
            f"warning: the loss ended at {np.mean(last):.4f} and never left ln 2 = {LN_2:.4f}: the policy has hardly moved. "
            "Usual causes: too small --lr or --beta, too few steps, --average-logps with a beta meant for sums."
        )


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
