"""One row a round: what self_improve.sh writes to summary.jsonl and prints as a table.

Reads   RUN_DIR/round*/: heldout.jsonl, and where they are there prompts, sft, pairs, discard, labels, rejudged (.jsonl)
Writes  RUN_DIR/summary.jsonl: one row a finished round; made anew from the files each time, so it cannot go stale
        RUN_DIR/round*/model/README.md: the scores in the card of each round's model

    python analysis/summary.py runs/demo

nonunified, separation, accuracy and weak_generation are of the round's own pictures of the held-out prompts. judge_accuracy
and the false positive and negative rates are of the *base model's* held-out pictures as this round's judge sees them: one
fixed set, so that a change is a change of the judge. The file holds the numbers as they are; the table rounds them, once.

Of an unfinished run what is there is read; what is there but cannot be read is refused, not left out. report.py shows the
same numbers because it reads the rounds, and computes their numbers, with the functions of this file.
"""

import argparse
import contextlib
import itertools
import os
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it can be started from anywhere
from common.command import BadInput, Parser, check_outputs, run_script
from common.model_card import fill_scores
from common.records import (
    DISCARD,
    PAIRS,
    PROMPT,
    SCORED,
    SFT,
    Key,
    Row,
    Tokens,
    parse_json,
    read_labels,
    read_lines,
    read_rows,
    read_scored,
)
from common.stats import bootstrap_interval
from common.writing import write_rows

HEADINGS = {  # column of summary.jsonl -> its heading in the printed table
    "round": "round",
    "n_prompts": "prompts",
    "nonunified": "nonunified",
    "separation": "separation",
    "discard": "discard",
    "recovered": "recovered",
    "n_sft": "sft",
    "n_pairs": "pairs",
    "accuracy": "accuracy",
    "judge_accuracy": "judge acc.",
    "false_positive_rate": "false pos.",
    "false_negative_rate": "false neg.",
    "weak_generation": "weak gen.",
}
ON_CARDS = {  # the same for the card of a model
    "round": "round",
    "nonunified": "nonunified score",
    "separation": "separation",
    "accuracy": "accuracy, by an independent judge",
    "judge_accuracy": "accuracy of its judge",
}
METRICS = {"step": "count"}  # what every row of metrics.jsonl holds


# ---------------------------------------------------------------------------------------------------------------------
# The numbers. A picture is a Row: a scored row with accepted (bool), label (bool or None), tokens (where its row points)


def mean(values: Iterable[float]) -> float | None:
    """The mean, or None of nothing: a rate over an empty set is unknown, not 0."""
    values = list(values)
    return float(np.mean(values)) if values else None


def rejected_share(pictures: list[Row]) -> tuple[float, float, float]:
    """The nonunified score, mean over prompts of the share of rejected pictures, and its 95 % interval over prompts."""
    per_prompt = defaultdict(list)
    for picture in pictures:
        per_prompt[picture["id"]].append(not picture["accepted"])
    shares = np.array([np.mean(rejected) for rejected in per_prompt.values()])
    return float(shares.mean()), *bootstrap_interval(shares)


def judge_rates(pictures: list[Row]) -> dict[str, float | None]:
    """How often the model's judge is right about labelled pictures, and how it errs; nothing of unlabelled ones.

    false_positive_rate = P(accepted given wrong picture); false_negative_rate = P(rejected given right picture).
    """
    pictures = [picture for picture in pictures if picture["label"] is not None]
    return {
        "judge_accuracy": mean(picture["accepted"] == picture["label"] for picture in pictures),
        "false_positive_rate": mean(picture["accepted"] for picture in pictures if not picture["label"]),
        "false_negative_rate": mean(not picture["accepted"] for picture in pictures if picture["label"]),
    }


def weak_generation(pictures: list[Row]) -> float | None:
    """P(the independent judge rejects, given that the model's own judge rejects): is the gap the drawing's fault?"""
    return mean(not picture["label"] for picture in pictures if picture["label"] is not None and not picture["accepted"])


# ---------------------------------------------------------------------------------------------------------------------
# The files of a round


class Training(NamedTuple):
    """A finished training of a round. name: model-sft or model; metrics: a row a step."""

    name: str
    settings: Row
    metrics: list[Row]

    @property
    def method(self) -> str:
        """sft or dpo, or "" where nothing was logged: only DPO logs a margin."""
        return "" if not self.metrics else "dpo" if "margin" in self.metrics[0] else "sft"


