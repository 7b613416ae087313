"""The results tables, from the rows that the experiments left.

Reads   RUNS/FAMILY/seedN/**/row.json (measure.py)
Writes  with --into, a Markdown file's tables between lines `<!-- table NAME -->` and `<!-- end -->`; with --results, all
        rows in one JSONL file, behind those that it has

    python experiments/tables.py runs/experiments --table methods
    python experiments/tables.py runs/experiments --results experiments/results.jsonl --into docs/results.md
    python experiments/tables.py experiments/results.jsonl --into README.md

A cell is the mean over seeds ± their standard deviation (n - 1). The win rate pools the seeds' pictures: wins of
disagreements, so `5/8` are eight pictures in all on which base and new judge differ.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.command import BadInput, Parser, run_script
from common.outputs import check_outputs
from common.stats import wilson
from common.writing import whole_file, write_rows

Row = dict[str, Any]
FAMILIES = {"janus": "tiny Janus", "showo": "tiny Show-o", "tar": "tiny Tar"}


# ---------------------------------------------------------------------------------------------------------------------
# Cells


def spread(key: str, digits: int = 3) -> Callable[[list[Row]], str]:
    """Mean ± standard deviation of a number over the seeds that have it."""

    def cell(rows: list[Row]) -> str:
        values = [row[key] for row in rows if row.get(key) is not None]
        if not values:
            return "-"
        return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")

    return cell


def share(key: str, of: str, interval: bool = False) -> Callable[[list[Row]], str]:
    """A share of pictures with its counts, all seeds together; with `interval` Wilson's as well."""

    def cell(rows: list[Row]) -> str:
        if any(key not in row for row in rows) or not (count := sum(row[of] for row in rows)):
            return "-"
        found = wilson(some := sum(row[key] for row in rows), count)
        assert found is not None
        value, low, high = found
        return f"{value:.3f} ({some}/{count}), {low:.3f} to {high:.3f}" if interval else f"{value:.2f} ({some}/{count})"

    return cell


win_rate = share("wins", "disagreements")


def fell(group: str) -> Callable[[list[Row]], str]:
    """Of a group of pictures, how many lost log p over the training."""
    return share(f"{group}_fell", group)


def judged_today(rows: list[Row]) -> list[Row]:
    """Runs that today's gates have judged: by the rules before `least_loss` an undecided round was bad, or an eroding judge
    one that had lost 5.5 % in the mean."""
    return [row for row in rows if "least_loss" in row or "refused" in row]


def stopped(rows: list[Row]) -> str:
    """How many seeds' runs one of the gates stopped, and of how many it said that nothing is shown."""
    if all("refused" in row for row in rows):
        return f"{len(rows)} of {len(rows)}, before training"
    judged = judged_today(rows)
    undecided = sum(row.get("undecided", 0) for row in judged if not row.get("refused"))
    bad = sum(bool(row.get("stopped") or row.get("refused")) for row in judged)
    return f"{bad} of {len(judged)}" + (f", {undecided} undecided" if undecided else "") if judged else "-"


