"""Turn a model's judgement of its own pictures into training data, behind a data-quality gate.

Reads one or several scored.jsonl (+ .safetensors). Writes into a directory, all of it or nothing:

    sft.jsonl      every aligned candidate: P(yes) > threshold
    pairs.jsonl    chosen = the aligned candidate with the highest P(yes), rejected = the other with the lowest
    discard.jsonl  the prompts with no aligned candidate, which the curriculum replays

and the pictures' tokens in sft.safetensors and pairs.safetensors. Rows are joined by id in a temporary database on disk
(about 100 bytes a row), so that memory does not grow with their number. Where the model says yes to everything, or to
foils as to the right prompts, its judgement is no training data: the gate refuses (exit code 3) and says why. Blind spots come
with a warning: kinds of foils that it accepts beside the prompt.

    python make_pairs.py --scored round1/scored.jsonl --out round1
    python make_pairs.py --scored round1/scored.jsonl round2/scored.jsonl --mix-models --out round2

Files of several rounds, in order, are one growing set of data, as in the paper's curriculum (Algorithm 2). Each row then names
the model that drew it. The header's `model` is that of the last file, with which training goes on; its `base` is that of the
first, which stays DPO's reference.

Of pictures that were judged by replies (score.py --answer reply) P(yes) is 0 or 1 only: all accepted ones are equally good and
the first candidate counts as the best, all rejected ones equally bad and the first as the worst, since the paper does not say
which of several it takes; every pair is 1 apart, whatever --margin; separation is a difference of two shares, and coverage the
share of replies that can be read. Files of different forms of answer are not mixed: a 1 that was written would beat any P(yes).

Departures from the paper (arXiv 2507.16663): the gate; `--pairs-per-prompt`, `--per-prompt` and `--leave-out` (off by default).
"""

import argparse
import contextlib
import json
import os
import sqlite3
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from common.answers import answer_form, unanswered
from common.candidates import (
    Candidate,
    Kind,
    PictureCopy,
    Source,
    check_same_pictures,
    count_kinds,
    insert_scored,
    leave_out,
    open_database,
    open_sources,
    prompts_with_candidates,
)
from common.command import BadInput, Parser, QualityRefusal, aligned, printable, run_script
from common.outputs import check_outputs, check_parent
from common.records import Tokens
from common.writing import check_space, held_directory, made_directory, whole_file

COPIED = (
    *("model", "model_hash", "judge", "judge_hash", "seed", "guidance", "temperature", "steps", "questions"),
    *("answer", "reply_tokens"),
    *("codebook_size", "image_tokens", "versions"),
)
MEASURED = {"separation", "coverage", "nonunified", "forced", "versions"}  # may differ between two runs of one command
# In the order in which they appear: tensors before the rows that point into them, discard.jsonl when all are there.
OUTPUTS = ("sft.safetensors", "pairs.safetensors", "sft.jsonl", "pairs.jsonl", "discard.jsonl")
encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
BYTES_A_ROW = 400  # of JSONL, generously

MARGIN = "least P(yes) distance within a pair (default 0); of replies it is 1, whatever is asked for"
PER_PROMPT = "most SFT pictures a prompt, best first, of equally good ones the first candidates (default 0: all)"


# ---------------------------------------------------------------------------------------------------------------------
# The rules


class Settings(NamedTuple):
    """What decides about a prompt's candidates; the flags of the same names."""

    threshold: float = 0.5
    margin: float = 0.0
    per_prompt: int = 0
    pairs_per_prompt: int = 1


class Selection(NamedTuple):
    """What one prompt gives: SFT pictures, (chosen, rejected) pairs, and how many candidates and pairs were judged."""

    sft: list[Candidate]
    pairs: list[tuple[Candidate, Candidate]]
    accepted: int
    too_close: int


def select(candidates: list[Candidate], settings: Settings) -> Selection:
    """Choose from all candidates of one prompt. Ties in P(yes) go to the earlier file, then to the lower number.

    Both pictures of a pair are of one model: otherwise DPO would learn who drew them, not which one is right.
    """
    order = sorted(candidates)
    best = sorted((one for one in order if one.p_yes > settings.threshold), key=lambda one: -one.p_yes)
    worst = sorted((one for one in order if one.p_yes <= settings.threshold), key=lambda one: one.p_yes)
    paired: list[tuple[Candidate, Candidate]] = []  # of each model the k-th best with the k-th worst
    for model in dict.fromkeys(one.model_hash for one in order):
        sides = ([one for one in side if one.model_hash == model] for side in (best, worst))
        paired += zip(*sides, strict=False)
    paired = sorted(paired, key=lambda pair: -pair[0].p_yes)[: settings.pairs_per_prompt]
    # 0.7 - 0.2 is under 0.5 in floating point: a distance equal to the margin in decimals has to pass
    pairs = [(one, other) for one, other in paired if one.p_yes - other.p_yes > settings.margin - 1e-9]
    return Selection(best[: settings.per_prompt or None], pairs, len(best), len(paired) - len(pairs))


