"""Everything that the results tables say of one trained model, as one row.

Reads   BASE/{heldout,labels}.jsonl: the base model's held-out pictures and what the oracle says of them
        DIR/{heldout,labels}.jsonl: the trained model's; DIR/rejudged.jsonl: the base's as it judges them
        DIR/{guided,guided-labels}.jsonl, drawn with guidance, and DIR/gate.json, where they are there
        DIR/../summary.jsonl and DIR/../round*/scored.safetensors, where DIR is a round of self_improve.sh
        with --likelihood the scored files as score.py --readouts likelihood judges them
        with --forecast DIR/forecast.json
        with --second DIR/seconded.jsonl, the trained model's held-out pictures as the base's judge sees them
        with --prompts {BASE/scored8,DIR/drawn}.jsonl and their labels, training prompts before and after
        with --data BASE/scored.jsonl and scored-labels.jsonl, what was drawn for training, and DIR/{sft,pairs}.jsonl
Writes  DIR/row.json; with --second DIR/second/row.json, with --prompts DIR/prompts/row.json, with --levels DIR/TASK/row.json of
        each level and task instead

    python experiments/measure.py --base runs/experiments/janus/seed0/base --dir runs/experiments/janus/seed0/sft \\
                                  --name sft --family janus --seed 0

The base model's own row comes without rejudged.jsonl: its judge is its own. Each row says which commit and versions made it.
"""

import argparse
import json
import operator
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from analysis import comparison, levels, measures
from common.command import Parser, run_script
from common.foils import kind_of_change
from common.records import LABELS, LIKELIHOOD, PAIRS, READOUTS, SCORED, SFT, Tokens, read_rows
from common.writing import write_json
from gate import JUDGE

BORDER = (0.1, 0.9)  # a P(yes) of the base's judge in between is near its decision
CLIP = 1e-6  # of P(yes), before its log-odds are taken


def read_pictures(scored: Path, labels: Path, columns: dict[str, str] = SCORED) -> dict[str, np.ndarray]:
    """The rows of a scored file as columns, each (R,); `accepted` at the file's threshold, from the labels `right` and, of what
    is wrong in one attribute alone, in which: `misses`."""
    rows = [row for _, row in read_rows(scored, columns)]
    labelled = {(row["id"], row["candidate"]): row for _, row in read_rows(labels, LABELS)}
    told = [labelled[row["id"], row["candidate"]] for row in rows]
    found = {key: np.array([row[key] for row in rows]) for key in columns if key not in ("prompt", "foil")}
    found["right"] = np.array([row["label"] for row in told], bool)
    found["misses"] = np.array([row.get("misses", "") for row in told])
    found["accepted"] = found["p_yes"] > Tokens(scored).threshold()
    return found


def log_odds(p: np.ndarray) -> np.ndarray:
    p = p.clip(CLIP, 1 - CLIP)
    return np.log(p / (1 - p))


def mean(values: np.ndarray) -> float | None:
    """The mean, or None of nothing."""
    return float(np.mean(values)) if len(values) else None


def judge_numbers(base: dict[str, np.ndarray], seen: dict[str, np.ndarray]) -> dict[str, float | None]:
    """A judge on the base's pictures, of which `base` is what the base's judge said and `seen` what the new one says.

    margin: mean log-odds of yes, taken negative for wrong pictures: how far on the right side its answers are. border: its
    accuracy where the base's judge was near its decision. wins of disagreements: the pictures on which the two differ, and
    how often the new one is right there; their ratio is the win rate.
    """
    right, correct = base["right"], seen["accepted"] == base["right"]
    near = (base["p_yes"] > BORDER[0]) & (base["p_yes"] < BORDER[1])
    disagree = seen["accepted"] != base["accepted"]
    return {
        "judge_accuracy": mean(correct),
        "false_positive_rate": mean(seen["accepted"][~right]),
        "false_negative_rate": mean(~seen["accepted"][right]),
        "margin": mean(np.where(right, 1, -1) * log_odds(seen["p_yes"])),
        "border_accuracy": mean(correct[near]),
        "border_margin": mean((np.where(right, 1, -1) * log_odds(seen["p_yes"]))[near]),
        "caption_margin": mean(seen["caption"] - seen["caption_foil"]),
        "wins": int((correct & disagree).sum()),
        "disagreements": int(disagree.sum()),
    }