RESULTS = {
    "accuracy": spread("accuracy"),
    "nonunified": spread("nonunified"),
    "separation": spread("separation"),
    "judge accuracy": spread("judge_accuracy"),
    "win rate": win_rate,
}
GUIDED = {"accuracy": RESULTS["accuracy"], "with guidance": spread("guided_accuracy")} | RESULTS
POOL = {
    "accuracy": spread("accuracy"),
    "nonunified": spread("nonunified"),
    "judge accuracy": spread("judge_accuracy"),
    "pictures drawn": spread("drawn", 0),
    "prompts drawn": spread("n_prompts", 0),
    "SFT pictures": spread("n_sft", 0),
    "pairs": spread("n_pairs", 0),
    "discard pool": spread("discard", 0),
    "recovered": spread("recovered", 0),
}
LOOKING = {
    "accuracy": spread("accuracy"),
    "judge accuracy": spread("judge_accuracy"),
    "false positives": spread("false_positive_rate"),
    "false negatives": spread("false_negative_rate"),
    "margin, log-odds": spread("margin", 2),
    "accuracy near the border": spread("border_accuracy"),
    "margin there": spread("border_margin", 2),
    "caption margin, nats": spread("caption_margin", 2),
    "win rate": win_rate,
}
LEARNING = {
    "cosine": spread("cosine", 4),
    "the foil's": spread("cosine_foil", 4),
    "log p rises, share": spread("g_rises", 2),
    "P(yes) rises, share": spread("u_rises", 2),
    "signs agree, share": spread("sign_agreement", 2),
    "rank correlation": spread("spearman", 2),
}
BAYES = {
    "w rises, share": spread("u_bayes_rises", 2),
    "P(yes) rises, share": spread("u_rises", 2),
    "w, log p: signs agree": spread("sign_agreement_g_bayes", 2),
    "w, log p: correlation": spread("pearson_g_bayes", 2),
    "w, P(yes): signs agree": spread("sign_agreement_u_bayes", 2),
    "w, log P(yes): correlation": spread("pearson_u_bayes", 2),
    "of ranks": spread("spearman_u_bayes", 2),
}
KERNEL = {
    "own prompt": spread("cosine_g"),
    "foil": spread("cosine_g_foil"),
    "other prompts": spread("cosine_g_others"),
}
DESCENT = {"log p": spread("slope_g", 4), "log P(yes)": spread("slope_u", 4), "w": spread("slope_u_bayes", 4)}
LIKELIHOOD = {
    "P(yes): right": spread("judge_accuracy"),
    "false positives": spread("false_positive_rate"),
    "ranked right": spread("ranking_accuracy"),
    "likelihood: right": spread("likelihood_accuracy"),
    "its false positives": spread("likelihood_false_positive_rate"),
    "its false negatives": spread("likelihood_false_negative_rate"),
    "it ranks right": spread("likelihood_ranking_accuracy"),
    "margin, nats": spread("likelihood_margin", 2),
    "on own pictures": spread("own_likelihood_margin", 2),
}
LEVELS = {
    "drawn right": share("right", "pictures", interval=True),
    "nonunified": share("rejected", "pictures", interval=True),
    "weak generation": share("weak", "rejected", interval=True),
    "verdicts right": share("judged_right", "pictures", interval=True),
}
ANSWERS = {
    "accuracy": spread("accuracy"),
    "accepted": spread("accepted"),
    "foils accepted": spread("foils_accepted"),
    "unreadable": spread("unreadable"),
    "cut": spread("cut"),
    "agreement": spread("agreement"),
    "kappa": spread("kappa"),
}
CORRECTED = {"corrected": fell("corrected"), "stayed": fell("stayed"), "rightly accepted, stayed": fell("true_positives")}


# ---------------------------------------------------------------------------------------------------------------------
# Tables: columns, and what each row is called and where it comes from


def both(text: str, name: str) -> dict[str, str]:
    """A row for SFT and one for DPO."""
    return {f"{method}{text}": f"{method.lower()}{name}" for method in ("SFT", "DPO")}


def swept(name: str, labels: dict[float, str], usual: float) -> dict[str, str]:
    """SFT and DPO at each value of one setting; at the usual one it is the plain run."""
    return {
        f"{method}, {label}": f"{method.lower()}{'' if value == usual else f'-{name}{value}'}"
        for method in ("SFT", "DPO")
        for value, label in labels.items()
    }


def probed(name: str) -> dict[str, str]:
    """A row for each kind of probe of one step of SFT and of one of DPO."""
    kinds = {"SFT": {"matching": "trained pictures"}, "DPO": {"chosen": "chosen", "rejected": "rejected"}}
    others = {"near": "others of their prompts", "random": "other prompts"}
    return {
        f"{label}, {probe}": f"{name}-{label.lower()}-{kind}"
        for label, own in kinds.items()
        for kind, probe in (own | others).items()
    }


