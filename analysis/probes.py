"""What dynamics.py's step learns from, and what is looked at before and after it: examples, probes of each kind, partners.

The kinds are told in dynamics.py. A probe's partner is the training example whose gradient its own is compared with.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.command import BadInput
from common.judgements import Row, read_scored
from common.records import Tokens, parse_json, read_rows, stable_seed

QUESTION = "Does this image describe {prompt}?"  # the paper's q(y)


class Training(NamedTuple):
    """What the step learns from. sides: kind of probe -> column of an example that names its picture."""

    examples: list[Row]
    tokens: Tokens
    sides: dict[str, str]


class Probing(NamedTuple):
    """What is looked at, and what is asked about it. kinds: kind -> its probes."""

    kinds: dict[str, list[Row]]
    tokens: Tokens
    question: str
    seed: int

    def draw_seed(self, probe: Row) -> int:
        """What fixes the masks from which log p is estimated at a probe, where it has to be estimated."""
        return stable_seed("probe", self.seed, probe["id"], probe["candidate"])


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_probes(path: Path) -> tuple[list[Row], Tokens]:
    """The rows of a scored file, and their tokens; raises BadInput for bad ones."""
    tokens = Tokens(path)
    return [row for _, row in read_scored(path, tokens)], tokens


def read_examples(path: Path, columns: dict[str, str], sides: Iterable[str]) -> tuple[list[Row], Tokens]:
    """The rows of training data, whose columns `sides` name pictures, and their tokens; raises BadInput for bad ones."""
    tokens, rows = Tokens(path), []
    for number, row in read_rows(path, columns):
        for side in sides:
            tokens.check_row(row[side], f"{path}:{number}", side)
        rows.append(row)
    if not rows:
        raise BadInput(f"{path}: holds no picture")
    tokens.check_values()
    return rows, tokens


def choose_question(given: str | None, tokens: Tokens) -> tuple[str, str]:
    """--question, else the first one that the probes' header names, else the paper's; and which of these it is."""
    if given is not None:
        return given, "--question"
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


def choose(rows: list[Row], n: int, seed: Sequence[int], per_prompt: int) -> list[Row]:
    """At most n of the rows, at most per_prompt of one prompt (0: any number), drawn by the seed; in file order."""
    chosen: list[int] = []
    count: dict[str, int] = {}
    for i in np.random.default_rng(seed).permutation(len(rows)):
        count[rows[i]["prompt"]] = count.get(rows[i]["prompt"], 0) + 1
        if not per_prompt or count[rows[i]["prompt"]] <= per_prompt:
            chosen.append(i)
    return [rows[i] for i in sorted(chosen[:n])]


def find_kinds(probes: list[Row], tokens: Tokens, training: Training) -> dict[str, list[Row]]:
    """The probes of each kind. Pictures are told by their tokens: ids and candidate numbers may come from other files.

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


class Partner(NamedTuple):
    """The training example that a probe is compared with; tokens (1, T)."""

    id: str
    prompt: str
    tokens: np.ndarray


def partners(kind: str, probing: Probing, training: Training, seed: int) -> list[Partner]:
    """The partner of each probe of a kind: itself where it matches, else an example of its prompt, else any."""
    probes = probing.kinds[kind]
    if kind in training.sides:
        return [Partner(probe["id"], probe["prompt"], probing.tokens[[probe["row"]]]) for probe in probes]
    anyone = np.random.default_rng([seed, 2]).integers(0, len(training.examples), len(probes))
    first = {row["prompt"]: row for row in reversed(training.examples)}
    rows = [first.get(probe["prompt"], training.examples[i]) for probe, i in zip(probes, anyone, strict=True)]
    side = next(iter(training.sides.values()))
    return [Partner(row["id"], row["prompt"], training.tokens[[row[side]]]) for row in rows]