def drawing_numbers(own: dict[str, np.ndarray]) -> dict[str, float | None]:
    """A model's own held-out pictures, judged by itself and by the oracle."""
    return {
        "accuracy": mean(own["right"]),
        "nonunified": mean(~own["accepted"]),
        "separation": mean(own["p_yes"] - own["p_yes_foil"]),
        "weak_generation": mean(~own["right"][~own["accepted"]]),
    }


def near_misses(own: dict[str, np.ndarray]) -> dict[str, dict[str, float | None]]:
    """Of each attribute the share of a model's own pictures that miss their prompt in it alone, and the share of these that its
    judge accepts: whether drawing drifts into a blind spot."""
    found = {}
    for name in ("shape", "side", "number"):
        these = own["misses"] == name
        found[name] = {"share": mean(these), "accepted": mean(own["accepted"][these])}
    return found


def by_category(own: dict[str, np.ndarray]) -> dict[str, dict[str, float | int | None]]:
    """Of each category of a model's own pictures: how many, how often right, and how often its judge accepts right and wrong
    ones: the law's a, t and f (law.py)."""
    found = {}
    for name in sorted({*own["category"].tolist()}):
        right, accepted = (own[key][own["category"] == name] for key in ("right", "accepted"))
        numbers = {"accuracy": mean(right), "accepted_right": mean(accepted[right]), "accepted_wrong": mean(accepted[~right])}
        found[name] = {"pictures": len(right), **numbers}
    return found


def data_numbers(base: Path, data: Path) -> dict[str, Any]:
    """How often what the base drew for training is right, and of it what is in DIR's sft.jsonl and pairs.jsonl, as far as they
    are there: of all prompts and of each category. A picture of the data is found among its prompt's by its tokens."""
    columns = read_pictures(base / "scored.jsonl", base / "scored-labels.jsonl")
    tokens = Tokens(base / "scored.jsonl")[:][columns["row"]]
    pictures = zip(columns["id"].tolist(), (row.tobytes() for row in tokens), strict=True)
    right = dict(zip(pictures, columns["right"].tolist(), strict=True))
    shares = {"drawn": list(zip(columns["category"].tolist(), columns["right"].tolist(), strict=True))}
    for stem, shape, parts in (("sft", SFT, {"row": "sft"}), ("pairs", PAIRS, {"chosen": "chosen", "rejected": "rejected"})):
        if (path := data / f"{stem}.jsonl").exists():
            rows, trained = [row for _, row in read_rows(path, shape)], Tokens(path)[:]
            for part, name in parts.items():
                shares[name] = [(row["category"], right[row["id"], trained[row[part]].tobytes()]) for row in rows]
    names = sorted({*columns["category"].tolist()})

    def numbers(wanted: list[str]) -> dict[str, Any]:
        some = {name: np.array([it for category, it in pairs if category in wanted]) for name, pairs in shares.items()}
        counts = {"pairs" if name == "chosen" else name: len(it) for name, it in some.items() if name != "rejected"}
        return counts | {f"{name}_right": mean(it) for name, it in some.items()}

    return numbers(names) | {"categories": {name: numbers([name]) for name in names}}


def commit() -> str | None:
    """Which commit these files are of, with "+" where they were changed since; None in a copy without its history."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def origin(scored: Path) -> dict[str, str | None]:
    """The commit that made a row, and the versions that judged its pictures."""
    return {"commit": commit(), "versions": Tokens(scored).metadata.get("versions")}


def rounded(value: Any) -> Any:
    """Floats, however nested, at five digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 5) if isinstance(value, float) else value


