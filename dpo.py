"""Direct preference optimization of a unified model on its own pictures: those its judge accepted against those it did not.

Reads   pairs.jsonl + pairs.safetensors (make_pairs.py): prompts and the image tokens of a chosen and a rejected candidate
Writes  a checkpoint directory that transformers loads, with training/{settings.json,metrics.jsonl,reference.safetensors}

    python dpo.py --pairs round3.jsonl
    torchrun --nproc-per-node 8 dpo.py --pairs round3.jsonl --out round3/model --beta 0.1 --nll-weight 1

The reference is the model before training or, of pairs of several rounds' models, the base, which is in memory beside the
policy until its log-probs are computed, once, before the first step. Where policy = reference at step 0, the loss is ln 2 and
all rewards are 0: the script compares log-probs token by token and stops if they differ. Where these are estimates (Show-o's
are), a pair's random draws are the same for both pictures, for policy and reference, and at every step. Departures from the
paper: in `--uncond-prob` of the pairs the caption is dropped and only the chosen picture's NLL is trained, for guidance's sake.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.command import Parser, progress_bar, run_script
from common.flags import add_training_flags, check_training_flags
from common.records import PAIRS, Tokens, read_examples
from common.sharding import compute_type
from common.training import TrainingError, TrainingRun, draw_seeds, micro_batches

if TYPE_CHECKING:  # torch takes seconds to import; arguments and files are checked before
    from torch import Tensor

    from model import UnifiedModel

LN_2 = math.log(2)
ROUNDING = {"cpu": (1e-3, 1e-3), "cuda": (0.2, 0.01)}  # nats a token: mean |policy - reference|, |mean|: bf16 errs either way


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
# From pairs to the loss


def pair_logps(policy: "UnifiedModel", pairs: list[dict], tokens: Tokens, dropped: np.ndarray | None = None) -> "Tensor":
    """The policy's token log-probs of b pairs: (2, b, T), chosen first. Both sides run in one batch.

    pairs: rows with the `seed` of their log-probs' draws, for families that make any: one for both sides, so that what they
    share cancels. dropped: bool (b,), pairs that see the unconditional prompt.
    """
    prompts, seeds = [pair["prompt"] for pair in pairs] * 2, [pair["seed"] for pair in pairs] * 2
    images = tokens[[pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]]  # (2 b, T)
    with compute_type(policy.device):
        logps = policy.logps(prompts, images, seeds, None if dropped is None else np.tile(dropped, 2))  # (2 b, T)
    return logps.unflatten(0, (2, len(pairs)))


def reference_logps(policy: "UnifiedModel", pairs: list[dict], run: TrainingRun) -> "Tensor":
    """Token log-probs of the model before training, (pairs, 2, T) float32 on the CPU; each rank computes its share."""
    import torch

    logps = torch.zeros(len(pairs), 2, run.tokens.length)
    mine = list(micro_batches(len(pairs), run.args.micro_batch, run.ranks))
    with torch.no_grad(), progress_bar(len(mine), "batch", run.ranks.is_rank_0, name="reference") as bar:
        for part, counted in mine:
            found = pair_logps(policy, [pairs[i] for i in part], run.tokens).transpose(0, 1).cpu()  # (b, 2, T)
            logps[part[counted]] = found[torch.from_numpy(counted)]
            bar.update()
    return run.ranks.sum_tensor(logps)  # each row is of one rank, zero on the others


def step_loss(
    policy_logps: "Tensor", reference: "Tensor", has_caption: "Tensor", counted: "Tensor", args: Any, with_kl: bool
) -> "tuple[Tensor, dict[str, Tensor]]":
    """The objective of each of b pairs, (b,), and what is logged of each, (b,).

    policy_logps, reference (2, b, T), chosen first. has_caption (b,) bool: only these pairs have a preference. counted (b,)
    bool: pairs that belong to the step; the others keep sharded ranks in step and are all 0. with_kl: not where log-probs are
    estimates, whose `kl` would mean nothing and may overflow.
    """
    chosen, rejected = (picture_logps(logps, args.average_logps) for logps in policy_logps)  # (b,)
    reference_chosen, reference_rejected = (picture_logps(logps, args.average_logps) for logps in reference)
    losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, args.beta)
    nll = -policy_logps[0].mean(dim=-1)  # (b,) of the chosen pictures; all have T tokens, so this is over the global count
    objective = losses.where(has_caption & counted, 0) + args.nll_weight * nll.where(counted, 0)
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
    if with_kl:
        logged["kl"] = kl_to_reference(policy_logps, reference).mean(dim=0)
    logged = {key: values.detach().where(has_caption & counted, 0) for key, values in logged.items()}
    return objective, logged | {"nll": nll.detach().where(counted, 0)}


def check_step_0(policy: "UnifiedModel", pairs: list[dict], reference: "Tensor", run: TrainingRun) -> None:
    """Print and check what theory says before the first step: policy = reference, so loss ln 2 and rewards 0.

    Raises TrainingError if the policy is not its reference: then the whole run would be meaningless.
    """
    import torch

    with torch.no_grad():
        policy_logps = pair_logps(policy, pairs, run.tokens)  # (2, b, T)
        reference = reference.transpose(0, 1).to(policy.device)  # (2, b, T)
        every = torch.ones(len(pairs), dtype=torch.bool, device=policy.device)
        logged = step_loss(policy_logps, reference, every, every, run.args, with_kl=False)[1]
    loss, chosen, rejected = (logged[key].mean().item() for key in ("loss", "chosen_rewards", "rejected_rewards"))
    apart, drift = (policy_logps - reference).abs().mean().item(), (policy_logps - reference).mean().abs().item()
    print(
        f"step 0         loss {loss:.4f} (theory ln 2 = {LN_2:.4f}), rewards {chosen:+.4f} and {rejected:+.4f} (theory 0), "
        f"|policy - reference| {apart:.1e} nats a token"
    )
    if any(not found <= most for found, most in zip((apart, drift), ROUNDING[policy.device.type], strict=True)):
        raise TrainingError(f"step 0: policy and reference differ by {apart:.3g} nats a token (in the mean by {drift:.3g})")


def accumulate(
    policy: "UnifiedModel", pairs: list[dict], dropped: np.ndarray, reference: "Tensor", run: TrainingRun
) -> tuple[dict[str, float], list[str]]:
    """Add one step's gradient to the weights' `.grad`: this rank's share of `pairs`, one forward pass after the other.

    dropped: bool (len(pairs),); reference (len(pairs), 2, T). Returns this rank's sums of what is logged, and the ids whose
    own objective is not finite.
    """
    import torch

    ids, found = [], []  # of what this rank runs
    for part, counted in micro_batches(len(pairs), run.args.micro_batch, run.ranks):
        rows = [pairs[i] for i in part]
        has_caption, real = (torch.from_numpy(mask).to(policy.device) for mask in (~dropped[part], counted))  # (b,)
        policy_logps = pair_logps(policy, rows, run.tokens, dropped[part])  # (2, b, T)
        reference_part = reference[part].transpose(0, 1).to(policy.device)  # (2, b, T)
        objective, logged = step_loss(policy_logps, reference_part, has_caption, real, run.args, policy.mask_draws is None)
        (objective.sum() / len(pairs)).backward()  # summed over the step's pairs, divided once by their number
        ids += [row["id"] for row in rows]
        found.append(torch.stack([objective.detach(), *logged.values()]))  # (1 + what is logged, b)
    objectives, *values = torch.cat(found, dim=1).double().cpu()  # once a step: whoever waits for a GPU leaves it idle
    sums = {key: value.sum().item() for key, value in zip(logged, values, strict=True)}
    return sums, [ids[i] for i in (~objectives.isfinite()).nonzero().flatten()]


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
    loss.add_argument("--average-logps", action="store_true", help="mean over image tokens, not sum; beta must grow T-fold")
    loss.add_argument("--uncond-prob", type=float, default=0.1, help="share without caption, for the NLL, if any (default 0.1)")
    loss.add_argument("--reference", help="where the header's base lies, or who drew (default: that base, else the policy)")
    add_training_flags(parser, "--pairs", epochs=30, learning_rate=5e-6)
    args = parser.parse_args(argv)
    check_training_flags(parser, args, args.pairs, "-dpo")
    if not 0 < args.beta < math.inf:
        parser.error(f"--beta must be greater than 0, found {args.beta}: at 0 the loss is ln 2 for ever")
    if not 0 <= args.nll_weight < math.inf:
        parser.error(f"--nll-weight must be at least 0, found {args.nll_weight}")
    args.uncond_prob *= args.nll_weight > 0  # a dropped pair trains its NLL only
    return args


def warn_if_stuck(losses: list[float]) -> None:
    """Say so if the loss of the last tenth of the steps is still ln 2: the policy has hardly moved."""
    if losses and abs((end := np.mean(losses[-max(1, len(losses) // 10) :])) - LN_2) < 0.01:
        print(f"warning: the loss ended at {end:.4f} and never left ln 2 = {LN_2:.4f}: the policy has hardly moved.")
        print("Usual causes: too small --lr or --beta, too few steps, --average-logps with a beta meant for sums.")


def main(args: argparse.Namespace) -> None:
    pairs, tokens = read_examples(args.pairs, PAIRS, ("chosen", "rejected"))
    for pair, seed in zip(pairs, draw_seeds(range(len(pairs)), args.seed), strict=True):
        pair["seed"] = seed  # the same at every step: the reference is computed once
    run = TrainingRun("dpo.py", args, args.pairs, tokens, len(pairs), pictures_per_example=2)  # only rank 0 prints from here on

    from model import load, model_hash  # after the cheap checks: torch takes seconds

    base = run.reference(args.reference, model_hash)  # None: the policy itself, before training
    if run.already_trained(model_hash(run.model)):
        return
    how: dict[str, Any] = {"device": run.device, "dtype": run.dtype, "mask_draws": args.mask_draws}
    policy = load(run.model, **how)
    print(f"pairs          {len(pairs)} of {len({pair['id'] for pair in pairs})} prompts")
    if not run.prepare(policy, pairs):
        return
    with run:
        reference = run.compute_once("reference", lambda: reference_logps(load(base, **how) if base else policy, pairs, run))
        if run.resume() == 0 and base is None:  # of another reference theory says nothing at step 0
            first = np.arange(0, len(pairs), run.ranks.world)[: args.micro_batch]  # a pass of the reference's: the same shapes
            check_step_0(policy, [pairs[i] for i in first], reference[first], run)
        for step in run.steps():  # when it is asked for the next one, states are saved and SIGTERM is obeyed
            examples = [pairs[i] for i in step.indices]
            sums, nonfinite_ids = accumulate(policy, examples, step.dropped, reference[step.indices], run)
            totals = run.update(sums, nonfinite_ids)  # gradients summed over ranks, clipped, AdamW's step
            run.log(**step_means(totals, len(examples), int((~step.dropped).sum())))
    warn_if_stuck(run.logged("loss"))
    run.finish()


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
