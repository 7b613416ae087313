"""What a round of self-improvement did to a model's drawing and to its judging: before, after, and a verdict.

Reads   --before, --after  scored.jsonl of the base and of the improved model on the same held-out prompts; without --after
                           the survey of one model, see below
        --rejudged         the pictures of --before, judged by the model of --after (score.py --rejudge)
        --labels           an independent judge's word on the pictures of --before, --labels-after on those of --after: a
                           labels.jsonl, a person's .csv (columns id, candidate, label 0 or 1, perhaps source), or a
                           scored.jsonl of these very pictures rejudged by a third model
Writes  diagnosis.json beside --after, or --out: every number with its interval and n, the verdict with its evidence; without
        --after survey.json beside --before

    python analysis/diagnose.py --before round0/heldout.jsonl --after round3/heldout.jsonl \\
        --rejudged round3/rejudged.jsonl --labels round0/labels.jsonl --labels-after round3/labels.jsonl
    python analysis/diagnose.py --before survey.jsonl --labels judged-by-qwen.jsonl

Judging is measured on one fixed set, the pictures of --before, so that a change is a change of the judge. Every prompt
counts once, whatever the number of its pictures; a rate under a condition is a ratio of two such means. Intervals are 95 %
percentile bootstraps over prompts (Efron 1979), those of a difference over the prompts of both sides together. They say
what other prompts would have given, not what another seed of the training would have.

The nonunified score decides nothing: a judge that says yes to everything has a perfect one. Drawing and judging are each
better or worse where the interval of the difference in accuracy excludes 0, unchanged where it lies within --margin of 0,
else unclear, and then the verdict is "cannot tell". So it is without labels, where only the separation of P(yes) for own
prompts and for foils is left to look at; a judge that grows more confident, or begins to accept near misses, widens it too.
Where the files were made with score.py --readouts likelihood, the model is also read as a judge that draws, which says yes
where the picture is likelier given its prompt than given the foil, and it is counted how often log p fell of false positives
that training corrected, and of those that stayed. Neither decides anything.

Categories of the paper's survey (GenEval's, T2I-CompBench's, Science-T2I's tasks) and of the shapes world have a level of
difficulty, and are shown by level and task: nonunified score, and weak generation where there are labels (levels.py).

A judge that does not answer is named and not believed; one that says the same of foils, only to be the worse one. From the
paper: nonunified score, weak generation, win rate; the rest is ours. Of replies (score.py --answer reply) P(yes) is 0 or 1:
separation, drift and shift are then differences of shares, and the calibration error is the share of wrong verdicts.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it can be started from anywhere
from analysis.comparison import (
    MIN_COVERAGE,
    check_comparable,
    check_own_judge,
    file_facts,
    read_label_files,
    read_rejudged,
    read_scored_file,
    share_likelihoods,
)
from analysis.levels import SHAPES, SURVEY, Survey, make_survey, print_survey
from analysis.measures import (
    BETWEEN_JUDGES,
    BETWEEN_LIKELIHOODS,
    BINS,
    FIXED_LIKELIHOODS,
    FIXED_PICTURES,
    OWN_LIKELIHOODS,
    OWN_PICTURES,
    Estimate,
    make_estimates,
    tasks_of,
)
from common.answers import answer_form, unanswered
from common.command import BadInput, Parser, printable, run_script
from common.outputs import check_outputs
from common.records import tokens_path
from common.stats import MIN_PROMPTS
from common.writing import write_json

MIN_SEPARATION = 0.05  # under this, as under MIN_COVERAGE, a judge's yes and no mean nothing; make_pairs.py's gate has the same
BY_CATEGORY = ("nonunified", "drawing_accuracy", "judge_accuracy")  # printed so; the JSON has all of them


# ---------------------------------------------------------------------------------------------------------------------
# The verdict

# (what drawing did, what judging did) -> verdict; any other pair: cannot tell.
VERDICTS = {
    ("better", "better"): "co-improvement",
    ("worse", "worse"): "co-degradation",
    ("better", "unchanged"): "generation only",
    ("unchanged", "better"): "understanding only",
    ("unchanged", "unchanged"): "no change",
    ("worse", "unchanged"): "generation only, for the worse",
    ("unchanged", "worse"): "understanding only, for the worse",
    ("better", "worse"): "generation at the cost of understanding",
    ("worse", "better"): "understanding at the cost of generation",
}
# What a direction is called of separation, which is only wider or narrower.
SEPARATION_DIRECTIONS = {"better": "wider", "worse": "narrower", "unchanged": "unchanged", "unclear": "unclear"}


def verdict(generation: str, understanding: str) -> str:
    """The verdict on two directions: better, worse, unchanged, unclear (not shown either way) or unknown (not measured)."""
    return VERDICTS.get((generation, understanding), "cannot tell")


def direction(change: Estimate | None, margin: float) -> str:
    """What a difference (larger is better) shows: better, worse, unchanged, unclear or, where there is none, unknown.

    unchanged: the whole interval is within `margin` of 0, and so is 3 / n_pictures: of n pictures of which none changed,
    that share still may (rule of three, Hanley & Lippman-Hand 1983), which a bootstrap of zeros cannot see.
    """
    if change is None or change.interval is None:
        return "unknown"
    _, low, high = change.interval
    if change.n_prompts < MIN_PROMPTS:
        return "unclear"
    if low > 0 or high < 0:
        return "better" if low > 0 else "worse"
    return "unchanged" if max(-low, high, 3 / change.n_pictures) <= margin else "unclear"


def credible_direction(understanding: str, unanswered: bool, blind_before: bool, blind_after: bool) -> str:
    """The direction of understanding, or unclear where the judges' answers mean nothing.

    unanswered: one of them hardly says yes or no. A blind judge, one that says of right pictures the same for a foil as for
    the prompt, may often be right by luck (yes to everything, where most are right): it is believed only to be the worse.
    """
    lucky = (blind_before and understanding != "better") or (blind_after and understanding != "worse")
    return "unclear" if understanding != "unknown" and (unanswered or lucky) else understanding


def known_value(number: Estimate) -> float:
    """The value of a measure that every picture has, so that it is always there."""
    assert number.value is not None
    return number.value


def judge_warnings(name: str, measures: dict[str, dict[str, Estimate]], side: str, form: str) -> list[str]:
    """What says that a judge's answers mean nothing, a sentence each."""
    coverage, separation = (known_value(measures[measure][side]) for measure in ("coverage", "separation"))
    warnings = []
    if coverage < MIN_COVERAGE:
        warnings.append(f"{name} has coverage {coverage:.3f}, under {MIN_COVERAGE:g}: its {unanswered(form)}")
    if separation < MIN_SEPARATION:
        why = "it says the same of foils, or hardly a picture is right"
        warnings.append(f"{name} has separation {separation:.3f}, under {MIN_SEPARATION:g}: {why}")
    return warnings


