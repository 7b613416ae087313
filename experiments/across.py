"""Tables of results that set families, bases or kinds of runs side by side, which tables.py fills in with its own."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.stats import wilson
from experiments.tables import BASE, FAMILIES, LOOPS, Row, families_of, judged_today, measured, spread, stopped, title, win_rate

SECOND_ROUNDS = {"dpo-lr5-2": "dpo-lr5-1"}  # of a run whose first is in STOPS
LATER = [f"{name}-{number}" for name in LOOPS.values() for number in (2, 3)]  # the first rounds are `sft` and `dpo`
USUAL = [f"{method}{end}" for method in ("sft", "dpo") for end in ("", "-first", "-last", "-drawing", "-n2", "-n4", "-n16")]
USUAL += [f"{method}-t{threshold}" for method in ("sft", "dpo") for threshold in (0.3, 0.7, 0.9)]
ROUNDS = ("", "-2", "-3")  # of judges.sh
STOPS = {
    "bad: all pairs inverted, rejected pictures": [
        f"{name}{end}" for name in ("dpo-invert1", "sft-rejected") for end in ROUNDS
    ],
    "bad: a judge that says yes to everything": ["sft-yes"],
    "bad: 3 and 10 x the rate of SFT, 5 and 10 x that of DPO": ["sft-lr3", "sft-lr10", "dpo-lr5-1", "dpo-lr10"],
    "useless: pictures drawn by lot, half of the pairs inverted": ["sft-lot", "dpo-invert0.5"],
    "worse than it could be: 10 to 40 % of the verdicts, or 20 % of the pairs, turned round": [
        *(f"{method}-noise{share}" for method in ("sft", "dpo") for share in (0.1, 0.2, 0.3, 0.4)),
        "dpo-invert0.2",
    ],
    "worse than it could be: 3 x the rate of DPO, 4 x the steps": ["dpo-lr3", "sft-steps4", "dpo-steps4"],
    "good: first rounds at the usual rate": USUAL,
    "good: second and third rounds": LATER,
    "good: the oracle's verdicts": [f"{method}-truth{end}" for method in ("sft", "dpo") for end in ROUNDS],
}


METHODS = {"SFT": "sft", "DPO": "dpo"}
SHORT = {"accuracy": spread("accuracy"), "nonunified": spread("nonunified"), "judge accuracy": spread("judge_accuracy")}
ENDS = BASE | {f"{label}, three rounds": f"{name}-3" for label, name in LOOPS.items()}
ENDS |= {"DPO, all pairs inverted, one round": "dpo-invert1"}


def stops(rows: list[Row]) -> str:
    """Of each kind of run: how many of each family the gates stopped, before training or after the round."""
    rows = judged_today(rows)
    families = measured(rows)
    lines = ["| | " + " | ".join(families.values()) + " |", "|---" * (len(families) + 1) + "|"]
    for kind, names in STOPS.items():
        cells = []
        for family in families:
            group = [row for row in rows if row["family"] == family and row["name"] in names]
            cells.append(stopped(group) if group else "-")
        if any(cell != "-" for cell in cells):
            lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def trial(rows: list[Row]) -> str:
    """The gates on bases that their rules were not chosen on: all other bases of all families together, by kind of run.

    Of SECOND_ROUNDS the first two rounds count once, as stopped if either was: missed for no more than one round. All others
    count each row. Good is what trained on the base's own verdicts at the usual rate, weak and blind judges' too, or on the
    oracle's.
    """
    lines = ["| | runs | stopped | undecided | let through | stopped, share |", "|---" * 6 + "|"]
    for kind, names in STOPS.items():
        runs: dict[tuple[Any, ...], list[Row]] = {}
        for row in judged_today(rows):
            name = SECOND_ROUNDS.get(row["name"], row["name"])
            if name in names and row["family"] not in FAMILIES:
                runs.setdefault((row["family"], row["seed"], name), []).append(row)
        bad = [any(row.get("stopped") or row.get("refused") for row in some) for some in runs.values()]
        unsure = [any(row.get("undecided") for row in some) for some in runs.values()]
        found = wilson(sum(bad), len(bad))
        if found is not None:
            undecided = sum(it and not was for it, was in zip(unsure, bad, strict=True))
            counts = [len(bad), sum(bad), undecided, len(bad) - sum(bad) - undecided]
            lines.append(f"| {kind} | " + " | ".join(map(str, counts)) + " | {:.3f}, {:.3f} to {:.3f} |".format(*found))
    return "\n".join(lines)


def second(rows: list[Row]) -> str:
    """Read-outs that gate.py does not take, by kind of run: the least, the middle and the highest of the runs.

    How often base's and trained judge differ on the trained model's pictures, near the base's decision and in all, and how many
    more of the accepted pictures than of the base's are accepted for their foil as well.
    """
    bases = {(row["family"], row["seed"]): row for row in rows if row["name"] == "second-base"}
    found = {
        (row["family"], row["name"].removeprefix("second-"), row["seed"]): row
        for row in rows
        if "differ_near" in row and (row["family"], row["seed"]) in bases
    }
    columns = ["runs", "differ near the border", "differ in all", "foils accepted too, change"]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for family, (kind, names) in itertools.product(FAMILIES, STOPS.items()):
        some = [(row, bases[family, seed]) for (of, name, seed), row in found.items() if of == family and name in names]
        if some:
            near = [row["differ_near"] / row["near"] for row, _ in some if row["near"]]
            every = [row["differ"] / row["pictures"] for row, _ in some]
            foils = [accepted_too(row) - accepted_too(base) for row, base in some if row["foils"] and base["foils"]]
            numbers = (near, every, foils)
            cells = [", ".join(f"{of(it):.3f}" for of in (min, median, max)) if it else "-" for it in numbers]
            lines.append(f"| {FAMILIES[family]}, {kind} | {len(some)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def accepted_too(row: Row) -> float:
    """Of a model's own accepted pictures, how many are accepted for their foil as well."""
    both, accepted = (sum(counts) for counts in zip(*row["foils"].values(), strict=True))
    return both / accepted