class Quality(NamedTuple):
    """What the gate looks at, over all candidates."""

    separation: float  # mean P(yes, own prompt) - mean P(yes, foil)
    coverage: float  # mean share of the distribution that yes and no hold
    accepted: int
    candidates: int


def quality_problems(quality: Quality, min_separation: float, min_coverage: float, form: str = "yes-no") -> list[str]:
    """Why these judgements, answers of a form, should not become training data, a sentence each; empty if they may."""
    problems = []
    if quality.separation < min_separation:
        problems.append(f"separation {quality.separation:.4g} is under {min_separation:g}: foils get about the same P(yes)")
    if quality.coverage < min_coverage:
        problems.append(f"coverage {quality.coverage:.4g} is under {min_coverage:g}: the {unanswered(form)}")
    if quality.accepted == quality.candidates:
        problems.append(f"all {quality.candidates} candidates were accepted")
    if quality.accepted == 0:
        problems.append(f"all {quality.candidates} candidates were rejected")
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# Counting, before anything is written

COLUMNS = ("prompts", "candidates", "accepted", "sft", "pairs", "discard")
BY_FILE = ("candidates", "accepted", "new prompts", "sft", "pairs")  # new: none of its pictures was accepted in earlier files


def measure(database: sqlite3.Connection, threshold: float) -> Quality:
    """The gate's numbers over all candidates."""
    return Quality(
        *database.execute(
            "SELECT avg(p_yes - p_yes_foil), avg(coverage), sum(p_yes > ?), count(*) FROM candidates", (threshold,)
        ).fetchone()
    )


def count_selected(database: sqlite3.Connection, settings: Settings) -> tuple[dict[str, Counter], Counter]:
    """COLUMNS, what is dropped, and the sum over prompts of the share not aligned, per category; and BY_FILE, per source."""
    table: dict[str, Counter] = {}
    by_file: Counter = Counter()  # (source, column)
    for prompt, candidates in prompts_with_candidates(database):
        selection = select(candidates, settings)
        counts: Any = table.setdefault(prompt["category"], Counter())  # of integers, but for a sum of shares
        counts["prompts"] += 1
        counts["candidates"] += len(candidates)
        counts["accepted"] += selection.accepted
        counts["sft"] += len(selection.sft)
        counts["pairs"] += len(selection.pairs)
        counts["discard"] += selection.accepted == 0
        counts["too_close"] += selection.too_close
        counts["nonunified"] += 1 - selection.accepted / len(candidates)
        accepted = [one.source for one in candidates if one.p_yes > settings.threshold]
        by_file.update((one.source, "candidates") for one in candidates)
        by_file.update((source, "accepted") for source in accepted)
        by_file.update((source, "new prompts") for source in sorted(accepted)[:1])
        by_file.update((one.source, "sft") for one in selection.sft)
        by_file.update((chosen.source, "pairs") for chosen, _ in selection.pairs)
    return table, by_file


def print_by_file(sources: list[Source], by_file: Counter) -> None:
    """How much of the data came from which file, a round each; nothing where there is one."""
    rows = [["file", "drawn by", *BY_FILE]]
    for number, source in enumerate(sources):
        counts = (str(by_file[number, column]) for column in BY_FILE)
        rows.append([printable(source.path), printable(source.tokens.metadata["model"]), *counts])
    if len(sources) > 1:
        print(aligned(rows))


def print_kinds(kinds: list[Kind]) -> None:
    """Of what was accepted, how often the foil was as well, and which kinds of foils the judge does not see."""
    rows = [[one.name, str(one.accepted), str(one.foil_too), f"{one.foil_too / one.accepted:.3f}"] for one in kinds]
    print(aligned([["foil changes", "accepted", "foil too", "share"], *rows]) if rows else "nothing was accepted")
    for one in kinds:
        if one.blind:
            told = f"of foils that change {one.name}, {one.foil_too} of {one.accepted} accepted pictures were accepted too"
            print(f"warning: {told}: the judge hardly sees it, and these data hardly teach it")