BASE = {"base": "base"}
DRAWN_AGAIN = {"base": "base", "SFT": "sft", "DPO": "dpo", "SFT on rejected pictures": "sft-rejected"}
DRAWN_AGAIN |= {"DPO, all pairs inverted": "dpo-invert1"}
SHARED = ("base", "sft", "dpo")  # rows that several tables have: by themselves they make none
LOOPS = {"SFT": "sft--no-replay", "SFT + curriculum": "sft-replay", "DPO": "dpo--no-replay", "DPO + curriculum": "dpo-replay"}
TABLES: dict[str, tuple[dict[str, Callable[[list[Row]], str]], dict[str, str]]] = {
    "methods": (
        GUIDED,
        BASE
        | {f"{label}, round {number}": f"{name}-{number}" for label, name in LOOPS.items() for number in (1, 2, 3)}
        | {"DPO, all pairs inverted, one round": "dpo-invert1"},
    ),
    "curricula": (
        POOL,
        BASE
        | {
            f"{method}, {label}, round {number}": f"{method.lower()}-{name}-{number}"
            for method in ("SFT", "DPO")
            for name, label in (
                ("paper", "the paper's curriculum"),
                ("rounds", "rounds"),
                ("none", "rounds without the pool"),
                ("once", "all drawn at once"),
            )
            for number in (1, 2, 3)
        }
        | both(", all drawn at once, one training", "-once"),
    ),
    "candidates": (RESULTS, BASE | swept("n", {n: f"N = {n}" for n in (2, 4, 8, 16)}, usual=8)),
    "threshold": (RESULTS, BASE | swept("t", {t: str(t) for t in (0.3, 0.5, 0.7, 0.9)}, usual=0.5)),
    "scope": (GUIDED, BASE | both(", language model", "") | both(", and what draws", "-drawing")),
    "noise": (
        RESULTS,
        BASE | swept("noise", {q: f"{100 * q:.0f} %" for q in (0, 0.1, 0.2, 0.3, 0.4)}, usual=0),
    ),
    "alarm": (
        RESULTS | {"stopped": stopped},
        BASE
        | both("", "")
        | {
            "DPO, 20 % of the pairs the wrong way round": "dpo-invert0.2",
            "DPO, half of the pairs the wrong way round": "dpo-invert0.5",
            "DPO, all pairs inverted": "dpo-invert1",
            "SFT on rejected pictures": "sft-rejected",
            "SFT on pictures drawn by lot": "sft-lot",
            "SFT, judge says yes to everything": "sft-yes",
            "SFT, 3 x the learning rate": "sft-lr3",
            "SFT, 10 x": "sft-lr10",
            "DPO, 5 x the learning rate, round 1": "dpo-lr5-1",
            "the same, round 2": "dpo-lr5-2",
            "the same, round 3": "dpo-lr5-3",
        },
    ),
    "understanding": (
        LOOKING,
        BASE
        | both("", "")
        | both(", 4 x the steps", "-steps4")
        | both(", 3 x the rate", "-lr3")
        | both(", 10 x the rate", "-lr10")
        | both(", first half of the layers", "-first")
        | both(", second half of the layers", "-last")
        | both(", and what draws", "-drawing")
        | {f"{label}, three rounds": f"{name}-3" for label, name in LOOPS.items()},
    ),
    "judges": (
        LOOKING,
        BASE
        | both("", "")
        | both(", the oracle's verdicts", "-truth")
        | {"SFT on rejected pictures": "sft-rejected", "DPO, all pairs inverted": "dpo-invert1"}
        | both(", round 3", "--no-replay-3")
        | both(", the oracle's verdicts, round 3", "-truth-3")
        | {"SFT on rejected pictures, round 3": "sft-rejected-3", "DPO, all pairs inverted, round 3": "dpo-invert1-3"},
    ),
    "dynamics": (LEARNING, probed("dynamics")),
    "bayes": (BAYES, probed("bayes")),
    "kernel": (KERNEL, probed("bayes")),
    "descent": (
        DESCENT,
        {
            f"rate {lr}, {probe}": f"descent{lr}-{kind}"
            for kind, probe in (("matching", "trained pictures"), ("random", "other prompts"))
            for lr in (1, 0.1, 0.01)
        },
    ),
    "likelihood": (LIKELIHOOD, {label: f"likelihood-{name}" for label, name in DRAWN_AGAIN.items()}),
    "answers": (
        ANSWERS,
        {
            "P(yes) of the short question": "answers-yes-no",
            "replies to the short question": "answers-reply-short",
            "replies to the paper's question": "answers-reply-published",
        },
    ),
    "levels": (
        LEVELS,
        {name: f"levels-{name}" for name in ("one object", "two objects", "counting and relations")}
        | {f"of these {name}": f"levels-{name}" for name in ("shape", "spatial", "numeracy")},
    ),
    "corrected": (CORRECTED, {label: f"likelihood-{name}" for label, name in DRAWN_AGAIN.items() if name != "base"}),
}


ACROSS = ("stops", "trial", "second", "drift", "prompts", "bases", "together", "short")  # across.py
ABOUT_BASES = ("judges", "trial", "drift", "bases", "law")
NAMES = [*TABLES, *ACROSS, "law"]