class Round(NamedTuple):
    """What one round left behind; empty where a file is not there."""

    number: int
    heldout: list[Row]
    rejudged: list[Row]  # the base's held-out pictures, judged by this round's model
    n_prompts: int
    sft: list[str]  # prompt ids, one a picture
    n_pairs: int
    discard: list[str] | None  # prompt ids
    label_source: str  # who labelled the held-out pictures
    scored: list[Row]
    pairs: list[tuple[Row, Row]]  # (chosen, rejected)
    training: list[Training]


def is_there(path: Path) -> bool:
    """Whether something has this name, a dangling link too; what may not be looked at is a PermissionError, not absent."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def read_judged(path: Path, labels: dict[Key, bool] | None = None) -> list[Row]:
    """The pictures of a scored file, [] where there is none; with `labels` each one's label."""
    if not is_there(path):
        return []
    tokens = Tokens(path)
    threshold = tokens.threshold()
    pictures: list[Row] = []
    for number, row in read_scored(path, tokens):
        if labels is not None and (row["id"], row["candidate"]) not in labels:
            raise BadInput(f"{path}:{number}: candidate {row['candidate']} of id {row['id']!r} has no label")
        label = labels[row["id"], row["candidate"]] if labels is not None else None
        judged = {"accepted": row["p_yes"] > threshold, "label": label, "tokens": tokens}
        pictures.append({column: row[column] for column in SCORED} | judged)
    return pictures


def read_pairs(path: Path) -> list[tuple[Row, Row]]:
    """The (chosen, rejected) pictures of pairs.jsonl, [] where there is none."""
    if not is_there(path):
        return []
    tokens, pairs = Tokens(path), []
    tokens.check_values()
    for number, row in read_rows(path, PAIRS):
        sides = []
        for side in ("chosen", "rejected"):
            tokens.check_row(row[side], f"{path}:{number}", side)
            picture = {"row": row[side], "p_yes": row[f"p_yes_{side}"], "accepted": side == "chosen"}
            sides.append({key: row[key] for key in PROMPT} | picture | {"label": None, "tokens": tokens})
        pairs.append((sides[0], sides[1]))
    return pairs


def read_ids(path: Path, columns: dict[str, str]) -> list[str]:
    """The prompt ids of a JSONL file's rows, [] where there is no file."""
    return [row["id"] for _, row in read_rows(path, columns)] if is_there(path) else []


def read_training(directory: Path) -> list[Training]:
    """The finished trainings of a round: model-sft before model."""
    trainings = []
    for name in ("model-sft", "model"):
        path = directory / name / "training" / "metrics.jsonl"
        if is_there(path):
            settings = read_training_settings(path.with_name("settings.json"))
            trainings.append(Training(name, settings, [row for _, row in read_rows(path, METRICS)]))
    return trainings


