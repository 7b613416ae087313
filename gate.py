"""Whether a round made the model better or worse, from its own answers alone; the alarm of self_improve.sh.

Reads   scored.jsonl files made with score.py --readouts: held-out prompts as the model before training (--base), the model
        of the last good round (--last) and the new model (--after) draw and judge them, and the base's pictures as these two
        judge them (--last-rejudged, --rejudged)
Writes  gate.json: every number with its interval, and the verdict; exit code 3 for a bad round

    python gate.py --base round0/heldout.jsonl --last round1/heldout.jsonl --last-rejudged round1/rejudged.jsonl \\
                   --after round2/heldout.jsonl --rejudged round2/rejudged.jsonl

The nonunified score decides nothing here: a judge that says yes to everything has a perfect one. What decides are answers
that training never used, each as a difference between a prompt and its foil, the same prompt with one attribute wrong:

    question        P(yes) to the question that chose the training data, own prompt minus foil
    second wording  the same to another wording
    caption         log p(prompt given picture) - log p(foil given picture), in nats

Of replies (score.py --answer reply) P(yes) to the question is 0 or 1, and its difference -1, 0 or 1 a picture: over prompts it
is a difference of shares. The second wording and the caption are read as ever. All files have to have one form of answer.

A round is bad if any of the three is worse than the base's on the model's own pictures, if none is better, if two are worse
than the last good round's, or if the new judge tells prompts from foils worse on the base's own pictures: than the base by
more than --tolerance, or, by the caption, which shows an eroding judge first, than the last good round's (in the first
round: the base) by more than --round-tolerance. Worse and better are 95 % bootstrap intervals over prompts that leave 0 out.
"""

import argparse
import itertools
import math
import sys
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.answers import name_form, unanswered
from common.command import BadInput, Parser, QualityRefusal, printable, run_script
from common.outputs import check_outputs
from common.records import READOUTS, SCORED, Tokens, read_scored
from common.stats import bootstraps_of_means, mean_itself, means_by_number
from common.writing import write_json

# What each read-out subtracts: column of the prompt, column of its foil.
SIGNALS = {
    "question": ("p_yes", "p_yes_foil"),
    "second wording": ("p_yes_again", "p_yes_foil_again"),
    "caption": ("caption", "caption_foil"),
}
BLOCK = 64  # rows held as dictionaries at a time: few enough to stay in the cache


# ---------------------------------------------------------------------------------------------------------------------
# The rules


class Difference(NamedTuple):
    """A mean before and after, over the prompts that both have, and the 95 % interval of the difference."""

    before: float
    after: float
    low: float
    high: float

    @property
    def better(self) -> bool:
        return self.low > 0

    @property
    def worse(self) -> bool:
        return self.high < 0


