"""Does a step that trains drawing move looking too? One step of SFT or DPO, and what it does to log p and to P(yes).

Reads   --data sft.jsonl or --pairs pairs.jsonl (make_pairs.py): what the step learns from
        --probes scored.jsonl (score.py): prompts and pictures to look at before and after the step
Writes  --out dynamics.jsonl, one row a probe, and the summary with all settings in dynamics.json beside it

    python analysis/dynamics.py --data round1/sft.jsonl --probes round1/scored.jsonl --out round1/dynamics.jsonl
    python analysis/dynamics.py --pairs round1/pairs.jsonl --probes round1/scored.jsonl --out round1/dynamics-dpo.jsonl \\
        --optimizer sgd --lr 1e-3

Of a probe, prompt y and picture x, G = log p(x given y) is generation and U = log P(yes given x and the question about y)
is understanding; delta G and delta U are what the step changes. For a step d of the weights, delta U is grad U . d to first
order, and gradient descent on -log p of a training example e has d = lr grad G(e): whether looking moves along is the sign
of grad U(probe) . grad G(e), the block between the branches of the empirical neural tangent kernel (Jacot et al. 2018; the
paper's argument that both share their learning dynamics). Kinds of probes:

    matching    the very picture and prompt of a training example (of pairs: chosen and rejected, each by itself)
    near        another picture of a training example's prompt
    random      a picture of a prompt that is in no training example

In the paper's Proposition 1 understanding is Bayes' rule over prompts, w(y given x) = p(x given y) / sum over y' of p(x given
y'), here over the prompt, its foil and --alternatives others of its category; delta U_bayes is the change of log w. To first
order it is predicted_u_bayes, delta G predicted_g: for gradient descent (--optimizer sgd) on one example its sums.
The table's slopes, measured per predicted, go to 1 as --lr goes to 0. cosine_g is that of grad G(probe) and grad G(e), and
cosine_g_foil, cosine_g_others that of the picture given other prompts: what the paper's ||K(Y0, Yu)||, ||K(Yi, Yu)|| stand for.

Each kind has one picture a prompt at most, so that an interval over probes is one over prompts. A probe's partner e is
itself where it matches, else an example of its prompt, else any; of pairs its chosen picture. U saturates: where P(yes) is
near 1 it cannot move, so that its mean is made by pictures that the judge rejects. The foil tells a judge that sees better
from one that says yes more often. In row and table: predicted_u = grad U . d, which the measured delta U must follow if the
step is small (and large enough for float32); cosine_foil is the foil's grad U with the same grad G(e), cosine_step that of
grad U with d. Gradients are those of the trained weights. No captions are dropped. The model is not saved.

A masked model (Show-o) has no exact log p: G is then an estimate of a lower bound (see its `logps`) from random masks, for a
probe the same before and after the step, and others than those that the step is taken on, or G would rise for them alone.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it can be started from anywhere
from analysis.probes import (
    Partner,
    ProbeSet,
    TrainingData,
    choose_alternatives,
    choose_question,
    find_partners,
    group_by_kind,
    make_row,
    print_summary,
    read_probes,
    subsample,
    summarize,
)
from common import sharding
from common import training as train
from common.answers import QUESTION
from common.command import BadInput, Parser, printable, process_numbers, progress_bar, run_script
from common.memory import memory_advice
from common.outputs import check_out_file, check_outputs
from common.ranks import Ranks
from common.records import PAIRS, SFT, Row, read_examples, tokens_path
from common.writing import write_json, write_rows

if TYPE_CHECKING:
    from torch import Tensor, nn

    from model import UnifiedModel


# ---------------------------------------------------------------------------------------------------------------------
# The mathematics


def sft_objective(logps: "Tensor") -> "Tensor":
    """sft.py's loss of each picture, per token: logps (B, T) -> (B,)."""
    return -logps.mean(dim=-1)


