"""Whether a round made the model better or worse, from its own answers alone; the alarm of self_improve.sh.

Reads   scored.jsonl files made with score.py --readouts: held-out prompts as the model before training (--base), the model
        that the round began with (--last: the last good round's, in the loop an undecided one's too) and the new model
        (--after) draw and judge them, and the base's pictures as these two judge them (--last-rejudged, --rejudged)
Writes  gate.json: every number with its interval, the verdict, and what these pictures can show; exit code 3 for a bad round,
        4 for one of which nothing is shown

    python gate.py --base round0/heldout.jsonl --last round1/heldout.jsonl --last-rejudged round1/rejudged.jsonl \\
                   --after round2/heldout.jsonl --rejudged round2/rejudged.jsonl

The nonunified score decides nothing here: a judge that says yes to everything has a perfect one. What decides are answers
that training never used, each as a difference between a prompt and its foil, the same prompt with one attribute wrong:

    question        P(yes) to the question that chose the training data, own prompt minus foil
    second wording  the same to another wording
    caption         log p(prompt given picture) - log p(foil given picture), in nats

Of replies (score.py --answer reply) P(yes) to the question is 0 or 1, and over prompts its difference one of shares. The second
wording and the caption are read as ever. All files have to have one form of answer.

A round is bad if any of the three is worse than the base's on the model's own pictures, if two are worse than the last good
round's, or if the new judge tells prompts from foils worse on the base's own pictures: than the base by more than
--tolerance, or, by the caption, which shows an eroding judge first, than the last good round's (in the first round: the
base) by more than --round-tolerance. It is good if one is better than the base's and nothing is wrong, and undecided if
none is. Worse and better are bootstrap intervals over prompts that leave 0 out, of 99 %. What a judge has lost is the least
that is shown with 99 % confidence: of judges that truly lost what they may, a read-out calls one in a hundred bad.

What is undecided is looked at again with more pictures of the same prompts: each flag takes several files, of which a prompt
has the mean over all its pictures. Who looks several times is misled more often: with looks at 4, 8 and 16 pictures of 128
prompts a round that changed nothing ends good in 3.0 % of simulated rounds and bad in 3.0 % (docs/bad-data.md).
"""

import argparse
import itertools
import math
import statistics
import sys
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.answers import name_form, unanswered
from common.command import BadInput, Parser, QualityRefusal, Undecided, printable, run_script
from common.outputs import check_outputs
from common.records import READOUTS, SCORED, Tokens, read_scored
from common.stats import MIN_PROMPTS, means_by_number, resampled_means
from common.writing import write_json

# What each read-out subtracts: column of the prompt, column of its foil.
SIGNALS = {
    "question": ("p_yes", "p_yes_foil"),
    "second wording": ("p_yes_again", "p_yes_foil_again"),
    "caption": ("caption", "caption_foil"),
}
OWN, SINCE = "own pictures, against the base's", "own pictures, against the last good round's"
JUDGE = "the base's pictures, judge against judge"
ERODING = "the base's pictures, judge against the last good round's"
LEVEL, POWER = 0.99, 0.8  # of the intervals and of a judge's least loss; of what can be seen
ASKED, DRAWN = ("answer", "reply_tokens", "questions", "readouts"), ("guidance", "temperature", "steps")  # in headers
BLOCK = 64  # rows held as dictionaries at a time: few enough to stay in the cache


# ---------------------------------------------------------------------------------------------------------------------
# The rules


class Difference(NamedTuple):
    """A mean before and after, over the prompts that both have, and the interval of the difference.

    least_loss: the share of `before` that is lost at least, as far as is shown; None where `before` may be 0.
    """

    before: float
    after: float
    low: float
    high: float
    least_loss: float | None = None

    @property
    def better(self) -> bool:
        return self.low > 0

    @property
    def worse(self) -> bool:
        return self.high < 0

    def lost(self, share: float) -> bool:
        """Whether more than this share of what was there before is shown to be lost."""
        return self.least_loss is not None and self.least_loss > share


