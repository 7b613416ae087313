"""The nonunified score: sample N pictures a prompt, let the model that drew them judge each one.

Reads   prompts, as they are published (common/prompt_files.py), or with --rejudge an existing scored.jsonl
Writes  scored.jsonl (id, prompt, category, candidate, p_yes, coverage, foil, p_yes_foil, row; with --foils both also
        easy_foil, p_yes_easy_foil; with --answer reply what was written) and the image tokens in scored.safetensors beside it

    python   score.py --model deepseek-community/Janus-Pro-1B --prompts color_train.txt --out round1/scored.jsonl
    torchrun --nproc-per-node 8 score.py --model round1/model --rejudge round1/scored.jsonl --out round1/rejudged.jsonl
    python   score.py --rejudge round1/scored.jsonl --judge Qwen/Qwen2.5-VL-7B-Instruct --out round1/judged-by-qwen.jsonl

Work is cut into chunks of a fixed number of prompts, shared out among the ranks; every chunk is written whole and skipped when
it is already there, so a killed run continues, on any number of ranks (common/chunks.py). Beyond the paper, each picture is
also judged against a foil: the prompt row's own, else the prompt with one attribute changed by rule (common/foils.py), else
another prompt of its category. A judge that says yes to everything has a perfect nonunified score; only foils show it.
By default the answer is P(yes) to a short question; the paper's judge, which answers a longer one in words, is --answer reply.

With --judge another model, any image-text-to-text one of transformers, answers the same questions about existing pictures,
which the model that drew them decodes. Its file has the same form: labels of an independent judge for diagnose.py.
"""

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.answers import FORM, FORMS, QUESTION, SECOND_QUESTION, check_questions, judge_batch, judged_how, reply_columns
from common.chunks import Chunks, batch_begun_with
from common.command import BadInput, Parser, printable, run_script
from common.memory import batch_matters, batch_size, with_less_memory
from common.outputs import DIRECTORY, check_out_file, check_outputs
from common.prompts import keep_readable, print_foils, prompts_to_draw, text_check
from common.ranks import Ranks
from common.records import EASY, SCORED, Row, Tokens, check_value, content_hash, read_scored, stable_seed, tokens_path
from common.stats import bootstrap_interval

if TYPE_CHECKING:  # torch takes seconds to import; arguments and files are checked before
    from model import Judge, UnifiedModel

TOKENS_JUDGED = 20_000  # image tokens to judge at a time: more gain nothing
DRAWING = 0.9  # of a picture's time, for the progress bar; the rest is judging

GUIDANCE = """w in uncond + w (cond - uncond), for every family; 1 = none. Janus-Pro's own scale is w; Show-o's is w - 1, its
published 5 (512 pixels) and 1.75 (256) are 6 and 2.75 here (default 5)"""
TEMPERATURE = """0 = always the likeliest token. Of Janus, of each token's distribution; of Show-o, of which tokens are kept
from step to step (default 1)"""
FOILS = """for prompts without a foil of their own. easy: another prompt of the category; hard: one attribute changed by rule
(English), easy where no rule applies; both: as hard, and a second, easy one for every prompt (default hard)"""
READOUTS = """answers (without a value): a second wording and captions as well, for gate.py. likelihood: also log p of the
picture given prompt and given foil, for diagnose.py: two more passes a picture, of a masked model twice its mask draws"""
Advance = Callable[[float], None]  # is told how many pictures' worth of work has been done


# ---------------------------------------------------------------------------------------------------------------------
# The mathematics


def rejected_shares(p_yes: np.ndarray, prompt: np.ndarray, threshold: float) -> np.ndarray:
    """The share of each prompt's pictures that the judge rejects: p_yes (R,), prompt (R,) which it belongs to -> (P,)."""
    rejected = (p_yes <= threshold).astype(np.float64)
    _, index = np.unique(prompt, return_inverse=True)
    return np.bincount(index, rejected) / np.bincount(index)


def nonunified_score(p_yes: np.ndarray, prompt: np.ndarray, threshold: float) -> float:
    """Share of pictures the judge rejects, E[und(x, q(y)) = 0] (arXiv 2507.16663), as a mean over prompts.

    p_yes (R,): one a picture; und is whether it exceeds the threshold, or with --answer reply, as in the paper, p_yes itself.
    prompt (R,): which prompt each belongs to. Candidates of one prompt are alike: an interval is to be taken over prompts, from
    `rejected_shares`.
    """
    return float(rejected_shares(p_yes, prompt, threshold).mean())


def separation(p_yes: np.ndarray, p_yes_foil: np.ndarray) -> float:
    """Mean P(yes) for a picture's own prompt minus mean P(yes) for its foil: 0 for a judge that does not look."""
    return float(np.mean(p_yes) - np.mean(p_yes_foil))


