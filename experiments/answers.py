"""The forms in which a judge can answer, compared on the same pictures: a row a form, as a table.

Reads   DIR/heldout.jsonl, judged with --answer yes-no, DIR/labels.jsonl, the oracle's word, and DIR/ANSWER.jsonl, the same
        pictures rejudged, of every further form; a DIR a seed
Prints  a markdown table: mean and standard deviation over the seeds

    python experiments/answers.py runs/experiments/janus/seed*/answers
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.answers import read_reply
from common.command import Parser, run_script
from common.records import LABELS, SCORED, read_rows
from common.stats import kappa

COLUMNS = ("accuracy", "accepted", "foils accepted", "coverage", "unreadable", "cut", "agreement", "kappa")


def read_form(path: Path) -> list[dict]:
    """The rows of a scored file in the order of their pictures."""
    return sorted((row for _, row in read_rows(path, SCORED)), key=lambda row: (row["id"], row["candidate"]))


def numbers(rows: list[dict], first: list[dict], right: dict[tuple[str, int], int]) -> list[float]:
    """COLUMNS of one form in one seed. first: the same pictures answered in the first form, for agreement and kappa."""
    accepted, before = (np.array([row["p_yes"] > 0.5 for row in some], float) for some in (rows, first))
    label = np.array([right[row["id"], row["candidate"]] for row in rows])
    same = accepted == before
    replies = [(read_reply(row["reply"]) is None, row["replies_cut"] / 2) for row in rows if "reply" in row]
    unreadable, cut = np.mean(replies, axis=0) if replies else (np.nan, np.nan)
    foils, coverage = np.mean([(row["p_yes_foil"] > 0.5, row["coverage"]) for row in rows], axis=0)
    agreed = float(kappa(np.array([same.mean(), accepted.mean(), before.mean()])))
    return [(accepted == label).mean(), accepted.mean(), foils, coverage, unreadable, cut, same.mean(), agreed]


def table(directories: list[Path]) -> str:
    """The forms of all seeds as markdown."""
    names = sorted({path.stem for directory in directories for path in directory.glob("*.jsonl")} - {"heldout", "labels"})
    lines = [["answer", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for name in ("heldout", *names):
        found = []
        for directory in directories:
            right = {(row["id"], row["candidate"]): row["label"] for _, row in read_rows(directory / "labels.jsonl", LABELS)}
            found.append(numbers(read_form(directory / f"{name}.jsonl"), read_form(directory / "heldout.jsonl"), right))
        cells = zip(np.mean(found, axis=0), np.std(found, axis=0, ddof=1 if len(found) > 1 else 0), strict=True)
        shown = ["-" if np.isnan(mean) else f"{mean:.3f} ± {spread:.3f}" for mean, spread in cells]
        lines.append([{"heldout": "yes-no"}.get(name, name), *shown])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIR", help="pictures and forms of one seed")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    print(table(args.directories))


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
