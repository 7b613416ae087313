"""What a round should gain, and whether it is worth it, before a single step: from a few hundred labels.

Reads   a scored.jsonl, from which make_pairs.py would take the round's data
        --labels   an independent judge's word on some or all of its pictures, as diagnose.py reads it: a labels.jsonl, a
                   person's .csv (columns id, candidate, label 0 or 1), or these pictures rejudged by another model
Writes  forecast.json beside the scored file, or --out

    python analysis/forecast.py round1/scored.jsonl --labels mine.csv --per-prompt 4
    python analysis/forecast.py round1/scored.jsonl --labels round1/judged-by-qwen.jsonl --method sft

Of the drawings a share a is right; the judge accepts right ones with probability t and wrong ones with f, so that of what it
accepts p = a t / (a t + (1 - a) f) is right. The law: gain = k (advantage of the data) - c. SFT's advantage is the share of
right pictures among those that it trains on, less a. DPO's is the share of right ones among the chosen less that among the
rejected, which is P(chosen right and rejected wrong) - P(chosen wrong and rejected right). k is how much of it a training
takes over, c what the training costs even on pictures by lot; law.json has both, with where they come from, for each world
in which they were measured (docs/results.md): of tiny models, one base each, and a first round of 100 steps. A second round
gained less than it says, DPO's nothing. A real model's k and c are not known: where the worlds differ the answer is doubt,
and where they agree it is theirs. c of your own is what a training on as many pictures by lot loses, or of DPO one on pairs of
which half are turned round (experiments/vary.py makes such data); --c and --k take yours.

The advantage is counted over the pictures that make_pairs.py would take with these flags, not over all accepted ones, as it
was for law.json: the best and the worst of a prompt are not any two pictures (of the tiny Janus, with 40 % of the verdicts
turned round, the rule says .18 for the pairs, and .11 is there), and the training sees them alone. And it is the mean over
categories: a judge that accepts more pictures of the easy ones does not know by that which are right.

Label any pictures that you choose without looking, of one category or of accepted ones more than of others if you like: each
category's taken, accepted and rejected ones count as many as there are (advantage.py). Intervals of a, t, f, p and of
advantages are 95 %, over prompts: the pictures' numbers by the bootstrap, what is right of them by Beta posteriors of as many
labels as these are worth where several are of one prompt, since the bootstrap of few labels is too narrow, and of none that
are wrong has no width. Label a few pictures of many prompts rather than many of a few: of 300 labels of six categories the
intervals of a, p and SFT's advantage held 91 to 95 % with 2 of each of 150 prompts, 85 to 89 % with all ten of 30 prompts that
differ as much as they can (150 simulated files each). That of a gain is 90 % and holds the law's own spread too: how far off
it was on kinds of data or on other bases that it had not seen, whichever is more, each run measured on 512 pictures.

A category is left out (make_pairs.py --leave-out) where its data's advantage is surely below 0. What a category gains by
itself is not foretold: the sign of its advantage held in the experiments, the size did not (k was .2 to .7 of SFT).
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it can be started from anywhere
from analysis.advantage import STRATA, Taken, count_cells, mean_rates, rates, take
from analysis.comparison import MIN_COVERAGE, Scored, file_facts, read_label_files, read_scored_file
from analysis.measures import Estimate, make_estimate
from common.command import BadInput, Parser, aligned, printable, run_script
from common.outputs import check_outputs
from common.records import tokens_path
from common.stats import Interval, percentile_interval
from common.writing import write_json

LAW = Path(__file__).with_name("law.json")
NORMAL_90, NORMAL_80 = 1.6449, 0.8416  # standard normal: 5 % lie above, 20 % do
METHODS = ("sft", "dpo")
Found = dict[str | None, dict[str, Any]]  # category, or None for all of them -> what is said of it


# ---------------------------------------------------------------------------------------------------------------------
# The law


def accepted_right(a: float, t: float, f: float) -> float:
    """p: how often what is accepted is right. Of what is rejected it is this of a, 1 - t, 1 - f. NaN of nothing."""
    accepted = a * t + (1 - a) * f
    return a * t / accepted if accepted else math.nan


def gain_of(advantage: Any, k: float, c: float) -> Any:
    """What a round gains in accuracy by data of this advantage."""
    return k * advantage - c


def break_even(a: float, t: float, k: float, c: float) -> float:
    """The false positive rate from which a round of SFT stops paying: where k (p - a) = c. 0 if it never pays.

    A c below 0, a training that helps on pictures by lot, is taken for 0: then it is t, where the verdicts say nothing.
    """
    p = a + max(c, 0.0) / k
    return a * t * (1 - p) / (p * (1 - a)) if p < 1 else 0.0


def labels_to_settle(distance: float, spread: float, sd: float, labels: int) -> float:
    """How many labels, placed as these are, would show with a power of 80 % on which side of the least gain a gain lies.

    distance: of the gain from the least one that pays. spread: of the law. sd: what these labels leave open, which shrinks
    with the root of their number. inf where the law's own spread is too wide for any number.
    """
    room = abs(distance)
    if room <= NORMAL_90 * spread:
        return math.inf

    def missing(part: float) -> float:
        return NORMAL_90 * math.hypot(spread, part) + NORMAL_80 * part - room

    low, high = 0.0, room  # of the sd that may be left
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if missing(middle) > 0 else (middle, high)
    return math.ceil(labels * (sd / low) ** 2)


class Line(NamedTuple):
    """gain = k advantage - c, with its spread (standard deviation)."""

    k: float
    c: float
    spread: float


def read_law(like: str | None = None) -> dict[str, dict[str, Line]]:
    """method -> world -> its line, as experiments/law.py fitted them."""
    worlds = json.loads(LAW.read_text())["families"]
    return {
        method: {
            world: Line(*(lines[method][key] for key in Line._fields))
            for world, lines in worlds.items()
            if method in lines and like in (None, world)
        }
        for method in METHODS
    }


# ---------------------------------------------------------------------------------------------------------------------
# What is said of them


def interval(value: np.ndarray, draws: np.ndarray) -> Interval | None:
    """95 % of the draws (D,), and the value (), which may lie at the very end of what is possible."""
    found = percentile_interval(value, draws)
    return found and (found[0], min(found[:2]), max(found[0], found[2]))


class Gain(NamedTuple):
    """What one world's law says: a gain with its 90 % interval, and how many labels would show whether it is worth it.

    labels: None where it is settled, inf where no number of labels would do.
    """

    gain: float | None
    low: float | None
    high: float | None
    verdict: str
    labels: float | None


def judge_gain(advantage: float, draws: np.ndarray, room: float, line: Line, least: float, n_labels: int) -> Gain:
    """The gain by data of this advantage, of which the labels leave `draws` (N,) open; at most `room`, what is drawn wrong."""
    gain, found = min(gain_of(advantage, line.k, line.c), room), gain_of(draws, line.k, line.c)
    found = found[np.isfinite(found)]
    if not math.isfinite(gain) or not len(found):
        return Gain(None, None, None, "unknown", None)
    noise = np.random.default_rng(1).normal(0, line.spread, len(found))
    low, high = (float(end) for end in np.percentile(np.minimum(found + noise, room), (5, 95)))
    if low > least or high < least:
        return Gain(gain, low, high, "worth it" if low > least else "not worth it", None)
    labels = labels_to_settle(gain - least, line.spread, float(found.std()), n_labels)
    return Gain(gain, low, high, "in doubt", labels)


def agreed(gains: dict[str, Gain]) -> str:
    """What all worlds say, or in doubt."""
    said = {gain.verdict for gain in gains.values()}
    return said.pop() if len(said) == 1 else "in doubt"


def forecast(scored: Scored, label: np.ndarray, taken: Taken, method: str, laws: dict[str, Line], least: float) -> Found:
    """Of all categories, under None, and of each: pictures, labels, numbers as Estimates; of all also gains and the verdict."""
    pictures = scored.pictures
    names, category = np.unique(pictures.category.astype(str), return_inverse=True)
    stratum, known = taken.strata(method), ~np.isnan(label)
    cells = count_cells(pictures.id, category, stratum, label, (len(names), len(STRATA[method])))
    found = {}
    for number, name in enumerate([None, *names.tolist()], -1):
        some = cells.of(None if name is None else number)
        of_method = mean_rates if name is None else rates
        values, spreads = of_method(some.shares(), some.pictures, method), of_method(some.draws(), some.resampled, method)
        here = known if name is None else known & (category == number)
        n_labels, n_prompts = int(here.sum()), len(set(pictures.id[here]))
        of = {  # the labels that a number is a rate of
            "t": here & (label == 1),
            "f": here & (label == 0),
            "p": here & taken.accepted,
            "taken_right": here & taken.sft,
            "chosen_right": here & taken.chosen,
            "rejected_right": here & taken.rejected,
        }
        estimates = {
            key: make_estimate(interval(values[key], spreads[key]), n_prompts, int(of.get(key, here).sum())) for key in values
        }
        found[name] = {"pictures": int(some.pictures.sum()), "labels": n_labels, **estimates}
        if name is None:
            advantage, room = float(values["advantage"]), 1 - float(values["drawn_right"])
            gains = {
                world: judge_gain(advantage, spreads["advantage"], room, line, least, n_labels) for world, line in laws.items()
            }
            found[name] |= {"gains": gains, "verdict": agreed(gains)}
    return found


def left_out(found: Found) -> tuple[list[str], list[str]]:
    """Categories whose data are surely worse than what stands against them, and those of which the labels do not say."""
    advantages = {name: numbers["advantage"] for name, numbers in found.items() if name is not None}
    worse = [name for name, it in advantages.items() if it.high is not None and it.high < 0]
    return worse, [name for name, it in advantages.items() if it.low is None or it.low <= 0 <= it.high]


def as_json(found: Any) -> Any:
    """Named tuples, however nested in dictionaries, as JSON objects; what no number of labels settles is null there."""
    if isinstance(found, Gain):
        settled = found.labels is None or math.isinf(found.labels)
        return found._asdict() | {"labels": None if settled else found.labels, "hopeless": found.labels == math.inf}
    if isinstance(found, Estimate):
        return found._asdict()
    return {key: as_json(value) for key, value in found.items()} if isinstance(found, dict) else found


# ---------------------------------------------------------------------------------------------------------------------
# The report


def cell(number: Estimate | Gain, sign: str = "") -> str:
    """A number with its interval."""
    value, low, high = number[:3]
    return "-" if value is None else f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def print_forecast(found: Found, method: str, least: float) -> None:
    """One method's table, what is worth it, what to leave out, and what labels would settle."""
    everything = found[None]
    shown = [key for key in everything if isinstance(everything[key], Estimate) and key not in "atfp"]
    worlds = everything["gains"]
    rows = [[method.upper(), *(key.replace("_", " ") for key in shown)]]
    for name, numbers in found.items():
        cells = [cell(numbers[key], "+" * (key == "advantage")) for key in shown]
        rows.append(["mean over categories" if name is None else name, *cells])
    print(f"\n{aligned(rows)}")
    for world, gain in worlds.items():
        print(f"gain as {world}: {cell(gain, '+')}")
    said = "; ".join(f"as {world} {gain.verdict}" for world, gain in worlds.items())
    print(f"{method.upper()}: {everything['verdict']} (a gain of more than {least:g}): {said}")
    worse, unknown = left_out(found)
    if worse:
        kept = [it["advantage"].value or 0.0 for name, it in found.items() if name is not None and name not in worse]
        then = f"the advantage is then {sum(kept) / (len(found) - 1):+.3f}"
        print(f"leave out: make_pairs.py --leave-out {' '.join(map(printable, worse))}\n{then}")
    if unknown:
        print(f"in doubt whether their data teach anything right: {', '.join(map(printable, unknown))}")
    for world, gain in worlds.items():
        if gain.labels is not None:
            print(f"doubt, as {world}: {describe_labels(gain.labels, everything)}")