def dpo_objective(policy: "Tensor", reference: "Tensor", beta: float, nll_weight: float) -> "Tensor":
    """dpo.py's loss of each pair (Rafailov et al. 2023, eq. 7, plus NLL of chosen): two of (2, B, T), chosen first -> (B,)."""
    from torch.nn.functional import logsigmoid

    chosen, rejected = (policy - reference).sum(dim=-1)  # (B,) each: log ratios of whole pictures
    return -logsigmoid(beta * (chosen - rejected)) + nll_weight * sft_objective(policy[0])


def bayes_logps(logps: "Tensor") -> "Tensor":
    """log w(y | x) by Bayes' rule, all prompts alike beforehand, from log p(x | y): (..., Y) -> (..., Y) (Proposition 1)."""
    return logps.log_softmax(dim=-1)


def bayes_inner_product(log_w: "Tensor", inner: "Tensor") -> float:
    """<grad log w(y_0 | x), d> from log w (Y,) and <grad log p(x | y), d> (Y,), y_0 first; d as in the text (Proposition 1)."""
    return (log_w[1:].exp() @ (inner[0] - inner[1:])).item()


def inner_product(one: "Sequence[Tensor]", other: "Sequence[Tensor]") -> float:
    """The inner product of two gradients, each a list of tensors; in float64, because cosines of 1e-4 matter."""
    return sum((a.flatten().double() @ b.flatten().double()).item() for a, b in zip(one, other, strict=True))


def cosine(inner: float, one: float, other: float) -> float:
    """The cosine from <a, b>, <a, a> and <b, b>; 0 where a gradient is 0."""
    return inner / math.sqrt(one * other) if one * other > 0 else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# The step


def example_logps(policy: "UnifiedModel", training: TrainingData, part: slice, seeds: list[int]) -> "Tensor":
    """Token log-probs of b of the examples, (sides, b, T). seeds: of all examples' draws, one for both sides of a pair."""
    import torch

    examples, sides = training.examples[part], training.sides.values()
    images = torch.from_numpy(training.tokens[[row[side] for side in sides for row in examples]])
    prompts = [row["prompt"] for row in examples] * len(sides)
    return policy.logps(prompts, images, seeds[part] * len(sides)).unflatten(0, (len(sides), len(examples)))


def take_steps(
    policy: "UnifiedModel", trained: "dict[str, nn.Parameter]", training: TrainingData, args: argparse.Namespace
) -> None:
    """Train `policy` for --steps steps of constant rate, each on all the examples; raises TrainingError if it comes apart."""
    import torch

    n_examples = len(training.examples)
    parts = [slice(start, start + args.micro_batch) for start in range(0, n_examples, args.micro_batch)]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(trained.values(), lr=args.lr)
    max_norm = math.inf
    if args.optimizer == "adamw":
        optimizer, max_norm = train.make_optimizer(trained, weight_decay=0.0), 1.0
    seeds = train.draw_seeds(range(n_examples), args.seed)  # of pairs the same at every step, as in dpo.py
    with torch.no_grad():
        references = [example_logps(policy, training, part, seeds) if args.pairs else None for part in parts]
    for step in range(args.steps):
        loss = 0.0
        if not args.pairs:
            seeds = train.draw_seeds(range(n_examples), args.seed, step)  # new ones, as in sft.py
        for part, reference in zip(parts, references, strict=True):
            logps = example_logps(policy, training, part, seeds)  # (sides, b, T)
            if reference is not None:
                objective = dpo_objective(logps, reference, args.beta, args.nll_weight).sum() / n_examples
            else:
                objective = sft_objective(logps[0]).sum() / n_examples
            objective.backward()
            loss += objective.item()
        norm = train.update(optimizer, trained, args.lr, max_norm).item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise train.TrainingError(f"step {step}: loss {loss}, gradient norm {norm}; try a smaller --lr than {args.lr:g}")
        print(f"{f'step {step}':<15}loss {loss:.6f}, gradient norm {norm:.4g}")


def restore_weights(trained: "dict[str, nn.Parameter]", start: "dict[str, Tensor]") -> "list[Tensor]":
    """Put the weights back to `start`; returns the step that they had made from it."""
    import torch

    step = []
    with torch.no_grad():
        for name, parameter in trained.items():
            before = start.pop(name).to(parameter.device)  # one by one: there may be 28 GB of them
            step.append(parameter - before)
            parameter.copy_(before)
    return step