def read_training_settings(path: Path) -> Row:
    """The settings of a training, a JSON object; {} where there is no file."""
    if not is_there(path):
        return {}
    try:
        settings = parse_json("\n".join(line for _, line in read_lines(path)))
    except ValueError as error:
        raise BadInput(f"{path}: not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise BadInput(f"{path}: expected a JSON object, found {type(settings).__name__}")
    return settings


def read_round(directory: Path, number: int, base_labels: dict[Key, bool] | None, numbers_only: bool) -> Round:
    """One round; base_labels: of the base's held-out pictures. numbers_only: without what `round_numbers` does not need."""
    labels, sources = read_labels(directory / "labels.jsonl") if is_there(directory / "labels.jsonl") else (None, [])
    heldout = read_judged(directory / "heldout.jsonl", labels)
    discard = directory / "discard.jsonl"
    return Round(
        number=number,
        heldout=heldout,
        rejudged=read_judged(directory / "rejudged.jsonl", base_labels) if number else heldout,
        n_prompts=len(read_ids(directory / "prompts.jsonl", PROMPT)),
        sft=read_ids(directory / "sft.jsonl", SFT),
        n_pairs=len(read_ids(directory / "pairs.jsonl", PAIRS)),
        discard=read_ids(discard, DISCARD) if is_there(discard) else None,
        label_source=", ".join(sources)[:40],
        scored=[] if numbers_only else read_judged(directory / "scored.jsonl"),
        pairs=[] if numbers_only else read_pairs(directory / "pairs.jsonl"),
        training=[] if numbers_only else read_training(directory),
    )


def read_run(run: Path, numbers_only: bool = False) -> list[Round]:
    """The rounds of a run, as far as it has come. Raises BadInput where there is nothing to report."""
    rounds: list[Round] = []
    base = run / "round0" / "labels.jsonl"
    base_labels = read_labels(base)[0] if is_there(base) else None
    while is_there(directory := run / f"round{len(rounds)}"):
        if not directory.is_dir():
            raise BadInput(f"{directory}: is not a directory")
        rounds.append(read_round(directory, len(rounds), base_labels, numbers_only))
    if not rounds or not rounds[0].heldout:
        raise BadInput(f"{run}: holds no finished round (no round0/heldout.jsonl)")
    numbers = [int(path.name[5:]) for path in run.glob("round*") if re.fullmatch(r"round[0-9]{1,9}", path.name)]
    if max(numbers) >= len(rounds):
        raise BadInput(f"{directory}: is not there, but round{max(numbers)} is")
    return rounds


def read_settings(path: Path) -> list[tuple[str, str]]:
    """The variables of self_improve.sh, as far as they say anything."""
    settings = []
    for _, line in read_lines(path) if is_there(path) else []:
        name, _, value = line.partition("=")
        with contextlib.suppress(ValueError):  # bash quotes control characters in a way that shlex does not know
            value = " ".join(shlex.split(value))
        if value:
            settings.append((name, value))
    return settings


# ---------------------------------------------------------------------------------------------------------------------
# The numbers of a round


def methods(rounds: list[Round]) -> set[str]:
    """What the run trained with: sft, dpo, both or, so far, neither."""
    return {training.method for one in rounds for training in one.training if training.metrics}


def round_numbers(one: Round, before: Round | None) -> Row:
    """All numbers of a round, `before` being the one before it; None where its files do not say.

    nonunified (with the interval low .. high), separation, accuracy and weak_generation are of the round's own pictures of
    the held-out prompts. The judge's rates are of the base model's, as this round's judge sees them: one fixed set, so that
    a change is a change of the judge. Nothing is rounded.
    """
    nonunified, low, high = rejected_share(one.heldout) if one.heldout else (None, None, None)
    trained = before is not None and one.discard is not None
    return {
        "round": one.number,
        "nonunified": nonunified,
        "low": low,
        "high": high,
        "separation": mean(picture["p_yes"] - picture["p_yes_foil"] for picture in one.heldout),
        "discard": len(one.discard or []) if trained else None,
        "recovered": len({*((before and before.discard) or [])} & {*one.sft}) if trained else None,
        "n_sft": len(one.sft) if trained else None,
        "n_pairs": one.n_pairs if trained else None,
        "accuracy": mean(picture["label"] for picture in one.heldout if picture["label"] is not None),
        **judge_rates(one.rejudged),
        "weak_generation": weak_generation(one.heldout),
    }


def summary_row(one: Round, before: Round | None) -> Row:
    """A finished round's row of summary.jsonl; `before` is the round before it."""
    tokens = one.heldout[0]["tokens"]
    if not tokens.metadata.get("model"):
        raise BadInput(f"{tokens.path}: its header names no model")
    numbers = round_numbers(one, before) | {"model": tokens.metadata["model"], "n_prompts": one.n_prompts or None}
    return {key: numbers[key] for key in ("round", "model", *list(HEADINGS)[1:])}


def print_table(rows: list[Row]) -> None:
    """The rows as an aligned table, columns that no row has left out."""
    columns = [key for key in HEADINGS if any(row.get(key) is not None for row in rows)]
    cells = [[HEADINGS[key] for key in columns]]
    for row in rows:
        cells.append([cell(row.get(key)) for key in columns])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def fill_model_cards(run: Path, rows: list[Row]) -> None:
    """Write the scores up to each round into the card of the model that it made."""
    columns = {key: name for key, name in ON_CARDS.items() if any(row.get(key) is not None for row in rows)}
    table = [[cell(row.get(key)) for key in columns] for row in rows]
    for row in rows[1:]:
        card = run / f"round{row['round']}" / "model" / "README.md"
        try:
            if card.is_file():
                fill_scores(card, [list(columns.values()), *table[: row["round"] + 1]])
        except (OSError, UnicodeDecodeError) as error:  # a model that was put away: the run goes on
            print(f"{card}: keeps its old scores: {error}")


def cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# Command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="the directory self_improve.sh wrote (its OUT)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    check_outputs([], {args.run / "summary.jsonl": "summary"})  # nothing that is read is a summary
    finished = list(itertools.takewhile(lambda one: one.heldout, read_run(args.run, numbers_only=True)))
    rows = [summary_row(one, before) for one, before in zip(finished, [None, *finished], strict=False)]
    write_rows(args.run / "summary.jsonl", rows)
    fill_model_cards(args.run, rows)
    print()
    print_table(rows)
    print(args.run / "summary.jsonl")


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