def title(family: str) -> str:
    """What a family is called: "tiny Janus", and of janus-blind-shape, another base, "tiny Janus, blind-shape"."""
    architecture, _, base = family.partition("-")
    return FAMILIES[architecture] + (f", {base}" if base else "")


def measured(rows: list[Row]) -> dict[str, str]:
    """The families that there is a row of, and what they are called."""
    return {family: title for family, title in FAMILIES.items() if any(row["family"] == family for row in rows)}


def families_of(rows: list[Row]) -> list[str]:
    """The shipped families, and behind them the other bases that there is a row of."""
    return [*FAMILIES, *sorted({row["family"] for row in rows} - FAMILIES.keys())]


def table(name: str, family: str, rows: list[Row]) -> list[str]:
    """One family's table as lines of Markdown; nothing if it has no row of its own, or, of another base, only few."""
    columns, conditions = TABLES[name]
    found = {
        label: [row for row in rows if row["family"] == family and row["name"] == key] for label, key in conditions.items()
    }
    own = [bool(found[label]) for label, key in conditions.items() if key not in SHARED]
    if sum(own) <= (0 if family in FAMILIES else len(own) // 2):  # what other bases have few of came from another experiment
        return []
    lines = [f"| {title(family)} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for label, group in found.items():
        if group:
            seeds = "" if len(group) == 3 else f" (seeds {', '.join(str(row['seed']) for row in group)})"
            lines.append(f"| {label}{seeds} | " + " | ".join(cell(group) for cell in columns.values()) + " |")
    return lines


def tables(name: str, rows: list[Row]) -> str:
    if name in ACROSS or name == "law":
        from experiments import across, law  # which import this file

        return law.table(rows) if name == "law" else across.MADE[name](rows)
    return "\n\n".join("\n".join(lines) for family in families_of(rows) if (lines := table(name, family, rows)))


def fill(text: str, rows: list[Row]) -> str:
    """The text with each table between its two marks made anew. Raises BadInput for a mark that no table has.

    Bases that were not pretrained as the shipped ones are, weaker and blind ones, are in ABOUT_BASES alone.
    """

    def made(match: re.Match[str]) -> str:
        if match[1] not in NAMES:
            raise BadInput(f"no table is called {match[1]!r}; there are {', '.join(NAMES)}")
        alike = [row for row in rows if row["family"] in FAMILIES or "-seed" in row["family"]]
        return f"<!-- table {match[1]} -->\n{tables(match[1], rows if match[1] in ABOUT_BASES else alike)}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", made, text, flags=re.DOTALL)


# ---------------------------------------------------------------------------------------------------------------------
# Command


def name_of(row: Row) -> tuple[str, str, int]:
    return row["family"], row["name"], row["seed"]


def guided_of(row: Row) -> Row:
    """What a run has from its drawings with guidance, which not every experiment makes: a second run's row takes them over."""
    return {key: value for key, value in row.items() if key.startswith("guided_")}


def read_results(runs: Path) -> list[Row]:
    """The rows of a JSONL file, or of all the row.json under a directory, in order of family, name and seed.

    A run that was measured again has a second row in the file, which is only ever appended to: the last one counts.
    """
    if runs.is_file():
        found = map(json.loads, runs.read_text().splitlines())
        return [*{name_of(row): row for row in found}.values()]
    rows = [json.loads(path.read_text()) for path in runs.rglob("row.json")]
    if not rows:
        raise BadInput(f"{runs}: holds no row.json")
    return sorted(rows, key=name_of)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, help="OUT of the experiments, or the file that --results wrote")
    parser.add_argument("--table", choices=NAMES, help="print this one (default: all)")
    parser.add_argument("--into", type=Path, help="Markdown file whose marked tables are made anew")
    parser.add_argument("--results", type=Path, help="JSONL file for all rows")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    if args.results:
        check_outputs([args.runs, args.into], {args.results: "results"})
    rows = read_results(args.runs)
    if args.results:
        written = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
        known = {name_of(row): row for row in written}
        new = [guided_of(known.get(name_of(row), {})) | row for row in rows]
        write_rows(args.results, [*written, *(row for row in new if row != known.get(name_of(row)))])
    if args.into:
        text = fill(args.into.read_text(), rows)
        with whole_file(args.into, "w") as file:
            file.write(text)
    if not args.into:
        for name in [args.table] if args.table else NAMES:
            if made := tables(name, rows):
                print(f"\n{name}\n\n{made}")


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