def print_report(table: dict[str, Counter], quality: Quality, problems: list[str], args: argparse.Namespace) -> None:
    """What becomes of the candidates, everything that is dropped, and the gate's numbers whatever it decides."""
    total = sum(table.values(), Counter())
    rows = [["category", *COLUMNS, "nonunified"]]
    for category, counts in [*table.items(), ("total", total)]:
        score = f"{counts['nonunified'] / counts['prompts']:.3f}"
        rows.append([category, *(str(counts[column]) for column in COLUMNS), score])
    print(aligned(rows))
    print(f"nonunified score {total['nonunified'] / total['prompts']:.4f}, mean over {total['prompts']} prompts")
    print(
        f"dropped: {total['too_close']} pairs by --margin {args.margin:g}, "
        f"{total['accepted'] - total['sft']} aligned pictures by --per-prompt {args.per_prompt}"
    )
    print(
        f"gate: separation {quality.separation:.4f} (least {args.min_separation:g}), "
        f"coverage {quality.coverage:.4f} (least {args.min_coverage:g}), accepted {quality.accepted} of "
        f"{quality.candidates} ({quality.accepted / quality.candidates:.1%}): "
        f"{('forced' if args.force else 'refused') if problems else 'passed'}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def describe(sources: list[Source], settings: Settings) -> dict[str, str]:
    """The outputs' metadata as far as files and flags decide it.

    The model is that of the last scored file; where several drew, the base is that of the first.
    """
    last = sources[-1].tokens
    metadata = {key: last.metadata[key] for key in COPIED if key in last.metadata}
    metadata |= {key: str(value) for key, value in settings._asdict().items()}
    metadata["image_tokens"] = str(last.length)
    metadata["sources"] = json.dumps([source.path for source in sources])
    if len({source.tokens.metadata["model_hash"] for source in sources}) > 1:
        metadata["models"] = json.dumps(sorted({source.tokens.metadata["model"] for source in sources}))
        first = sources[0].tokens.metadata
        metadata |= {"base": first["model"], "base_hash": first["model_hash"]}
    return metadata


def check_out(out: Path, sources: list[Source], metadata: dict[str, str]) -> None:
    """Raise BadInput unless `out` can be written: it can be made, and holds nothing of another run, or that is read."""
    check_parent(out / "sft.jsonl" if out.is_dir() else out)
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out}: is a file, a directory is wanted")
    reads = [name for source in sources for name in (source.path, source.tokens.path)]
    check_outputs(reads, {out / name: "pictures" if name.endswith(".safetensors") else Path(name).stem for name in OUTPUTS})
    found = [name for name in OUTPUTS if (out / name).exists()]
    if found and not any(name.endswith(".safetensors") for name in found):
        raise BadInput(f"--out {out}: holds {found[0]}, but no safetensors file that says where it comes from")
    for stem in ("sft", "pairs"):
        if f"{stem}.safetensors" not in found:
            continue
        there = Tokens(out / f"{stem}.jsonl").metadata
        ours = metadata | {"kind": stem}
        for key in sorted((there.keys() | ours.keys()) - MEASURED):
            if there.get(key) != ours.get(key):
                raise BadInput(
                    f"--out {out}: holds another run: in {stem}.safetensors {key} is {there.get(key)}, now it would be "
                    f"{ours.get(key)}; choose another directory or delete sft, pairs and discard there"
                )


def write_outputs(
    out: Path,
    database: sqlite3.Connection,
    sources: list[Source],
    settings: Settings,
    total: Counter,
    metadata: dict[str, str],
) -> None:
    """Write OUTPUTS. They take their names together, at the end: tensors first, so that a JSONL never lacks them."""
    pictures, rows = total["sft"] + 2 * total["pairs"], total["sft"] + total["pairs"] + total["discard"]
    wanted = 2 * sources[0].tokens.length * pictures + BYTES_A_ROW * rows
    check_space(out, wanted, f"{rows} rows with {pictures} pictures")
    with contextlib.ExitStack() as stack:
        stack.enter_context(made_directory(out))
        stack.enter_context(held_directory(out))
        check_out(out, sources, metadata)  # again: another process may have been at work
        files = {  # an ExitStack leaves in reverse order
            name: stack.enter_context(whole_file(out / name, "wb" if name.endswith(".safetensors") else "w"))
            for name in reversed(OUTPUTS)
        }
        sft = PictureCopy(files["sft.safetensors"], total["sft"], sources, metadata | {"kind": "sft"})
        pairs = PictureCopy(files["pairs.safetensors"], 2 * total["pairs"], sources, metadata | {"kind": "pairs"})
        models = [{key: source.tokens.metadata[key] for key in ("model", "model_hash")} for source in sources]
        if "models" not in metadata:  # the header says it
            models = [{}] * len(sources)
        for prompt, candidates in prompts_with_candidates(database):
            selection = select(candidates, settings)
            for one in selection.sft:
                row = {"p_yes": one.p_yes, "row": sft.add(one)}
                print(encode(prompt | row | models[one.source]), file=files["sft.jsonl"])
            for chosen, rejected in selection.pairs:
                row = {"chosen": pairs.add(chosen), "rejected": pairs.add(rejected)}
                scores = {"p_yes_chosen": chosen.p_yes, "p_yes_rejected": rejected.p_yes}
                print(encode(prompt | row | scores | models[chosen.source]), file=files["pairs.jsonl"])
            if not selection.accepted:
                best_p_yes = max(one.p_yes for one in candidates)
                print(encode(prompt | {"best_p_yes": best_p_yes}), file=files["discard.jsonl"])
        sft.close()
        pairs.close()
        for source in sources:
            source.tokens.check_unchanged()
        for file in files.values():  # a full disk shows here, while no file has taken its name
            file.flush()
            os.fsync(file.fileno())


