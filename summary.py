"""One row a round: what self_improve.sh writes to summary.jsonl and prints as a table.

Reads   RUN_DIR/round*/: heldout.jsonl, and where they are there prompts, sft, pairs, discard, labels, rejudged (.jsonl)
Writes  RUN_DIR/summary.jsonl: one row a finished round; made anew from the files each time, so it cannot go stale

    python summary.py runs/demo

nonunified, separation and accuracy are of the round's own pictures of the held-out prompts. judge_accuracy and the false
positive and negative rates are of the *base model's* held-out pictures as this round's judge sees them: one fixed set, so
that a change is a change of the judge.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from records import DISCARD, LABELS, PAIRS, PROMPT, SCORED, SFT, BadInput, Parser, Tokens, read_rows, run_script, write_rows

# Column of summary.jsonl -> its heading in the printed table.
TABLE = {
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

Key = tuple[str, int]  # (prompt id, candidate)


# ---------------------------------------------------------------------------------------------------------------------
# The numbers


def mean(values: list[bool] | np.ndarray) -> float | None:
    """The mean, or None of nothing: a rate over an empty set is unknown, not 0."""
    return round(float(np.mean(values)), 4) if len(values) else None


def judge_rates(accepted: dict[Key, bool], truth: dict[Key, bool]) -> dict[str, float | None]:
    """How often a judge is right about given pictures, and how it errs.

    false_positive_rate = P(accepted given wrong picture); false_negative_rate = P(rejected given right picture).
    """
    return {
        "judge_accuracy": mean([accepted[key] == truth[key] for key in truth]),
        "false_positive_rate": mean([accepted[key] for key in truth if not truth[key]]),
        "false_negative_rate": mean([not accepted[key] for key in truth if truth[key]]),
    }


def weak_generation(accepted: dict[Key, bool], truth: dict[Key, bool]) -> float | None:
    """P(the independent judge rejects, given that the model's own judge rejects): is the gap the drawing's fault?"""
    return mean([not truth[key] for key in truth if not accepted[key]])


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_judgements(path: Path) -> tuple[list[dict[str, Any]], dict[Key, bool], dict[str, str]]:
    """A scored file: its rows, whether each picture was accepted at the file's own threshold, and its header."""
    tokens = Tokens(path)
    if not tokens.metadata.get("model"):
        raise BadInput(f"{tokens.path}: its header names no model")
    threshold = tokens.threshold()
    rows, accepted = [], {}
    for number, row in read_rows(path, SCORED):
        tokens.check_row(row["row"], f"{path}:{number}")
        rows.append(row)
        note(accepted, row, row["p_yes"] > threshold, f"{path}:{number}")
    if not rows:
        raise BadInput(f"{path}: holds no scored candidate")
    tokens.check_values()
    return rows, accepted, tokens.metadata


def note(known: dict[Key, bool], row: dict[str, Any], value: bool, where: str) -> None:
    """Note what was said of a row's picture; BadInput if something was before."""
    key = row["id"], row["candidate"]
    if key in known:
        raise BadInput(f"{where}: candidate {key[1]} of id {key[0]!r} is given twice")
    known[key] = value


def read_labels(path: Path, wanted: dict[Key, bool]) -> dict[Key, bool]:
    """labels.jsonl as (id, candidate) -> right; BadInput if a picture of `wanted` has no label."""
    labels: dict[Key, bool] = {}
    for number, row in read_rows(path, LABELS):
        note(labels, row, bool(row["label"]), f"{path}:{number}")
    if missing := wanted.keys() - labels.keys():
        raise BadInput(f"{path}: {len(missing)} pictures have no label, first {min(missing)}")
    return {key: labels[key] for key in wanted}


def ids(path: Path, columns: dict[str, str]) -> list[str]:
    """The prompt ids of a JSONL file's rows, or nothing where there is no file."""
    return [row["id"] for _, row in read_rows(path, columns)] if os.path.lexists(path) else []


def round_row(run: Path, number: int) -> dict[str, Any]:
    """The summary of one finished round."""
    directory = run / f"round{number}"
    rows, accepted, metadata = read_judgements(directory / "heldout.jsonl")
    per_prompt: dict[str, list[bool]] = {}
    for (prompt, _), yes in accepted.items():
        per_prompt.setdefault(prompt, []).append(not yes)
    row: dict[str, Any] = {
        "round": number,
        "model": metadata["model"],
        "n_prompts": len(ids(directory / "prompts.jsonl", PROMPT)) or None,
        "nonunified": mean([np.mean(rejected) for rejected in per_prompt.values()]),
        "separation": mean([row["p_yes"] - row["p_yes_foil"] for row in rows]),
    }
    row |= {"discard": None, "recovered": None, "n_sft": None, "n_pairs": None}
    if number:
        before = ids(run / f"round{number - 1}" / "discard.jsonl", DISCARD)
        sft = ids(directory / "sft.jsonl", SFT)
        row["discard"] = len(ids(directory / "discard.jsonl", DISCARD))
        row["recovered"] = len(set(before) & set(sft))
        row["n_sft"], row["n_pairs"] = len(sft), len(ids(directory / "pairs.jsonl", PAIRS))
    if os.path.lexists(directory / "labels.jsonl"):  # what is there but cannot be read is refused, not left out
        truth = read_labels(directory / "labels.jsonl", accepted)
        row["accuracy"] = mean(list(truth.values()))
        row |= base_judgement(run, directory)
        row["weak_generation"] = weak_generation(accepted, truth)
    return row


def base_judgement(run: Path, directory: Path) -> dict[str, float | None]:
    """This round's judge on the base model's held-out pictures; nothing if it has not seen them."""
    judged = directory / ("heldout.jsonl" if directory.name == "round0" else "rejudged.jsonl")
    if not os.path.lexists(judged):
        return {}
    accepted = read_judgements(judged)[1]
    return judge_rates(accepted, read_labels(run / "round0" / "labels.jsonl", accepted))


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows as an aligned table, columns that no row has left out."""
    shown = [key for key in TABLE if any(row.get(key) is not None for row in rows)]
    cells = [[TABLE[key] for key in shown]]
    for row in rows:
        values = [row.get(key) for key in shown]
        cells.append(["-" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in values])
    widths = [max(len(line[i]) for line in cells) for i in range(len(shown))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


# ---------------------------------------------------------------------------------------------------------------------
# Command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="the directory self_improve.sh wrote (its OUT)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    finished = []
    while os.path.lexists(args.run / f"round{len(finished)}" / "heldout.jsonl"):
        finished.append(round_row(args.run, len(finished)))
    if not finished:
        raise BadInput(f"{args.run}: holds no finished round (no round0/heldout.jsonl)")
    write_rows(args.run / "summary.jsonl", finished)
    print()
    print_table(finished)
    print(args.run / "summary.jsonl")


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
