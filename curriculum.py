"""Choose this round's prompts: all of them at first, later those that the model can still learn from.

Reads prompt files as they are published (text, JSON, tables: common/prompt_files.py) and the scored.jsonl of every earlier
round, in order. Writes prompts.jsonl: id, prompt, category and, where the prompt file has one, foil.
A prompt's state is that of the last round that scored it:

    mastered    all candidates are aligned: it rests, but for a share that is kept against forgetting
    learnable   some are aligned, some are not: it stays
    discarded   none is aligned: it is replayed, since the model has changed since then
    unseen      never scored: it comes in

All state is in the files: the same command writes the same bytes.

    python curriculum.py --prompts color_train.txt ... --exclude color_val.txt --out round1/prompts.jsonl
    python curriculum.py --prompts color_train.txt ... --scored round1/scored.jsonl --out round2/prompts.jsonl

Departures from the paper (arXiv 2507.16663): replay happens between rounds, not from the tenth epoch of one training,
learnable prompts are drawn again, and mastered ones rest. `--only-discarded` is the paper's curriculum (Algorithm 2): the pool
of prompts of which no picture was ever accepted, and nothing else. `--no-replay` is the paper's ablation.
"""

import argparse
import math
import os
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from common.command import BadInput, Parser, aligned, check_left_out, printable, run_script
from common.outputs import check_out_file, check_outputs
from common.prompt_files import print_notes, read_prompt_files
from common.records import SCORED, check_value, read_rows, stable_seed
from common.writing import write_rows

MASTERED, LEARNABLE, DISCARDED, UNSEEN = "mastered", "learnable", "discarded", "unseen"
MAX_CANDIDATES = 2**16  # candidate numbers are kept as a set of bits: one absurd number must not fill the memory

Prompt = dict[str, str]


# ---------------------------------------------------------------------------------------------------------------------
# The rules


# What Unicode calls format characters (zero-width, bidirectional, soft hyphens, tags), and what else has no width: variation
# selectors, the grapheme joiner, fillers.
INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\uffa0\ufe00-\ufe0f\U000e0100-\U000e01ef]")


def plain(text: str) -> str:
    """White space collapsed, case folded, no full stop at the end."""
    return " ".join(text.casefold().split()).rstrip(". ")


def normalise(text: str) -> str:
    """What makes two prompts the same: `plain`, in Unicode's form NFKC and without what cannot be seen."""
    if text.isascii() and text.isprintable():
        return plain(text)
    seen = (c for c in INVISIBLE.sub("", text) if unicodedata.category(c) not in ("Cf", "Cc") or c.isspace())
    folded = unicodedata.normalize("NFKC", "".join(seen)).casefold()
    return plain(unicodedata.normalize("NFKC", folded))


def state_of(aligned: int, candidates: int) -> str:
    """The state of a prompt of which `aligned` out of `candidates` pictures were accepted in its last round."""
    if aligned == 0:
        return DISCARDED
    return MASTERED if aligned == candidates else LEARNABLE


def share_of(share: float, count: int) -> int:
    """`share` of `count`, halves rounded up; any positive share of something is at least one."""
    if share == 0 or count == 0:
        return 0
    return max(1, math.floor(share * count + 0.5))


class History(NamedTuple):
    """What the last two rounds that scored a prompt found, the number of the last of them (from 0), and what all found."""

    before: str | None
    last: str
    round: int
    ever: bool = False  # whether any round accepted a picture

    def recovered(self, n_rounds: int) -> bool:
        """Whether the newest round drew what the round before could not."""
        return self.round == n_rounds - 1 and self.before == DISCARDED and self.last != DISCARDED