# ---------------------------------------------------------------------------------------------------------------------
# The script


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--scored", nargs="+", required=True, metavar="FILE", help="scored.jsonl, tokens beside it")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write, made if missing")
    parser.add_argument("--mix-models", action="store_true", help="allow scored files drawn by different models")
    rules = parser.add_argument_group("rules")
    rules.add_argument("--leave-out", nargs="+", default=[], metavar="CATEGORY", help="whose prompts give no data")
    rules.add_argument("--threshold", type=float, default=0.5, help="aligned is a P(yes) over this (default 0.5)")
    rules.add_argument("--margin", type=float, default=0.0, help=MARGIN)
    rules.add_argument("--per-prompt", type=int, default=0, help=PER_PROMPT)
    rules.add_argument("--pairs-per-prompt", type=int, default=1, help="k-th best with k-th worst, up to k (default 1)")
    gate = parser.add_argument_group("data-quality gate")
    gate.add_argument("--min-separation", type=float, default=0.05, help="least mean P(yes) - P(yes, foil) (default 0.05)")
    gate.add_argument("--min-coverage", type=float, default=0.5, help="least mean P(yes or no at all) (default 0.5)")
    gate.add_argument("--force", action="store_true", help="override the gate; the metadata records it")
    args = parser.parse_args(argv)
    if not 0 <= args.threshold < 1:
        parser.error(f"--threshold must be at least 0 and less than 1, found {args.threshold}")
    for name, low in (("margin", 0), ("min-separation", -1), ("min-coverage", 0)):
        if not low <= (value := getattr(args, name.replace("-", "_"))) <= 1:
            parser.error(f"--{name} must be from {low} to 1, found {value}")
    for name, low in (("per-prompt", 0), ("pairs-per-prompt", 1)):
        if (value := getattr(args, name.replace("-", "_"))) < low:
            parser.error(f"--{name} must be at least {low}, found {value}")
    return args


def main(args: argparse.Namespace) -> None:
    out, settings = args.out, Settings(args.threshold, args.margin, args.per_prompt, args.pairs_per_prompt)
    sources = open_sources(args.scored, args.mix_models)
    metadata = describe(sources, settings) | ({"left_out": json.dumps(sorted({*args.leave_out}))} if args.leave_out else {})
    check_out(out, sources, metadata)

    with contextlib.closing(open_database()) as database:
        for index, source in enumerate(sources):
            insert_scored(database, index, source)
        check_same_pictures(database, sources)
        for category, prompts, candidates in leave_out(database, args.leave_out):
            print(f"left out: {printable(category)}, {prompts} prompts with {candidates} candidates")

        quality = measure(database, settings.threshold)
        form = answer_form(sources[-1].tokens.metadata)
        problems = quality_problems(quality, args.min_separation, args.min_coverage, form)
        table, by_file = count_selected(database, settings)
        kinds = count_kinds(database, settings.threshold)
        total = sum(table.values(), Counter())
        metadata |= {"separation": f"{quality.separation:.6f}", "coverage": f"{quality.coverage:.6f}"}
        if "models" not in metadata:  # a score is of one model
            metadata["nonunified"] = f"{total['nonunified'] / total['prompts']:.6f}"
        if problems:
            metadata["forced"] = "; ".join(problems)
        refused = problems and not args.force
        if total["pairs"] and not refused:
            write_outputs(out, database, sources, settings, total, metadata)
    print_report(table, quality, problems, args)
    print_kinds(kinds)
    print_by_file(sources, by_file)
    if refused:
        raise QualityRefusal(f"data-quality gate: {'; '.join(problems)} (--force overrides)")
    if not total["pairs"]:
        raise BadInput(
            f"no pair is left: {total['too_close']} dropped by --margin {args.margin:g}, no other prompt has both "
            "aligned and other candidates"
        )
    print(printable(out))


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