def differences(pairs: list[tuple[np.ndarray, np.ndarray]], level: float = LEVEL) -> list[Difference]:
    """Compare means over the same prompts, (P,) before and after, prompt by prompt, by percentile bootstrap; one prompt at
    least in each pair. Pairs of equally many prompts share its draws."""
    found = {}
    for n_prompts in {len(before) for before, _ in pairs}:
        some = [i for i, (before, _) in enumerate(pairs) if len(before) == n_prompts]
        columns = [(after - before, before) for before, after in (pairs[i] for i in some)]
        draws = resampled_means(np.stack([*itertools.chain(*columns)], 1))  # (N, 2 pairs)
        for i, changes, befores in zip(some, draws.T[::2], draws.T[1::2], strict=True):
            numbers = [*map(np.mean, pairs[i]), *np.quantile(changes, [(1 - level) / 2, (1 + level) / 2])]
            losses = np.divide(-changes, befores, out=np.full(len(befores), -np.inf), where=befores > 0)
            least = np.quantile(losses, 1 - level, method="lower")
            found[i] = Difference._make([*map(float, numbers), float(least) if np.isfinite(least) else None])
    return [found[i] for i in range(len(pairs))]


class Sight(NamedTuple):
    """What so many pictures of so many prompts can show of a read-out; None where nothing can be said."""

    by_chance: float | None  # standard deviation of the difference if both models drew their pictures again
    seen: float | None  # the difference that they show four times in five
    matters: float | None  # the difference that one would like to see
    prompts: int | None  # prompts that show it, as many pictures each
    pictures: int | None  # pictures a prompt that show it, of the same number of prompts; None also: no number of them does


def what_can_be_seen(spread: Any, sides: list[tuple[Any, np.ndarray]], matters: Any, level: float) -> Sight:
    """How large a difference of two means over P prompts has to be for its interval to leave 0 out four times in five.

    spread: variance over prompts of the difference (P - 1 in the denominator). sides: before and after, the variance of a
    picture around its prompt, and the pictures of each prompt (P,). The difference of two means over prompts then has the
    variance spread / P, of which the pictures' chance makes (before / pictures + after / pictures) / P, while the rest, what
    a round does to one prompt and not to another, only more prompts make smaller. matters: more than 0, else NaN.
    """
    n_prompts = len(sides[0][1])
    z = sum(map(statistics.NormalDist().inv_cdf, ((1 + level) / 2, POWER)))
    with np.errstate(all="ignore"):
        chance = np.sum([variance * np.mean(1 / pictures) for variance, pictures in sides])
        seen = z * np.sqrt(np.float64(spread) / n_prompts)
        room = np.float64(matters) ** 2 * n_prompts / z**2 - np.maximum(spread - chance, 0)
        alike = np.fmin(spread / chance, 1)  # under 1 where both drew with the same noise, or by luck
        pictures = alike * sum(variance for variance, _ in sides) / room if room > 0 else math.nan
        numbers = (np.sqrt(chance / n_prompts), seen, matters, n_prompts * (seen / matters) ** 2, pictures)
    by_chance, seen, matters, *counts = (float(x) if math.isfinite(x) else None for x in numbers)
    return Sight(by_chance, seen, matters, *(None if x is None else max(1, math.ceil(x)) for x in counts))


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
    """What is wrong with a round, a sentence each; empty if it is good or undecided.

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
    fallen = [name for name, change in since_last.items() if change.worse]
    if len(fallen) >= 2:
        found.append(f"its pictures match their prompts less than the last good round's: {listed(since_last, fallen)}")
    blinder = [name for name, it in judging.items() if it.lost(tolerance)]
    if blinder:
        found.append(f"as a judge of the base's pictures it tells prompts from foils less well: {listed(judging, blinder)}")
    if eroding.lost(round_tolerance):
        found.append(f"its judging erodes: {listed({'caption': eroding}, ['caption'])} in one round, on the base's pictures")
    return found


def verdict(found: list[str], drawing: dict[str, Difference]) -> str:
    """good, bad, or undecided: nothing is wrong, and nothing shows that its pictures got better than the base's."""
    return "bad" if found else "good" if any(change.better for change in drawing.values()) else "undecided"