# ---------------------------------------------------------------------------------------------------------------------
# What is printed


def print_report(rows: list[Row], threshold: float, too_long: Counter[str] | None = None) -> None:
    """The score per category and over all, with 95 % bootstrap intervals over prompts, and what says whether to believe it.

    too_long: how many prompts of each category were left out. Of replies also how many cannot be read, and were cut.
    """
    left_out = too_long or Counter()
    categories = sorted({row["category"] for row in rows} | left_out.keys())
    names = {name: [row for row in rows if row["category"] == name] for name in categories}
    width = max(len("category"), *(len(printable(name)) for name in names))
    easy = all("p_yes_easy_foil" in row for row in rows)
    counts = reply_columns() if all("reply" in row for row in rows) else {}
    print(f"{'category':{width}}  pictures  nonunified  95 % interval   separation  {'easy foils  ' * easy}coverage"
          f"{''.join(f'  {name}' for name in counts)}{'  too long' * (too_long is not None)}")  # fmt: skip
    for name, group in [*names.items(), ("all", rows)] if len(names) > 1 else [("all", rows)]:
        n_left_out = left_out.total() if group is rows else left_out[name]
        if not group:
            wide = 56 + 12 * easy + sum(2 + len(name) for name in counts)
            print(f"{printable(name):{width}}  {0:8d}  {f'all {n_left_out} prompts are too long':>{wide}}")
            continue
        columns = {key: np.array([row[key] for row in group]) for key in ("p_yes", "p_yes_foil", "coverage", "id")}
        shares = rejected_shares(columns["p_yes"], columns["id"], threshold)
        low, high = bootstrap_interval(shares)
        apart = f"{separation(columns['p_yes'], columns['p_yes_foil']):10.3f}"
        if easy:
            apart += f"  {separation(columns['p_yes'], np.array([row['p_yes_easy_foil'] for row in group])):10.3f}"
        print(
            f"{printable(name):{width}}  {len(group):8d}  {shares.mean():10.3f}  {low:.3f} .. {high:.3f}  {apart}  "
            f"{columns['coverage'].mean():8.3f}{''.join(f'  {count(group):{len(name)}d}' for name, count in counts.items())}"
            f"{f'  {n_left_out:8d}' * (too_long is not None)}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Drawing and judging


def draw_chunk(
    policy: "UnifiedModel", prompts: list[dict[str, str]], args: argparse.Namespace, advance: Callable[[float], None]
) -> tuple[list[Row], np.ndarray]:
    """Sample and judge all candidates of some prompts: rows (without their place in the file), tokens (len(rows), T).

    advance: told how many pictures' worth of work has been done, now and then.
    """
    seeds = [stable_seed("sample", args.seed, prompt["id"]) for prompt in prompts]
    texts = [prompt["prompt"] for prompt in prompts]
    tokens = policy.sample(
        texts, args.candidates, args.guidance, args.temperature, seeds, args.batch, lambda n: advance(DRAWING * n)
    ).flatten(0, 1)  # (P N, T)
    rows = [
        {key: prompt[key] for key in ("id", "prompt", "category", "foil", "easy_foil") if key in prompt} | {"candidate": number}
        for prompt in prompts
        for number in range(args.candidates)
    ]
    judge_rows(policy, policy, tokens, rows, args, lambda n: advance((1 - DRAWING) * n))
    return rows, tokens.cpu().numpy()


def rejudge_chunk(
    policy: "UnifiedModel", judge: "Judge", rows: list[Row], tokens: Tokens, args: argparse.Namespace, advance: Advance
) -> tuple[list[Row], np.ndarray]:
    """Judge existing pictures again: the same rows with new answers, and their tokens (len(rows), T)."""
    import torch

    block = tokens[[row["row"] for row in rows]]
    rows = [dict(row) for row in rows]
    judge_rows(policy, judge, torch.from_numpy(block), rows, args, advance)
    return rows, block


def judge_rows(
    policy: "UnifiedModel", judge: "Judge", tokens: Any, rows: list[Row], args: argparse.Namespace, advance: Advance
) -> None:
    """Judge pictures, a few at a time: the model that knows their tokens by these, another by what they stand for."""
    size = min(args.batch, max(1, TOKENS_JUDGED // policy.image_tokens))
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        pictures = tokens[part].to(policy.device)
        judge_batch(judge, pictures if judge is policy else policy.decode(pictures), rows[part], args, size)
        advance(len(rows[part]))


# ---------------------------------------------------------------------------------------------------------------------
# What a run is


def pictures_to_rejudge(path: Path) -> tuple[list[Row], list[str], Tokens]:
    """The rows of a scored file, without what was answered, where they stand, and their tokens; BadInput for bad ones."""
    tokens, rows, places = Tokens(path), [], []
    for line, row in read_scored(path, tokens, SCORED, EASY):
        rows.append({key: row[key] for key in (*SCORED, "easy_foil") if key in row})
        places.append(f"{path}:{line}")
    return rows, places, tokens


def run_metadata(
    policy: "UnifiedModel", judge: "Judge", args: argparse.Namespace, source: Tokens | None, work_hash: str
) -> dict[str, str]:
    """The header of the tensor file: who drew the pictures and how, who judged them and how. All strings."""
    import torch
    import transformers

    identity, judged_by = policy.identity(), judge.identity()
    judged = {"judge": judged_by["model"], "judge_hash": judged_by["model_hash"]}
    judged |= judged_how(args) | {"questions": json.dumps(args.question), "threshold": str(args.threshold)}
    drawn = {"seed": str(args.seed), "foils": args.foils, "guidance": str(args.guidance), "temperature": str(args.temperature)}
    if policy.steps:
        drawn["steps"] = str(policy.steps)
    if source is not None:  # rejudged pictures stay the pictures of the model that drew them
        drawn = {key: source.metadata.get(key, "") for key in (*identity, *drawn, *source.metadata.keys() & {"batch"})}
    if args.readouts:
        judged["readouts"] = args.second_question
    if args.readouts == "likelihood":
        judged["likelihood"] = f"estimated from {policy.mask_draws} masks" if policy.mask_draws else "exact"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, numpy {np.__version__}"
    return identity | drawn | judged | {"kind": "scored", "work": work_hash, "versions": versions}


def check_out(args: argparse.Namespace) -> Path:
    """--out, if a scored file may be written there; BadInput if not."""
    out = check_out_file(args.out)
    if out.suffix != ".jsonl":
        raise BadInput(f"--out {out}: must end in .jsonl; its tensors go beside it")
    read = [*(args.prompts or []), args.rejudge, args.rejudge and tokens_path(args.rejudge)]  # whatever its name ends in
    if os.path.realpath(out.parent) in map(os.path.realpath, args.prompts or []):
        raise BadInput(f"--out {out}: lies in a folder that is read")
    check_outputs(read, {out.with_name(out.name + ".chunks"): DIRECTORY})
    if (out.exists() or tokens_path(out).exists()) and Tokens(out).metadata.get("kind") != "scored":
        raise BadInput(f"--out {out}: {tokens_path(out)} beside it is not of a scored file")
    check_outputs(read, {out: "scored", tokens_path(out): "pictures"})
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", help="checkpoint directory or hub id: draws and judges (default with --rejudge: what drew)")
    work = parser.add_mutually_exclusive_group(required=True)
    work.add_argument("--prompts", type=Path, nargs="+", help="prompt files, or folders of them")
    work.add_argument("--rejudge", type=Path, help="a scored.jsonl whose pictures are judged, instead of new ones")
    parser.add_argument("--out", type=Path, required=True, help="scored.jsonl to write, its safetensors beside it")
    parser.add_argument("--restart", action="store_true", help="replace what --out and its chunks hold")
    parser.add_argument("--skip-long", action="store_true", help="leave out, and count, prompts longer than the model reads")
    drawing = parser.add_argument_group("drawing (not with --rejudge)")
    drawing.add_argument("--category", help="category of all prompts (default: what the files say)")
    drawing.add_argument("--candidates", type=int, default=10, help="pictures a prompt (default 10, as the paper)")
    drawing.add_argument("--guidance", type=float, default=5.0, help=GUIDANCE)
    drawing.add_argument("--temperature", type=float, default=1.0, help=TEMPERATURE)
    drawing.add_argument("--steps", type=int, help="passes a picture is drawn in, where a family has them (default its own)")
    drawing.add_argument("--seed", type=int, default=0, help="noise and foils; same seed, same pictures (default 0)")
    drawing.add_argument("--foils", choices=("hard", "easy", "both"), default="hard", help=FOILS)
    judging = parser.add_argument_group("judging")
    judging.add_argument("--judge", help="with --rejudge: an image-text-to-text model that answers instead of --model")
    judging.add_argument("--answer", choices=tuple(FORMS), default="yes-no", help=FORM)
    judging.add_argument("--reply-tokens", type=int, default=128, help="most tokens of a reply (default 128)")
    judging.add_argument("--question", action="append", help=f"what to ask; several are averaged (default {QUESTION!r}; of "
                         "--answer score and reply the paper's)")  # fmt: skip
    judging.add_argument("--readouts", nargs="?", const="answers", choices=("answers", "likelihood"), help=READOUTS)
    judging.add_argument("--second-question", default=SECOND_QUESTION, help=f"that wording (default {SECOND_QUESTION!r})")
    judging.add_argument("--threshold", type=float, default=0.5, help="P(yes) above it is aligned (default 0.5)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--batch", type=batch_size, default="auto", help="pictures at a time, halved where memory runs out "
                         "(default auto: as many as fit). On a GPU pictures depend on it: kept in the header")  # fmt: skip
    machine.add_argument("--chunk", type=int, default=16, help="prompts a chunk, the unit of work that is kept (default 16)")
    machine.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with code 2, naming the flag and the value, for what cannot work."""
    if args.judge and not args.rejudge:
        parser.error(f"--judge {args.judge}: only with --rejudge; what --prompts asks for, --model draws and judges")
    if args.category is not None and (args.rejudge or check_value(args.category, "text")):
        parser.error(f"--category {args.category!r}: a name, and with --prompts, whose category it is")
    if not args.model and not args.judge:
        parser.error("the following arguments are required: --model")
    if args.judge and args.readouts:
        parser.error(f"--readouts: of a model that draws and judges, not of --judge {args.judge}")
    for name in ("candidates", "chunk", "steps"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, found {value}")
    for name in ("guidance", "temperature", "seed"):
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name} must be at least 0, found {getattr(args, name)}")
    if not 0 < args.threshold < 1:
        parser.error(f"--threshold must lie between 0 and 1, found {args.threshold}")
    check_questions(parser, args)


def main(args: argparse.Namespace) -> None:
    ranks, out = Ranks(), check_out(args)
    if args.rejudge:
        work, places, source = pictures_to_rejudge(args.rejudge)
        args.model = args.model or source.model_name()
        pictures, per_chunk = 1, 16 * args.chunk
    else:
        (work, places), source = prompts_to_draw(args.prompts, args.category), None
        pictures, per_chunk = args.candidates, args.chunk  # pictures of a row of work, rows of a chunk
        if not args.skip_long:
            print_foils(work, args.seed, args.foils)

    from model import load, no_decoder  # after the cheap checks: torch takes seconds

    ranks.join(args.device)
    if args.judge and (reason := no_decoder(args.model)):
        raise BadInput(f"--judge {args.judge}: looks at pictures, but {reason}")
    policy: UnifiedModel = load(args.model, device=ranks.device, steps=args.steps)
    judge: Judge = policy
    if source is not None:
        source.check_codebook(policy, args.model)
    if args.judge:
        from families.vlm import load_judge

        judge = load_judge(args.judge, device=ranks.device)
    scored = args.question if args.answer == "score" else []
    wordings = [*args.question, args.second_question] if args.readouts else args.question
    as_prompts = ("prompt", "foil")[: 1 + (args.readouts == "likelihood")]
    check = text_check(policy, judge, wordings, bool(args.readouts), scored, as_prompts)
    foils = (args.seed, args.foils) if args.prompts else None
    work, too_long = keep_readable(work, places, check, args.skip_long, foils)  # now rather than after hours
    if source is not None:
        work_hash = content_hash(args.rejudge, source.path)
    else:
        work_hash = f"{stable_seed(json.dumps(work), args.candidates, args.chunk):016x}"
    begun = None if args.restart else ranks.on_rank_0(batch_begun_with, out)
    if source is None:  # on every rank, and always: room is then kept for the longest prompt
        fitting = policy.drawing_batch([row["prompt"] for row in work], args.guidance)
    if args.batch == "auto":
        args.batch = TOKENS_JUDGED if source else begun or ranks.on_rank_0(lambda: fitting)
    args.batch = min(args.batch, per_chunk * pictures)

    def make(rows: list[Row], advance: Callable[[float], None]) -> tuple[list[Row], np.ndarray]:
        """A chunk: drawn or read, and judged."""
        if source is not None:
            return rejudge_chunk(policy, judge, rows, source, args, advance)
        return draw_chunk(policy, rows, args, advance)

    metadata = run_metadata(policy, judge, args, source, work_hash)
    if source is None and (begun or (begun is None and batch_matters(policy.device))):
        metadata["batch"] = str(args.batch)
    if args.skip_long:
        metadata["too_long"] = str(too_long.total())
    chunks = Chunks(out, work, per_chunk, metadata, ranks)
    unchanged = source.check_unchanged if source else lambda: None
    in_bytes = 2 * policy.image_tokens + 8 * args.reply_tokens * (args.answer == "reply")
    chunks.run(with_less_memory(make, policy, args, ranks.rank), args.restart, pictures, in_bytes, unchanged)
    ranks.on_rank_0(lambda: print_report(chunks.rows(), args.threshold, too_long if args.skip_long else None))
    print(printable(out))


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
