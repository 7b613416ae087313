"""Good or bad variations of a step's files: fewer candidates, a noisy judge, inverted pairs, and the like.

Reads   a scored.jsonl (candidates, prompts, noise, truth, yes, rejected, lot) or a pairs.jsonl (invert), tensors beside it; for
        truth also the labels of that scored.jsonl
Writes  the same file changed, or (rejected, lot) an sft.jsonl of four pictures a prompt

    python experiments/vary.py candidates 4 round1/scored.jsonl --out few/scored.jsonl      the first 4 of each prompt
    python experiments/vary.py prompts 0.5 round1/scored.jsonl --out half/scored.jsonl      half of the prompts, by lot
    python experiments/vary.py noise 0.2 round1/scored.jsonl --out noisy/scored.jsonl       20 % of the verdicts turned round
    python experiments/vary.py truth 0 round1/scored.jsonl --labels round1/labels.jsonl --out true/scored.jsonl
                                                                                            verdicts turned round where wrong
    python experiments/vary.py yes 0 round1/scored.jsonl --out yes/scored.jsonl             a judge that says yes to everything
    python experiments/vary.py rejected 4 round1/scored.jsonl --out worst/sft.jsonl         4 rejected pictures, the worst first
    python experiments/vary.py lot 4 round1/scored.jsonl --out lot/sft.jsonl                4 pictures by lot
    python experiments/vary.py invert 0.5 round1/pairs.jsonl --out half/pairs.jsonl         half of the pairs turned round
"""

import argparse
import math
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.command import BadInput, Parser, printable, run_script
from common.outputs import check_outputs
from common.records import LABELS, PAIRS, SCORED, Tokens, read_rows, tokens_path, write_tokens
from common.writing import write_rows

Row = dict[str, Any]
YES_LOGITS = 12.0  # added to every answer of the judge that says yes


