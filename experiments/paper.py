"""The paper's table, theirs and ours side by side, after experiments/paper.sh; or theirs alone, with what its numbers imply.

Reads   OUT/{sft,c-sft,dpo,c-dpo}/, the loops that paper.sh ran; --labels, who is right about the base's pictures; and where you
        have put an evaluator's numbers, OUT/{base,sft,c-sft,dpo,c-dpo}/gen.csv: a header category,score, scores in percent
Writes  OUT/table.md

    python experiments/paper.py runs/paper --labels runs/paper/base/judged-by-qwen.jsonl
    python experiments/paper.py --theirs
    python experiments/paper.py runs/paper --plan --model deepseek-community/Janus-Pro-7B \\
        --prompts color_train.txt --eval-prompts color_val.txt

Gen   what draws well by the benchmark's own evaluator; overall the mean of the categories
Und   win rate: of the base's pictures on which base's and trained judge differ, the share on which the independent judge sides
      with the trained one. Ours pools the pictures, the paper's overall is the mean of its categories
Non   the nonunified score: of the model's own held-out pictures, one a prompt, those that its judge rejects; Wilson
"""

import argparse
import csv
import json
import math
import re
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from analysis.comparison import Scored, check_comparable, read_label_files, read_rejudged, read_scored_file
from common.command import BadInput, Parser, printable, run_script
from common.outputs import check_out_file
from common.prompt_files import read_prompt_files
from common.records import read_lines
from common.stats import wilson
from common.writing import whole_file

METHODS = {"base": "base", "sft": "SFT", "c-sft": "C-SFT", "dpo": "DPO", "c-dpo": "C-DPO"}
HEADINGS = ["method", "category", "Gen: theirs", "ours", "Und: theirs", "ours", "Non: theirs", "ours"]
CATEGORIES = ("texture", "shape", "color", "spatial", "non-spatial", "complex")


# ---------------------------------------------------------------------------------------------------------------------
# The paper's numbers (arXiv 2507.16663, T2I-CompBench++; all in %)


class Cell(NamedTuple):
    gen: float
    und: float
    non: float


N_PROMPTS = 300  # validation prompts a category, one picture each: every Non is a multiple of 1/300
N_TRAINED_COLOR = 295  # but those of color after training, of which each is a multiple of 1/295


def numbers(table: str) -> dict[str, tuple[Cell, ...]]:
    """Lines of a method and its Gen/Und/Non by category and overall."""
    rows = (line.split() for line in table.strip().splitlines())
    return {name: tuple(Cell(*map(float, cell.split("/"))) for cell in cells) for name, *cells in rows}


JANUS = numbers("""
base   38.63/50/43.33    33.49/50/43.00    53.22/50/27.33    16.81/50/31.00    31.40/50/2.33    37.73/50/10.33   35.21/50/26.22
SFT    53.93/65.22/29.67 38.63/53.85/34.00 73.41/54.62/10.85 23.73/26.67/22.00 31.45/75/1.00    38.57/75/4.33    43.29/58.39/16.98
C-SFT  56.38/66.67/28.33 39.86/64.52/33.67 73.77/52.14/12.20 24.87/38.46/21.67 31.44/75/2.33    38.78/70/3.33    44.18/61.13/16.92
DPO    40.98/53.85/43.00 33.49/57.89/47.00 51.72/63.64/27.12 16.49/41.67/30.00 31.32/66.67/2.00 38.61/50/6.67    35.44/55.62/25.97
C-DPO  42.13/53.33/45.33 33.46/55.56/40.00 53.17/55.71/28.81 15.74/42.86/32.33 31.38/50/2.00    37.98/78.57/6.33 35.64/56.00/25.80
T2I-R1 50.91/52.50/34.67 37.80/53.49/36.00 70.47/35.29/11.33 24.22/45/23.67    31.38/75/1.00    38.53/72.73/3.33 42.22/55.67/18.33
""")  # noqa: E501
SHOWO = numbers("""
base 49.66/50/0.95
SFT 52.67/66.67/0.11
C-SFT 52.82/66.67/0.06
DPO 51.50/52.78/0.45
C-DPO 52.43/58.33/0.39
HermesFlow 49.65/41.67/0.83
""")  # overall alone
THEIRS = {"janus": ("Janus-Pro-7B", JANUS), "showo": ("Show-o", SHOWO)}  # by our family, or a word in the model's name
GENEVAL_PICTURES = 553 * 4
GENEVAL = {"TorchUMM's SFT": (78.92, 77.61), "the paper's SFT": (79.36, 79.89), "the paper's C-SFT": (79.36, 80.87)}