def describe_labels(labels: float, everything: dict[str, Any]) -> str:
    """How many labels settle a doubt, in words."""
    if math.isinf(labels):
        return "no number of labels settles it: the gain is nearer to the least one than the law is sure of"
    there = f"{everything['labels']} are there" + f", of {everything['pictures']} pictures"
    more = " (so draw more)" if labels > everything["pictures"] else ""
    return f"about {labels:.0f} labels, placed like these, settle it 4 times of 5{more}; {there}"


def print_judge(found: Found) -> None:
    """a, t, f and p of all pictures and of each category."""
    rows = [["judge", "pictures", "labels", "a: right", "t: right accepted", "f: wrong accepted", "p: accepted right"]]
    for name, numbers in found.items():
        counts = [str(numbers[key]) for key in ("pictures", "labels")]
        rows.append(["all" if name is None else name, *counts, *(cell(numbers[key]) for key in "atfp")])
    print(aligned(rows))


# ---------------------------------------------------------------------------------------------------------------------
# Command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("scored", type=Path, help="scored.jsonl of the pictures that would become data")
    parser.add_argument("--labels", type=Path, nargs="+", required=True, metavar="FILE", help="labels of some of them")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON to write (default: forecast.json beside them)")
    data = parser.add_argument_group("which data, as make_pairs.py is told")
    data.add_argument("--threshold", type=float, default=0.5, help="accepted is a P(yes) over this (default 0.5)")
    data.add_argument("--margin", type=float, default=0.0, help="least P(yes) distance within a pair (default 0)")
    data.add_argument("--per-prompt", type=int, default=0, help="most SFT pictures a prompt, best first (default 0: all)")
    data.add_argument("--pairs-per-prompt", type=int, default=1, help="most pairs a prompt (default 1)")
    law = parser.add_argument_group("which law")
    law.add_argument("--method", choices=METHODS, help="only this one (default: both)")
    law.add_argument("--like", metavar="WORLD", help="only the law of this world in law.json (default: of each)")
    law.add_argument("--k", type=float, help="your own k, with --c and --method (default: law.json's)")
    law.add_argument("--c", type=float, help="your own c, with --method; k is then each world's (default: law.json's)")
    law.add_argument("--spread", type=float, help="standard deviation of your law (default: the widest of law.json)")
    law.add_argument("--least-gain", type=float, default=0.0, help="accuracy that makes a round worth it (default 0)")
    args = parser.parse_args(argv)
    if not 0 <= args.threshold < 1:
        parser.error(f"--threshold must be at least 0 and less than 1, found {args.threshold}")
    if not 0 <= args.margin <= 1:
        parser.error(f"--margin must be from 0 to 1, found {args.margin}")
    for name, least in (("per-prompt", 0), ("pairs-per-prompt", 1)):
        if (value := getattr(args, name.replace("-", "_"))) < least:
            parser.error(f"--{name} must be at least {least}, found {value}")
    if not -1 < args.least_gain < 1:
        parser.error(f"--least-gain must lie between -1 and 1, found {args.least_gain}")
    own = [args.k is not None, args.c is not None]
    if (any(own) and not args.method) or own == [True, False]:
        parser.error("--c goes with --method, and --k with both: each method has its own")
    if args.like and args.k is not None:
        parser.error("--like names a world of law.json, --k is your own: give one")
    if args.spread is not None and not (all(own) and args.spread >= 0):
        parser.error(f"--spread goes with --k and --c and is at least 0, found {args.spread}")
    for name in ("k", "c"):
        if (value := getattr(args, name)) is not None and not (math.isfinite(value) and abs(value) < 10):
            parser.error(f"--{name} must be a number under 10, found {value}")
    return args