def choose_kept(mastered: list[Prompt], share: float, seed: int, n_rounds: int) -> set[str]:
    """The ids of the mastered prompts that do not rest this round: `share` of all, other ones every round.

    Spread over the categories by largest remainder: each has its part rounded down, and those with the largest rest one more;
    among equal rests, others every round.
    """
    by_category: dict[str, list[str]] = {}
    for prompt in mastered:
        by_category.setdefault(prompt["category"], []).append(prompt["id"])

    def drawn(name: str) -> tuple[int, str]:
        return stable_seed("keep", seed, n_rounds, name), name

    total = share_of(share, len(mastered))
    parts = {name: divmod(total * len(ids), len(mastered)) for name, ids in by_category.items()}  # exact: whole, remainder
    left = total - sum(whole for whole, _ in parts.values())
    one_more = set(sorted(parts, key=lambda name: (-parts[name][1], *drawn(name)))[:left])
    kept = set()
    for name, ids in by_category.items():
        kept.update(sorted(ids, key=drawn)[: parts[name][0] + (name in one_more)])
    return kept


def choose(prompts: list[Prompt], states: dict[str, str], kept: set[str], replay: bool) -> list[Prompt]:
    """This round's prompts, in the order of `prompts`; a prompt without a state is unseen."""
    wanted = {LEARNABLE, UNSEEN, DISCARDED} if replay else {LEARNABLE, UNSEEN}
    return [row for row in prompts if states.get(row["id"], UNSEEN) in wanted or row["id"] in kept]


def choose_pool(prompts: list[Prompt], histories: dict[str, History]) -> list[Prompt]:
    """The discard pool of Algorithm 2: prompts that were scored and never had an accepted picture, in the order of `prompts`.

    A prompt that has left the pool does not come back, whatever a later round says of it. An unseen one is not in it.
    """
    return [row for row in prompts if row["id"] in histories and not histories[row["id"]].ever]


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


class Merged(NamedTuple):
    """The prompts of all files without duplicates and excluded ones, and what was found on the way."""

    prompts: list[Prompt]
    texts: dict[str, str]  # id -> normalised text, of every prompt read, dropped ones too
    read: list[tuple[str, Counter]]  # a prompt file each: prompts, duplicates, excluded
    overlaps: list[tuple[str, Counter]]  # an exclude file each: prompts that it took out, and of these only normalised


def merge(paths: list[str], exclude: list[str], category: str | None = None) -> Merged:
    """Read all prompt files. Raises BadInput where one id stands for two texts, or where nothing is left."""
    files, others = read_prompt_files(paths, category), read_prompt_files(exclude)
    print_notes(files, others)
    as_written = [{plain(row["prompt"]) for row in file.rows} for file in others]
    held_out = [{normalise(row["prompt"]) for row in file.rows} for file in others]
    merged = Merged([], {}, [], [(file.path, Counter()) for file in others])
    seen: set[str] = set()
    for file in files:
        merged.read.append((file.path, Counter()))
        for row in file.rows:
            text = normalise(row["prompt"])
            check_text(merged.texts, row["id"], text, where=file.path)
            overlaps = [index for index, texts in enumerate(held_out) if text in texts]
            outcome = "duplicates" if text in seen else "excluded" if overlaps else "kept"
            merged.read[-1][1].update(["prompts", outcome])
            if outcome == "excluded":
                for index in overlaps:
                    only_normalised = plain(row["prompt"]) not in as_written[index]
                    merged.overlaps[index][1].update(["prompts", *["only normalised"] * only_normalised])
            elif outcome == "kept":
                merged.prompts.append(row)
            seen.add(text)
    if not merged.prompts:
        raise BadInput(f"--exclude takes out all {len(seen)} prompts of --prompts: nothing is left")
    return merged


def check_text(texts: dict[str, str], prompt_id: str, text: str, where: str) -> None:
    """Note which text an id stands for; raises BadInput if it already stands for another."""
    if (known := texts.setdefault(prompt_id, text)) != text:
        raise BadInput(f"{where}: id {prompt_id!r} is {text[:80]!r} here and {known[:80]!r} elsewhere")