FOILS_OF = {  # of the attribute that a near miss misses; another shape than a square is "other words"
    "shape": ("shape", "other words"),
    "side": ("left or right",),
    "number": ("number",),
}


def drift(rows: list[Row]) -> str:
    """Whether drawing drifts into a blind spot: of each attribute how often a model's pictures miss in it alone, and how many
    accepted pictures are accepted for a foil of that kind as well; on the shipped base and on the one that is blind to it."""
    runs = BASE | {
        f"{label}{end}": name + tail
        for end, tail in (("", ""), (", round 3", "--no-replay-3"))
        for label, name in METHODS.items()
    }
    lines = [f"| | {' | '.join(runs)} |", "|---" * (1 + len(runs)) + "|"]
    blind = {row["family"] for row in rows if "-blind-" in row["family"]}
    for architecture, attribute in itertools.product(FAMILIES, FOILS_OF):
        if (other := f"{architecture}-blind-{attribute}") not in blind:
            continue
        for family in (architecture, other):
            cells = []
            for name in runs.values():
                mine = [row for row in rows if row["family"] == family and row["name"] in (name, f"second-{name}")]
                missed = [it[attribute]["share"] for row in mine if attribute in (it := row.get("near_misses", {}))]
                counts = [row["foils"].get(kind, [0, 0]) for row in mine if "foils" in row for kind in FOILS_OF[attribute]]
                both, accepted = (sum(it[place] for it in counts) for place in (0, 1))
                cells.append((f"{mean(missed):.3f}" if missed else "-") + (f", {both}/{accepted}" if accepted else ""))
            lines.append(f"| {title(family)}: {attribute} | {' | '.join(cells)} |")
    return "\n".join(lines)