def choose_laws(args: argparse.Namespace) -> dict[str, dict[str, Line]]:
    """method -> world -> line, as the flags say; BadInput for a world that there is not."""
    laws = read_law()
    if args.k is not None:
        widest = max(line.spread for line in laws[args.method].values())
        return {args.method: {"yours": Line(args.k, args.c, widest if args.spread is None else args.spread)}}
    worlds = {world for lines in laws.values() for world in lines}
    if args.like and args.like not in worlds:
        raise BadInput(f"--like {args.like}: law.json has {', '.join(sorted(worlds))}")
    laws = {method: lines for method, lines in read_law(args.like).items() if args.method in (None, method)}
    if args.c is None:
        return laws
    return {args.method: {f"{world}, with your c": line._replace(c=args.c) for world, line in laws[args.method].items()}}


def check_labels(label: np.ndarray, accepted: np.ndarray, paths: list[Path]) -> None:
    """Raise BadInput where a side of the judge has pictures and no label: p, t and f take both."""
    for side, name in ((accepted, "accepts"), (~accepted, "rejects")):
        if side.any() and np.isnan(label[side]).all():
            listed = ", ".join(map(str, paths))
            raise BadInput(f"{listed}: no label of a picture that the judge {name}; label some of both kinds")


def main(args: argparse.Namespace) -> None:
    out = args.out or tokens_path(args.scored).with_name("forecast.json")
    check_outputs([args.scored, *args.labels], {out: "forecast"})
    laws = choose_laws(args)
    scored = read_scored_file(args.scored)
    label, sources = read_label_files(args.labels, scored, [scored])
    taken = take(scored, args.threshold, args.per_prompt, args.pairs_per_prompt, args.margin)
    check_labels(label, taken.accepted, args.labels)

    found = {method: forecast(scored, label, taken, method, lines, args.least_gain) for method, lines in laws.items()}
    data = {key: getattr(args, key) for key in ("threshold", "margin", "per_prompt", "pairs_per_prompt")}
    data |= {name: int(getattr(taken, name).sum()) for name in ("accepted", "sft", "chosen")}
    write_json(
        out,
        {
            "files": {"scored": file_facts(scored)},
            "labels": {"paths": list(map(str, args.labels)), "sources": sources},
            "data": data,
            "law": {method: {world: line._asdict() for world, line in lines.items()} for method, lines in laws.items()},
            "least_gain": args.least_gain,
            "forecast": {
                method: {
                    "all": as_json(each[None]),
                    "categories": {name: as_json(it) for name, it in each.items() if name is not None},
                }
                | {"leave_out": left_out(each)[0]}
                for method, each in found.items()
            },
        },
    )
    facts = file_facts(scored)
    print(f"{facts['n_pictures']} pictures of {facts['n_prompts']} prompts, judged by {printable(facts['judge'])}")
    print(
        f"accepted {data['accepted']}, SFT would take {data['sft']}, DPO {data['chosen']} pairs; {sum(sources.values())} labels"
    )
    if (coverage := float(scored.pictures.coverage.mean())) < MIN_COVERAGE:
        print(f"warning: coverage is {coverage:.3f}, under {MIN_COVERAGE:g}: the judge says neither yes nor no")
    print_judge(next(iter(found.values())))
    for method, each in found.items():
        print_forecast(each, method, args.least_gain)
    if args.k is None:
        print("The laws are of tiny models' first rounds; later rounds gained less, and a real model's law is not known.")
    print(printable(out))


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