# ---------------------------------------------------------------------------------------------------------------------
# Probing


def yes_logps(policy: "UnifiedModel", images: "Tensor", probes: list[Row], key: str, question: str) -> "Tensor":
    """log P(yes) to the question about each probe's `key`, prompt or foil: (B,), differentiable. images: tokens (B, T)."""
    return policy.answer_logps(images, [question.replace("{prompt}", probe[key]) for probe in probes])[0]


def measure_probes(policy: "UnifiedModel", probe_set: ProbeSet, size: int) -> np.ndarray:
    """G, U, the foil's U and log w of each probe, kind after kind, under the model as it is: (R, 4) float64, nats."""
    import torch

    probes, found = [probe for some in probe_set.kinds.values() for probe in some], []
    with torch.no_grad():
        for start in range(0, len(probes), size):
            part = probes[start : start + size]
            images = torch.from_numpy(probe_set.tokens[[probe["row"] for probe in part]]).to(policy.device)
            seeds = [probe_set.draw_seed(probe) for probe in part]
            logps = policy.logps([probe["prompt"] for probe in part], images, seeds).double().sum(dim=-1)
            answers = [yes_logps(policy, images, part, key, probe_set.question).double() for key in ("prompt", "foil")]
            texts = [probe_set.alternatives[probe["id"]] for probe in part]
            where = [i for i, some in enumerate(texts) for _ in some]
            pairs, draws = [[text] for some in texts for text in some], size * (policy.mask_draws or 1)
            given = policy.log_likelihoods(pairs, images[where], [seeds[i] for i in where], draws)[:, 0]
            log_w = torch.stack([bayes_logps(some)[0] for some in given.split([len(some) for some in texts])])
            found.append(torch.stack([logps, *answers, log_w], dim=1).cpu().numpy())
    return np.concatenate(found)


def probe_gradients(
    policy: "UnifiedModel",
    trained: "list[nn.Parameter]",
    probe: Row,
    partner: Partner,
    probe_set: ProbeSet,
    step: "list[Tensor]",
) -> dict[str, float]:
    """What the gradients at one probe say; never more than two of them are in memory. step: d, by parameter."""
    import torch

    def gradient(value: "Tensor") -> "Sequence[Tensor]":
        return torch.autograd.grad(value.sum(), trained, materialize_grads=True)

    image, seeds = torch.from_numpy(probe_set.tokens[[probe["row"]]]).to(policy.device), [probe_set.draw_seed(probe)]
    of_e = gradient(policy.logps([partner.prompt], torch.from_numpy(partner.tokens), seeds))
    squared_e, squared_step = inner_product(of_e, of_e), inner_product(step, step)

    def products(value: "Tensor") -> tuple[float, float, float]:
        """Of grad value: with the step, with grad G(e), with itself."""
        found = gradient(value)
        return inner_product(found, step), inner_product(found, of_e), inner_product(found, found)

    u, foil = (products(yes_logps(policy, image, [probe], key, probe_set.question)) for key in ("prompt", "foil"))
    log_p, g = [], []  # of the picture given each of the prompts, its own first, its foil second
    for prompt in probe_set.alternatives[probe["id"]]:
        value = policy.logps([prompt], image, seeds)
        log_p.append(value.detach().double().sum())
        g.append(products(value))
        del value
    with_step = torch.tensor([found[0] for found in g], dtype=torch.float64)
    cosines = [cosine(inner, squared, squared_e) for _, inner, squared in g]
    others = cosines[2:] or cosines[1:]
    return {
        "predicted_u": u[0],
        "inner_product": u[1],
        "cosine": cosine(u[1], u[2], squared_e),
        "cosine_foil": cosine(foil[1], foil[2], squared_e),
        "cosine_step": cosine(u[0], u[2], squared_step),
        "predicted_g": g[0][0],
        "predicted_u_bayes": bayes_inner_product(bayes_logps(torch.stack(log_p)).cpu(), with_step),
        "cosine_g": cosines[0],
        "cosine_g_foil": cosines[1],
        "cosine_g_others": sum(others) / len(others),
    }


