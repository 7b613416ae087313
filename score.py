"""The nonunified score: sample N pictures a prompt, let the model that drew them judge each one.

Reads   prompts (ours, T2I-CompBench's or GenEval's), or with --rejudge an existing scored.jsonl
Writes  scored.jsonl (id, prompt, category, candidate, p_yes, coverage, foil, p_yes_foil, row; with --foils both also
        easy_foil, p_yes_easy_foil) and the image tokens in scored.safetensors beside it

    python   score.py --model deepseek-community/Janus-Pro-1B --prompts color_train.txt --out round1/scored.jsonl
    torchrun --nproc-per-node 8 score.py --model round1/model --rejudge round1/scored.jsonl --out round1/rejudged.jsonl
    python   score.py --rejudge round1/scored.jsonl --judge Qwen/Qwen2.5-VL-7B-Instruct --out round1/labels.jsonl

Work is cut into chunks of a fixed number of prompts, shared out among the ranks; every chunk is written whole into
``OUT.chunks/`` and skipped when it is already there, so a killed run continues, on any number of ranks. Beyond the paper,
each picture is also judged against a foil: the prompt row's own, else the prompt with one attribute changed by rule (see
foils.py), else another prompt of its category. A judge that says yes to everything has a perfect nonunified score, and
only its foils show it.

With --judge another model, any image-text-to-text one of transformers, answers the same questions about existing pictures,
which the model that drew them decodes. Its file has the same form: labels of an independent judge for diagnose.py.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from foils import hard_foil
from ranks import OutOfMemory, Ranks, memory_advice
from records import (
    READOUTS,
    SCORED,
    BadInput,
    Parser,
    Tokens,
    TokenWriter,
    bootstrap_interval,
    check_out_file,
    check_space,
    check_value,
    content_hash,
    differences,
    hold_directory,
    parse_json,
    read_prompts,
    read_rows,
    run_script,
    stable_seed,
    tokens_path,
    whole_file,
    write_json,
    write_rows,
    write_tokens,
)

T = TypeVar("T")
EASY = {"easy_foil": "text", "p_yes_easy_foil": "probability"}  # columns that a scored file may have beyond SCORED
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


def easy_foils(prompts: list[dict[str, str]], seed: int) -> dict[str, str]:
    """id -> another prompt of its category (of any, if it is alone), fixed by (seed, id); nothing for a single prompt."""
    by_category = defaultdict(set)
    for prompt in prompts:
        by_category[prompt["category"]].add(prompt["prompt"])
    pools, everything = {name: sorted(texts) for name, texts in by_category.items()}, sorted(set().union(*by_category.values()))
    foils = {}
    for prompt in prompts:
        for pool in (pools[prompt["category"]], everything):
            if others := [text for text in pool if text != prompt["prompt"]]:
                foils[prompt["id"]] = others[stable_seed("foil", seed, prompt["id"]) % len(others)]
                break
    return foils


def add_foils(prompts: list[dict[str, str]], seed: int, which: str = "hard") -> list[bool]:
    """Give every prompt without a foil one, fixed by (seed, prompts); returns which have a hard one, their own or by rule.

    which: "hard", the prompt with one attribute changed, or another prompt where no rule applies; "easy", another prompt;
    "both", as hard, and another prompt as easy_foil beside it.
    """
    easy, hard = easy_foils(prompts, seed), []
    for prompt in prompts:
        other = easy.get(prompt["id"])
        found = prompt.get("foil") or (hard_foil(prompt["prompt"], seed) if which != "easy" else None)
        if not (foil := found or other):
            raise BadInput(f"prompt {prompt['prompt'][:60]!r} needs a foil: give it one, or a second prompt beside it")
        prompt["foil"] = foil
        if which == "both" and other:
            prompt["easy_foil"] = other
        hard.append(found is not None)
    return hard


def hard_shares(prompts: list[dict[str, str]], hard: list[bool]) -> str:
    """For people to read: how many prompts have a hard foil, over all and per category."""
    by_category = defaultdict(list)
    for prompt, is_hard in zip(prompts, hard, strict=True):
        by_category[prompt["category"]].append(is_hard)
    shares = ", ".join(f"{name} {100 * sum(group) // len(group)} %" for name, group in sorted(by_category.items()))
    return f"hard for {sum(hard)} of {len(hard)} prompts ({shares})"


def prompts_to_draw(paths: list[Path], seed: int, foils: str) -> list[dict[str, str]]:
    """The prompts of all files, duplicates dropped and counted, each with its foils."""
    prompts: dict[str, dict[str, str]] = {}
    seen = 0
    for path in paths:
        for row in read_prompts(path):
            seen += 1
            if prompts.setdefault(row["id"], row)["prompt"] != row["prompt"]:
                raise BadInput(f"{path}: id {row['id']!r} names two prompts")
    texts = {row["prompt"]: row for row in reversed(prompts.values())}  # the first of equal texts wins
    rows = [row for row in prompts.values() if texts[row["prompt"]] is row]
    print(f"prompts        {len(rows)} ({seen - len(rows)} duplicates dropped)")
    print(f"foils          {hard_shares(rows, add_foils(rows, seed, foils))}")
    return rows


def pictures_to_rejudge(path: Path) -> tuple[list[dict[str, Any]], Tokens]:
    """The rows of a scored file and their tokens; BadInput for duplicates and rows outside the tensor."""
    tokens, rows, seen = Tokens(path), [], set()
    for number, row in read_rows(path, SCORED):
        tokens.check_row(row["row"], f"{path}:{number}")
        if (row["id"], row["candidate"]) in seen:
            raise BadInput(f"{path}:{number}: candidate {row['candidate']} of {row['id']!r} is there twice")
        seen.add((row["id"], row["candidate"]))
        check_easy(row, f"{path}:{number}")
        rows.append({key: row[key] for key in (*SCORED, "easy_foil") if key in row})
    if not rows:
        raise BadInput(f"{path}: holds no picture")
    tokens.check_values()
    return rows, tokens


def check_easy(row: dict[str, Any], where: str) -> None:
    """Raise BadInput unless the columns about an easy foil, which a row need not have, are what they must be."""
    for key, kind in EASY.items():
        if key in row and (problem := check_value(row[key], kind)):
            raise BadInput(f"{where}: {key} {problem}, found {json.dumps(row[key])[:60]}")


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
        answers = judge.look(seen, asked, captions, batch=batch)
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


def draw_chunk(policy: Any, prompts: list[dict[str, str]], args: argparse.Namespace) -> tuple[list[dict], np.ndarray]:
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
    policy: Any, judge: Any, rows: list[dict[str, Any]], tokens: Tokens, args: argparse.Namespace
) -> tuple[list[dict], np.ndarray]:
    """Judge existing pictures again: the same rows with new answers, and their tokens (len(rows), T)."""
    import torch

    block = tokens[[row["row"] for row in rows]]
    rows = [dict(row) for row in rows]
    look(policy, judge, torch.from_numpy(block), rows, args)
    return rows, block


def look(policy: Any, judge: Any, tokens: Any, rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Judge pictures, a few at a time: the model that knows their tokens by these, another by what they stand for."""
    size = min(args.batch, max(1, LOOK_TOKENS // policy.image_tokens))
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        seen = tokens[part].to(policy.device)
        ask(judge, seen if judge is policy else policy.decode(seen), rows[part], args, size)


def with_less_memory(make: Callable[[], T], policy: Any, args: argparse.Namespace, ranks: Ranks) -> T:
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
        policy.release_memory()
        tqdm.write(f"rank {ranks.rank}: {told}); going on with --batch {args.batch}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Chunks


class Chunks:
    """``OUT.chunks/``: finished pieces of one run, each a JSONL file and its tokens.

    metadata decides the content; a directory that holds another run's pieces is refused. The tensor file is written
    last, with a hash over both files' content in its header: a chunk is used only if all of it is what was written.
    """

    def __init__(self, out: Path, work: list[list[dict[str, Any]]], metadata: dict[str, str]) -> None:
        self.out, self.work, self.metadata = out, work, metadata
        self.directory = out.with_name(out.name + ".chunks")

    def path(self, index: int) -> Path:
        return self.directory / f"{index:06d}.jsonl"

    def finished(self) -> bool:
        """Whether the result is there already; BadInput if it is another run's."""
        if not self.out.exists():
            return False
        refuse_other_run(self.out, Tokens(self.out).metadata, self.metadata, ["versions"])
        return True

    def _check(self, restart: bool) -> bool:
        """`restart` itself; without it BadInput if result or chunks are another run's."""
        if not restart and not self.finished() and (self.directory / "settings.json").is_file():
            refuse_other_run(self.directory, read_settings(self.directory / "settings.json"), self.metadata)
        return restart

    def _ours(self) -> bool:
        """Whether result or chunks are those of this run."""
        try:
            return self.finished() or read_settings(self.directory / "settings.json") == self.metadata
        except (BadInput, OSError):
            return False

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the finished result."""
        rows = []
        for number, row in read_rows(self.out, SCORED):
            check_easy(row, f"{self.out}:{number}")
            rows.append(row)
        if len(rows) != Tokens(self.out).rows:
            raise BadInput(f"{self.out}: has {len(rows)} rows, but {tokens_path(self.out).name} {Tokens(self.out).rows}")
        return rows

    def begin(self, restart: bool, restarted: bool) -> list[int] | None:
        """Take hold of the directory; returns the chunks to make, None if the result is there.

        restart: replace what is there; restarted: torchrun has started this command before, which may have obeyed.
        Chunks that are damaged are removed and made again. BadInput for another run's.
        """
        self._check(restart)
        if not restart and self.out.exists() and not self.directory.exists():
            return None
        self._lock = hold_directory(self.directory)
        restart = self._check(restart and not (restarted and self._ours()))  # again: another process may have held it
        if self.out.exists() and not restart:
            shutil.rmtree(self.directory, ignore_errors=True)
            return None
        if restart:
            for file in self.directory.iterdir():
                if file.name != "lock" and not file.name.startswith("replaced"):
                    file.unlink()
            for file in (self.out, tokens_path(self.out)):  # they go with the directory, when their successors are whole
                if file.exists():
                    os.replace(file, self.directory / f"replaced{file.suffix}")
        write_json(self.directory / "settings.json", self.metadata)
        missing, damaged = [], 0
        for index in range(len(self.work)):
            try:
                self.read(index)
            except BadInput:
                missing.append(index)
                damaged += self.path(index).exists() and tokens_path(self.path(index)).exists()
                self.path(index).unlink(missing_ok=True)
                tokens_path(self.path(index)).unlink(missing_ok=True)
        if len(missing) < len(self.work) or damaged:
            again = f", {damaged} damaged and made again" if damaged else ""
            print(f"resumed        {len(self.work) - len(missing)} of {len(self.work)} chunks are there{again}")
        return missing

    def write(self, index: int, rows: list[dict[str, Any]], tokens: np.ndarray) -> None:
        rows = [{**row, "row": i} for i, row in enumerate(rows)]
        write_rows(self.path(index), rows)
        write_tokens(tokens_path(self.path(index)), tokens, self.metadata | {"chunk": self._hash(index, rows, tokens)})

    def _hash(self, index: int, rows: list[dict[str, Any]], tokens: np.ndarray) -> str:
        content = np.ascontiguousarray(tokens, dtype="<u2").tobytes()
        return f"{stable_seed(index, json.dumps(rows), hashlib.sha256(content).hexdigest()):016x}"

    def read(self, index: int) -> tuple[list[dict[str, Any]], np.ndarray]:
        """Rows and tokens of a finished chunk; raises BadInput unless it is there, of this run and exactly as written."""
        rows = [row for _, row in read_rows(self.path(index), SCORED)]
        tokens = Tokens(self.path(index))
        block = tokens[:]
        if tokens.metadata != self.metadata | {"chunk": self._hash(index, rows, block)}:
            raise BadInput(f"{self.path(index)}: not as it was written; start again to have it made again")
        return rows, block

    def n_done(self) -> int:
        """How many pictures all ranks together have finished: those of the chunks whose last file is there."""
        done = {int(file.stem) for file in self.directory.glob("[0-9]*.safetensors")}
        return sum(len(self.work[index]) for index in done)

    def merge(self) -> None:
        """Join all chunks, in order, into the final two files and remove the chunks. The JSONL comes last."""
        length = Tokens(self.path(0)).length
        with whole_file(self.out, "w") as lines, whole_file(tokens_path(self.out)) as tensors:
            writer = TokenWriter(tensors, sum(Tokens(self.path(i)).rows for i in range(len(self.work))), length, self.metadata)
            row = 0
            for index in range(len(self.work)):
                rows, tokens = self.read(index)
                writer.write(tokens)
                for values in rows:
                    whole = {key: values[key] for key in (*SCORED, *EASY, *READOUTS) if key in values} | {"row": row}
                    lines.write(json.dumps(whole, ensure_ascii=False, allow_nan=False) + "\n")
                    row += 1
            writer.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def read_settings(path: Path) -> dict[str, str]:
    """The settings.json of a directory of chunks; raises BadInput if it is not one."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path}: not JSON: {error}; add --restart") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path}: expected a JSON object; add --restart")
    return found


def refuse_other_run(where: Path, found: dict[str, str], wanted: dict[str, str], ignored: Sequence[str] = ()) -> None:
    """Raise BadInput with the list of differences if `where` was made with other settings."""
    if told := differences(found, wanted, ignored):
        raise BadInput(f"{where}: holds another run ({told}); choose another --out or add --restart")


def run_metadata(policy: Any, judge: Any, args: argparse.Namespace, source: Tokens | None, work_hash: str) -> dict[str, str]:
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
    ranks = Ranks()
    out = check_out_file(args.out)
    if out.suffix != ".jsonl":
        raise BadInput(f"--out {out}: must end in .jsonl; its tensors go beside it")
    if os.path.realpath(out) in map(os.path.realpath, [*(args.prompts or []), *([args.rejudge] if args.rejudge else [])]):
        raise BadInput(f"--out {out}: is also read")
    if tokens_path(out).exists() and not out.exists() and Tokens(out).metadata.get("kind") != "scored":
        raise BadInput(f"--out {out}: {tokens_path(out)} beside it is not of a scored file")
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
    policy: Any = load(args.model, device=ranks.device, steps=args.steps)
    judge = policy
    if source is not None:
        check_same_codebook(policy, source, args)
    if args.judge:
        from vlm import load_judge

        judge = load_judge(args.judge, device=ranks.device)
    for text in {row[key] for row in work for key in ("prompt", "foil", "easy_foil") if key in row}:
        policy.prompt_ids(text)  # PromptError now rather than after hours
        for wording in (*args.question, args.second_question) if args.readouts else args.question:
            judge.question_ids(wording.replace("{prompt}", text))
        if args.readouts:
            policy.caption_ids(text)
    if args.batch == "auto":
        args.batch = LOOK_TOKENS if args.rejudge else policy.drawing_batch([row["prompt"] for row in work], args.guidance)
    args.batch = min(args.batch, per_chunk if args.rejudge else per_chunk * args.candidates)
    metadata = run_metadata(policy, judge, args, source, work_hash)
    chunks = Chunks(out, [work[start : start + per_chunk] for start in range(0, len(work), per_chunk)], metadata)
    for other in ranks.gather([metadata]):
        if told := differences(metadata, other):
            raise BadInput(f"the ranks do not read the same files: {told}")
    ranks.check_restart(args.restart)
    missing = ranks.on_first(chunks.begin, args.restart, ranks.restarted)
    if missing is None:
        print("already scored")
    else:
        n_pictures = len(work) if args.rejudge else len(work) * args.candidates
        wanted = 2 * n_pictures * (2 * policy.image_tokens + BYTES_A_ROW)
        ranks.on_first(check_space, out, wanted, f"{n_pictures} pictures, in chunks and joined,")
        score_chunks(policy, judge, chunks, missing, source, args, ranks)
        ranks.on_first(chunks.merge)
    ranks.on_first(lambda: print_report(chunks.rows(), args.threshold))
    print(out)


def score_chunks(
    policy: Any,
    judge: Any,
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
    with tqdm(total=total, initial=before, unit="picture", dynamic_ncols=True, disable=not ranks.first) as bar:

        def show() -> None:
            bar.update(chunks.n_done() * pictures - bar.n)

        for index in missing[ranks.rank :: ranks.world]:
            if source is not None:
                make = partial(rejudge_chunk, policy, judge, chunks.work[index], source, args)
            else:
                make = partial(draw_chunk, policy, chunks.work[index], args)
            rows, tokens = with_less_memory(make, policy, args, ranks)
            chunks.write(index, rows, tokens)
            if ranks.first:
                show()
        ranks.barrier(show if ranks.first else None)
        if ranks.first:
            show()
    print(f"speed          {(total - before) / (time.perf_counter() - started):.1f} pictures/s")


def drawer(path: Path, source: Tokens) -> str:
    """The model that drew the pictures of a scored file, by its header; BadInput where there is none."""
    name = source.metadata.get("model")
    if not name:
        raise BadInput(f"{path}: its header names no model; give --model")
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise BadInput(f"{path}: was drawn by {name}, which is not there any more; give --model")
    return name


def check_same_codebook(policy: Any, source: Tokens, args: argparse.Namespace) -> None:
    """Refuse pictures whose tokens mean something else to the judging model."""
    if (source.codebook_size, source.length) != (policy.codebook_size, policy.image_tokens):
        raise BadInput(
            f"{args.rejudge}: holds pictures of {source.length} tokens of a codebook of {source.codebook_size}, "
            f"but {args.model} draws {policy.image_tokens} of {policy.codebook_size}"
        )


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