def by_prompt(rows: list[Row]) -> list[list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    return list(groups.values())


def candidates(rows: list[Row], amount: float, rng: random.Random, threshold: float) -> list[Row]:
    """The first so many of each prompt: just what score.py draws with a smaller --candidates."""
    return [row for row in rows if row["candidate"] < amount]


def prompts(rows: list[Row], amount: float, rng: random.Random, threshold: float) -> list[Row]:
    """All candidates of this share of the prompts, drawn by lot."""
    groups = by_prompt(rows)
    kept = {*rng.sample(range(len(groups)), round(amount * len(groups)))}
    return [row for number, group in enumerate(groups) if number in kept for row in group]


def noise(rows: list[Row], amount: float, rng: random.Random, threshold: float) -> list[Row]:
    """Each verdict turned round with this probability, that about the foil too."""
    for column in ("p_yes", "p_yes_foil"):
        rows = turned(rows, column, (rng.random() < amount for _ in rows), rng, threshold)
    return rows


def truth(rows: list[Row], amount: float, rng: random.Random, threshold: float) -> list[Row]:
    """Each verdict turned round that is not the picture's `label`: perfect supervision. Of foils nothing is known."""
    return turned(rows, "p_yes", ((row["p_yes"] > threshold) != bool(row["label"]) for row in rows), rng, threshold)


def turned(rows: list[Row], column: str, which: Iterable[bool], rng: random.Random, threshold: float) -> list[Row]:
    """The rows, some verdicts of a column turned round.

    A turned verdict gets a P(yes) drawn from those of the verdict it turns into: how sure the judge sounds says nothing of
    whether it was turned. Where there is none of these, 0 or 1.
    """
    values = [row[column] for row in rows]
    yes, no = ([p for p in values if (p > threshold) == side] for side in (True, False))
    others = {True: no or [0.0], False: yes or [1.0]}
    return [
        row | {column: rng.choice(others[p > threshold]) if turn else p}
        for row, p, turn in zip(rows, values, which, strict=True)
    ]


def yes(rows: list[Row], amount: float, rng: random.Random, threshold: float) -> list[Row]:
    """Every answer moved far towards yes, that about the foil too."""

    def moved(p: float) -> float:
        p = min(max(p, 1e-6), 1 - 1e-6)
        return 1 / (1 + math.exp(-math.log(p / (1 - p)) - YES_LOGITS))

    return [row | {"p_yes": moved(row["p_yes"]), "p_yes_foil": moved(row["p_yes_foil"])} for row in rows]


def rejected(rows: list[Row], amount: float, rng: random.Random, threshold: float) -> list[Row]:
    """Up to so many pictures of each prompt that the judge rejected, the worst first."""
    groups = [
        sorted((row for row in group if row["p_yes"] <= threshold), key=lambda row: row["p_yes"]) for group in by_prompt(rows)
    ]
    return [row for group in groups for row in group[: int(amount)]]


def lot(rows: list[Row], amount: float, rng: random.Random, threshold: float) -> list[Row]:
    """So many pictures of each prompt, drawn by lot."""
    return [row for group in by_prompt(rows) for row in rng.sample(group, int(amount))]


def invert(rows: list[Row], amount: float, rng: random.Random, threshold: float) -> list[Row]:
    """Chosen and rejected exchanged in each pair with this probability."""
    exchange = {"chosen": "rejected", "rejected": "chosen", "p_yes_chosen": "p_yes_rejected", "p_yes_rejected": "p_yes_chosen"}
    return [row | {key: row[other] for key, other in exchange.items()} if rng.random() < amount else row for row in rows]


KINDS = {function.__name__: function for function in (candidates, prompts, noise, truth, yes, rejected, lot, invert)}
SFT_COLUMNS = ("id", "prompt", "category", "p_yes")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("kind", choices=KINDS, help="what to change")
    parser.add_argument("amount", type=float, help="pictures a prompt, or a share of the prompts or rows")
    parser.add_argument("file", type=Path, help="scored.jsonl, or pairs.jsonl for invert")
    parser.add_argument(
        "--out", type=Path, required=True, help="file to write, its safetensors beside it; the directory is made"
    )
    parser.add_argument("--labels", type=Path, help="of truth: labels.jsonl of the file")
    parser.add_argument("--seed", type=int, default=0, help="which rows are changed (default 0)")
    args = parser.parse_args(argv)
    if (args.kind == "truth") != bool(args.labels):
        parser.error("--labels are for truth, which needs them")
    return args


def main(args: argparse.Namespace) -> None:
    made = {"invert": "pairs", "rejected": "sft", "lot": "sft"}.get(args.kind, "scored")
    check_outputs([args.file, tokens_path(args.file), args.labels], {args.out: made, tokens_path(args.out): "pictures"})
    tokens = Tokens(args.file)
    rows = [row for _, row in read_rows(args.file, PAIRS if args.kind == "invert" else SCORED)]
    if args.labels:
        labels = {(row["id"], row["candidate"]): row["label"] for _, row in read_rows(args.labels, LABELS)}
        rows = [row | {"label": labels[row["id"], row["candidate"]]} for row in rows]
    changed = KINDS[args.kind](rows, args.amount, random.Random(args.seed), tokens.threshold())
    if not changed:
        raise BadInput(f"{args.file}: {args.kind} {args.amount:g} leaves no row")
    pictures = tokens[:]
    if args.kind != "invert":  # an inverted pair keeps its row numbers, and so all the tokens
        pictures = pictures[[row["row"] for row in changed]]
        columns = SFT_COLUMNS if args.kind in ("rejected", "lot") else changed[0].keys() - {"row", "label"}
        changed = [{key: row[key] for key in row if key in columns} | {"row": number} for number, row in enumerate(changed)]
    write_tokens(tokens_path(args.out), pictures, tokens.metadata | {"varied": f"{args.kind} {args.amount:g}"})
    write_rows(args.out, changed)
    print(f"{printable(args.out)}: {len(changed)} rows of {len(rows)}")


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