def listed(changes: dict[str, Difference], names: Any) -> str:
    """Before and after of some read-outs, for people to read, and how much of them is shown to be lost."""
    lost = {name: f" ({it.least_loss:.1%} lost at least)" if it.lost(0) else "" for name, it in changes.items()}
    return ", ".join(f"{name} {changes[name].before:.3f} -> {changes[name].after:.3f}{lost[name]}" for name in names)


# ---------------------------------------------------------------------------------------------------------------------
# Data


class Answers(NamedTuple):
    """The read-outs of pictures, each signal as its mean over each prompt's pictures; and the mean coverage."""

    path: Path
    prompts: dict[str, int]  # id -> place in what follows
    pictures: np.ndarray  # (P,): how many
    means: np.ndarray  # (P, signals)
    squares: np.ndarray  # (P, signals): sums of squared deviations from the prompt's mean
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
    index, columns = np.array(places), np.concatenate(blocks)  # (R,), (R, signals + 1)
    means = means_by_number(index, columns.T, len(prompts))[:, :-1]  # (P, signals)
    with np.errstate(over="ignore"):  # nats have no least
        squares = [np.bincount(index, (columns[:, i] - means[index, i]) ** 2, len(prompts)) for i in range(len(SIGNALS))]
    pictures, coverage = np.bincount(index, minlength=len(prompts)), float(columns[:, -1].mean())
    return Answers(path, prompts, pictures, means, np.stack(squares, 1), coverage, name_form(tokens.metadata))


def read_files(paths: list[Path]) -> list[Answers]:
    """Pictures of the same prompts, drawn and judged by the same models with other seeds. Raises BadInput otherwise."""
    files: list[Answers] = []
    for path in paths:
        files.append(read_answers(path))
        first, new = files[0], files[-1]
        check_same(first, new, ("model_hash", "judge_hash", *ASKED, *DRAWN))
        for other in files[:-1]:
            if other.header.get("seed") == new.header.get("seed"):
                raise BadInput(f"{path}: seed is {new.header.get('seed')!r}, as of {other.path}: the same pictures twice")
        if odd := first.prompts.keys() ^ new.prompts.keys():
            raise BadInput(f"{path}: expected pictures of the prompts of {first.path}; only one of the two has id {min(odd)!r}")
    return files


def together(files: list[Answers]) -> Answers:
    """All pictures of several files of the same prompts."""
    first, means, squares = files[0], files[0].means, files[0].squares
    pictures, coverage = first.pictures, first.coverage
    for file in files[1:]:
        at = [file.prompts[id] for id in first.prompts]
        old, new = pictures[:, None], file.pictures[at][:, None]
        coverage = (coverage * old.sum() + file.coverage * new.sum()) / (old.sum() + new.sum())
        apart = file.means[at] - means
        with np.errstate(over="ignore"):
            squares = squares + file.squares[at] + apart**2 * (old * new / (old + new))  # Chan, Golub and LeVeque 1979
        means, pictures = means + apart * (new / (old + new)), pictures + file.pictures[at]
    return first._replace(pictures=pictures, means=means, squares=squares, coverage=float(coverage))


def shared_places(before: Answers, after: Answers) -> list[np.ndarray]:
    """Where in each of the two the prompts stand that both have. Raises BadInput for none."""
    shared = sorted(before.prompts.keys() & after.prompts.keys())
    if not shared:
        raise BadInput(f"{after.path}: has no prompt id in common with {before.path}")
    return [np.array([answers.prompts[id] for id in shared]) for answers in (before, after)]