def describe_change(name: str, numbers: dict[str, Estimate], conclusion: str) -> str:
    """One piece of evidence: before, after, the difference with its interval, and what it shows."""
    before, after, change = (numbers[key] for key in ("before", "after", "difference"))
    few = f" (fewer than {MIN_PROMPTS})" if change.n_prompts < MIN_PROMPTS else ""
    return (
        f"{name} {before.value:.3f} -> {after.value:.3f}, {change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}] "
        f"over {change.n_prompts} prompts{few}: {conclusion}"
    )


def assess_generation(drawn: dict[str, Any], margin: float) -> tuple[str, list[str]]:
    """The direction of generation, and the evidence."""
    conclusion = direction(drawn["drawing_accuracy"].get("difference"), margin)
    if conclusion == "unknown":
        return conclusion, ["drawing unknown (that takes labels of both models' pictures, of the same prompts)"]
    return conclusion, [describe_change("drawing accuracy", drawn["drawing_accuracy"], conclusion)]


def assess_understanding(judged: dict[str, Any], margin: float) -> tuple[str, list[str]]:
    """The direction of understanding, and the evidence; `judged` is empty without --rejudged."""
    if not judged:
        return "unknown", ["judging unknown (that takes --rejudged, and labels of the pictures before)"]
    found = direction(judged["judge_accuracy"].get("difference"), margin)
    if found == "unknown":
        conclusion = SEPARATION_DIRECTIONS[direction(judged["separation"]["difference"], margin)]
        evidence = describe_change("without labels, separation on the pictures before", judged["separation"], conclusion)
        return found, ["judging unknown (that takes labels of the pictures before)", evidence]
    unanswered = any(known_value(judged["coverage"][side]) < MIN_COVERAGE for side in ("before", "after"))
    blind = ((judged["separation_if_right"][side].value or 0) < MIN_SEPARATION for side in ("before", "after"))
    conclusion = credible_direction(found, unanswered, *blind)
    doubt = "" if conclusion == found else " (a judge does not answer, or is blind)"
    return conclusion, [describe_change("judge accuracy on the pictures before", judged["judge_accuracy"], conclusion) + doubt]