def prompts(rows: list[Row]) -> str:
    """Whether a prompt gains by its own data: what prompts gained whose turn it was by lot, and those whose it was not.

    Of half of the prompts: those trained on, with what was accepted of them, and those left out. Of half of the pairs: those
    the right way round, and those turned round; prompts without a pair, which are no lot's, are in neither. Means over seeds,
    and the difference's standard error over prompts.
    """
    columns = ["trained on, or its pair the right way round", "left out", "its pair turned round", "difference"]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    runs = {"SFT on half of the prompts": "sft-half", "DPO on half of the prompts": "dpo-half"}
    runs |= {"DPO, half of the pairs the wrong way round": "dpo-invert0.5"}
    for family, (label, key) in itertools.product(families_of(rows), runs.items()):
        groups = [row["groups"] for row in rows if (row["family"], row["name"]) == (family, f"prompts-{key}")]
        than = "turned" if "invert" in key else "others"
        groups = [it for it in groups if {"own", than} <= it.keys()]
        if not groups:
            continue
        means = {it: mean(group[it]["gain"] for group in groups) for it in ("own", than)}
        errors = [group[it]["error"] for group in groups for it in ("own", than)]
        error = "" if None in errors else f" ± {sum(x**2 for x in errors) ** 0.5 / len(groups):.3f}"
        cells = [f"{means[it]:+.3f}" if it in means else "-" for it in ("own", "others", "turned")]
        seeds = "" if len(groups) == 3 else f" ({len(groups)} seed{'s' * (len(groups) > 1)})"
        lines.append(f"| {title(family)}: {label}{seeds} | {' | '.join(cells)} | {means['own'] - means[than]:+.3f}{error} |")
    return "\n".join(lines)


def bases(rows: list[Row]) -> str:
    """Each base, and one round from it by its own verdicts and by the oracle's: what drawing gains, what judging becomes."""
    runs = {"SFT": "sft", "SFT, the oracle's verdicts": "sft-truth", "DPO": "dpo", "DPO, the oracle's": "dpo-truth"}
    head = ["base", "draws right", "judges right", "accepts wrong", *(f"{label}: gain, judges right" for label in runs)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    kinds, found = ("seed", "early", "blind"), {row["family"] for row in rows}
    for family in sorted(found, key=lambda it: (it.split("-")[0], *(kind in it for kind in kinds), len(it), it)):
        mine = [row for row in rows if row["family"] == family]
        of = {name: [row for row in mine if row["name"] == name] for name in ("base", *runs.values())}
        if not of["base"]:
            continue
        cells = [spread(key)(of["base"]) for key in ("accuracy", "judge_accuracy", "false_positive_rate")]
        before = {row["seed"]: row["accuracy"] for row in of["base"]}
        for name in runs.values():
            gains = [row["accuracy"] - before[row["seed"]] for row in of[name] if row["seed"] in before]
            cells.append(f"{mean(gains):+.3f}, {mean(row['judge_accuracy'] for row in of[name]):.3f}" if gains else "-")
        lines.append(f"| {title(family)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def together(rows: list[Row]) -> str:
    """The shipped families side by side after one round: what drawing gains, and what becomes of the judge."""
    columns = {
        "drawn right": spread("accuracy"),
        "false positives": spread("false_positive_rate"),
        "false negatives": spread("false_negative_rate"),
        "right where it differs from the base's": win_rate,
    }
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for family, name in measured(rows).items():
        for label, key in (BASE | METHODS).items():
            group = [row for row in rows if (row["family"], row["name"]) == (family, key)]
            lines.append(f"| {name}: {label} | {' | '.join(cell(group) for cell in columns.values())} |")
    return "\n".join(lines)


def short(rows: list[Row]) -> str:
    """Where each method ends, the families side by side: for the front page."""
    families = measured(rows)
    lines = ["| | " + " | ".join(f"{title}: {column}" for title in families.values() for column in SHORT) + " |"]
    lines.append("|---" * (len(families) * len(SHORT) + 1) + "|")
    for label, name in ENDS.items():
        groups = [[row for row in rows if row["family"] == family and row["name"] == name] for family in families]
        lines.append(f"| {label} | " + " | ".join(cell(group) for group in groups for cell in SHORT.values()) + " |")
    return "\n".join(lines)


MADE: dict[str, Callable[[list[Row]], str]] = {
    "stops": stops,
    "trial": trial,
    "second": second,
    "drift": drift,
    "prompts": prompts,
    "bases": bases,
    "together": together,
    "short": short,
}