def compare(tables: dict[str, tuple[Answers, Answers]]) -> dict[str, dict[str, Difference]]:
    """Every read-out before and after, for each title. Raises BadInput if two have no prompt in common.

    All at once: over equally many prompts they share the bootstrap's draws, which take most of the time.
    """
    both = []
    for before, after in tables.values():
        at = shared_places(before, after)
        both += [(before.means[at[0], i], after.means[at[1], i]) for i in range(len(SIGNALS))]
    found = iter(differences(both))
    return {title: dict(zip(SIGNALS, found, strict=False)) for title in tables}


def look(before: Answers, after: Answers, matters: float) -> dict[str, Sight]:
    """What the pictures of both can show of each read-out. matters: as a share of the read-out before."""
    both, found = list(zip((before, after), shared_places(before, after), strict=True)), {}
    for i, name in enumerate(SIGNALS):
        old, new = (answers.means[at, i] for answers, at in both)
        with np.errstate(all="ignore"):  # of one picture a prompt, and of one prompt, there is no variance
            spread = ((new - old - (new - old).mean()) ** 2).sum() / np.float64(len(old) - 1)
            sides = [(one.squares[at, i].sum() / (one.pictures[at] - 1.0).sum(), one.pictures[at]) for one, at in both]
        wanted = matters * old.mean()
        found[name] = what_can_be_seen(spread, sides, wanted if wanted > 0 else math.nan, LEVEL)
    return found


def said(sight: Sight, n_prompts: int, n_pictures: float) -> str:
    """What can be seen of the question, in one sentence."""
    if sight.seen is None:
        return "one prompt shows nothing"
    told = f"{n_prompts} prompts of {n_pictures:.3g} pictures show a difference of the question of {sight.seen:.3f} or more "
    if sight.prompts is None:
        return told + "four times in five"
    told += f"four times in five; {sight.matters:.3f} takes {sight.prompts} prompts"
    if sight.pictures is None:
        return told + (", and no number of pictures a prompt would do" if sight.by_chance is not None else "")
    return f"{told}, or {sight.pictures} pictures a prompt"


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
    some: dict[str, Any] = {"type": Path, "nargs": "+", "default": []}  # further pictures of the same prompts, by other seeds
    files.add_argument("--base", **some, required=True, help="held-out prompts by the model before the first round")
    files.add_argument("--after", **some, required=True, help="the same prompts by the new model")
    files.add_argument("--last", **some, help="the same by the last good round's model (from the second round on)")
    files.add_argument("--rejudged", **some, required=True, help="the pictures of --base as the new model judges them")
    files.add_argument("--last-rejudged", **some, help="and as the last good round's model does (with --last)")
    files.add_argument("--out", type=Path, help="JSON to write (default: gate.json beside --after)")
    rules = parser.add_argument_group("rules")
    share = "share of the base's read-outs on its own pictures that the new judge may lose (default 0.1)"
    rules.add_argument("--tolerance", type=float, default=0.1, help=share)
    share = "share of the caption read-out there that the new judge may lose in one round (default 0.04)"
    rules.add_argument("--round-tolerance", type=float, default=0.04, help=share)
    rules.add_argument("--min-coverage", type=float, default=0.5, help="least p(yes) + p(no) of the answers (default 0.5)")
    share = "the difference that one would like to see, as a share of the base's read-out; decides nothing (default 0.25)"
    rules.add_argument("--matters", type=float, default=0.25, help=share)
    args = parser.parse_args(argv)
    for name in ("tolerance", "round_tolerance", "min_coverage", "matters"):
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be at least 0, found {getattr(args, name)}")
    if bool(args.last) != bool(args.last_rejudged):
        parser.error("--last and --last-rejudged are of one round, give both or neither")
    if not len(args.base) == len(args.after) == len(args.rejudged):
        counts = f"{len(args.base)}, {len(args.after)} and {len(args.rejudged)}"
        parser.error(f"--base, --after and --rejudged take equally many files, found {counts}")
    if len(args.last_rejudged) > len(args.base):
        parser.error(f"--last-rejudged has {len(args.last_rejudged)} files, but --base has {len(args.base)}")
    if not args.after[0].name:
        parser.error(f"--after {args.after[0]}: a file name is wanted")
    args.out = args.out or args.after[0].with_name("gate.json")
    return args