def leave_out(prompts: list[Prompt], categories: list[str]) -> list[Prompt]:
    """The prompts of all other categories; says how many go. Raises BadInput for an unknown one, and where none is left."""
    wanted = check_left_out(categories, (row["category"] for row in prompts))
    counts = Counter(row["category"] for row in prompts)
    for category in wanted:
        print(f"left out: {printable(category)}, {counts[category]} prompts")
    return [row for row in prompts if row["category"] not in wanted]


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def read_states(path: str, threshold: float, texts: dict[str, str]) -> dict[str, str]:
    """The state of every prompt in one scored file. Raises BadInput for a candidate given twice, or another text."""
    counts: dict[str, list[int]] = {}  # id -> aligned, candidates, their numbers as a set of bits
    for number, row in read_rows(path, SCORED):
        where, candidate = f"{path}:{number}", row["candidate"]
        check_text(texts, row["id"], normalise(row["prompt"]), where)
        if candidate >= MAX_CANDIDATES:
            raise BadInput(f"{where}: candidate is {candidate}, but numbers end at {MAX_CANDIDATES - 1}")
        count = counts.setdefault(row["id"], [0, 0, 0])
        if count[2] >> candidate & 1:
            raise BadInput(f"{where}: candidate {candidate} of id {row['id']!r} is given twice")
        count[0] += row["p_yes"] > threshold
        count[1] += 1
        count[2] |= 1 << candidate
    if not counts:
        raise BadInput(f"{path}: holds no scored candidate")
    return {prompt_id: state_of(aligned, candidates) for prompt_id, (aligned, candidates, _) in counts.items()}


def read_histories(paths: list[str], threshold: float, texts: dict[str, str]) -> dict[str, History]:
    """What the scored files say of every prompt, the earliest round first."""
    histories: dict[str, History] = {}
    for number, path in enumerate(paths):
        for prompt_id, state in read_states(path, threshold, texts).items():
            earlier = histories.get(prompt_id)
            ever = state != DISCARDED or (earlier is not None and earlier.ever)
            histories[prompt_id] = History(earlier.last if earlier else None, state, number, ever)
    return histories


# ---------------------------------------------------------------------------------------------------------------------
# What is printed

COLUMNS = ("prompts", MASTERED, "kept", LEARNABLE, DISCARDED, "recovered", UNSEEN, "this round")


def count_states(
    prompts: list[Prompt], histories: dict[str, History], kept: set[str], chosen: list[Prompt], n_rounds: int
) -> dict[str, Counter]:
    """COLUMNS counted per category, in order of appearance, and in total."""
    table: dict[str, Counter] = {row["category"]: Counter() for row in prompts}
    for row in prompts:
        history = histories.get(row["id"])
        table[row["category"]].update(["prompts", history.last if history else UNSEEN])
        table[row["category"]]["kept"] += row["id"] in kept
        table[row["category"]]["recovered"] += history is not None and history.recovered(n_rounds)
    for row in chosen:
        table[row["category"]]["this round"] += 1
    return table


def print_merged(merged: Merged) -> None:
    """What was read from each file, and what was dropped from it."""
    for path, counts in merged.read:
        dropped = f"{counts['duplicates']} duplicates and {counts['excluded']} excluded dropped"
        print(f"{printable(path)}: {counts['prompts']} prompts, {dropped}")
    for path, counts in merged.overlaps:
        only = f", {only} of them only by Unicode normalisation" if (only := counts["only normalised"]) else ""
        print(f"{printable(path)}: takes out {counts['prompts']} prompts{only}")


# ---------------------------------------------------------------------------------------------------------------------
# The script


