"""Around dynamics.py's step: the examples that it learns from, the probes of each kind, and what the probes say together.

The kinds are explained in dynamics.py. A probe's partner is the training example whose gradient its own is compared with.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import stats
from common.answers import QUESTION, answer_form
from common.command import BadInput
from common.records import Row, Tokens, parse_json, read_scored, stable_seed

DIGITS = 8  # significant ones in the files


class TrainingData(NamedTuple):
    """What the step learns from. sides: kind of probe -> column of an example that names its picture."""

    examples: list[Row]
    tokens: Tokens
    sides: dict[str, str]


class ProbeSet(NamedTuple):
    """The pictures that are probed, and the question that is asked about them.

    kinds: kind -> its probes. alternatives: id -> the prompts that Bayes' rule chooses from, of `choose_alternatives`.
    """

    kinds: dict[str, list[Row]]
    tokens: Tokens
    question: str
    seed: int
    alternatives: dict[str, list[str]]

    def draw_seed(self, probe: Row) -> int:
        """What fixes the masks from which log p is estimated at a probe, where it has to be estimated."""
        return stable_seed("probe", self.seed, probe["id"], probe["candidate"])


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_probes(path: Path) -> tuple[list[Row], Tokens]:
    """The rows of a scored file, and their tokens; raises BadInput for bad ones."""
    tokens = Tokens(path)
    return [row for _, row in read_scored(path, tokens)], tokens


def choose_question(given: str | None, tokens: Tokens) -> tuple[str, str]:
    """--question, else the first one that the probes' header names, else score.py's own; and which of these it is."""
    if given is not None:
        return given, "--question"
    if (form := answer_form(tokens.metadata)) != "yes-no":
        about = "and P(yes) at the first token of the answer to that is no answer"
        raise BadInput(f"{tokens.path}: was judged with --answer {form}, {about}; give --question")
    if "questions" not in tokens.metadata:
        return QUESTION, "the default"
    try:
        found = parse_json(tokens.metadata["questions"])
    except ValueError:
        found = None
    if not isinstance(found, list) or not found or not all(isinstance(q, str) and "{prompt}" in q for q in found):
        raise BadInput(f"{tokens.path}: metadata questions must be a JSON list of texts with {{prompt}}; give --question")
    return found[0], f"{'the first of ' if len(found) > 1 else ''}what the probes were asked"


# ---------------------------------------------------------------------------------------------------------------------
# Choosing


def subsample(rows: list[Row], n: int, seed: Sequence[int], per_prompt: int) -> list[Row]:
    """At most n of the rows, at most per_prompt of one prompt (0: any number), drawn by the seed; in file order."""
    drawn: list[int] = []
    count: dict[str, int] = {}
    for i in np.random.default_rng(seed).permutation(len(rows)):
        count[rows[i]["prompt"]] = count.get(rows[i]["prompt"], 0) + 1
        if not per_prompt or count[rows[i]["prompt"]] <= per_prompt:
            drawn.append(i)
    return [rows[i] for i in sorted(drawn[:n])]


def group_by_kind(probes: list[Row], tokens: Tokens, training: TrainingData) -> dict[str, list[Row]]:
    """The probes of each kind. Pictures are told apart by their tokens: ids and candidate numbers may come from other files.

    A picture that is on both sides of pairs counts as on the first.
    """
    trained: dict[tuple[str, bytes], str] = {}  # (prompt, its picture's tokens) -> kind
    for kind, side in reversed(training.sides.items()):
        trained |= {(row["prompt"], training.tokens[[row[side]]].tobytes()): kind for row in training.examples}
    prompts = {prompt for prompt, _ in trained}
    kinds: dict[str, list[Row]] = {kind: [] for kind in (*training.sides, "near", "random")}
    for probe in probes:
        kind = "random"
        if probe["prompt"] in prompts:
            kind = trained.get((probe["prompt"], tokens[[probe["row"]]].tobytes()), "near")
        kinds[kind].append(probe)
    return kinds


def choose_alternatives(probes: list[Row], n: int, seed: int) -> dict[str, list[str]]:
    """By id the prompts that Bayes' rule chooses from: its own, its foil, and at most n others of the category, by the seed."""
    known: dict[str, dict[str, None]] = {}  # category -> its prompts, in file order
    for probe in probes:
        known.setdefault(probe["category"], {})[probe["prompt"]] = None
    found = {}
    for probe in probes:
        if probe["id"] not in found:
            both = [probe["prompt"], probe["foil"]]
            others = [prompt for prompt in known[probe["category"]] if prompt not in both]
            order = np.random.default_rng(stable_seed("alternatives", seed, probe["id"])).permutation(len(others))
            found[probe["id"]] = both + [others[i] for i in sorted(order[:n])]
    return found


class Partner(NamedTuple):
    """The training example that a probe is compared with; tokens (1, T)."""

    id: str
    prompt: str
    tokens: np.ndarray


