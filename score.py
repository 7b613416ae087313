"""The nonunified score: sample N pictures a prompt, let the model that drew them judge each one.

Reads   prompts (ours, T2I-CompBench's or GenEval's), or with --rejudge an existing scored.jsonl
Writes  scored.jsonl (id, prompt, category, candidate, p_yes, coverage, foil, p_yes_foil, row; with --foils both also
        easy_foil, p_yes_easy_foil) and the image tokens in scored.safetensors beside it

    python   score.py --model deepseek-community/Janus-Pro-1B --prompts color_train.txt --out round1/scored.jsonl
    torchrun --nproc-per-node 8 score.py --model round1/model --rejudge round1/scored.jsonl --out round1/rejudged.jsonl
    python   score.py --rejudge round1/scored.jsonl --judge Qwen/Qwen2.5-VL-7B-Instruct --out round1/labels.jsonl

Work is cut into chunks of a fixed number of prompts, shared out among the ranks; every chunk is written whole (chunks.py) and
skipped when it is already there, so a killed run continues, on any number of ranks. Beyond the paper, each picture is also
judged against a foil: the prompt row's own, else the prompt with one attribute changed by rule (see foils.py), else another
prompt of its category. A judge that says yes to everything has a perfect nonunified score, and only its foils show it.

With --judge another model, any image-text-to-text one of transformers, answers the same questions about existing pictures,
which the model that drew them decodes. Its file has the same form: labels of an independent judge for diagnose.py.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from common.chunks import Chunks
from common.command import BadInput, Parser, check_out_file, run_script
from common.memory import OutOfMemory, memory_advice, release_memory
from common.prompts import prompts_to_draw
from common.ranks import Ranks
from common.records import EASY, SCORED, Tokens, content_hash, differences, read_rows, stable_seed, tokens_path
from common.stats import bootstrap_interval
from common.writing import check_space

if TYPE_CHECKING:
    from model import Judge, UnifiedModel

T = TypeVar("T")
BYTES_A_ROW = 800  # of JSONL, generously
LOOK_TOKENS = 20_000  # image tokens to judge at a time: more gain nothing
QUESTION = "Does this image describe {prompt}?"  # the paper's q(y)
SECOND_QUESTION = "Is this a picture of {prompt}?"


# ---------------------------------------------------------------------------------------------------------------------
# The score


def nonunified_score(p_yes: np.ndarray, prompt: np.ndarray, threshold: float) -> tuple[float, float, float]:
    """Share of pictures the judge rejects, E[und(x, q(y)) = 0], as a mean over prompts, with its 95 % interval.

    p_yes (R,): one a picture. prompt (R,): which prompt each belongs to. Returns (score, low, high); the interval is a
    bootstrap over prompts, because candidates of one prompt are alike.
    """
    rejected = (p_yes <= threshold).astype(np.float64)
    _, index = np.unique(prompt, return_inverse=True)
    per_prompt = np.bincount(index, rejected) / np.bincount(index)  # (P,)
    return float(per_prompt.mean()), *bootstrap_interval(per_prompt)


def separation(p_yes: np.ndarray, p_yes_foil: np.ndarray) -> float:
    """Mean P(yes) for a picture's own prompt minus mean P(yes) for its foil: 0 for a judge that does not look."""
    return float(np.mean(p_yes) - np.mean(p_yes_foil))