def conclude(drawn: dict[str, Any], judged: dict[str, Any], margin: float, form: str = "yes-no") -> dict[str, Any]:
    """The verdict with its evidence, from the measures over all prompts; `judged` is empty without --rejudged.

    form: of the judges' answers.
    """
    generation, of_drawing = assess_generation(drawn, margin)
    understanding, of_judging = assess_understanding(judged, margin)
    warnings = [line for side in ("before", "after") for line in judge_warnings(f"the judge {side}", drawn, side, form)]
    if judged:
        warnings += judge_warnings("the judge after, on the pictures before,", judged, "after", form)
    return {
        "verdict": verdict(generation, understanding),
        "generation": generation,
        "understanding": understanding,
        "margin": margin,
        "evidence": of_drawing + of_judging,
        "warnings": warnings,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The report


def overall(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The measures over all prompts, without those of the categories."""
    return {name: numbers["all"] for name, numbers in found.items()}


def as_json(found: Any) -> Any:
    """Estimates, however nested in dictionaries, as JSON objects."""
    if isinstance(found, Estimate):
        return found._asdict()
    return {key: as_json(value) for key, value in found.items()} if isinstance(found, dict) else found


def table_lines(found: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    """A line a measure, and below the most important ones a line a category: name, n, numbers, interval."""
    for name, numbers in found.items():
        if not numbers["all"]:  # no label
            continue
        yield [name.replace("_", " "), *cells(numbers["all"])]
        if name in BY_CATEGORY and len(numbers["categories"]) > 1:
            yield from (["  " + printable(category), *cells(each)] for category, each in numbers["categories"].items())


def cells(numbers: dict[str, Estimate] | Estimate) -> list[str]:
    """Prompts, and before, after, difference and its interval; of a single number itself and its interval."""
    if isinstance(numbers, Estimate):
        return [str(numbers.n_prompts), cell(numbers), interval_cell(numbers, "")]
    sides = [numbers.get(side) for side in ("before", "after")]
    change = numbers.get("difference")
    n_prompts = max((side.n_prompts for side in sides if side), default=0)
    return [str(n_prompts), *map(cell, sides), cell(change, "+"), interval_cell(change, "+")]


def cell(number: Estimate | None, sign: str = "") -> str:
    return "-" if number is None or number.value is None else f"{number.value:{sign}.3f}"


def interval_cell(number: Estimate | None, sign: str) -> str:
    return "-" if number is None or number.value is None else f"{number.low:{sign}.3f} .. {number.high:{sign}.3f}"


def print_table(title: str, headings: tuple[str, ...], found: dict[str, dict[str, Any]]) -> None:
    """An aligned table: names to the left, numbers to the right."""
    lines = [[title, *headings, "95 % interval"], *table_lines(found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print()
    for name, *numbers in lines:
        print("  ".join([name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])]))


def print_report(diagnosis: dict[str, Any], surveys: dict[str, Survey]) -> None:
    """Whose pictures these are, what labels there are of them, what has no counterpart, the tables, and the surveys by side."""
    print_facts(diagnosis)
    if "verdict" in diagnosis:
        print_comparison(diagnosis)
    for side, survey in surveys.items():
        print_survey(f"by level, {side}" if len(surveys) > 1 else "by level", survey)
    if "verdict" in diagnosis:
        found = diagnosis["verdict"]
        why = [*found["evidence"], *(f"warning: {warning}" for warning in found["warnings"])]
        print(f"\n{'verdict':<15}{found['verdict']}: {'; '.join(why)}")


def print_facts(diagnosis: dict[str, Any]) -> None:
    """Whose pictures these are, and what labels there are of them."""
    for name, file in diagnosis["files"].items():
        pictures = f"{file['n_pictures']} pictures of {file['n_prompts']} prompts"
        print(f"{name:<15}{pictures}, drawn by {printable(file['model'])}, judged by {printable(file['judge'])}")
    for side, labels in diagnosis["labels"].items():
        sources, n_pictures = labels["sources"], diagnosis["files"][side]["n_pictures"]
        by_source = "".join(f", {count} by {printable(source)}" for source, count in sources.items())
        print(f"{f'labels {side}':<15}{sum(sources.values())} of {n_pictures} pictures{by_source}")


def print_comparison(diagnosis: dict[str, Any]) -> None:
    """What has no counterpart, and the tables."""
    alone = diagnosis["unpaired_prompts"]
    print(f"{'unpaired':<15}{alone['before']} prompts of before and {alone['after']} of after: left out of own pictures")
    compared = ("prompts", "before", "after", "change")
    print_table("own pictures, judged by the model that drew them", compared, diagnosis["drawn"])
    if diagnosis["judged"]:
        print_table("pictures of before, judged by each model", compared, diagnosis["judged"])
        print_table("the same, between the two judges", ("prompts", "value"), diagnosis["between_judges"])


# ---------------------------------------------------------------------------------------------------------------------
# Command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--before", type=Path, required=True, metavar="FILE", help="scored.jsonl of the base model")
    files.add_argument("--after", type=Path, metavar="FILE", help="scored.jsonl of the improved model; without it: a survey")
    files.add_argument("--rejudged", type=Path, metavar="FILE", help="the pictures of --before judged by the model of --after")
    files.add_argument("--labels", type=Path, nargs="+", default=[], metavar="FILE", help="labels of the pictures of --before")
    files.add_argument("--labels-after", type=Path, nargs="+", default=[], metavar="FILE", help="labels of those of --after")
    files.add_argument("--out", type=Path, metavar="FILE", help="JSON to write (default: see above)")
    parser.add_argument(
        "--margin",
        type=float,
        default=0.02,
        help="a difference counts as no change if its whole interval is this near 0 (default 0.02)",
    )
    args = parser.parse_args(argv)
    if not 0 < args.margin < 1:
        parser.error(f"--margin must lie between 0 and 1, found {args.margin}")
    for flag in ("rejudged", "labels_after"):
        if getattr(args, flag) and not args.after:
            parser.error(f"--{flag.replace('_', '-')} needs --after")
    return args


def check_out(args: argparse.Namespace) -> Path:
    """Where the diagnosis goes; BadInput if it cannot, or if it is one of the files that are read."""
    kind = "diagnosis" if args.after else "survey"
    out = args.out or tokens_path(args.after or args.before).with_name(f"{kind}.json")
    check_outputs([args.before, args.after, args.rejudged, *args.labels, *args.labels_after], {out: kind})
    for path in args.labels:
        if os.path.realpath(path) in map(os.path.realpath, args.labels_after):
            raise BadInput(f"{path}: given as --labels and as --labels-after, but these are other pictures")
    return out


def survey_alone(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Survey]]:
    """One model's survey, as `compare` has it; BadInput if no category has a level."""
    before = read_scored_file(args.before)
    check_own_judge(before)
    labels, sources = read_label_files(args.labels, before, [before])
    survey = make_survey(before.pictures.id, before.pictures.category, before.pictures.accepted, labels)
    if not survey.levels:
        known = ", ".join(task for tasks in (SURVEY | SHAPES).values() for task in tasks)
        raise BadInput(f"{args.before}: no category has a level ({known}), and without --after nothing else is measured")
    diagnosis = {
        "files": {"before": file_facts(before)},
        "labels": {"before": {"paths": list(map(str, args.labels)), "sources": sources}},
        "levels": {"before": survey.as_json()},
    }
    return diagnosis, {"before": survey}


def compare(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Survey]]:
    """What is written of two models, and their surveys by side, none where no category has a level."""
    before, after = read_scored_file(args.before), read_scored_file(args.after)
    check_comparable(before, after)
    rejudged = read_rejudged(args.rejudged, before, after) if args.rejudged else None
    labels_before, sources_before = read_label_files(args.labels, before, [before, after])
    labels_after, sources_after = read_label_files(args.labels_after, after, [before, after])
    base = before.pictures._replace(label=labels_before)
    improved = after.pictures._replace(label=labels_after)
    again = rejudged.pictures._replace(label=labels_before) if rejudged else None
    form = answer_form(before.tokens.metadata)
    files = {"before": file_facts(before), "after": file_facts(after)}
    files |= {"rejudged": file_facts(rejudged)} if rejudged else {}
    own, fixed, of_two = OWN_PICTURES, FIXED_PICTURES, BETWEEN_JUDGES
    if share_likelihoods(before, after):
        own = own | OWN_LIKELIHOODS
    if rejudged and share_likelihoods(before, rejudged):
        fixed, of_two = fixed | FIXED_LIKELIHOODS, of_two | BETWEEN_LIKELIHOODS
    del before, after, rejudged  # what is not compared is a third of the memory

    surveys = {
        name: make_survey(side.id, side.category, side.accepted, side.label)
        for name, side in (("before", base), ("after", improved))
    }
    surveys = {name: survey for name, survey in surveys.items() if survey.levels}
    wanted = {"drawn": tasks_of(own, base, improved), "both": tasks_of({**fixed, **of_two}, base, again) if again else {}}
    unpaired = {"before": len({*base.id} - {*improved.id}), "after": len({*improved.id} - {*base.id})}
    del base, improved, again  # these are a seventh
    drawn, both = make_estimates(wanted).values()  # together, since they share the bootstrap's draws
    judged, between = ({name: both[name] for name in names if both} for names in (fixed, of_two))
    diagnosis = {
        "verdict": conclude(overall(drawn), overall(judged), args.margin, form),
        "files": files,
        "labels": {
            "before": {"paths": list(map(str, args.labels)), "sources": sources_before},
            "after": {"paths": list(map(str, args.labels_after)), "sources": sources_after},
        },
        "calibration_bins": BINS,
        "unpaired_prompts": unpaired,
        "drawn": drawn,
        "judged": judged,
        "between_judges": between,
    } | ({"levels": {side: survey.as_json() for side, survey in surveys.items()}} if surveys else {})
    return diagnosis, surveys


def main(args: argparse.Namespace) -> None:
    out = check_out(args)
    diagnosis, surveys = compare(args) if args.after else survey_alone(args)
    write_json(out, as_json(diagnosis))
    print_report(diagnosis, surveys)
    print(printable(out))


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