def find_partners(kind: str, probe_set: ProbeSet, training: TrainingData, seed: int) -> list[Partner]:
    """The partner of each probe of a kind: itself where it matches, else an example of its prompt, else any."""
    probes = probe_set.kinds[kind]
    if kind in training.sides:
        return [Partner(probe["id"], probe["prompt"], probe_set.tokens[[probe["row"]]]) for probe in probes]
    fallback = np.random.default_rng([seed, 2]).integers(0, len(training.examples), len(probes))
    first = {row["prompt"]: row for row in reversed(training.examples)}
    rows = [first.get(probe["prompt"], training.examples[i]) for probe, i in zip(probes, fallback, strict=True)]
    side = next(iter(training.sides.values()))
    return [Partner(row["id"], row["prompt"], training.tokens[[row[side]]]) for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# What the probes of a kind say together


def make_row(
    kind: str, probe: Row, partner: Partner, before: np.ndarray, after: np.ndarray, gradients: dict[str, float]
) -> Row:
    """One row of dynamics.jsonl; before and after are (4,): G, U, the foil's U, log w."""
    delta_g, delta_u, delta_u_foil, delta_u_bayes = after - before
    numbers = {
        "log_p": before[0],
        "p_yes": math.exp(before[1]),
        "p_yes_foil": math.exp(before[2]),
        "w_bayes": math.exp(before[3]),
        "delta_g": delta_g,
        "delta_u": delta_u,
        "delta_u_foil": delta_u_foil,
        "delta_margin": delta_u - delta_u_foil,
        "delta_u_bayes": delta_u_bayes,
    }
    texts = {key: probe[key] for key in ("id", "candidate", "prompt", "category")} | {"kind": kind, "partner": partner.id}
    return texts | {key: round_digits(number) for key, number in (numbers | gradients).items()}


MEANS = {  # column of a row -> what the table calls its mean
    "delta_g": "delta G, nats",
    "delta_u": "delta U, nats",
    "delta_u_foil": "delta U of the foil",
    "delta_margin": "delta U - foil's",
    "delta_u_bayes": "delta U by Bayes' rule",
    "inner_product": "grad U . grad G",
    "cosine": "its cosine",
    "cosine_foil": "the foil's cosine",
    "cosine_step": "cosine of grad U, step",
    "cosine_g": "cosine of grad G, grad G",
    "cosine_g_foil": "the same, given the foil",
    "cosine_g_others": "given other prompts",
}
OTHER_STATISTICS = {
    "g_rises": "log p rises, share",
    "u_rises": "P(yes) rises, share",
    "sign_agreement": "signs agree, share",
    "pearson": "correlation of deltas",
    "spearman": "rank correlation",
    "prediction": "correlation, predicted",
    "residual": "residual, predicted",
    "u_bayes_rises": "w rises, share",
    "sign_agreement_g_bayes": "G, Bayes: signs agree",
    "pearson_g_bayes": "G, Bayes: correlation",
    "sign_agreement_u_bayes": "U, Bayes: signs agree",
    "pearson_u_bayes": "U, Bayes: correlation",
    "spearman_u_bayes": "U, Bayes: of ranks",
    "slope_g": "slope, G per predicted",
    "slope_u": "slope, U per predicted",
    "slope_u_bayes": "slope, Bayes per predicted",
}


PREDICTED = {"predicted_g": "delta_g", "predicted_u": "delta_u", "predicted_u_bayes": "delta_u_bayes"}


def round_digits(number: float) -> float:
    """A number as it is written into the files."""
    return float(f"{number:.{DIGITS}g}")


def summarize(rows: list[Row]) -> Row:
    """What the probes of one kind say together: how many they are, and value and interval of each of the statistics above."""
    columns = {key: np.array([row[key] for row in rows], float) for key in (*MEANS, *PREDICTED)}
    g, u, w = (columns[key] for key in PREDICTED.values())
    predicted = columns["predicted_u"]
    found = {key: stats.bootstrap(stats.mean, columns[key]) for key in MEANS}
    found |= {"g_rises": share(g > 0), "u_rises": share(u > 0), "sign_agreement": sign_agreement(g, u)}
    found |= {"pearson": stats.bootstrap(stats.pearson, g, u), "spearman": stats.bootstrap(stats.spearman, g, u)}
    found |= {"prediction": stats.bootstrap(stats.pearson, predicted, u)}
    found |= {"residual": stats.bootstrap(stats.residual, predicted, u)}
    found |= {"u_bayes_rises": share(w > 0), "spearman_u_bayes": stats.bootstrap(stats.spearman, u, w)}
    for name, other in (("g", g), ("u", u)):
        found[f"sign_agreement_{name}_bayes"] = sign_agreement(other, w)
        found[f"pearson_{name}_bayes"] = stats.bootstrap(stats.pearson, other, w)
    for key, delta in PREDICTED.items():
        found[key.replace("predicted", "slope")] = stats.bootstrap(stats.slope, columns[key], columns[delta])
    return {"n_probes": len(rows)} | {key: rounded_interval(interval) for key, interval in found.items()}


def sign_agreement(one: np.ndarray, other: np.ndarray) -> stats.Interval | None:
    """The share of two changes (R,) that have the same sign; a change of exactly 0 has none."""
    return share((one * other > 0)[(one != 0) & (other != 0)])


def share(values: np.ndarray) -> stats.Interval | None:
    """The share of `values` (R,) that are true."""
    return stats.wilson(int(values.sum()), len(values))


def rounded_interval(found: stats.Interval | None) -> dict[str, float | None]:
    """A number with its interval as it is written into the file; None where there is none."""
    value, low, high = map(round_digits, found) if found else (None, None, None)
    return {"value": value, "low": low, "high": high}


def print_summary(kinds: dict[str, dict[str, Any]]) -> None:
    """An aligned table: what was measured down, kinds of probes across."""
    lines = [["", *kinds], ["probes", *(str(found["n_probes"]) for found in kinds.values())]]
    for key, name in (MEANS | OTHER_STATISTICS).items():
        estimates = [found[key] for found in kinds.values()]
        shown = "{value:+.3g} ({low:+.3g} .. {high:+.3g})"
        lines.append([name, *("-" if one["value"] is None else shown.format(**one) for one in estimates)])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for name, *cells in lines:
        print("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]))