def print_report(rows: list[dict[str, Any]], threshold: float) -> None:
    """The score per category and over all, with intervals, and what says whether to believe it."""
    names = {name: [row for row in rows if row["category"] == name] for name in sorted({row["category"] for row in rows})}
    width = max(len("category"), *map(len, names))
    easy = all("p_yes_easy_foil" in row for row in rows)
    print(f"{'category':{width}}  pictures  nonunified  95 % interval   separation  {'easy foils  ' * easy}coverage")
    for name, group in [*names.items(), ("all", rows)] if len(names) > 1 else [("all", rows)]:
        columns = {key: np.array([row[key] for row in group]) for key in ("p_yes", "p_yes_foil", "coverage", "id")}
        score, low, high = nonunified_score(columns["p_yes"], columns["id"], threshold)
        apart = f"{separation(columns['p_yes'], columns['p_yes_foil']):10.3f}"
        if easy:
            apart += f"  {separation(columns['p_yes'], np.array([row['p_yes_easy_foil'] for row in group])):10.3f}"
        print(
            f"{name:{width}}  {len(group):8d}  {score:10.3f}  {low:.3f} .. {high:.3f}  {apart}  "
            f"{columns['coverage'].mean():8.3f}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Work


def pictures_to_rejudge(path: Path) -> tuple[list[dict[str, Any]], Tokens]:
    """The rows of a scored file and their tokens; BadInput for duplicates and rows outside the tensor."""
    tokens, rows, seen = Tokens(path), [], set()
    for number, row in read_rows(path, SCORED, EASY):
        tokens.check_row(row["row"], f"{path}:{number}")
        if (row["id"], row["candidate"]) in seen:
            raise BadInput(f"{path}:{number}: candidate {row['candidate']} of {row['id']!r} is there twice")
        seen.add((row["id"], row["candidate"]))
        rows.append({key: row[key] for key in (*SCORED, "easy_foil") if key in row})
    if not rows:
        raise BadInput(f"{path}: holds no picture")
    tokens.check_values()
    return rows, tokens


def ask(judge: Any, seen: Any, rows: list[dict[str, Any]], args: argparse.Namespace, batch: int) -> None:
    """Judge each picture against its prompt and its foils; sets p_yes, coverage, p_yes_foil in `rows`, and EASY and READOUTS.

    seen: image tokens or pictures. Several wordings are averaged. coverage is that of the questions about the own prompt.
    """
    texts = [[row["prompt"], row["foil"]] for row in rows]
    captions = texts
    if any("easy_foil" in row for row in rows):
        texts = [[*asked, row.get("easy_foil", row["foil"])] for asked, row in zip(texts, rows, strict=True)]
    wordings = [*args.question, args.second_question] if args.readouts else args.question
    asked = [[wording.replace("{prompt}", text) for text in row for wording in wordings] for row in texts]
    if args.readouts:
        answers = judge.judge_with_captions(seen, asked, captions, batch=batch)
    else:
        answers = judge.judge(seen, asked, batch=batch)
    p_yes, coverage, *logps = (answer.double().cpu().numpy() for answer in answers)
    if not all(np.isfinite(answer).all() for answer in (p_yes, coverage, *logps)):
        raise BadInput("the judge's answers are not numbers: the checkpoint's weights overflow")
    n = len(args.question)
    p_yes, coverage = (answer.reshape(len(rows), -1, len(wordings)) for answer in (p_yes, coverage))  # (B, texts, wordings)
    means = p_yes[:, :, :n].mean(axis=2)
    for i, row in enumerate(rows):
        row["p_yes"], row["p_yes_foil"] = (round(float(value), 7) for value in means[i, :2])
        row["coverage"] = round(min(1.0, float(coverage[i, 0, :n].mean())), 7)
        if "easy_foil" in row:
            row["p_yes_easy_foil"] = round(float(means[i, 2]), 7)
        if args.readouts:
            row["p_yes_again"], row["p_yes_foil_again"] = (round(float(value), 7) for value in p_yes[i, :2, n])
            row["caption"], row["caption_foil"] = (round(min(0.0, float(value)), 5) for value in logps[0][i])


def draw_chunk(
    policy: "UnifiedModel", prompts: list[dict[str, str]], args: argparse.Namespace
) -> tuple[list[dict], np.ndarray]:
    """Sample and judge all candidates of some prompts: rows (without their place in the file), tokens (len(rows), T)."""
    seeds = [stable_seed("sample", args.seed, prompt["id"]) for prompt in prompts]
    tokens = policy.sample(
        [prompt["prompt"] for prompt in prompts], args.candidates, args.guidance, args.temperature, seeds, args.batch
    ).flatten(0, 1)  # (P N, T)
    rows = [
        {key: prompt[key] for key in ("id", "prompt", "category", "foil", "easy_foil") if key in prompt} | {"candidate": number}
        for prompt in prompts
        for number in range(args.candidates)
    ]
    look(policy, policy, tokens, rows, args)
    return rows, tokens.cpu().numpy()


def rejudge_chunk(
    policy: "UnifiedModel", judge: "Judge", rows: list[dict[str, Any]], tokens: Tokens, args: argparse.Namespace
) -> tuple[list[dict], np.ndarray]:
    """Judge existing pictures again: the same rows with new answers, and their tokens (len(rows), T)."""
    import torch

    block = tokens[[row["row"] for row in rows]]
    rows = [dict(row) for row in rows]
    look(policy, judge, torch.from_numpy(block), rows, args)
    return rows, block


def look(policy: "UnifiedModel", judge: "Judge", tokens: Any, rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Judge pictures, a few at a time: the model that knows their tokens by these, another by what they stand for."""
    size = min(args.batch, max(1, LOOK_TOKENS // policy.image_tokens))
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        seen = tokens[part].to(policy.device)
        ask(judge, seen if judge is policy else policy.decode(seen), rows[part], args, size)


def with_less_memory(make: Callable[[], T], policy: "UnifiedModel", args: argparse.Namespace, ranks: Ranks) -> T:
    """`make()`, with --batch halved and told, as often as memory runs out; raises OutOfMemory when one is too many."""
    from tqdm import tqdm

    while True:
        try:
            with memory_advice(f"drawing and judging with --batch {args.batch}", "a smaller model", ranks.device):
                return make()
        except OutOfMemory as error:
            if args.batch == 1:
                raise
            told = str(error).split(";")[0]
        args.batch //= 2  # outside the handler: the traceback holds on to what did not fit
        release_memory(policy.device)
        tqdm.write(f"rank {ranks.rank}: {told}); going on with --batch {args.batch}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# What a run is


def run_metadata(
    policy: "UnifiedModel", judge: "Judge", args: argparse.Namespace, source: Tokens | None, work_hash: str
) -> dict[str, str]:
    """The header of the tensor file: who drew the pictures and how, who judged them and how. All strings."""
    import torch
    import transformers

    identity, looks = policy.identity(), judge.identity()
    judged = {"judge": looks["model"], "judge_hash": looks["model_hash"]}
    judged |= {"questions": json.dumps(args.question), "threshold": str(args.threshold)}
    drawn = {"seed": str(args.seed), "foils": args.foils, "guidance": str(args.guidance), "temperature": str(args.temperature)}
    if policy.steps:
        drawn["steps"] = str(policy.steps)
    if source is not None:  # rejudged pictures stay the pictures of the model that drew them
        drawn = {key: source.metadata.get(key, "") for key in (*identity, *drawn)}
    if args.readouts:
        judged["readouts"] = args.second_question
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, numpy {np.__version__}"
    return identity | drawn | judged | {"kind": "scored", "work": work_hash, "versions": versions}


def drawer(path: Path, source: Tokens) -> str:
    """The model that drew the pictures of a scored file, by its header; BadInput where there is none."""
    name = source.metadata.get("model")
    if not name:
        raise BadInput(f"{path}: its header names no model; give --model")
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise BadInput(f"{path}: was drawn by {name}, which is not there any more; give --model")
    return name


def check_same_codebook(policy: "UnifiedModel", source: Tokens, args: argparse.Namespace) -> None:
    """Refuse pictures whose tokens mean something else to the judging model."""
    if (source.codebook_size, source.length) != (policy.codebook_size, policy.image_tokens):
        raise BadInput(
            f"{args.rejudge}: holds pictures of {source.length} tokens of a codebook of {source.codebook_size}, "
            f"but {args.model} draws {policy.image_tokens} of {policy.codebook_size}"
        )


def check_texts(policy: "UnifiedModel", judge: "Judge", work: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Raise PromptError for a prompt or question that drawing or judging model cannot be given: now rather than after hours."""
    for text in {row[key] for row in work for key in ("prompt", "foil", "easy_foil") if key in row}:
        policy.prompt_ids(text)
        for wording in (*args.question, args.second_question) if args.readouts else args.question:
            judge.question_ids(wording.replace("{prompt}", text))
        if args.readouts:
            policy.caption_ids(text)


def check_out(args: argparse.Namespace) -> Path:
    """--out, if a scored file may be written there; BadInput if not."""
    out = check_out_file(args.out)
    if out.suffix != ".jsonl":
        raise BadInput(f"--out {out}: must end in .jsonl; its tensors go beside it")
    if os.path.realpath(out) in map(os.path.realpath, [*(args.prompts or []), *([args.rejudge] if args.rejudge else [])]):
        raise BadInput(f"--out {out}: is also read")
    if tokens_path(out).exists() and not out.exists() and Tokens(out).metadata.get("kind") != "scored":
        raise BadInput(f"--out {out}: {tokens_path(out)} beside it is not of a scored file")
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--model", help="checkpoint directory or hub id: draws and judges (with --judge: the one that drew, by default)"
    )
    work = parser.add_mutually_exclusive_group(required=True)
    work.add_argument("--prompts", type=Path, nargs="+", help="prompt files: our jsonl, T2I-CompBench txt, GenEval jsonl")
    work.add_argument("--rejudge", type=Path, help="a scored.jsonl whose pictures are judged, instead of new ones")
    parser.add_argument("--out", type=Path, required=True, help="scored.jsonl to write, its safetensors beside it")
    parser.add_argument("--restart", action="store_true", help="replace what --out and its chunks hold")
    drawing = parser.add_argument_group("drawing (not with --rejudge)")
    drawing.add_argument("--candidates", type=int, default=10, help="pictures a prompt (default 10, as the paper)")
    drawing.add_argument(
        "--guidance",
        type=float,
        default=5.0,
        help="w in uncond + w (cond - uncond), for every family; 1 = none. Janus-Pro's own scale is w; Show-o's is w - 1, its "
        "published 5 (512 pixels) and 1.75 (256) are 6 and 2.75 here (default 5)",
    )
    drawing.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="0 = always the likeliest token. Of Janus, of each token's distribution; of Show-o, of which tokens are kept from "
        "step to step (default 1)",
    )
    drawing.add_argument(
        "--steps", type=int, help="passes a picture is drawn in, for families that draw in steps (default the family's own)"
    )
    drawing.add_argument("--seed", type=int, default=0, help="noise and foils; same seed, same pictures (default 0)")
    drawing.add_argument(
        "--foils",
        choices=("hard", "easy", "both"),
        default="hard",
        help="for prompts without a foil of their own. easy: another prompt of the category; hard: one attribute changed by "
        "rule "
        "(English), easy where no rule applies; both: as hard, and a second, easy one for every prompt (default hard)",
    )
    judging = parser.add_argument_group("judging")
    judging.add_argument(
        "--judge",
        help="with --rejudge: checkpoint directory or hub id of an image-text-to-text model that answers instead of --model",
    )
    judging.add_argument(
        "--question",
        action="append",
        help=f"what to ask, with {{prompt}} in it; give several to average their answers (default {QUESTION!r})",
    )
    judging.add_argument(
        "--readouts",
        action="store_true",
        help="ask in a second wording as well, and how likely the prompt and its foil are as captions: for gate.py",
    )
    judging.add_argument(
        "--second-question", default=SECOND_QUESTION, help=f"the other wording of --readouts (default {SECOND_QUESTION!r})"
    )
    judging.add_argument("--threshold", type=float, default=0.5, help="P(yes) above it is aligned (default 0.5)")
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--batch",
        type=batch_size,
        default="auto",
        help="pictures in flight on the device, halved where memory runs out (default auto: as many as fit)",
    )
    machine.add_argument("--chunk", type=int, default=16, help="prompts a chunk, the unit of work that is kept (default 16)")
    machine.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    args = parser.parse_args(argv)
    args.question = args.question or [QUESTION]
    check_arguments(parser, args)
    return args


