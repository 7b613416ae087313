"""One row a round: what self_improve.sh writes to summary.jsonl and prints as a table.

Reads   RUN_DIR/round*/: heldout.jsonl, and where they are there prompts, sft, pairs, discard, labels, rejudged (.jsonl)
Writes  RUN_DIR/summary.jsonl: one row a finished round; made anew from the files each time, so it cannot go stale

    python summary.py runs/demo

nonunified, separation, accuracy and weak_generation are of the round's own pictures of the held-out prompts. judge_accuracy
and the false positive and negative rates are of the *base model's* held-out pictures as this round's judge sees them: one
fixed set, so that a change is a change of the judge. The file holds the numbers as they are; the table rounds them, once.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it can be started from anywhere
from analysis.rundir import Round, read_run, round_numbers
from common.command import BadInput, Parser, run_script
from common.writing import write_rows

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


def summary_row(one: Round, before: Round | None) -> dict[str, Any]:
    """A finished round's row of summary.jsonl; `before` is the round before it."""
    tokens = one.heldout[0]["tokens"]
    if not tokens.metadata.get("model"):
        raise BadInput(f"{tokens.path}: its header names no model")
    numbers = round_numbers(one, before) | {"model": tokens.metadata["model"], "n_prompts": one.n_prompts or None}
    return {key: numbers[key] for key in ("round", "model", *list(TABLE)[1:])}


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
    finished = list(itertools.takewhile(lambda one: one.heldout, read_run(args.run, numbers_only=True)))
    rows = [summary_row(one, before) for one, before in zip(finished, [None, *finished], strict=False)]
    write_rows(args.run / "summary.jsonl", rows)
    print()
    print_table(rows)
    print(args.run / "summary.jsonl")


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