def differences(pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[Difference]:
    """Compare means over the same prompts, (P,) before and after, prompt by prompt; one prompt at least in each pair."""
    intervals = bootstraps_of_means([((after - before)[:, None], (mean_itself,)) for before, after in pairs])
    found = []
    for (before, after), [interval] in zip(pairs, intervals, strict=True):
        assert interval is not None  # the files' numbers are finite
        found.append(Difference(float(before.mean()), float(after.mean()), *interval[1:]))
    return found


def problems(
    drawing: dict[str, Difference],
    since_last: dict[str, Difference],
    judging: dict[str, Difference],
    eroding: Difference,
    coverage: float,
    tolerance: float,
    round_tolerance: float,
    min_coverage: float,
    form: str = "yes-no",
) -> list[str]:
    """What is wrong with a round, a sentence each; empty if it is good.

    drawing: each read-out on own pictures against the base's; since_last: against the last good round's (empty in the first);
    judging: the new judge against the base's judge on the base's pictures; eroding: its caption read-out there against that
    of the last good round's judge. tolerance, round_tolerance: the share of these that it may lose. form: of the answers.
    """
    found = []
    if coverage < min_coverage:
        found.append(f"coverage is {coverage:.3f}, under {min_coverage:g}: the {unanswered(form)}")
    worse = [name for name, change in drawing.items() if change.worse]
    if worse:
        found.append(f"its own pictures match their prompts less than the base's: {listed(drawing, worse)}")
    elif not any(change.better for change in drawing.values()):
        found.append(f"nothing says that its pictures got better than the base's: {listed(drawing, drawing)}")
    fallen = [name for name, change in since_last.items() if change.worse]
    if len(fallen) >= 2:
        found.append(f"its pictures match their prompts less than the last good round's: {listed(since_last, fallen)}")
    blinder = [name for name, it in judging.items() if it.worse and it.after < (1 - tolerance) * it.before]
    if blinder:
        found.append(f"as a judge of the base's pictures it tells prompts from foils less well: {listed(judging, blinder)}")
    if eroding.worse and eroding.after < (1 - round_tolerance) * eroding.before:
        found.append(f"its judging erodes: {listed({'caption': eroding}, ['caption'])} in one round, on the base's pictures")
    return found


def listed(changes: dict[str, Difference], names: Any) -> str:
    """Before and after of some read-outs, for people to read."""
    return ", ".join(f"{name} {changes[name].before:.3f} -> {changes[name].after:.3f}" for name in names)


# ---------------------------------------------------------------------------------------------------------------------
# Data


class Answers(NamedTuple):
    """The read-outs of a file: for each signal its mean difference over each prompt's pictures; and the mean coverage."""

    path: Path
    prompts: dict[str, int]  # id -> place in the signals
    signals: dict[str, np.ndarray]  # (P,) each
    coverage: float
    header: dict[str, str]


def read_answers(path: Path) -> Answers:
    """Raises BadInput for a file that was not scored with --readouts, or is empty."""
    tokens = Tokens(path)
    for key in ("model", "model_hash", "judge_hash"):
        if not tokens.metadata.get(key):
            raise BadInput(f"{tokens.path}: metadata {key} is missing: which model drew and judged these pictures?")
    if "readouts" not in tokens.metadata:
        raise BadInput(f"{path}: has no read-outs; score it with --readouts")
    prompts: dict[str, int] = {}
    places, blocks = array("q"), []  # blocks: of each picture the differences and the coverage
    rows = read_scored(path, tokens, SCORED | READOUTS)
    while block := [row for _, row in itertools.islice(rows, BLOCK)]:
        places.extend(prompts.setdefault(sys.intern(row["id"]), len(prompts)) for row in block)
        answers = {key: np.array([row[key] for row in block], np.float64) for key in (*sum(SIGNALS.values(), ()), "coverage")}
        blocks.append(np.stack([*(answers[own] - answers[foil] for own, foil in SIGNALS.values()), answers["coverage"]], 1))
    columns = np.concatenate(blocks)  # (R, signals + 1)
    means = means_by_number(np.array(places), columns.T, len(prompts))  # (P, signals + 1)
    signals = {name: means[:, i].copy() for i, name in enumerate(SIGNALS)}
    return Answers(path, prompts, signals, float(columns[:, -1].mean()), name_form(tokens.metadata))


def compare(pairs: list[tuple[Answers, Answers]]) -> list[dict[str, Difference]]:
    """Every read-out of two files, of each pair of files. Raises BadInput if two have no prompt in common.

    All pairs at once: over equally many prompts they share the bootstrap's draws, which take most of the time.
    """
    both = []
    for before, after in pairs:
        shared = sorted(before.prompts.keys() & after.prompts.keys())
        if not shared:
            raise BadInput(f"{after.path}: has no prompt id in common with {before.path}")
        at = [[answers.prompts[id] for id in shared] for answers in (before, after)]
        both += [(before.signals[name][at[0]], after.signals[name][at[1]]) for name in SIGNALS]
    found = iter(differences(both))
    return [dict(zip(SIGNALS, found, strict=False)) for _ in pairs]


def check_same(one: Answers, other: Answers, keys: tuple[str, ...]) -> None:
    """Raise BadInput where two headers differ in what has to be equal for the files to be compared."""
    for key in keys:
        if one.header.get(key) != other.header.get(key):
            raise BadInput(f"{other.path}: {key} is {other.header.get(key)!r}, but {one.path} has {one.header.get(key)!r}")


# ---------------------------------------------------------------------------------------------------------------------
# Command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--base", type=Path, required=True, help="held-out prompts by the model before the first round")
    files.add_argument("--after", type=Path, required=True, help="the same prompts by the new model")
    files.add_argument("--last", type=Path, help="the same prompts by the last good round's model (from the second round on)")
    files.add_argument("--rejudged", type=Path, required=True, help="the pictures of --base as the new model judges them")
    files.add_argument("--last-rejudged", type=Path, help="and as the last good round's model does (with --last)")
    files.add_argument("--out", type=Path, help="JSON to write (default: gate.json beside --after)")
    rules = parser.add_argument_group("rules")
    rules.add_argument(
        "--tolerance",
        type=float,
        default=0.1,
        help="share of the base's read-outs on its own pictures that the new judge may lose (default 0.1)",
    )
    rules.add_argument(
        "--round-tolerance",
        type=float,
        default=0.055,
        help="share of the caption read-out there that the new judge may lose in one round (default 0.055)",
    )
    rules.add_argument("--min-coverage", type=float, default=0.5, help="least p(yes) + p(no) of the answers (default 0.5)")
    args = parser.parse_args(argv)
    for name in ("tolerance", "round_tolerance", "min_coverage"):
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be at least 0, found {getattr(args, name)}")
    if (args.last is None) != (args.last_rejudged is None):
        parser.error("--last and --last-rejudged are of one round, give both or neither")
    if not args.after.name:
        parser.error(f"--after {args.after}: a file name is wanted")
    args.out = args.out or args.after.with_name("gate.json")
    return args


def main(args: argparse.Namespace) -> None:
    check_outputs([args.base, args.after, args.last, args.rejudged, args.last_rejudged], {args.out: "gate"})
    base, after, rejudged = (read_answers(path) for path in (args.base, args.after, args.rejudged))
    last, last_rejudged = (read_answers(path) if path else base for path in (args.last, args.last_rejudged))
    asked = ("answer", "reply_tokens", "questions", "readouts")
    check_same(base, after, (*asked, "guidance", "temperature", "steps"))
    check_same(base, rejudged, ("model_hash", "seed", *asked))
    check_same(after, rejudged, ("judge_hash",))
    check_same(base, last, (*asked, "guidance", "temperature", "steps"))
    check_same(base, last_rejudged, ("model_hash", "seed", *asked))
    check_same(last, last_rejudged, ("judge_hash",))
    drawing, judging, *others = compare(
        [(base, after), (base, rejudged), *([(last, after), (last_rejudged, rejudged)] if args.last else [])]
    )
    since_last, since_last_judging = others or ({}, judging)
    eroding = since_last_judging["caption"]
    limits = (args.tolerance, args.round_tolerance, args.min_coverage)
    found = problems(drawing, since_last, judging, eroding, after.coverage, *limits, after.header["answer"])
    tables = {
        "own pictures, against the base's": drawing,
        "own pictures, against the last good round's": since_last,
        "the base's pictures, judge against judge": judging,
    }
    numbers = {title: {name: change._asdict() for name, change in table.items()} for title, table in tables.items()}
    models = {"base": base.header["model"], "after": after.header["model"]}
    write_json(args.out, {"good": not found, "problems": found, "coverage": after.coverage, "models": models} | numbers)
    print_tables(tables)
    if found:
        raise QualityRefusal(f"{after.header['model']} is a bad round: {'; '.join(found)}")
    print(f"a good round\n{printable(args.out)}")


def print_tables(tables: dict[str, dict[str, Difference]]) -> None:
    for title, changes in tables.items():
        if changes:
            print(f"{title:44}  before   after  difference, 95 % interval")
        for name, it in changes.items():
            print(
                f"  {name:42}  {it.before:6.3f}  {it.after:6.3f}  {it.after - it.before:+.3f}  {it.low:+.3f} .. {it.high:+.3f}"
            )


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
