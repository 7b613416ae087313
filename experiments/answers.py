"""The forms in which a judge can answer, compared on the same pictures: a row a form.

Reads   DIR/heldout.jsonl, judged with --answer yes-no, DIR/labels.jsonl, the oracle's word, and DIR/FORM.jsonl, the same
        pictures rejudged, of every further form
Writes  DIR/yes-no/row.json and DIR/FORM/row.json, which tables.py reads

    python experiments/answers.py --dir runs/experiments/janus/seed0/answers --family janus --seed 0
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
from common.writing import write_json
from experiments.measure import origin, rounded


def read_form(path: Path) -> list[dict]:
    """The rows of a scored file in the order of their pictures."""
    return sorted((row for _, row in read_rows(path, SCORED)), key=lambda row: (row["id"], row["candidate"]))


def numbers(rows: list[dict], first: list[dict], right: dict[tuple[str, int], int]) -> dict[str, float]:
    """One form in one seed. first: the same pictures answered in the first form, for agreement and kappa."""
    accepted, before = (np.array([row["p_yes"] > 0.5 for row in some], float) for some in (rows, first))
    label = np.array([right[row["id"], row["candidate"]] for row in rows])
    same = (accepted == before).mean()
    foils, coverage = np.mean([(row["p_yes_foil"] > 0.5, row["coverage"]) for row in rows], axis=0)
    found = {"accuracy": (accepted == label).mean(), "accepted": accepted.mean(), "foils_accepted": foils, "coverage": coverage}
    found |= {"agreement": same, "kappa": kappa(np.array([same, accepted.mean(), before.mean()]))}
    replies = [(read_reply(row["reply"]) is None, row["replies_cut"] / 2) for row in rows if "reply" in row]
    if replies:
        found |= dict(zip(("unreadable", "cut"), np.mean(replies, axis=0), strict=True))
    return {key: float(value) for key, value in found.items() if not np.isnan(value)}  # kappa of forms that say one thing


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="pictures and forms of one seed")
    parser.add_argument("--family", required=True, help="janus, showo or tar")
    parser.add_argument("--seed", type=int, required=True, help="seed of the pictures")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    right = {(row["id"], row["candidate"]): row["label"] for _, row in read_rows(args.dir / "labels.jsonl", LABELS)}
    first = read_form(args.dir / "heldout.jsonl")
    for path in sorted({*args.dir.glob("*.jsonl")} - {args.dir / "labels.jsonl"}):
        form = "yes-no" if path.stem == "heldout" else path.stem
        row = {"name": f"answers-{form}", "family": args.family, "seed": args.seed}
        row |= rounded(numbers(read_form(path), first, right)) | origin(path)
        (args.dir / form).mkdir(exist_ok=True)
        write_json(args.dir / form / "row.json", row)
        print(f"{row['name']} seed {args.seed}: accuracy {row['accuracy']:.3f}, agreement {row['agreement']:.3f}")


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