def run_experiment(policy: "UnifiedModel", training: TrainingData, probe_set: ProbeSet, args: argparse.Namespace) -> list[Row]:
    """Measure, take the step, measure again, put the weights back and look at the gradients there: a row a probe."""
    trained = policy.trainable_parameters(args.train.replace("-", "_"))
    n_trained = sum(parameter.numel() for parameter in trained.values())
    print(f"steps          {args.steps} of {args.optimizer}, rate {args.lr:g}, on {n_trained:,} parameters ({args.train})")
    sharding.recompute_what_does_not_fit(policy, n_trained, 2 * args.micro_batch * len(training.sides))  # in float32: twice
    before = measure_probes(policy, probe_set, args.micro_batch)
    start = {name: parameter.detach().clone().cpu() for name, parameter in trained.items()}
    take_steps(policy, trained, training, args)
    after = measure_probes(policy, probe_set, args.micro_batch)
    if not np.isfinite(after).all():
        raise train.TrainingError(f"log-probs after the step are not finite; try a smaller --lr than {args.lr:g}")
    step, weights = restore_weights(trained, start), list(trained.values())
    rows: list[Row] = []
    with progress_bar(len(before), "probe") as bar:
        for kind, probes in probe_set.kinds.items():
            for probe, partner in zip(probes, find_partners(kind, probe_set, training, args.seed), strict=True):
                found = probe_gradients(policy, weights, probe, partner, probe_set, step)
                rows.append(make_row(kind, probe, partner, before[len(rows)], after[len(rows)], found))
                bar.update()
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", type=Path, help="sft.jsonl to take a step of SFT on, its safetensors beside it")
    data.add_argument("--pairs", type=Path, help="pairs.jsonl to take a step of DPO on, its safetensors beside it")
    parser.add_argument("--probes", type=Path, required=True, help="scored.jsonl with the pictures to look at")
    parser.add_argument("--out", type=Path, required=True, help="dynamics.jsonl to write; the summary is .json beside it")
    parser.add_argument("--model", help="checkpoint (default: the model that drew the data, by its header)")
    parser.add_argument("--other-model", action="store_true", help="allow a --model that did not draw data and probes")
    parser.add_argument("--seed", type=int, default=0, help="which examples and probes are drawn (default 0)")
    step = parser.add_argument_group("step")
    step.add_argument("--examples", type=int, default=64, help="examples of the data to learn from (default 64)")
    step.add_argument("--steps", type=int, default=1, help="steps, each on all the examples (default 1)")
    step.add_argument("--lr", type=float, default=1e-5, help="learning rate (default 1e-5)")
    step.add_argument(
        "--optimizer",
        choices=["adamw", "sgd"],
        default="adamw",
        help="adamw as in training (default), or sgd, plain gradient descent as in theory, which wants a far larger --lr",
    )
    step.add_argument(
        "--train",
        choices=["language-model", "drawing"],
        default="language-model",
        help="what learns: decoder layers and final norm (default), or also image-token embeddings, aligner and head",
    )
    step.add_argument("--beta", type=float, default=0.1, help="of pairs: pull to the reference, per nat (default 0.1)")
    step.add_argument("--nll-weight", type=float, default=1.0, help="of pairs: weight of the chosen's NLL a token (default 1)")
    probing = parser.add_argument_group("probing")
    probing.add_argument("--n-probes", type=int, default=64, help="probes of each kind, at most (default 64)")
    probing.add_argument("--question", help=f"what to ask (default: the first that the probes were asked, else {QUESTION!r})")
    probing.add_argument(
        "--alternatives", type=int, default=4, help="other prompts, besides the foil, of Bayes' rule over prompts (default 4)"
    )
    machine = parser.add_argument_group("machine")
    about = "pictures or pairs per forward pass (default 8); a weight takes 16 bytes beside activations, 7B 102 GB in all"
    machine.add_argument("--micro-batch", type=int, default=8, help=about)
    machine.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with code 2, naming the flag and the value, for what cannot work."""
    for name in ("examples", "steps", "n_probes", "micro_batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, found {getattr(args, name)}")
    for name in ("lr", "beta"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name} must be greater than 0, found {getattr(args, name)}")
    for name in ("nll_weight", "seed", "alternatives"):
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be at least 0, found {getattr(args, name)}")
    if args.question is not None and "{prompt}" not in args.question:
        parser.error(f"--question must hold {{prompt}}, found {args.question!r}")
    if (world := process_numbers().world) > 1:
        parser.error(f"is one process: start it with python; torchrun has started {world}")


def check_out(args: argparse.Namespace) -> Path:
    """Where the rows go; BadInput if they cannot, or if data would be lost."""
    out = check_out_file(args.out)
    if out.suffix != ".jsonl":
        raise BadInput(f"--out {out}: must end in .jsonl; its summary goes beside it")
    if tokens_path(out).exists():
        raise BadInput(f"--out {out}: is a file of pictures, which would be lost")
    check_outputs([args.data, args.pairs, args.probes], {out: "dynamics rows", out.with_suffix(".json"): "dynamics"})
    return out


def main(args: argparse.Namespace) -> None:
    out = check_out(args)
    path, columns = (args.pairs, PAIRS) if args.pairs else (args.data, SFT)
    sides = {"chosen": "chosen", "rejected": "rejected"} if args.pairs else {"matching": "row"}
    rows, tokens = read_examples(path, columns, tuple(sides.values()))
    scored, probe_tokens = read_probes(args.probes)
    question, question_source = choose_question(args.question, probe_tokens)
    name = tokens.model_name(args.model)
    training = TrainingData(subsample(rows, args.examples, [args.seed, 0], per_prompt=0), tokens, sides)
    alternatives = choose_alternatives(scored, args.alternatives, args.seed)
    found = group_by_kind(scored, probe_tokens, training)
    kinds = {kind: subsample(some, args.n_probes, [args.seed, 1], per_prompt=1) for kind, some in found.items()}
    probe_set = ProbeSet(kinds, probe_tokens, question, args.seed, alternatives)

    import torch  # after the cheap checks: it takes seconds

    from model import load

    ranks = Ranks()
    ranks.join(args.device)
    policy = load(name, device=ranks.device, dtype=torch.float32)  # bfloat16's steps are larger than one step's changes
    identity = policy.identity()
    train.check_model(name, identity, tokens, args.other_model)
    train.check_model(name, identity, probe_tokens, args.other_model)
    train.check_prompts(policy, training.examples, path)
    train.check_prompts(policy, scored, args.probes, [question])
    train.check_prompts(policy, [row | {"prompt": row["foil"]} for row in scored], args.probes)  # which is drawn, too
    n_prompts = len({row["prompt"] for row in training.examples})
    print(f"examples       {len(training.examples)} of {len(rows)} rows of {printable(path)}, {n_prompts} prompts")
    counts = (f"{len(kinds[kind])} of {len(found[kind])} {kind}" for kind in kinds)
    print(f"probes         {', '.join(counts)}, one a prompt at most, of {printable(args.probes)}")
    print(f"question       {printable(question)} ({question_source})")
    if policy.mask_draws is not None:
        print("log p          a lower bound's, estimated from masks: of a probe the same before and after, not the step's own")

    with memory_advice(f"with --micro-batch {args.micro_batch}", "a smaller --micro-batch", ranks.device):
        rows = run_experiment(policy, training, probe_set, args)
    summary = {kind: summarize([row for row in rows if row["kind"] == kind]) for kind in kinds}
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    settings |= {"model": identity["model"], "model_hash": identity["model_hash"], "question": question}
    settings |= {"exact_logps": (policy.mask_draws is None)}
    tokens.check_unchanged()
    probe_tokens.check_unchanged()
    write_json(out.with_suffix(".json"), {"settings": settings, "kinds": summary})
    write_rows(out, rows)
    print_summary(summary)
    print(printable(out))


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