def batch_size(text: str) -> int | str:
    """The value of --batch."""
    if text != "auto" and (not text.isdecimal() or int(text) < 1):
        raise argparse.ArgumentTypeError(f"must be auto or at least 1, found {text}")
    return text if text == "auto" else int(text)


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with code 2, naming the flag and the value, for what cannot work."""
    if args.judge and not args.rejudge:
        parser.error(f"--judge {args.judge}: only with --rejudge; what --prompts asks for, --model draws and judges")
    if not args.model and not args.judge:
        parser.error("the following arguments are required: --model")
    if args.judge and args.readouts:
        parser.error(f"--readouts: of a model that draws and judges, not of --judge {args.judge}")
    for name in ("candidates", "chunk"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, found {getattr(args, name)}")
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps must be at least 1, found {args.steps}")
    for name in ("guidance", "temperature", "seed"):
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name} must be at least 0, found {getattr(args, name)}")
    if not 0 < args.threshold < 1:
        parser.error(f"--threshold must lie between 0 and 1, found {args.threshold}")
    for flag, question in [*(("question", question) for question in args.question), ("second-question", args.second_question)]:
        if "{prompt}" not in question:
            parser.error(f"--{flag} must hold {{prompt}}, found {question!r}")


def main(args: argparse.Namespace) -> None:
    ranks, out = Ranks(), check_out(args)
    if args.rejudge:
        work, source = pictures_to_rejudge(args.rejudge)
        args.model = args.model or drawer(args.rejudge, source)
        work_hash = content_hash(args.rejudge, source.path)
        per_chunk = args.chunk * 16
    else:
        work, source = prompts_to_draw(args.prompts, args.seed, args.foils), None
        work_hash = f"{stable_seed(json.dumps(work), args.candidates, args.chunk):016x}"
        per_chunk = args.chunk

    from model import load  # after the cheap checks: torch takes seconds

    ranks.join(args.device)
    policy: UnifiedModel = load(args.model, device=ranks.device, steps=args.steps)
    judge: Judge = policy
    if source is not None:
        check_same_codebook(policy, source, args)
    if args.judge:
        from families.vlm import load_judge

        judge = load_judge(args.judge, device=ranks.device)
    check_texts(policy, judge, work, args)
    if args.batch == "auto":
        args.batch = LOOK_TOKENS if args.rejudge else policy.drawing_batch([row["prompt"] for row in work], args.guidance)
    args.batch = min(args.batch, per_chunk if args.rejudge else per_chunk * args.candidates)
    metadata = run_metadata(policy, judge, args, source, work_hash)
    chunks = Chunks(out, [work[start : start + per_chunk] for start in range(0, len(work), per_chunk)], metadata)
    for other in ranks.gather([metadata]):
        if told := differences(metadata, other):
            raise BadInput(f"the ranks do not read the same files: {told}")
    ranks.check_restart(args.restart)
    missing = ranks.on_rank_0(chunks.begin, args.restart, ranks.restarted)
    if missing is None:
        print("already scored")
    else:
        n_pictures = len(work) if args.rejudge else len(work) * args.candidates
        wanted = 2 * n_pictures * (2 * policy.image_tokens + BYTES_A_ROW)
        ranks.on_rank_0(check_space, out, wanted, f"{n_pictures} pictures, in chunks and joined,")
        score_chunks(policy, judge, chunks, missing, source, args, ranks)
        ranks.on_rank_0(chunks.merge)
    ranks.on_rank_0(lambda: print_report(chunks.rows(), args.threshold))
    print(out)


def score_chunks(
    policy: "UnifiedModel",
    judge: "Judge",
    chunks: Chunks,
    missing: list[int],
    source: Tokens | None,
    args: argparse.Namespace,
    ranks: Ranks,
) -> None:
    """Make this rank's share of the missing chunks and wait for the others, under one bar that counts all pictures."""
    from tqdm import tqdm

    pictures = 1 if args.rejudge else args.candidates  # a row of work
    started, before = time.perf_counter(), chunks.n_done() * pictures
    total = sum(map(len, chunks.work)) * pictures
    with tqdm(total=total, initial=before, unit="picture", dynamic_ncols=True, disable=not ranks.is_rank_0) as bar:

        def show() -> None:
            bar.update(chunks.n_done() * pictures - bar.n)

        for index in missing[ranks.rank :: ranks.world]:
            if source is not None:
                make = partial(rejudge_chunk, policy, judge, chunks.work[index], source, args)
            else:
                make = partial(draw_chunk, policy, chunks.work[index], args)
            rows, tokens = with_less_memory(make, policy, args, ranks)
            chunks.write(index, rows, tokens)
            if ranks.is_rank_0:
                show()
        ranks.barrier(show if ranks.is_rank_0 else None)
        if ranks.is_rank_0:
            show()
    print(f"speed          {(total - before) / (time.perf_counter() - started):.1f} pictures/s")


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
