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
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it can be started from anywhere
from analysis.columns import TYPES, Labels, Pictures, read_columns, read_labels
from common.command import BadInput, Parser, run_script
from common.model_card import fill_scores
from common.outputs import check_outputs
from common.records import (
    DISCARD,
    PAIRS,
    PROMPT,
    SFT,
    Row,
    Tokens,
    parse_json,
    read_lines,
    read_rows,
)
from common.stats import bootstrap_interval, means_by_number
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
# The numbers


def mean(values: np.ndarray) -> float | None:
    """The mean, or None of nothing: a rate over an empty set is unknown, not 0."""
    return float(np.mean(values)) if len(values) else None


def rejected_shares(pictures: Pictures) -> np.ndarray:
    """The share of rejected pictures of each prompt, (P,), in the order in which the prompts appear."""
    numbers: dict[str, int] = {}
    index = np.array([numbers.setdefault(id, len(numbers)) for id in pictures.columns["id"]], np.int64)
    return means_by_number(index, [~pictures.accepted], len(numbers))[:, 0]


def rejected_share(pictures: Pictures) -> tuple[float, float, float]:
    """The nonunified score, mean over prompts of the share of rejected pictures, and its 95 % interval over prompts."""
    shares = rejected_shares(pictures)
    return float(shares.mean()), *bootstrap_interval(shares)


def judge_rates(pictures: Pictures) -> dict[str, float | None]:
    """How often the model's judge is right about labelled pictures, and how it errs; nothing of unlabelled ones.

    false_positive_rate = P(accepted given wrong picture); false_negative_rate = P(rejected given right picture).
    """
    accepted, label = pictures.accepted, pictures.label
    return {
        "judge_accuracy": mean((accepted == label)[~np.isnan(label)]),
        "false_positive_rate": mean(accepted[label == 0]),
        "false_negative_rate": mean(~accepted[label == 1]),
    }


def accuracy(pictures: Pictures) -> float | None:
    """The share of labelled pictures that the independent judge calls right."""
    return mean(pictures.label[~np.isnan(pictures.label)])


def weak_generation(pictures: Pictures) -> float | None:
    """P(the independent judge rejects, given that the model's own judge rejects): is the gap the drawing's fault?"""
    return mean(pictures.label[~np.isnan(pictures.label) & ~pictures.accepted] == 0)


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
    heldout: Pictures
    rejudged: Pictures  # the base's held-out pictures, judged by this round's model
    n_prompts: int
    sft: list[str]  # prompt ids, one a picture
    n_pairs: int
    discard: list[str] | None  # prompt ids
    label_source: str  # who labelled the held-out pictures
    scored: Pictures
    pairs: tuple[Pictures, Pictures]  # chosen, rejected
    training: list[Training]


def is_there(path: Path) -> bool:
    """Whether something has this name, a dangling link too; what may not be looked at is a PermissionError, not absent."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def no_pictures() -> Pictures:
    """Of a file that is not there."""
    columns = {key: np.array([], kind) for key, kind in TYPES.items()}
    return Pictures(columns, np.array([], bool), np.array([]), None)


def read_judged(path: Path, labels: Labels | None = None) -> Pictures:
    """The pictures of a scored file, none where there is no file; with `labels` each one's label."""
    if not is_there(path):
        return no_pictures()
    tokens = Tokens(path)
    threshold = tokens.threshold()
    columns = read_columns(path, tokens)
    label = np.full(len(columns["id"]), np.nan)
    if labels is not None:
        found = labels.places.find(columns["id"], columns["candidate"])
        if (found < 0).any():
            line, id, candidate = (columns[key][(found < 0).argmax()] for key in ("line", "id", "candidate"))
            raise BadInput(f"{path}:{line}: candidate {candidate} of id {id!r} has no label")
        label = labels.right[found].astype(np.float64)
    return Pictures(columns, columns["p_yes"] > threshold, label, tokens)