def counts(method: str) -> list[tuple[int, int]]:
    """The rejected pictures that the printed Non imply, of how many, by category."""
    color = N_PROMPTS if method in ("base", "T2I-R1") else N_TRAINED_COLOR
    totals = [color if name == "color" else N_PROMPTS for name in CATEGORIES]
    return [(round(cell.non / 100 * total), total) for cell, total in zip(JANUS[method][:6], totals, strict=True)]


def smallest_fraction(percent: float) -> tuple[int, int]:
    """The fraction of the least denominator that is printed as `percent`: a win rate rests on at least so many pictures."""
    for count in range(1, 10_000):
        wins = round(percent / 100 * count)
        if round(100 * wins / count, 2) == percent:
            return wins, count
    raise ValueError(f"{percent} is no share of fewer than 10,000")


def z_score(one: tuple[int, int], other: tuple[int, int]) -> float:
    """How many standard errors lie between two shares, (successes, trials) each, if both were the same (pooled)."""
    pooled = (one[0] + other[0]) / (one[1] + other[1])
    error = math.sqrt(pooled * (1 - pooled) * (1 / one[1] + 1 / other[1]))
    return (one[0] / one[1] - other[0] / other[1]) / error


def difference_error(one: float, other: float, n: int) -> float:
    """The standard error of the difference of two shares in %, of n independent pictures each: in points."""
    return math.sqrt(sum(share * (100 - share) / n for share in (one, other)))


def interval(rejected: int, total: int) -> str:
    """A share in % with its Wilson interval, and its counts."""
    found = wilson(rejected, total)
    if found is None:
        return "-"
    share, low, high = (100 * value for value in found)
    return f"{share:.2f} [{low:.2f}, {high:.2f}] ({rejected}/{total})"


