"""Direct preference optimization of a unified model on its own pictures: those its judge accepted against those it did not.

Reads   pairs.jsonl + pairs.safetensors (make_pairs.py): prompts and the image tokens of a chosen and a rejected candidate
Writes  a checkpoint directory that transformers loads, with training/{settings.json,metrics.jsonl,reference.safetensors}

    python   dpo.py --pairs round3.jsonl
    torchrun dpo.py --pairs round3.jsonl --out round3/model --beta 0.1 --nll-weight 1

The reference is the model before training. Its log-probs are computed once, before the first step, so that no second
model is in memory; at step 0 policy = reference, hence the loss is ln 2 and all rewards are 0: the script checks it and
stops if not. Where log-probs are estimates (Show-o's are), a pair's random draws are the same for both pictures, for policy
and reference, and at every step. Departures from the paper: in `--uncond-prob` of the pairs the caption is dropped and only
the NLL term on the chosen picture is trained, so that guidance at sampling time keeps working.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common import training as train
from common.checkpoint import RunDirectory
from common.command import BadInput, Parser, run_script
from common.ranks import Ranks, memory_advice
from common.records import PAIRS, Tokens, content_hash, read_rows
from common.writing import whole_file

if TYPE_CHECKING:
    from torch import Tensor

    from model import UnifiedModel

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


def pair_logps(policy: "UnifiedModel", pairs: list[dict], tokens: Tokens, dropped: np.ndarray | None = None) -> "Tensor":
    """The policy's token log-probs of b pairs: (2, b, T), chosen first. Both sides run in one batch.

    pairs: rows with the `seed` of their log-probs' draws, for families that make any: one for both sides, so that what they
    share cancels. dropped: bool (b,), pairs that see the unconditional prompt.
    """
    import torch

    prompts, seeds = [pair["prompt"] for pair in pairs] * 2, [pair["seed"] for pair in pairs] * 2
    rows = [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]
    unconditional = None if dropped is None else torch.from_numpy(np.concatenate([dropped, dropped]))
    with train.compute_type(policy.device):
        logps = policy.logps(prompts, torch.from_numpy(tokens[rows]), seeds, unconditional=unconditional)  # (2 b, T)
    return logps.unflatten(0, (2, len(pairs)))


def reference_logps(
    policy: "UnifiedModel", pairs: list[dict], tokens: Tokens, micro_batch: int, cache: Path, ranks: Ranks
) -> "Tensor":
    """Token log-probs of the model before training, (pairs, 2, T) float32 on the CPU; read from `cache` if it is there.

    Each rank computes its share. `cache` lies in the run's own directory, which belongs to one set of pairs and one model.
    """
    import torch
    from safetensors.torch import load_file
    from tqdm import tqdm

    if ranks.on_first(cache.exists):
        return load_file(cache)["logps"]
    logps = torch.zeros(len(pairs), 2, tokens.length)
    passes = list(train.passes(len(pairs), micro_batch, ranks.rank, ranks.world))
    bar = tqdm(total=len(passes), desc="reference", unit="batch", dynamic_ncols=True, disable=not ranks.first)
    with torch.no_grad(), bar:
        for part, counted in passes:
            found = pair_logps(policy, [pairs[i] for i in part], tokens).transpose(0, 1).cpu()  # (b, 2, T)
            logps[part[counted]] = found[torch.from_numpy(counted)]
            bar.update()
    ranks.sum_tensor(logps)  # each row is of one rank, zero on the others
    ranks.on_first(write_cache, cache, logps)
    return logps


def write_cache(cache: Path, logps: "Tensor") -> None:
    """Write reference log-probs, whole or not at all."""
    from safetensors.torch import save

    with whole_file(cache) as file:
        file.write(save({"logps": logps}))


def pair_loss(policy_logps: "Tensor", reference: "Tensor", args: argparse.Namespace) -> "tuple[Tensor, Tensor, Tensor]":
    """`dpo_loss` of b pairs from token log-probs, policy_logps and reference (2, b, T), chosen first."""
    chosen, rejected = (picture_logps(logps, args.average_logps) for logps in policy_logps)
    reference_chosen, reference_rejected = (picture_logps(logps, args.average_logps) for logps in reference)
    return dpo_loss(chosen, rejected, reference_chosen, reference_rejected, args.beta)


def check_step_0(
    policy: "UnifiedModel", pairs: list[dict], tokens: Tokens, reference: "Tensor", args: argparse.Namespace
) -> None:
    """Print and check what theory says before the first step: policy = reference, so loss ln 2 and rewards 0.

    Raises train.TrainingError if the policy is not its reference: then the whole run would be meaningless.
    """
    import torch

    with torch.no_grad():
        policy_logps = pair_logps(policy, pairs, tokens)  # (2, b, T)
    reference = reference.transpose(0, 1).to(policy_logps.device)  # (2, b, T)
    losses, chosen_rewards, rejected_rewards = pair_loss(policy_logps, reference, args)
    apart = (policy_logps - reference).abs().mean().item()
    print(
        f"step 0         loss {losses.mean():.4f} (theory ln 2 = {LN_2:.4f}), rewards {chosen_rewards.mean():+.4f} and "
        f"{rejected_rewards.mean():+.4f} (theory 0), |policy - reference| {apart:.1e} nats a token"
    )
    if not apart <= SAME[policy.device.type]:
        raise train.TrainingError(
            f"step 0: policy and reference differ by {apart:.3g} nats a token, loss {losses.mean():.4f} instead of {LN_2:.4f}"
        )


def step_loss(
    policy_logps: "Tensor",
    reference: "Tensor",
    keep: "Tensor",
    counted: "Tensor",
    args: argparse.Namespace,
    exact_logps: bool = True,
) -> "tuple[Tensor, dict[str, Tensor]]":
    """The objective of each of b pairs, (b,), and what is logged of each, (b,).

    policy_logps, reference (2, b, T). keep (b,) bool: pairs whose caption was not dropped; only they have a preference.
    counted (b,) bool: pairs that belong to the step; the others are there to keep sharded ranks in step and are all 0.
    exact_logps: whether the log-probs are that; `kl` of estimates would mean nothing, and may overflow.
    """
    losses, chosen_rewards, rejected_rewards = pair_loss(policy_logps, reference, args)  # (b,)
    nll = -policy_logps[0].mean(dim=-1)  # (b,) of the chosen pictures; all have T tokens, so this is over the global count
    objective = losses.where(keep & counted, 0) + args.nll_weight * nll.where(counted, 0)
    margins = chosen_rewards - rejected_rewards
    logged = {
        "loss": losses,
        "chosen_rewards": chosen_rewards,
        "rejected_rewards": rejected_rewards,
        "margin": margins,
        "accuracy": (margins > 0).float(),
        "chosen_logps": policy_logps[0].sum(dim=-1),
        "rejected_logps": policy_logps[1].sum(dim=-1),
    }
    if exact_logps:
        logged["kl"] = kl_to_reference(policy_logps, reference).mean(dim=0)
    logged = {key: values.detach().where(keep & counted, 0) for key, values in logged.items()}
    return objective, logged | {"nll": nll.detach().where(counted, 0)}


def accumulate(
    policy: "UnifiedModel",
    pairs: list[dict],
    dropped: np.ndarray,
    tokens: Tokens,
    reference: "Tensor",
    args: argparse.Namespace,
    ranks: Ranks,
) -> tuple[dict[str, float], list[str]]:
    """Add one step's gradient to the weights' `.grad`: this rank's share of `pairs`, one forward pass after the other.

    dropped: bool (len(pairs),); reference (len(pairs), 2, T). Returns this rank's sums of what is logged, and the ids whose
    own objective is not finite.
    """
    import torch

    sums: dict[str, float] = {}
    guilty = []
    for part, counted in train.passes(len(pairs), args.micro_batch, ranks.rank, ranks.world):
        rows = [pairs[i] for i in part]
        keep, real = (torch.from_numpy(mask).to(policy.device) for mask in (~dropped[part], counted))  # (b,)
        policy_logps = pair_logps(policy, rows, tokens, dropped[part])  # (2, b, T)
        before = reference[part].transpose(0, 1).to(policy.device)
        objective, logged = step_loss(policy_logps, before, keep, real, args, policy.exact_logps)
        (objective.sum() / len(pairs)).backward()  # summed over the step's pairs, divided once by their number
        for key, values in logged.items():
            sums[key] = sums.get(key, 0.0) + values.sum().item()
        guilty += [row["id"] for row, value in zip(rows, objective.tolist(), strict=True) if not math.isfinite(value)]
    return sums, guilty


def step_means(sums: dict[str, float], n_pairs: int, n_kept: int) -> dict[str, float]:
    """What is logged of a step: NLL per pair; preference numbers per pair that kept its caption, left out if none did."""
    return {key: value / (n_pairs if key == "nll" else n_kept) for key, value in sums.items() if n_kept or key == "nll"}


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
    ranks = Ranks()
    pairs, tokens = read_pairs(args.pairs)
    name = train.model_name(args.model, tokens.path, tokens.metadata)
    steps = train.batches(len(pairs), args.batch_size, args.epochs, args.seed, args.max_steps)
    for pair, seed in zip(pairs, train.draw_seeds(range(len(pairs)), args.seed), strict=True):
        pair["seed"] = seed  # the same at every step: the reference is computed once

    from families.pretrained import resolve, weights_hash
    from model import load  # after the cheap checks: torch takes seconds

    ranks.join(args.device)
    settings = train.run_settings(args, "dpo.py", content_hash(args.pairs, tokens.path), weights_hash(resolve(name)))
    run = RunDirectory(args.out, settings, args.restart, ranks)
    if run.finished:
        print(f"already trained\n{args.out}")
        return
    policy = load(name, ranks.device, train.weight_type(args, ranks.device), draws=args.mask_draws)
    train.check_model(name, policy.identity(), tokens.metadata, args.pairs, args.other_model)
    train.check_prompts(policy, pairs)
    print(f"pairs          {len(pairs)} of {len({pair['id'] for pair in pairs})} prompts, 2 x {tokens.length} tokens each")
    print(f"steps          {len(steps)} of {args.batch_size} pairs")
    trained = train.prepare(policy, args, ranks, pictures=2)
    optimizer = train.make_optimizer(trained, args.weight_decay)
    if not run.begin(train.disk_bytes(policy, trained, args)):
        print(f"already trained, by another process meanwhile\n{args.out}")
        return

    cache = run.work / "reference.safetensors"
    with memory_advice(f"before step 0 with --micro-batch {args.micro_batch}", train.memory_hint(args), ranks.device):
        reference = reference_logps(policy, pairs, tokens, args.micro_batch, cache, ranks)
        if (start := run.resume(trained, optimizer)) == 0:
            first = steps[0][: args.micro_batch]
            check_step_0(policy, [pairs[i] for i in first], tokens, reference[first], args)

    shown = ("loss", "margin", "accuracy", "images_per_s")
    with run, train.Progress(run.work / "metrics.jsonl", start, len(steps), shown, ranks.first) as progress:
        for step in range(start, len(steps)):
            indices = steps[step]
            examples = [pairs[i] for i in indices]
            dropped = train.dropped_captions(indices, args.uncond_prob, args.seed, step)
            train.restart_randomness(args.seed, step, ranks.rank)
            with memory_advice(f"at step {step} with --micro-batch {args.micro_batch}", train.memory_hint(args), ranks.device):
                sums, guilty = accumulate(policy, examples, dropped, tokens, reference[indices], args, ranks)
            sums = ranks.sum(sums)
            ids = [pair["id"] for pair in examples]
            train.check_finite(step, sums, ids, ranks, guilty)
            rate = train.learning_rate(step, len(steps), args.lr, args.warmup)
            with memory_advice(f"at step {step} in the optimizer", "more ranks", ranks.device):
                norm = train.update(optimizer, trained, rate, args.max_grad_norm).item()
            train.check_finite(step, {"grad_norm": norm}, ids, ranks)
            memory = train.peak_memory_gb(policy.device)
            numbers = step_means(sums, len(indices), int((~dropped).sum()))
            progress.step(2 * len(indices), step=step, **numbers, lr=rate, grad_norm=norm, peak_memory_gb=memory)
            run.after(step + 1, args.save_every)

    if ranks.first:
        warn_if_stuck(run.work / "metrics.jsonl")
    run.finish(policy, args.save_dtype)
    print(args.out)


def warn_if_stuck(metrics: Path) -> None:
    """Say so if the loss of the last tenth of the steps is still ln 2."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row] or [math.inf]
    last = losses[-max(1, len(losses) // 10) :]
    if abs(np.mean(last) - LN_2) < 0.01:
        print(
            f"warning: the loss ended at {np.mean(last):.4f} and never left ln 2 = {LN_2:.4f}: the policy has hardly moved. "
            "Usual causes: too small --lr or --beta, too few steps, --average-logps with a beta meant for sums."
        )


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