def round_numbers(directory: Path) -> dict[str, int]:
    """Of a round: pictures drawn for training in it and before, what it trained on, its discard pool, and how much of the last
    round's pool has an accepted picture now; nothing where the directory is no round."""
    summary, number = directory.parent / "summary.jsonl", directory.name.removeprefix("round")
    if not number.isdigit() or not summary.exists():
        return {}
    (row,) = (row for row in map(json.loads, summary.read_text().splitlines()) if row["round"] == int(number))
    scored = (directory.with_name(f"round{earlier}") / "scored.jsonl" for earlier in range(1, int(number) + 1))
    drawn = sum(Tokens(path).rows for path in scored)
    return {"drawn": drawn} | {key: row[key] for key in ("n_prompts", "n_sft", "n_pairs", "discard", "recovered")}


def likelihood_numbers(base: dict[str, np.ndarray], seen: dict[str, np.ndarray], own: dict[str, np.ndarray]) -> dict[str, Any]:
    """The model as a judge that draws, on the base's pictures, by the measures of diagnose.py; margin also on its own pictures.

    Then of false positives that training corrected, of those that stayed and of right pictures that stayed accepted: how many
    there are, and of how many log p fell over the training.
    """
    first, second, own_pictures = (as_pictures(columns) for columns in (base, seen, own))
    found = {name: measure(first, second)["after"].value for name, measure in measures.FIXED_LIKELIHOODS.items()}
    found["own_likelihood_margin"] = mean(own_pictures.likelihood_margin)
    if seen is not base:
        groups = {"corrected": (0, False), "stayed": (0, True), "true_positives": (1, True)}
        for name, (label, accepted) in groups.items():
            share = measures.fell(label, accepted)(first, second)
            found |= {name: share.n_pictures, f"{name}_fell": round((share.value or 0) * share.n_pictures)}
    return found


def as_pictures(columns: dict[str, np.ndarray]) -> comparison.Pictures:
    """Columns of `read_pictures` as diagnose.py has them."""
    shown = {key: columns[key] for key in ("id", "p_yes", "p_yes_foil", "coverage", *LIKELIHOOD)}
    return comparison.Pictures(**shown, category=columns["id"], label=columns["right"].astype(float), threshold=0.5)


def level_rows(directory: Path) -> dict[str, dict[str, int]]:
    """The survey of a directory's pictures in counts, of each level and each of its tasks.

    weak: of the rejected pictures those that are wrong.
    """
    columns = read_pictures(directory / "heldout.jsonl", directory / "labels.jsonl")
    label = columns["right"].astype(float)
    found = levels.make_survey(columns["id"], columns["category"], columns["accepted"], label)
    named = {
        name: rates for level, rates in found.levels.items() for name, rates in ((level, rates), *found.tasks[level].items())
    }
    return {
        name: {
            "pictures": rates["nonunified"].n_pictures,
            "right": levels.successes(rates["drawing_accuracy"]),
            "rejected": levels.successes(rates["nonunified"]),
            "weak": levels.successes(rates["weak_generation"]),
            "judged_right": levels.successes(rates["judge_accuracy"]),
        }
        for name, rates in named.items()
    }


def prompt_numbers(base: Path, directory: Path, data: Path) -> dict[str, Any]:
    """Whether a prompt gains by its own data: of training prompts how many there are, how often the base draws them right, and
    the gain's mean and standard error. own: those of the scored.jsonl beside the data, whose turn it was by lot, or where there
    is none those whose pair is the right way round; others: those left out, or without a pair; turned: with a pair the wrong
    way round."""
    if (lot := data.with_name("scored.jsonl")).exists():
        turned = {row["id"]: False for _, row in read_rows(lot, SCORED)}  # also where nothing was accepted
    else:
        turned = {row["id"]: row["p_yes_chosen"] < row["p_yes_rejected"] for _, row in read_rows(data, PAIRS)}
    first = right_of_prompts(base / "scored8.jsonl", base / "scored8-labels.jsonl")
    then = right_of_prompts(directory / "drawn.jsonl", directory / "drawn-labels.jsonl")
    groups: dict[str, list[str]] = {}
    for name in first:
        groups.setdefault({True: "turned", False: "own", None: "others"}[turned.get(name)], []).append(name)
    found = {}
    for group, names in groups.items():
        gains = np.array([then[name] - first[name] for name in names])
        found[group] = {"prompts": len(names), "before": mean(np.array([first[name] for name in names])), "gain": mean(gains)}
        found[group]["error"] = float(gains.std(ddof=1) / len(gains) ** 0.5) if len(gains) > 1 else None
    return {"groups": found}