def markdown(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def theirs() -> str:
    """The paper's own numbers with the counts and intervals that they imply."""
    rows = [["the paper's", "Gen", "Und", "Non", "rejected: " + ", ".join(CATEGORIES), "all, %, 95 % Wilson", "z against base"]]
    base = 0, 0
    for model, methods in THEIRS.values():
        for method, (*parts, cell) in methods.items():
            found = counts(method) if parts else [(round(cell.non / 100 * 6 * N_PROMPTS), 6 * N_PROMPTS)]
            total = sum(count for count, _ in found), sum(n for _, n in found)
            base = total if method == "base" else base
            z = "-" if method == "base" else f"{z_score(base, total):.1f}"
            listed = ", ".join(str(count) for count, _ in found) if parts else "-"
            rows.append([f"{model}: {method}", *(f"{value:.2f}" for value in cell), listed, interval(*total), z])
    return markdown(rows)


def arithmetic() -> str:
    """What else the paper's numbers, and TorchUMM's of GenEval, imply."""
    n = [smallest_fraction(cell.und)[1] for name in list(JANUS)[1:5] for cell in JANUS[name][:6]]
    lines = [f"win rates: on at least {min(n)} to {max(n)} pictures a cell, {statistics.median(n):.0f} in the median"]
    for name, (before, after) in GENEVAL.items():
        error = difference_error(before, after, GENEVAL_PICTURES)
        change = after - before
        lines.append(f"GenEval, {name}: {change:+.2f} points, standard error {error:.2f}, z {change / error:+.1f}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# What a run will cost


class Machine(NamedTuple):
    """One H200 by arithmetic (docs/real-models.md, benchmarks/README.md): pictures a second at the floor and at the targets."""

    draw: tuple[float, float]
    judge: tuple[float, float]
    train: tuple[float, float]
    saved_gb: float  # a model, in float32
    state_gb: float  # of training, while another is being written


MACHINES = {
    "7B": Machine((16.7, 10.8), (90, 45), (35, 0.45 * 35), saved_gb=29.6, state_gb=2 * 73),
    "1B": Machine((49, 32), (380, 190), (172, 0.45 * 172), saved_gb=8.3, state_gb=2 * 15),
}
PICTURE_GB = 1.4e-6  # tokens and judgements
REPLY_TOKENS = 32  # that a judge writes: a guess, of 128 at most
IMAGE_TOKENS = 576
YIELD, REPLAYED, TRAINING_PROMPTS = 2265, 1091, 4200  # the paper's: accepted at first, by replay; of so many prompts
N_MODELS = 6  # trained and kept: one of SFT, two of C-SFT, and so for DPO


class Work(NamedTuple):
    """What a run will do, in pictures."""

    drawn: int
    judged: int
    trained: tuple[int, int]  # by the paper's yield; if as many are accepted as its Non says


def work(n_train: int, n_heldout: int, candidates: int, epochs: tuple[int, int]) -> Work:
    """Pictures drawn, judged and trained on, the pool and its yield in the paper's proportions."""
    first, later = (n * n_train // TRAINING_PROMPTS for n in (YIELD, REPLAYED))
    drawn = n_train * candidates + (1 + N_MODELS) * n_heldout + 2 * (n_train - first) * candidates
    sft, dpo = epochs
    few = sft * (2 * first + later / 2) + 2 * dpo * (2 * first + later / 2)  # a pair has two pictures; replay comes half-way
    accepted = n_train * candidates * (1 - JANUS["base"][6].non / 100)
    many = sft * (2 * accepted + later / 2) + 2 * dpo * 2 * n_train  # one pair a prompt at most
    return Work(drawn, drawn + N_MODELS * n_heldout, (round(few), round(many)))


def hours(machine: Machine, work: Work, at: int, trained: int) -> float:
    """Hours of one GPU; at: 0 the floor, 1 the targets. A reply's tokens cost what a picture's do."""
    written = REPLY_TOKENS / IMAGE_TOKENS / machine.draw[at]
    seconds = work.drawn / machine.draw[at] + work.judged * (1 / machine.judge[at] + written) + trained / machine.train[at]
    return seconds / 3600


def plan(args: argparse.Namespace) -> str:
    """What the run will cost. Raises BadInput for prompts that cannot be read."""
    train, heldout = (
        {row["prompt"] for file in read_prompt_files(paths) for row in file.rows} for paths in (args.prompts, args.eval_prompts)
    )
    train -= heldout
    if not train:
        raise BadInput(f"{args.prompts[0]}: every training prompt is an evaluation prompt too")
    todo = work(len(train), len(heldout), args.candidates, tuple(args.epochs))
    few, many = todo.trained
    took, disk, kept = "not known", todo.judged * PICTURE_GB, f"and {N_MODELS} models, whose size is not known"
    if name := re.search("[17]B", args.model):
        machine = MACHINES[name[0]]
        low, high = (hours(machine, todo, at, n) / args.processes for at, n in ((0, few), (1, many)))
        took = f"{low:.1f} at the floor to {high:.1f} at the targets, on {args.processes} H200"
        disk, kept = disk + N_MODELS * machine.saved_gb + machine.state_gb, "models and a training's state together"
    return f"""\
prompts   {len(train):,} to train on, {args.candidates} pictures each; {len(heldout):,} held out, one picture each
pictures  {todo.drawn:,} drawn, {todo.judged:,} judged, {few:,} to {many:,} trained on
hours     {took}; by arithmetic, for Janus-Pro-1B and -7B alone
disk      {disk:.2f} GB of pictures, {kept}
assumed   benchmarks/README.md's rates; replies of {REPLY_TOKENS} tokens; a pool in the paper's proportion; accepted is from the
          paper's yield ({YIELD:,} of {TRAINING_PROMPTS:,} prompts) to all that its Non says; JUDGE is not counted"""


def family(name: str) -> str:
    """Of which family a checkpoint is; a hub's is fetched. CheckpointError for a name that is none."""
    from model import family_of, resolve

    return family_of(resolve(name), name)


# ---------------------------------------------------------------------------------------------------------------------
# Our numbers


class Ours(NamedTuple):
    """One method's numbers by category, and of all pictures under `overall`."""

    gen: dict[str, float]
    und: Counter[tuple[str, str]]  # (category, "won" or "of")
    non: Counter[tuple[str, str]]  # (category, "rejected" or "of")


def category(name: str) -> str:
    """A category as the paper spells it, to be printed: non_spatial is non-spatial."""
    return printable(name.lower().replace("_", "-").replace("|", "/"))


def last_round(out: Path, name: str) -> tuple[Path, str]:
    """The directory of a method's last round, and a note. Raises BadInput where paper.sh has not come so far."""
    rounds = [out / name / f"round{number}" for number in (1, 2)]
    wanted = rounds[name.startswith("c-")]
    if (wanted / "rejudged.jsonl").is_file():
        return wanted, ""
    discard = rounds[0] / "discard.jsonl"
    if name.startswith("c-") and (rounds[0] / "rejudged.jsonl").is_file() and not discard.read_bytes():
        plain = name.removeprefix("c-")
        return last_round(out, plain)[0], f"{METHODS[name]}: no prompt was left to replay, so it is {METHODS[plain]}."
    raise BadInput(f"{wanted / 'rejudged.jsonl'}: is not there: type paper.sh again")


def read_gen(path: Path, known: set[str]) -> dict[str, float]:
    """An evaluator's numbers, category -> percent, their mean as `overall` if none is missing; or nothing."""
    if not path.exists():
        return {}
    table = csv.reader((text for _, text in read_lines(path)), strict=True)
    found: dict[str, float] = {}
    try:
        if [cell.strip() for cell in next(table, [])] != ["category", "score"]:
            raise BadInput(f"{path}:1: expected the header category,score")
        for row in filter(any, table):
            where = f"{path}:{table.line_num}"
            if len(row) != 2 or not re.fullmatch(r"\s*[0-9]{1,3}(\.[0-9]+)?\s*", row[1]) or float(row[1]) > 100:
                raise BadInput(f"{where}: expected a category and a score of 0 to 100, found {','.join(row)[:60]!r}")
            name = category(row[0].strip())
            if name not in known or name in found:
                raise BadInput(f"{where}: category {row[0][:60]!r} {'twice' if name in found else 'is not one of the run'}")
            found[name] = float(row[1])
    except csv.Error as error:
        raise BadInput(f"{path}:{table.line_num}: not CSV: {error}") from None
    if found.keys() == known:
        found["overall"] = statistics.mean(found.values())
    return found


def read_ours(out: Path, labels: Path | None, methods: list[str]) -> tuple[dict[str, Ours], list[str], Scored]:
    """The methods' numbers, the notes below the table, and the base's pictures."""
    base = read_scored_file(out / "sft" / "round0" / "heldout.jsonl")
    found, notes = {}, []
    right = read_label_files([labels], base, [base])[0] if labels else None
    for name in methods:
        drawn = rejudged = base
        if name != "base":
            directory, note = last_round(out, name)
            notes += [note] * bool(note)
            drawn = read_scored_file(directory / "heldout.jsonl")
            check_comparable(base, drawn)
            rejudged = read_rejudged(directory / "rejudged.jsonl", base, drawn)
        non, und = Counter(), Counter()
        for kind, accepted in zip(drawn.pictures.category, drawn.pictures.accepted, strict=True):
            for key in (category(kind), "overall"):
                non[key, "of"] += 1
                non[key, "rejected"] += int(not accepted)
        if right is not None:
            columns = base.pictures.category, base.pictures.accepted, rejudged.pictures.accepted, right
            for kind, before, after, label in zip(*columns, strict=True):
                for key in (category(kind), "overall"):
                    und[key, "of"] += int(before != after and not math.isnan(label))
                    und[key, "won"] += int(before != after and after == label)
        known = {key for key, what in non if what == "of"} - {"overall"}
        found[name] = Ours(read_gen(out / name / "gen.csv", known), und, non)
    return found, notes, base


def training_settings(out: Path) -> str:
    """Where the paper is silent: what the runs trained with, by their own records."""
    told = []
    usual = ("lr", "warmup", "batch_size", "uncond_prob")
    for name, keys in (("sft", usual), ("dpo", (*usual, "beta", "nll_weight"))):
        file = out / name / "round1" / "model" / "training" / "settings.json"
        settings = json.loads(file.read_text())
        told.append(f"{METHODS[name]}: " + ", ".join(f"{key.replace('_', ' ')} {settings[key]}" for key in keys))
    return "; ".join(told)


def table(out: Path, labels: Path | None, methods: list[str]) -> str:
    """Theirs and ours, a line for each method and category."""
    found, notes, base = read_ours(out, labels, methods)
    model, answer = (base.provenance[key] for key in ("model", "answer"))
    kind_of = family(model) if Path(model).is_dir() else model.lower().replace("-", "")
    whose, columns = next((both for name, both in THEIRS.items() if name in kind_of), ("none of this model", {}))
    rows = [HEADINGS]
    kinds = {key for key, what in found["base"].non if what == "of"} - {"overall"}
    for name, ours in found.items():
        cells = columns.get(METHODS[name], ())
        for kind in (*(kind for kind in CATEGORIES if kind in kinds), *sorted(kinds - set(CATEGORIES)), "overall"):
            named = (*CATEGORIES, "overall")[len(CATEGORIES) + 1 - len(cells) :]
            printed = [f"{value:.2f}" for value in cells[named.index(kind)]] if kind in named else ["-"] * 3
            gen = f"{ours.gen[kind]:.2f}" if kind in ours.gen else "-"
            won, differ = ours.und[kind, "won"], ours.und[kind, "of"]
            und = f"{100 * won / differ:.2f} ({won}/{differ})" if differ else "-"
            non = interval(ours.non[kind, "rejected"], ours.non[kind, "of"])
            rows.append([METHODS[name], kind, printed[0], gen, printed[1], und, printed[2], non])
    notes += [
        f"Theirs: {whose}, arXiv 2507.16663. Ours: {printable(model)}, --answer {answer} (%)",
        f"Und by {printable(labels.name)}, wins of disagreements." if labels else "Und: give JUDGE or LABELLER.",
    ]
    if "dpo" in methods:
        notes.append(f"Where the paper is silent: {training_settings(out)}, one pair a prompt; C-*: one replay, half-way.")
    return markdown(rows) + "\n\n" + "\n".join(notes) + "\n"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("out", type=Path, nargs="?", help="OUT of paper.sh")
    parser.add_argument("--theirs", action="store_true", help="print the paper's own numbers and what they imply")
    parser.add_argument("--labels", type=Path, help="who is right about the base's pictures, as diagnose.py --labels takes it")
    parser.add_argument("--base", action="store_true", help="print the base's lines alone, before the rest is there")
    before = parser.add_argument_group("before a run")
    before.add_argument("--plan", action="store_true", help="say what it will cost, and refuse what cannot be run")
    before.add_argument("--model", help="checkpoint directory or hub id")
    before.add_argument("--processes", type=int, default=1, help="GPUs (default 1)")
    before.add_argument("--candidates", type=int, default=10, help="pictures a training prompt (default 10)")
    before.add_argument("--epochs", type=int, nargs=2, default=(20, 30), help="of SFT and of DPO (default 20 30)")
    before.add_argument("--prompts", nargs="+", help="training prompt files")
    before.add_argument("--eval-prompts", nargs="+", help="evaluation prompt files")
    args = parser.parse_args(argv)
    if args.theirs == bool(args.out):
        parser.error("OUT of a run, or --theirs")
    if args.plan and not (args.model and args.prompts and args.eval_prompts):
        parser.error("--plan: with --model, --prompts and --eval-prompts")
    if min(args.processes, args.candidates, *args.epochs) < 1:
        parser.error("--processes, --candidates and --epochs must be at least 1")
    return args


def main(args: argparse.Namespace) -> None:
    if args.theirs:
        print(f"{theirs()}\n\n{arithmetic()}")
    elif args.plan:
        print(plan(args), flush=True)  # before gigabytes are fetched
        family(args.model)
    elif args.base:
        print(table(args.out, args.labels, ["base"]))
    else:
        made = args.out / "table.md"
        check_out_file(made)
        if made.exists() and not made.read_text(errors="replace").startswith(f"| {' | '.join(HEADINGS)} |"):
            raise BadInput(f"{made}: is there already and is no table of this command, so it is not replaced")
        text = table(args.out, args.labels, list(METHODS))
        with whole_file(made, "w") as file:
            file.write(text)
        print(f"{text}\n{printable(made)}")


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