def check_paths(args: argparse.Namespace) -> Path:
    """The file to write. Raises BadInput if it would overwrite an input, or if a round is given twice."""
    out = check_out_file(args.out)
    for flag, paths in (("--prompts", args.prompts), ("--scored", args.scored), ("--exclude", args.exclude)):
        resolved = [os.path.realpath(path) for path in paths]  # not Path.resolve, which has no word for a symlink loop
        if os.path.realpath(out) in resolved:
            raise BadInput(f"--out {out}: is also given to {flag}")
        if os.path.realpath(out.parent) in resolved:
            raise BadInput(f"--out {out}: lies in the folder that is given to {flag}, and would be read with it")
        if flag == "--scored" and len(set(resolved)) < len(resolved):
            twice = next(path for path in resolved if resolved.count(path) > 1)
            raise BadInput(f"--scored: {twice} is given twice, but each round counts once")
    check_outputs([*args.prompts, *args.scored, *args.exclude], {out: "prompts"})
    return out


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--prompts", nargs="+", required=True, metavar="FILE", help="prompt files, or folders of them")
    parser.add_argument("--category", metavar="NAME", help="category of all prompts (default: what the files say)")
    parser.add_argument("--scored", nargs="+", default=[], metavar="FILE", help="all earlier rounds' scored.jsonl, in order")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="FILE", help="evaluation prompt files, to be left out")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="this round's prompts.jsonl")
    rules = parser.add_argument_group("rules")
    rules.add_argument("--threshold", type=float, default=0.5, help="aligned is a P(yes) over this (default 0.5)")
    rules.add_argument("--leave-out", nargs="+", default=[], metavar="CATEGORY", help="whose prompts are not drawn at all")
    rules.add_argument(
        "--keep-mastered",
        type=float,
        default=0.1,
        help="share of all mastered prompts that stay, spread over the categories (default 0.1)",
    )
    replay = rules.add_mutually_exclusive_group()
    replay.add_argument("--no-replay", action="store_true", help="leave discarded prompts out, for the ablation")
    replay.add_argument(
        "--only-discarded",
        action="store_true",
        help="only prompts that never had an accepted picture, as the paper; if none is left, nothing is written",
    )
    rules.add_argument("--seed", type=int, default=0, help="chooses which mastered prompts are kept (default 0)")
    args = parser.parse_args(argv)
    if args.category is not None and (problem := check_value(args.category, "text")):
        parser.error(f"--category {problem}")
    if not 0 <= args.threshold < 1:
        parser.error(f"--threshold must be at least 0 and less than 1, found {args.threshold}")
    if not 0 <= args.keep_mastered <= 1:
        parser.error(f"--keep-mastered must be from 0 to 1, found {args.keep_mastered}")
    if args.only_discarded and not args.scored:
        parser.error("--only-discarded needs --scored: which prompts never had an accepted picture?")
    return args


def main(args: argparse.Namespace) -> None:
    out = check_paths(args)
    merged = merge(args.prompts, args.exclude, args.category)
    print_merged(merged)

    histories = read_histories(args.scored, args.threshold, merged.texts)
    known = {row["id"] for row in merged.prompts}
    if ignored := len(histories.keys() - known):
        print(f"--scored: {ignored} prompts ignored, which --prompts does not have or --exclude takes out")
    prompts = leave_out(merged.prompts, args.leave_out)

    states = {prompt_id: history.last for prompt_id, history in histories.items()}
    mastered = [row for row in prompts if states.get(row["id"]) == MASTERED]
    if args.only_discarded:
        kept, chosen = set(), choose_pool(prompts, histories)
    else:
        kept = choose_kept(mastered, args.keep_mastered, args.seed, len(args.scored))
        chosen = choose(prompts, states, kept, replay=not args.no_replay)
    table = count_states(prompts, histories, kept, chosen, len(args.scored))
    rows = [*table.items(), ("total", sum(table.values(), Counter()))]
    if chosen:
        write_rows(out, chosen)
    print(aligned([["category", *COLUMNS], *([name, *(str(counts[key]) for key in COLUMNS)] for name, counts in rows)]))
    if args.only_discarded and not chosen:
        print("nothing is left to be drawn again: no prompt that was scored is without an accepted picture")
        return
    if not chosen:
        raise BadInput(
            f"no prompt is left for this round: {len(mastered)} of {len(prompts)} are mastered "
            f"(--keep-mastered {args.keep_mastered}){', the others discarded (--no-replay)' if args.no_replay else ''}"
        )
    print(printable(out))


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