def main(args: argparse.Namespace) -> None:
    inputs = (args.base, args.after, args.rejudged, args.last, args.last_rejudged)
    check_outputs([path for paths in inputs for path in paths], {args.out: "gate"})
    base, after, rejudged, last, last_rejudged = map(read_files, inputs)
    check_same(base[0], after[0], (*ASKED, *DRAWN))
    for drawn, seen in (*zip(base, rejudged, strict=True), *zip(base, last_rejudged, strict=False)):
        check_same(drawn, seen, ("model_hash", "seed", *ASKED))
    check_same(after[0], rejudged[0], ("judge_hash",))
    pairs = {OWN: (together(base), together(after)), JUDGE: (together(base), together(rejudged))}
    eroding = JUDGE
    if last:
        check_same(base[0], last[0], (*ASKED, *DRAWN))
        check_same(last[0], last_rejudged[0], ("judge_hash",))
        eroding = ERODING
        pairs[SINCE] = together(last), pairs[OWN][1]
        pairs[eroding] = together(last_rejudged), together(rejudged[: len(last_rejudged)])
    found = compare(pairs)
    tables = {title: found.get(title, {}) for title in (OWN, SINCE, JUDGE)} | ({ERODING: found[ERODING]} if last else {})
    coverage, form = pairs[OWN][1].coverage, after[0].header["answer"]
    limits = (args.tolerance, args.round_tolerance, args.min_coverage)
    wrong = problems(tables[OWN], tables[SINCE], tables[JUDGE], found[eroding]["caption"], coverage, *limits, form)
    decided = verdict(wrong, tables[OWN])
    n_prompts, sights = len(shared_places(*pairs[OWN])[0]), look(*pairs[OWN], args.matters)
    can_be_seen = said(sights["question"], n_prompts, pairs[OWN][1].pictures.mean())
    result = {"verdict": decided, "good": decided == "good", "problems": wrong, "coverage": coverage}
    result |= {"models": {"base": base[0].header["model"], "after": after[0].header["model"]}, "level": LEVEL}
    result |= {title: {name: change._asdict() for name, change in table.items()} for title, table in tables.items()}
    result |= {"what can be seen": {name: sight._asdict() for name, sight in sights.items()}}
    write_json(args.out, result)
    print_tables(tables)
    print(can_be_seen)
    if n_prompts < MIN_PROMPTS:
        print(f"warning: intervals over {n_prompts} prompts are too narrow to be relied upon; give {MIN_PROMPTS} at least")
    if wrong:
        raise QualityRefusal(f"{after[0].header['model']} is a bad round: {'; '.join(wrong)}")
    if decided == "undecided":
        reason = f"nothing says that its pictures got better than the base's, or worse: {listed(tables[OWN], SIGNALS)}"
        raise Undecided(f"{after[0].header['model']} is undecided: {reason}; {can_be_seen}")
    print(f"a good round\n{printable(args.out)}")


def print_tables(tables: dict[str, dict[str, Difference]]) -> None:
    for title, changes in tables.items():
        if changes:
            print(f"{title:44}  before   after  difference, {100 * LEVEL:g} % interval")
        for name, it in changes.items():
            shown = f"{it.before:6.3f}  {it.after:6.3f}  {it.after - it.before:+.3f}  {it.low:+.3f} .. {it.high:+.3f}"
            print(f"  {name:42}  {shown}" + (f"  {it.least_loss:.1%} lost at least" if it.lost(0) else ""))


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