def read_pairs(path: Path) -> tuple[Pictures, Pictures]:
    """The chosen and the rejected pictures of pairs.jsonl, none where there is no file."""
    if not is_there(path):
        return no_pictures(), no_pictures()
    tokens = Tokens(path)
    tokens.check_values()
    texts: dict[str, list[str]] = {key: [] for key in PROMPT}
    rows: dict[str, list[float]] = {side + key: [] for side in ("chosen", "rejected") for key in ("", " p_yes")}
    for number, row in read_rows(path, PAIRS):
        for key, values in texts.items():
            values.append(sys.intern(row[key]))
        for side in ("chosen", "rejected"):
            tokens.check_row(row[side], f"{path}:{number}", side)
            rows[side].append(row[side])
            rows[f"{side} p_yes"].append(row[f"p_yes_{side}"])
    shared = {key: np.array(values, object) for key, values in texts.items()}
    count, unknown = len(rows["chosen"]), np.full(len(rows["chosen"]), np.nan)
    chosen, rejected = (
        shared | {"row": np.array(rows[side], np.int64), "p_yes": np.array(rows[f"{side} p_yes"], np.float64)}
        for side in ("chosen", "rejected")
    )
    return (
        Pictures(chosen, np.ones(count, bool), unknown, tokens),
        Pictures(rejected, np.zeros(count, bool), unknown, tokens),
    )


def read_ids(path: Path, columns: dict[str, str]) -> list[str]:
    """The prompt ids of a JSONL file's rows, [] where there is no file."""
    return [sys.intern(row["id"]) for _, row in read_rows(path, columns)] if is_there(path) else []


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


def read_round(directory: Path, number: int, base_labels: Labels | None, numbers_only: bool) -> Round:
    """One round; base_labels: of the base's held-out pictures. numbers_only: without what `round_numbers` does not need."""
    path = directory / "labels.jsonl"
    labels = base_labels if not number else read_labels(path) if is_there(path) else None
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
        label_source=", ".join(labels.sources if labels else [])[:40],
        scored=no_pictures() if numbers_only else read_judged(directory / "scored.jsonl"),
        pairs=(no_pictures(), no_pictures()) if numbers_only else read_pairs(directory / "pairs.jsonl"),
        training=[] if numbers_only else read_training(directory),
    )


def read_rounds(run: Path, numbers_only: bool = False) -> Iterator[Round]:
    """The rounds of a run, as far as it has come, one at a time. Raises BadInput where there is nothing to report."""
    base = run / "round0" / "labels.jsonl"
    base_labels = read_labels(base) if is_there(base) else None
    number = 0
    while is_there(directory := run / f"round{number}"):
        if not directory.is_dir():
            raise BadInput(f"{directory}: is not a directory")
        one = read_round(directory, number, base_labels, numbers_only)
        if not number and not one.heldout:
            break
        yield one
        number += 1
    if not number:
        raise BadInput(f"{run}: holds no finished round (no round0/heldout.jsonl)")
    numbers = [int(path.name[5:]) for path in run.glob("round*") if re.fullmatch(r"round[0-9]{1,9}", path.name)]
    if max(numbers) >= number:
        raise BadInput(f"{directory}: is not there, but round{max(numbers)} is")


def read_run(run: Path) -> list[Round]:
    """The rounds of a run, all of them."""
    return list(read_rounds(run))


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
        "separation": mean(one.heldout.columns["p_yes"] - one.heldout.columns["p_yes_foil"]),
        "discard": len(one.discard or []) if trained else None,
        "recovered": len({*((before and before.discard) or [])} & {*one.sft}) if trained else None,
        "n_sft": len(one.sft) if trained else None,
        "n_pairs": one.n_pairs if trained else None,
        "accuracy": accuracy(one.heldout),
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
    rows: list[Row] = []
    before, finished = None, True
    for one in read_rounds(args.run, numbers_only=True):  # all of them, so that what cannot be read is refused
        finished = finished and len(one.heldout) > 0
        if finished:
            rows.append(summary_row(one, before))
        before = one._replace(heldout=no_pictures(), rejudged=no_pictures())
    write_rows(args.run / "summary.jsonl", rows)
    fill_model_cards(args.run, rows)
    print()
    print_table(rows)
    print(args.run / "summary.jsonl")


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