def right_of_prompts(scored: Path, labels: Path) -> dict[str, float]:
    """Of each prompt how often its pictures are right."""
    columns = read_pictures(scored, labels)
    names, index = np.unique(columns["id"], return_inverse=True)
    return dict(zip(names.tolist(), (np.bincount(index, columns["right"]) / np.bincount(index)).tolist(), strict=True))


def forecast_numbers(path: Path) -> dict[str, Any]:
    """What forecast.py said: of each method its verdict by all worlds, and by each the gain with its 90 % interval;
    and by which laws."""
    told = json.loads(path.read_text())
    said, law = {method: it["all"] for method, it in told["forecast"].items()}, told["law"]
    return {"labels": next(iter(said.values()))["labels"]} | {
        method: {
            "verdict": it["verdict"],
            "law": law[method],
            "advantage": it["advantage"]["value"],
            "gains": {world: [gain[key] for key in ("gain", "low", "high")] for world, gain in it["gains"].items()},
        }
        for method, it in said.items()
    }


def second_numbers(directory: Path) -> dict[str, Any]:
    """What gate.py does not read of a model's own pictures: on how many of them the base's judge (DIR/seconded.jsonl) says
    otherwise, in all and near its decision; and of each kind of foil how many accepted pictures are accepted for it too."""
    own, foils = [row for _, row in read_rows(directory / "heldout.jsonl", SCORED)], {}
    threshold = Tokens(directory / "heldout.jsonl").threshold()
    for row in own:
        if row["p_yes"] > threshold:
            count = foils.setdefault(kind_of_change(row["prompt"], row["foil"]), [0, 0])
            count[0] += row["p_yes_foil"] > threshold
            count[1] += 1
    found = {"pictures": len(own), "foils": dict(sorted(foils.items()))}
    if (directory / "seconded.jsonl").exists():
        seconded = [row for _, row in read_rows(directory / "seconded.jsonl", SCORED)]
        pictures = [Tokens(directory / f"{name}.jsonl")[:] for name in ("heldout", "seconded")]
        assert np.array_equal(*pictures), "the base's judge saw other pictures"
        base = [row["p_yes"] for row in seconded]
        differ = [(p > threshold) != (row["p_yes"] > threshold) for p, row in zip(base, own, strict=True)]
        near = [BORDER[0] < p < BORDER[1] for p in base]
        found |= {"differ": sum(differ), "near": sum(near), "differ_near": sum(map(operator.and_, differ, near))}
    return found


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="directory of the base model's pictures")
    parser.add_argument("--dir", type=Path, required=True, help="directory of the trained model's pictures, and of row.json")
    parser.add_argument("--name", required=True, help="what the model was trained with, as tables.py knows it")
    parser.add_argument(
        "--family", required=True, help="janus, showo or tar; of another base than the shipped one with its name: janus-blind"
    )
    parser.add_argument("--seed", type=int, required=True, help="seed of the loop")
    parser.add_argument("--trained-on", type=Path, help="sft.jsonl or pairs.jsonl: whether make_pairs.py's gate had refused it")
    parser.add_argument("--likelihood", action="store_true", help="the numbers of --readouts likelihood as well")
    parser.add_argument("--levels", action="store_true", help="the survey by level of difficulty, and nothing else")
    parser.add_argument("--data", action="store_true", help="how often the data of --dir are right, and nothing else")
    parser.add_argument("--prompts", action="store_true", help="gains by whose data they are, and nothing else")
    parser.add_argument("--second", action="store_true", help="read-outs that gate.py does not take, and nothing else")
    parser.add_argument("--forecast", action="store_true", help="what DIR/forecast.json says, and nothing else")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    whose = {"name": args.name, "family": args.family, "seed": args.seed}
    if args.data:
        row = whose | data_numbers(args.base, args.dir) | origin(args.base / "scored.jsonl")
        write_json(args.dir / "row.json", rounded(row))
        print(f"{args.name} seed {args.seed}: " + ", ".join(f"{key} {row[key]:.3f}" for key in row if key.endswith("_right")))
        return
    if args.forecast:
        row = whose | forecast_numbers(args.dir / "forecast.json") | origin(args.base / "scored.jsonl")
        write_json(args.dir / "row.json", rounded(row))
        return
    if args.prompts:
        row = whose | {"name": f"prompts-{args.name}"} | prompt_numbers(args.base, args.dir, args.trained_on)
        (args.dir / "prompts").mkdir(exist_ok=True)
        write_json(args.dir / "prompts" / "row.json", rounded(row | origin(args.dir / "drawn.jsonl")))
        print(f"{args.name} seed {args.seed}: " + ", ".join(f"{key} {it['gain']:+.3f}" for key, it in row["groups"].items()))
        return
    if args.second:
        row = whose | {"name": f"second-{args.name}"} | second_numbers(args.dir) | origin(args.dir / "heldout.jsonl")
        (args.dir / "second").mkdir(exist_ok=True)
        write_json(args.dir / "second" / "row.json", row)
        return
    if args.levels:
        for task, counts in level_rows(args.dir).items():
            path = args.dir / task.replace(" ", "-")
            path.mkdir(exist_ok=True)
            name = f"{args.name}-{task}"
            write_json(path / "row.json", whose | {"name": name} | counts | origin(args.dir / "heldout.jsonl"))
            shown = f"{counts['rejected']} of {counts['pictures']} rejected, {counts['weak']} of them wrong"
            print(f"{name} seed {args.seed}: {shown}")
        return
    columns = SCORED | READOUTS | (LIKELIHOOD if args.likelihood else {})
    base = read_pictures(args.base / "heldout.jsonl", args.base / "labels.jsonl", columns)
    own = read_pictures(args.dir / "heldout.jsonl", args.dir / "labels.jsonl", columns)
    seen = base
    if (args.dir / "rejudged.jsonl").exists():
        seen = read_pictures(args.dir / "rejudged.jsonl", args.base / "labels.jsonl", columns)
        assert all((seen[key] == base[key]).all() for key in ("id", "candidate")), (
            "rejudged rows come in the order of the base's"
        )
    row: dict[str, Any] = whose | {"pictures": len(own["id"])}
    row |= drawing_numbers(own) | judge_numbers(base, seen)
    if args.likelihood:
        row |= likelihood_numbers(base, seen, own)
    if (args.dir / "guided.jsonl").exists():
        guided = read_pictures(args.dir / "guided.jsonl", args.dir / "guided-labels.jsonl")
        row |= {"guided_accuracy": mean(guided["right"]), "guided_nonunified": mean(~guided["accepted"])}
    if (args.dir / "gate.json").exists():
        gate = json.loads((args.dir / "gate.json").read_text())
        said = gate.get("verdict", "good" if gate["good"] else "bad")  # of older runs, in which undecided was bad
        row |= {"stopped": int(said == "bad")} | ({"undecided": 1} if said == "undecided" else {})
        if "least_loss" in gate[JUDGE]["caption"]:  # else by the rules before
            row["least_loss"] = gate[JUDGE]["caption"]["least_loss"]
    if args.trained_on and Tokens(args.trained_on).metadata.get("forced"):
        row["refused"] = 1
    row |= (
        round_numbers(args.dir)
        | {"categories": by_category(own)}
        | ({"near_misses": near_misses(own)} if (own["misses"] != "").any() else {})  # labels of before told none
        | origin(args.dir / "heldout.jsonl")
    )
    write_json(args.dir / "row.json", rounded(row))
    print(
        f"{args.name} seed {args.seed}: accuracy {row['accuracy']:.3f}, nonunified {row['nonunified']:.3f}, "
        f"judge {row['judge_accuracy']:.3f}{', stopped' if row.get('stopped') else ''}"
    )


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
