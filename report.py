"""One page that shows what happened in a run: numbers, curves and pictures in a single HTML file.

Reads   RUN_DIR/settings.txt and RUN_DIR/round*/: heldout, labels, rejudged, scored, sft, pairs, discard (.jsonl, tokens beside
        them) and model*/training/{settings.json,metrics.jsonl}; of an unfinished run what is there
Writes  RUN_DIR/report.html: under 5 MB, needs neither network nor scripts, light or dark as the reader's system is

    python report.py runs/demo

Pictures are decoded from their tokens by a model that the files name or that lies in the run: the decoder never trains, so
any round's draws all rounds' pictures. Where there is no model the page is made without pictures and says so. Which prompts
are shown is drawn by lot (a hash of the id), except where a section says that it shows the worst.
"""

import argparse
import base64
import contextlib
import html
import io
import itertools
import json
import math
import os
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ranks import Ranks, memory_advice
from records import (
    DISCARD,
    LABELS,
    PAIRS,
    PROMPT,
    SCORED,
    SFT,
    BadInput,
    Parser,
    Tokens,
    bootstrap_interval,
    check_out_file,
    parse_json,
    read_lines,
    read_rows,
    run_script,
    stable_seed,
    whole_file,
)

PAGE_BYTES = 5_000_000
PICTURE_BYTES = 4_200_000  # of the page, in base64; the rest is text
TINY = 128  # pixels: smaller pictures are kept as they are and enlarged by the browser in whole steps
BOUND = 320  # pixels a side: larger pictures are scaled down to it, half as much again as what is shown
POINTS = 75  # of a training curve, each the mean of a stretch of steps
TEXT = 240  # characters of a prompt or setting that are shown

Key = tuple[str, int]  # (prompt id, candidate)
Row = dict[str, Any]  # a scored row with accepted (bool), label (bool or None) and tokens (the file its row points into)


# ---------------------------------------------------------------------------------------------------------------------
# The numbers


def mean(values: Iterable[float]) -> float | None:
    """The mean, or None of nothing: a rate over an empty set is unknown, not 0."""
    values = list(values)
    return float(np.mean(values)) if values else None


def rejected_share(rows: list[Row]) -> tuple[float, float, float]:
    """The nonunified score, mean over prompts of the share of rejected pictures, and its 95 % interval over prompts."""
    per_prompt = defaultdict(list)
    for row in rows:
        per_prompt[row["id"]].append(not row["accepted"])
    shares = np.array([np.mean(rejected) for rejected in per_prompt.values()])
    return float(shares.mean()), *bootstrap_interval(shares)


def judge_rates(rows: list[Row]) -> dict[str, float | None]:
    """How often the model's judge is right about labelled pictures, and how it errs; nothing of unlabelled ones."""
    rows = [row for row in rows if row["label"] is not None]
    return {
        "judge_accuracy": mean(row["accepted"] == row["label"] for row in rows),
        "false_positive_rate": mean(row["accepted"] for row in rows if not row["label"]),
        "false_negative_rate": mean(not row["accepted"] for row in rows if row["label"]),
    }


def thin(values: list[float], most: int) -> list[tuple[float, float]]:
    """(place, value) of at most `most` points: means over equal stretches, each at its stretch's middle."""
    size = max(1, math.ceil(len(values) / most))
    stretches = [(start, values[start : start + size]) for start in range(0, len(values), size)]
    return [(start + (len(stretch) - 1) / 2, float(np.mean(stretch))) for start, stretch in stretches]


def nice_ticks(low: float, high: float, least: float = 0.0) -> list[float]:
    """Round numbers, evenly spaced by `least` or more, about five, that enclose low .. high."""
    rough = max((high - low) / 5, least, abs(high) / 1000, 1e-6)
    power = 10.0 ** math.floor(math.log10(rough) + 1e-9)
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


# ---------------------------------------------------------------------------------------------------------------------
# Reading a run


class Round(NamedTuple):
    """What one round left behind; empty where a file is not there."""

    number: int
    heldout: list[Row]
    rejudged: list[Row]
    scored: list[Row]
    pairs: list[tuple[Row, Row]]
    sft: list[str]  # prompt ids, one a picture
    discard: list[str] | None  # prompt ids
    training: list[tuple[str, Row, list[Row]]]  # (model or model-sft, settings, metrics)
    source: str  # who labelled the held-out pictures


def read_judged(path: Path, labels: dict[Key, bool] | None = None) -> list[Row]:
    """The pictures of a scored file, [] where there is none; with `labels` each one's label."""
    if not os.path.lexists(path):
        return []
    tokens = Tokens(path)
    threshold = tokens.threshold()
    rows: list[Row] = []
    seen: set[Key] = set()
    for number, row in read_rows(path, SCORED):
        where = f"{path}:{number}"
        tokens.check_row(row["row"], where)
        key = new_key(row, seen, where)
        if labels is not None and key not in labels:
            raise BadInput(f"{where}: candidate {key[1]} of id {key[0]!r} has no label")
        judged = {"accepted": row["p_yes"] > threshold, "label": labels[key] if labels is not None else None, "tokens": tokens}
        rows.append({column: row[column] for column in SCORED} | judged)
    if not rows:
        raise BadInput(f"{path}: holds no scored candidate")
    return rows


def new_key(row: Row, seen: set[Key], where: str) -> Key:
    """The row's picture, noted in `seen`; BadInput if it was there."""
    key = row["id"], row["candidate"]
    if key in seen:
        raise BadInput(f"{where}: candidate {key[1]} of id {key[0]!r} is given twice")
    seen.add(key)
    return key


def read_labels(path: Path) -> tuple[dict[Key, bool] | None, str]:
    """labels.jsonl as (id, candidate) -> right, and who says so; None where there is none."""
    if not os.path.lexists(path):
        return None, ""
    labels: dict[Key, bool] = {}
    sources, seen = set(), set()
    for number, row in read_rows(path, LABELS):
        labels[new_key(row, seen, f"{path}:{number}")] = bool(row["label"])
        sources.add(row["source"])
    return labels, ", ".join(sorted(sources))[:40]


def read_pairs(path: Path) -> list[tuple[Row, Row]]:
    """The (chosen, rejected) pictures of pairs.jsonl."""
    if not os.path.lexists(path):
        return []
    tokens, pairs = Tokens(path), []
    for number, row in read_rows(path, PAIRS):
        sides = []
        for side in ("chosen", "rejected"):
            tokens.check_row(row[side], f"{path}:{number}", side)
            picture = {"row": row[side], "p_yes": row[f"p_yes_{side}"], "accepted": side == "chosen"}
            sides.append({key: row[key] for key in PROMPT} | picture | {"label": None, "tokens": tokens})
        pairs.append((sides[0], sides[1]))
    return pairs


def read_training(directory: Path) -> list[tuple[str, Row, list[Row]]]:
    """(name, settings, metrics) of each finished training of a round: model-sft before model."""
    found = []
    for name in ("model-sft", "model"):
        place = directory / name / "training"
        if not (place / "metrics.jsonl").is_file():
            continue
        metrics = [row for _, row in read_rows(place / "metrics.jsonl", {"step": "count"})]
        settings: Any = {}
        if (place / "settings.json").is_file():
            try:
                settings = parse_json("\n".join(line for _, line in read_lines(place / "settings.json")))
            except ValueError as error:
                raise BadInput(f"{place / 'settings.json'}: not JSON: {error}") from None
        found.append((name, settings if isinstance(settings, dict) else {}, metrics))
    return found


def read_run(run: Path) -> list[Round]:
    """The rounds of a run, as far as it has come. Raises BadInput where there is nothing to report."""
    rounds: list[Round] = []
    base_labels = read_labels(run / "round0" / "labels.jsonl")[0]
    while (directory := run / f"round{len(rounds)}").is_dir():
        labels, source = read_labels(directory / "labels.jsonl")
        heldout = read_judged(directory / "heldout.jsonl", labels)
        sft, discard = directory / "sft.jsonl", directory / "discard.jsonl"
        one = Round(
            number=len(rounds),
            heldout=heldout,
            rejudged=read_judged(directory / "rejudged.jsonl", base_labels) if rounds else heldout,
            scored=read_judged(directory / "scored.jsonl"),
            pairs=read_pairs(directory / "pairs.jsonl"),
            sft=[row["id"] for _, row in read_rows(sft, SFT)] if os.path.lexists(sft) else [],
            discard=[row["id"] for _, row in read_rows(discard, DISCARD)] if os.path.lexists(discard) else None,
            training=read_training(directory),
            source=source,
        )
        rounds.append(one)
    if not rounds or not rounds[0].heldout:
        raise BadInput(f"{run}: holds no finished round (no round0/heldout.jsonl)")
    return rounds


def read_settings(path: Path) -> list[tuple[str, str]]:
    """The variables of self_improve.sh, as far as they say anything."""
    settings = []
    for _, line in read_lines(path) if os.path.lexists(path) else []:
        name, _, value = line.partition("=")
        with contextlib.suppress(ValueError):  # bash quotes control characters in a way that shlex does not know
            value = " ".join(shlex.split(value))
        if value:
            settings.append((name, value))
    return settings


COLUMNS = {  # of the table behind the curves
    "round": "round",
    "nonunified": "nonunified",
    "low": "95 % from",
    "high": "to",
    "separation": "separation",
    "accuracy": "accuracy",
    "judge_accuracy": "judge accuracy",
    "false_positive_rate": "false positives",
    "false_negative_rate": "false negatives",
    "discard": "discard pool",
    "recovered": "recovered",
    "n_sft": "SFT pictures",
    "n_pairs": "pairs",
}


def round_numbers(one: Round, before: Round | None) -> Row:
    """All numbers of a round, by COLUMNS; None where its files do not say."""
    numbers: Row = dict.fromkeys(COLUMNS)
    numbers["round"] = one.number
    if one.heldout:
        numbers["nonunified"], numbers["low"], numbers["high"] = rejected_share(one.heldout)
        numbers["separation"] = mean(row["p_yes"] - row["p_yes_foil"] for row in one.heldout)
        numbers["accuracy"] = mean(row["label"] for row in one.heldout if row["label"] is not None)
    numbers |= judge_rates(one.rejudged)
    if before and one.discard is not None:
        numbers["discard"], numbers["recovered"] = len(one.discard), len({*(before.discard or [])} & {*one.sft})
        numbers["n_sft"], numbers["n_pairs"] = len(one.sft), len(one.pairs)
    return numbers


def methods(rounds: list[Round]) -> set[str]:
    """What the run trained with: sft, dpo, both or, so far, neither."""
    return {method(metrics) for one in rounds for _, _, metrics in one.training if metrics}


def method(metrics: list[Row]) -> str:
    """Only DPO logs a margin."""
    return "dpo" if "margin" in metrics[0] else "sft"


# ---------------------------------------------------------------------------------------------------------------------
# Which pictures are shown


class Card(NamedTuple):
    """One prompt with one or two groups of pictures of it, each with its heading."""

    prompt: str
    sides: list[tuple[str, list[Row]]]

    def pictures(self) -> list[Row]:
        return [row for _, rows in self.sides for row in rows]


class Gallery(NamedTuple):
    """Some cards with what they show. `of` counts what they were taken from; `none` is said where that is nothing."""

    name: str
    title: str
    words: str
    cards: list[Card]
    of: int
    unit: str
    none: str


def by_prompt(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows grouped by prompt id, in their order."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["id"]].append(row)
    return groups


def lottery(categories: dict[str, str]) -> list[str]:
    """The keys in an order that nobody chose and that never changes, their categories taking turns."""
    queues = defaultdict(list)
    for key in sorted(categories, key=lambda key: stable_seed("report", key)):
        queues[categories[key]].append(key)
    turns = [(place, category, key) for category, queue in queues.items() for place, key in enumerate(queue)]
    return [key for *_, key in sorted(turns)]


def before_and_after(rounds: list[Round], most: int) -> Gallery:
    """The first pictures of the same held-out prompts, by the first and the last model."""
    drawn = [one for one in rounds if one.heldout]
    first, last = by_prompt(drawn[0].heldout), by_prompt(drawn[-1].heldout)
    cards = []
    for key in lottery({key: first[key][0]["category"] for key in first.keys() & last.keys()}):
        sides = [("before training", first[key][:most]), (f"after round {drawn[-1].number}", last[key][:most])]
        cards.append(Card(first[key][0]["prompt"], sides[: len(drawn)]))
    words = (
        "Held-out prompts, drawn by lot, none of them trained on. Each picture carries the verdict of the model that drew it. "
        "Look for crosses that turned into ticks, and whether you would agree with the ticks."
    )
    title = "Before and after" if len(drawn) > 1 else "Before training"
    return Gallery("before-after", title, words, cards, len(cards), "held-out prompts", "The rounds share no held-out prompt.")


def accepted_and_rejected(rounds: list[Round], most: int) -> Gallery:
    """The candidates of a prompt in the first training round, the model's yes and no apart."""
    drawn = next((one for one in rounds if one.scored), None)
    groups = by_prompt(drawn.scored) if drawn else {}
    mixed = {key: rows for key, rows in groups.items() if len({row["accepted"] for row in rows}) == 2}
    cards = []
    for key in lottery({key: rows[0]["category"] for key, rows in mixed.items()}):
        order = sorted(mixed[key], key=lambda row: row["p_yes"])
        no, yes = [row for row in order if not row["accepted"]], [row for row in order[::-1] if row["accepted"]]
        sides = [(f"accepted, {len(yes)} of {len(order)}", yes[:most]), (f"rejected, {len(no)} of {len(order)}", no[:most])]
        cards.append(Card(order[0]["prompt"], sides))
    words = (
        f"Training prompts of round {drawn.number if drawn else 1}: one model drew all of these, then said yes to some and no "
        "to the others; surest verdicts first. This disagreement with itself is all the teaching there is."
    )
    none = "No prompt has both accepted and rejected candidates yet."
    return Gallery("candidates", "Accepted and rejected", words, cards, len(cards), "prompts with both", none)


def chosen_against_rejected(rounds: list[Round]) -> Gallery:
    """Preference pairs of the first training round."""
    paired = next((one for one in rounds if one.pairs), rounds[0])
    numbered = {f"{number} {chosen['id']}": (chosen, rejected) for number, (chosen, rejected) in enumerate(paired.pairs)}
    cards = []
    for key in lottery({key: chosen["category"] for key, (chosen, _) in numbered.items()}):
        chosen, rejected = numbered[key]
        cards.append(Card(chosen["prompt"], [("chosen", [chosen]), ("rejected", [rejected])]))
    words = (
        f"Of each prompt's candidates in round {paired.number}, the one with the highest P(yes) and the rejected one with the "
        "lowest. Their difference should be what the prompt asks for, and little else. "
    )
    words += "DPO trained on these." if "dpo" in methods(rounds) else "DPO would train on these; this run has not."
    return Gallery("pairs", "Chosen against rejected", words, cards, len(cards), "pairs", "No pairs yet.")


def recovered(rounds: list[Round]) -> Gallery:
    """Prompts of the discard pool that the next round's model could draw: the best attempt then and now."""
    cards = []
    for before, after in itertools.pairwise(rounds):
        then, now = by_prompt(before.scored), by_prompt(after.scored)
        back = {*(before.discard or [])} & {*after.sft} & then.keys() & now.keys()
        for key in lottery({key: then[key][0]["category"] for key in back}):
            best = [max(rows[key], key=lambda row: row["p_yes"]) for rows in (then, now)]
            sides = [(f"round {before.number}", best[:1]), (f"round {after.number}", best[1:])]
            cards.append(Card(best[0]["prompt"], sides))
    words = (
        "Prompts of which the model once accepted no candidate at all. The improved model tried again; what it now accepts "
        "joined the training data. Left the best attempt then, right the best one a round later."
    )
    none = "Nothing has come out of the discard pool yet."
    return Gallery("recovered", "Out of the discard pool", words, cards, len(cards), "prompts", none)


def false_positives(rounds: list[Round]) -> Gallery | None:
    """What the last labelled round's model drew wrongly and accepted, surest first; None without labels."""
    labelled = [one for one in rounds if one.source]
    if not labelled:
        return None
    wrong = [row for row in labelled[-1].heldout if row["accepted"] and not row["label"]]
    cards = single_cards(sorted(wrong, key=lambda row: -row["p_yes"]))
    words = (
        f"Held-out pictures {moment(labelled[-1])} that the model accepts and the independent judge ({labelled[-1].source}) "
        "calls wrong, surest mistakes first. Training on such pictures teaches the mistake: this is the method's blind spot."
    )
    none = "None: all that the model accepts is right."
    return Gallery("false-positives", "Fooled by itself", words, cards, len(cards), "prompts with such a picture", none)


def contradictions(rounds: list[Round]) -> Gallery:
    """The last model's own pictures that it rejects most surely."""
    last = [one for one in rounds if one.heldout][-1]
    rejected = [row for row in last.heldout if not row["accepted"]]
    cards = single_cards(sorted(rejected, key=lambda row: row["p_yes"]))
    words = (
        f"Held-out pictures {moment(last)} that the model itself rejects most surely: it draws this and sees at once that it "
        "is not what was asked for. What is left to learn."
    )
    none, unit = "None: the model accepts every picture that it drew.", "prompts with a rejected picture"
    return Gallery("contradictions", "The worst contradictions", words, cards, len(cards), unit, none)


def single_cards(rows: list[Row]) -> list[Card]:
    """One picture a prompt, the first of its rows."""
    return [Card(group[0]["prompt"], [("", group[:1])]) for group in by_prompt(rows).values()]


def moment(one: Round) -> str:
    return f"after round {one.number}" if one.number else "before training"


def choose(rounds: list[Round], tiny: bool) -> list[Gallery]:
    """All galleries, in the page's order, with as many cards as fill rows; tiny pictures come in larger groups."""
    galleries = [
        (before_and_after(rounds, 4 if tiny else 2), 8),
        (accepted_and_rejected(rounds, 6 if tiny else 3), 6),
        (chosen_against_rejected(rounds), 9),
        (recovered(rounds), 9),
        (false_positives(rounds), 12),
        (contradictions(rounds), 12),
    ]
    return [gallery._replace(cards=gallery.cards[:most]) for gallery, most in galleries if gallery]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def find_decoder(rounds: list[Round], args: argparse.Namespace, ranks: Ranks) -> tuple[Any, str]:
    """(model, "") or (None, why there is none). Without --model nothing is fetched from the hub."""
    rows = [row for one in rounds for row in (*one.heldout, *one.scored, *(row for pair in one.pairs for row in pair))]
    files = {row["tokens"].path: row["tokens"] for row in rows}
    named = list(dict.fromkeys(tokens.metadata.get("model", "") for tokens in files.values()))
    local = [name for name in named if Path(name).is_absolute() and Path(name).is_dir()]
    local += [str(place) for place in sorted(args.run.glob("round*/model")) if place.is_dir()]
    hub = [name for name in named if name and not Path(name).is_absolute()]
    if not args.model:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a page is not worth gigabytes; what is in the cache is found

    from model import CheckpointError, load  # after the cheap checks: torch takes seconds

    ranks.join(args.device)
    why = [f"{name or 'the model'} is not there" for name in named if name not in local + hub]
    for name in [args.model] if args.model else [*local, *hub]:
        try:
            policy = load(name, device=ranks.device)
        except CheckpointError as error:
            if args.model:
                raise
            why.append(str(error))
            continue
        for tokens in files.values():
            if (policy.codebook_size, policy.image_tokens) != (tokens.codebook_size, tokens.length):
                raise BadInput(
                    f"{tokens.path}: holds pictures of {tokens.length} tokens of a codebook of {tokens.codebook_size}, "
                    f"but {name} draws {policy.image_tokens} of {policy.codebook_size}"
                )
        return policy, ""
    return None, "; ".join(why)


def encode(picture: np.ndarray) -> str:
    """A picture (H, W, 3) uint8 as a data URI: tiny ones exact, larger ones scaled down, as PNG or JPEG by size."""
    from PIL import Image

    image, kinds = Image.fromarray(picture), {"png": {"optimize": True}}
    if max(picture.shape[:2]) > TINY:
        image.thumbnail((BOUND, BOUND))
        kinds["jpeg"] = {"quality": 82}
    uris = []
    for kind, options in kinds.items():
        data = io.BytesIO()
        image.save(data, kind, **options)
        uris.append(f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}")
    return min(uris, key=len)


def decode_pictures(policy: Any, rows: list[Row], batch: int) -> dict[tuple[Path, int], str]:
    """Data URIs of the rows' pictures by (file, row)."""
    import torch
    from tqdm import tqdm

    wanted = list({picture_key(row): row for row in rows}.values())
    uris = {}
    with tqdm(total=len(wanted), unit="picture", dynamic_ncols=True) as bar:
        for start in range(0, len(wanted), batch):
            part = wanted[start : start + batch]
            tokens = torch.from_numpy(np.concatenate([row["tokens"][[row["row"]]] for row in part]))  # (b, T)
            with memory_advice(f"decoding with --batch {batch}", f"--batch {max(1, batch // 2)}", policy.device):
                pictures = policy.decode(tokens.to(policy.device), batch=batch).cpu().numpy()  # (b, H, W, 3)
            for row, picture in zip(part, pictures, strict=True):
                uris[picture_key(row)] = encode(picture)
            bar.update(len(part))
    return uris


def picture_key(row: Row) -> tuple[Path, int]:
    return row["tokens"].path, row["row"]


def picture_side(policy: Any, row: Row) -> int:
    """The larger side of a model's pictures, in pixels."""
    import torch

    return max(policy.decode(torch.from_numpy(row["tokens"][[row["row"]]]).to(policy.device)).shape[1:3])


def within_budget(galleries: list[Gallery], size: Callable[[Row], int], budget: int) -> list[Gallery]:
    """The galleries with the cards that fit: all first cards, all second ones, ..., up to the first that does not fit."""
    kept: list[list[Card]] = [[] for _ in galleries]
    turns = [(place, number) for number, gallery in enumerate(galleries) for place in range(len(gallery.cards))]
    for place, number in sorted(turns):
        card = galleries[number].cards[place]
        budget -= sum(size(row) for row in card.pictures())
        if budget < 0:
            break
        kept[number].append(card)
    return [gallery._replace(cards=cards) for gallery, cards in zip(galleries, kept, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Words and numbers


def escape(value: object) -> str:
    """Anything as HTML text, cut to a length that a page can show."""
    words = str(value)
    return html.escape(words if len(words) <= TEXT else words[: TEXT - 1] + "…")


def short(value: float | None) -> str:
    """A number as tables and curves show it; a dash where it is unknown."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def percent(value: float) -> str:
    return f"{100 * value:.0f}\u00a0%"


def change(before: float, after: float) -> str:
    """A change in words; less than a point is none."""
    if abs(after - before) < 0.01:
        return f"stayed at {percent(after)}"
    return f"{'rose' if after > before else 'fell'} from {percent(before)} to {percent(after)}"


def headline(first: Row, last: Row) -> str:
    """The run in one or two sentences."""
    if first is last:
        return f"This model rejects {percent(first['nonunified'])} of its own pictures."
    count = f"{last['round']} rounds" if last["round"] > 1 else "one round"
    return (
        f"This model rejected {percent(first['nonunified'])} of its own pictures. "
        f"After {count} of learning from that, it rejects {percent(last['nonunified'])}."
    )


def introduction(rounds: list[Round]) -> str:
    """What a reader has to know who has not read the paper."""
    trained = {
        "": "trained on its own verdicts",
        "sft": "trained on the pictures that it accepted",
        "dpo": "trained to prefer a picture that it accepted to one that it rejected",
        "dpo sft": "trained on the pictures that it accepted, then to prefer them to those that it rejected",
    }[" ".join(sorted(methods(rounds)))]
    return (
        "<p>One model does two things here: it <b>draws</b> pictures from prompts, and it <b>looks</b> at pictures and answers "
        "questions about them. Asked whether its own picture shows what the prompt wanted, it often says no. The share of such "
        "pictures is its <b>nonunified score</b>: the model contradicts itself.</p>"
        f"<p>Each round it draws several pictures a prompt, judges every one itself, and is {trained}. No person and no other "
        f"model tells it what is right. The scores below are of {len(by_prompt(rounds[0].heldout)):,} held-out prompts that it "
        "is never trained on.</p>"
    )


def verdict(numbers: list[Row], first: Row, last: Row, source: str) -> str:
    """Whether to believe the score: a judge that says yes to everything has a score of 0."""
    if first is last:
        return "<p>Nothing has been trained and drawn yet: this is where the run starts.</p>"
    apart = (
        "Its separation, how much surer it says yes to a picture's own prompt than to a wrong one, went from "
        f"{short(first['separation'])} to {short(last['separation'])}; a judge that says yes to everything would be at 0."
    )
    asked = "<p><b>Is the change real?</b> A score also falls when the judge grows lax"
    if first["accuracy"] is None or last["accuracy"] is None:
        return f"{asked}. No independent judge looked, so look yourself, and at the check that needs no labels. {apart}</p>"
    judge = [row["judge_accuracy"] for row in numbers if row["judge_accuracy"] is not None]
    looking = f"Of its own verdicts, on one fixed set of pictures, the share that is right {change(judge[0], judge[-1])}."
    return (
        f"{asked}, so an independent judge ({escape(source)}) looked at the same pictures. The share that it calls right "
        f"{change(first['accuracy'], last['accuracy'])}. {looking if len(judge) > 1 else ''} {apart}</p>"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Charts, as SVG

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 190, 38, 46, 12, 30


class Line(NamedTuple):
    """One curve: points (x, y), and where there is an interval (x, low, high). color: a CSS variable. Its last value is
    written beside it if it has a name."""

    name: str
    color: str
    points: list[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()


def line_chart(lines: list[Line], x_ticks: list[tuple[float, str]], y_ticks: list[float], said: str) -> str:
    """An SVG of curves over common axes. said: the same in words, for those who do not see it."""
    xs = [x for x, _ in x_ticks] + [x for line in lines for x, _ in line.points]
    left, right, low, high = min(xs), max(max(xs), min(xs) + 1e-9), y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def path(points: Iterable[tuple[float, float]]) -> str:
        return " ".join("{},{}".format(*place(x, y)) for x, y in points)

    parts = []
    for tick in y_ticks:
        y = place(left, tick)[1]
        label = f"{tick:,.0f}" if abs(tick) >= 10 else f"{tick:.10g}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">{label}</text>')
    for tick, label in x_ticks:
        x = place(tick, low)[0]
        parts.append(f'<text class="tick" x="{x}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{escape(label)}</text>')
    for line in lines:
        color = f"var(--{line.color})"
        edge = [(x, y) for x, _, y in line.band] + [(x, y) for x, y, _ in reversed(line.band)]
        parts.append(f'<polygon points="{path(edge)}" fill="{color}" stroke="{color}" stroke-width="1" opacity=".2"/>')
        parts.append(f'<polyline points="{path(line.points)}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        for x, y in line.points if len(line.points) <= 12 else []:
            parts.append('<circle cx="{}" cy="{}" r="3" fill="{}"/>'.format(*place(x, y), color))
    beside = -math.inf
    for line in sorted((line for line in lines if line.name), key=lambda line: -line.points[-1][1]):
        x, y = place(*line.points[-1])
        beside = max(y + 3.5, beside + 13)  # values that are close are written apart
        value = short(line.points[-1][1])
        parts.append(f'<text class="value" x="{x + 7}" y="{beside}" fill="var(--{line.color})">{value}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(said)}">{"".join(parts)}</svg>'


def bar_chart(groups: list[tuple[str, list[float | None]]], color: str, said: str) -> str:
    """An SVG of bars from 0 to 1: for each (name, values) one bar a value, the last one in full colour."""
    thick, most, y, parts = 11, WIDTH - RIGHT, 15, []
    for name, values in groups:
        parts.append(f'<text class="name" x="0" y="{y}">{escape(name if len(name) <= 40 else name[:39] + "…")}</text>')
        y += 6
        for value, opacity in zip(values, (1,) if len(values) == 1 else (0.38, 1), strict=True):
            full = f'fill="var(--{color})" opacity="{opacity}"'
            for width, filled in ((most, 'fill="var(--wash)"'), ((value or 0) * most, full)):
                parts.append(f'<rect x="0" y="{y}" width="{width:.1f}" height="{thick}" {filled}/>')
            parts.append(f'<text class="tick" x="{most + 6}" y="{y + 9.5}">{short(value)}</text>')
            y += thick + 3
        y += 20
    return f'<svg viewBox="0 0 {WIDTH} {y - 12}" role="img" aria-label="{escape(said)}">{"".join(parts)}</svg>'


def figure(title: str, chart: str, caption: str, lines: Sequence[Line] = ()) -> str:
    """A chart with its heading, a legend where there are several lines, and a sentence on what to look for."""
    keys = [f'<span class="key"><i style="background:var(--{line.color})"></i>{escape(line.name)}</span>' for line in lines]
    legend = f'<p class="legend">{"".join(keys)}</p>' if len(keys) > 1 else ""
    return f'<figure class="chart"><h3>{escape(title)}</h3>{chart}{legend}<figcaption>{caption}</figcaption></figure>'


def round_chart(numbers: list[Row], title: str, keys: dict[str, tuple[str, str]], caption: str) -> str:
    """Some columns of the rounds' numbers as curves, "" where no round knows them. keys: column -> (name, colour)."""
    lines = []
    for key, (name, color) in keys.items():
        known = [row for row in numbers if row[key] is not None]
        band = [(row["round"], row["low"], row["high"]) for row in known if key == "nonunified"]
        if known:
            lines.append(Line(name, color, [(row["round"], row[key]) for row in known], band))
    if not lines:
        return ""
    values = [y for line in lines for _, y in line.points]
    counts = "discard" in keys
    y_ticks = nice_ticks(min(0, *values), max(*values, 1), 1 if counts else 0)
    labels = [(row["round"], f"round {row['round']}" if row["round"] else "base") for row in numbers]
    told = "; ".join(f"{line.name} from {short(line.points[0][1])} to {short(line.points[-1][1])}" for line in lines)
    said = f"{title} over the rounds: {told}"
    return figure(title, line_chart(lines, labels[:: math.ceil(len(labels) / 4)], y_ticks, said), caption, lines)


def training_chart(rounds: list[Round], title: str, kind: str, key: str, caption: str) -> str:
    """One logged number over the steps of all rounds' SFT or DPO, one after the other; "" where none was logged."""
    lines, labels, start = [], [], 0
    trained = [(one.number, metrics) for one in rounds for _, _, metrics in one.training if metrics and method(metrics) == kind]
    for number, metrics in trained:
        values = [float(row[key]) for row in metrics if type(row.get(key)) in (int, float) and abs(row[key]) < 1e30]
        if values:
            points = thin(values, max(10, POINTS // len(trained)))
            lines.append(Line("", "model", [(start + x, y) for x, y in points]))
            labels.append((start + len(values) / 2, f"round {number}"))
            start += len(values)
    if not lines:
        return ""
    lines[-1] = lines[-1]._replace(name=title)
    values = [y for line in lines for _, y in line.points]
    said = f"{title} over {start} steps, from {short(values[0])} to {short(values[-1])}"
    chart = line_chart(lines, labels[:: math.ceil(len(labels) / 4)], nice_ticks(min(values), max(values)), said)
    return figure(title, chart, caption)


# ---------------------------------------------------------------------------------------------------------------------
# The page


def section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2>{body}</section>'


def table(head: list[str], rows: list[list[str]], title: str) -> str:
    """A table that is folded away and scrolls sideways by itself."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<details><summary>{escape(title)}</summary><div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></details>"
    )


def tiles(numbers: list[Row]) -> str:
    """The few numbers that matter, first and last."""
    parts = []
    for key, name, note in (
        ("nonunified", "nonunified score", "own pictures rejected; lower is better"),
        ("accuracy", "accuracy", "pictures that the independent judge calls right"),
        ("judge_accuracy", "judge accuracy", "verdicts that are right, on one fixed set"),
        ("separation", "separation", "own prompt against a wrong one; higher is better"),
        ("discard", "discard pool", "prompts with no accepted picture"),
    ):
        known = [row for row in numbers if row[key] is not None]
        if not known:
            continue
        was = f'<span class="was">{short(known[0][key])} →</span> ' if len(known) > 1 else ""
        if key == "nonunified":
            note += f" (95 % interval {short(known[-1]['low'])} to {short(known[-1]['high'])})"
        parts.append(f"<div><dt>{name}</dt><dd>{was}<b>{short(known[-1][key])}</b><small>{note}</small></dd></div>")
    return f'<dl class="tiles">{"".join(parts)}</dl>'


def curves_section(numbers: list[Row], rounds: list[Round]) -> str:
    """The curves over rounds and steps, and their numbers."""
    drawing, judging = ("its drawing", "other"), ("its judging", "model")
    charts = [
        round_chart(numbers, title, keys, caption)
        for title, keys, caption in (
            (
                "Nonunified score",
                {"nonunified": ("nonunified", "model")},
                "Share of held-out pictures that the model itself rejects, with its 95 % interval. It should fall.",
            ),
            (
                "Accuracy and judge accuracy",
                {"judge_accuracy": judging, "accuracy": drawing},
                "By the independent judge: how often the drawings are right, and how often the model's verdicts are. Drawing "
                "should rise; judging must not fall, or the score means less and less.",
            ),
            (
                "Separation",
                {"separation": ("separation", "model")},
                "Mean P(yes) for a picture's own prompt less that for a foil, a wrong one. At 0 the judge does not look.",
            ),
            (
                "Discard pool",
                {"discard": ("prompts", "model")},
                "Training prompts with no accepted candidate. They come back next round; the pool should shrink.",
            ),
        )
    ]
    sft = "-log p of the accepted pictures, per image token. It should fall within a round."
    dpo = "It starts at ln 2 = 0.693, where the policy still is its reference, and should fall."
    margin = "Reward of the chosen less that of the rejected picture. It starts at 0 and should grow."
    charts.append(training_chart(rounds, "SFT loss", "sft", "loss", sft))
    charts.append(training_chart(rounds, "DPO loss", "dpo", "loss", dpo))
    charts.append(training_chart(rounds, "DPO margin", "dpo", "margin", margin))
    rows = [[short(row[key]) for key in COLUMNS] for row in numbers]
    body = "<p>A point a round; base is the model before training.</p>"
    body += f'<div class="charts">{"".join(charts)}</div>'
    body += table(list(COLUMNS.values()), rows, "The numbers behind the curves")
    return section("curves", "Round by round", body)


def categories_section(rounds: list[Round]) -> str:
    """Bars by category, before and after, and their numbers."""
    drawn = [one for one in rounds if one.heldout]
    sides = [drawn[0], drawn[-1]][: len(drawn)]
    names = list(dict.fromkeys(row["category"] for one in sides for row in one.heldout))
    rejected: list[tuple[str, list[float | None]]] = []
    right: list[tuple[str, list[float | None]]] = []
    for name in names[:200]:
        groups = [[row for row in one.heldout if row["category"] == name] for one in sides]
        rejected.append((name, [rejected_share(group)[0] if group else None for group in groups]))
        right.append((name, [mean(row["label"] for row in group if row["label"] is not None) for group in groups]))
    when = f"Pale: before training. Full: {moment(sides[-1])}. " if len(sides) > 1 else ""
    more = f" The first 16 of {len(names)} categories." if len(names) > 16 else ""
    charts, both = [], (("Nonunified score", rejected, "model", "Shorter"), ("Accuracy", right, "other", "Longer"))
    for title, groups, color, better in both:
        if any(value is not None for _, values in groups for value in values):
            chart = bar_chart(groups[:16], color, f"{title} by category; the numbers are in the table below")
            charts.append(figure(title, chart, f"{when}{better} is better.{more}"))
    ends = ["before", "after"][: len(sides)]
    head = ["category", *(f"nonunified {end}" for end in ends), *(f"accuracy {end}" for end in ends)]
    rows = [[name, *map(short, values), *map(short, true)] for (name, values), (_, true) in zip(rejected, right, strict=True)]
    body = f'<p>Where it helped, and where it did not.</p><div class="charts">{"".join(charts)}</div>'
    return section("categories", "By category", body + table(head, rows, "The numbers behind the bars"))


def picture_figure(row: Row, uris: dict[tuple[Path, int], str]) -> str:
    """One picture with its judge's verdict, and the independent judge's where there is one."""
    mark, kind, said = ("✓", "yes", "accepted") if row["accepted"] else ("✗", "no", "rejected")
    said = f"Drawing of: {row['prompt'][:160]}. The model {said} it, P(yes) {row['p_yes']:.2f}"
    label = ""
    if row["label"] is not None:
        word = "right" if row["label"] else "wrong"
        said += f"; the independent judge calls it {word}"
        label = f' <span class="{"label" if row["label"] == row["accepted"] else "label odd"}">{word}</span>'
    return (
        f'<figure class="picture {kind}"><img src="{uris[picture_key(row)]}" alt="{escape(said)}">'
        f"<figcaption><b>{mark}</b> {row['p_yes']:.2f}{label}</figcaption></figure>"
    )


def gallery_section(gallery: Gallery, uris: dict[tuple[Path, int], str]) -> str:
    """A gallery as HTML; without pictures only its words."""
    if not gallery.of:
        return section(gallery.name, gallery.title, f"<p>{gallery.none}</p>")
    cards = []
    for card in gallery.cards if uris else []:
        sides = "".join(
            f'<div class="side">{f"<h4>{escape(title)}</h4>" if title else ""}<div class="strip">'
            f"{''.join(picture_figure(row, uris) for row in rows)}</div></div>"
            for title, rows in card.sides
        )
        cards.append(f'<article><h3>{escape(card.prompt)}</h3><div class="sides">{sides}</div></article>')
    body = f"<p>{html.escape(gallery.words)}</p>"
    body += f'<p class="count">Shown: {len(cards) or "none"} of {gallery.of:,} {gallery.unit}.</p>'
    return section(gallery.name, gallery.title, f'{body}<div class="cards {gallery.name}">{"".join(cards)}</div>')


def settings_section(settings: list[tuple[str, str]], rounds: list[Round]) -> str:
    """How the run was made: the loop's variables, what the tensor files' headers say, the trainings' flags."""
    header = rounds[0].heldout[0]["tokens"].metadata
    wanted = ("model", "model_hash", "questions", "threshold", "guidance", "temperature", "image_tokens", "versions")
    rows = settings + [(f"base pictures: {key}", header[key]) for key in wanted if header.get(key)]
    listed = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows)
    body = f'<div class="scroll" tabindex="0"><table class="settings">{listed}</table></div>'
    runs = [(f"round {one.number} {name}", flags, len(metrics)) for one in rounds for name, flags, metrics in one.training]
    if runs:
        keys = sorted({key for _, flags, _ in runs for key in flags})
        lines = [[name, str(steps), *(json.dumps(flags.get(key)).strip('"') for key in keys)] for name, flags, steps in runs]
        body += table(["training", "steps", *keys], lines, "The trainings' settings")
    return section("settings", "Settings", body)


def make_page(run: Path, rounds: list[Round], galleries: list[Gallery], uris: dict, side: int, why: str) -> str:
    """The whole page. side: of the pictures, in pixels. why: the reason where there are no pictures."""
    numbers = [round_numbers(one, before) for one, before in zip(rounds, [None, *rounds[:-1]], strict=True)]
    drawn = [row for row in numbers if row["nonunified"] is not None]
    first, last = drawn[0], drawn[-1]
    source = next((one.source for one in rounds if one.source), "")
    name = escape(run.resolve().name)
    warning = f'<p class="warning" role="alert"><b>This page has no pictures:</b> {escape(why)}. Give report.py a --model.</p>'
    reading = (
        '<p class="reading"><b>Reading the pictures.</b> <span class="yes">✓ 0.98</span>: the model accepts its own picture, '
        'with P(yes) = 0.98. <span class="no">✗ 0.03</span>: it rejects it.'
    )
    if source:
        reading += " <i>right</i> or <i>wrong</i> is the independent judge's word, in colour where the two disagree."
    shown = [gallery_section(gallery, uris) for gallery in galleries]
    body = [
        f'<header><p class="eyebrow">nonunified · report of {name}</p>{warning if why else ""}<h1>{headline(first, last)}</h1>',
        f'<div class="lead">{introduction(rounds)}{verdict(numbers, first, last, source)}</div>{tiles(numbers)}</header>',
        f"<main>{'' if why else reading + '</p>'}{shown[0]}",
        curves_section(numbers, rounds),
        categories_section(rounds),
        *shown[1:],
        settings_section(read_settings(run / "settings.txt"), rounds),
        "</main>",
    ]
    # nothing that the page quotes can load or run anything, whatever it is
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>nonunified: {name}</title>'
        f"<style>{picture_style(side)}{STYLE}</style></head>\n<body>{chr(10).join(body)}</body></html>\n"
    )


def picture_style(side: int) -> str:
    """How large pictures are shown. Tiny ones, two a row in a group, in whole multiples of their pixels."""
    if side > TINY:
        return ":root { --side: 204px; --columns: 1; } @media (max-width: 640px) { :root { --side: 150px; } }"
    wide = max(1, round(96 / max(1, side))) * side
    return (
        f":root {{ --side: {wide}px; --columns: 2; }} @media (max-width: 640px) {{ :root {{ --side: {0.75 * wide:g}px; }} }}"
        " .picture img { image-rendering: pixelated; }"
    )


STYLE = """
:root { --paper: #fff; --ink: #1b1d20; --muted: #59616b; --rule: #dcdfe4; --wash: #f0f2f4;
  --model: #2257b0; --other: #a95500; --yes: #17774a; --no: #b92d25;
  --serif: Charter, "Bitstream Charter", "Iowan Old Style", Georgia, "Liberation Serif", serif;
  --sans: system-ui, -apple-system, "Segoe UI", "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
@media (prefers-color-scheme: dark) { :root { --paper: #141619; --ink: #e7e9ec; --muted: #a1a9b3; --rule: #31363d;
  --wash: #23272c; --model: #7fb0ff; --other: #f2a65a; --yes: #5ccf97; --no: #ff8b80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 0 24px 96px; max-width: 968px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 var(--sans); overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; }
header { padding: 56px 0 8px; }
.eyebrow { margin: 0 0 12px; color: var(--muted); font-size: 13px; letter-spacing: .02em; }
h1 { margin: 0 0 24px; max-width: 25em; font: 600 clamp(27px, 4.2vw, 42px)/1.16 var(--serif); letter-spacing: -.012em;
  text-wrap: balance; }
h2 { margin: 0 0 8px; font: 600 25px/1.2 var(--serif); letter-spacing: -.005em; }
h3 { margin: 0 0 8px; font: 600 15px/1.35 var(--sans); }
h4 { margin: 0 0 6px; color: var(--muted); font: 12.5px/1.4 var(--sans); }
.lead, section > p { max-width: 44em; font: 17px/1.58 var(--serif); }
.lead p { margin: 0 0 14px; }
section { margin-top: 56px; padding-top: 22px; border-top: 1px solid var(--rule); }
section > p { margin: 0 0 6px; }
section > p.count, .reading, .legend { font: 13px/1.5 var(--sans); color: var(--muted); }
.reading { margin: 40px 0 -24px; max-width: 60em; }
.yes b, span.yes { color: var(--yes); }
.no b, span.no { color: var(--no); }
.warning { margin: 0 0 24px; padding: 14px 18px; border-left: 5px solid var(--no); background: var(--wash); font-size: 16px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 20px 24px; margin: 34px 0 0; }
.tiles div { border-top: 2px solid var(--ink); padding-top: 8px; }
.tiles dt { font-size: 13px; font-weight: 600; }
.tiles dd { margin: 2px 0 0; font: 600 25px/1.25 var(--serif); white-space: nowrap;
  font-variant-numeric: lining-nums tabular-nums; }
.tiles .was { color: var(--muted); font-weight: 400; font-size: 16px; }
.tiles small { display: block; margin-top: 3px; color: var(--muted); font: 12.5px/1.4 var(--sans); white-space: normal; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(270px, 100%), 1fr)); gap: 32px 40px;
  margin: 22px 0; }
.chart { margin: 0; max-width: 440px; }
.chart figcaption { margin-top: 4px; color: var(--muted); font-size: 13px; line-height: 1.45; }
.legend { display: flex; gap: 16px; margin: 2px 0 0; }
.key i { display: inline-block; width: 14px; height: 3px; margin-right: 6px; vertical-align: middle; }
svg { display: block; width: 100%; height: auto; font-family: var(--sans); overflow: visible; }
.grid { stroke: var(--rule); }
.tick { fill: var(--muted); font-size: 11px; }
.name { fill: var(--ink); font-size: 12px; }
.value { font-size: 12px; font-weight: 600; }
details { margin-top: 14px; font-size: 14px; }
summary { cursor: pointer; color: var(--muted); width: fit-content; }
.scroll { overflow-x: auto; margin-top: 10px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top;
  white-space: nowrap; }
th { font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
.settings th { color: var(--muted); font-weight: 400; }
.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 12em; }
.cards { display: flex; flex-wrap: wrap; align-items: flex-end; gap: 30px 44px; margin-top: 22px; }
article { min-width: 0; max-width: 100%; }
article h3 { font: italic 16px/1.35 var(--serif); }
.sides { display: flex; flex-wrap: wrap; gap: 14px 28px; }
.strip { display: flex; flex-wrap: wrap; gap: 8px; }
.before-after .sides, .pairs .sides, .recovered .sides { flex-wrap: nowrap; }
.before-after article { width: calc(var(--columns) * 2 * var(--side) + (var(--columns) - 1) * 16px + 28px); }
.before-after .strip { width: calc(var(--columns) * var(--side) + (var(--columns) - 1) * 8px); }
.pairs article, .recovered article { width: calc(2 * var(--side) + 28px); }
.false-positives article, .contradictions article { width: calc(var(--side) + 34px); }
.false-positives, .contradictions { column-gap: 24px; }
.picture { margin: 0; width: var(--side); }
.picture img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--wash); }
.picture.yes { border-bottom: 3px solid var(--yes); }
.picture.no { border-bottom: 3px solid var(--no); }
.picture figcaption { padding: 3px 0 2px; font-size: 12.5px; line-height: 1.35; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.label { color: var(--muted); }
.label.odd { color: var(--other); font-weight: 600; }
@media (max-width: 640px) {
  body { padding: 0 16px 64px; }
  header { padding-top: 28px; }
  section { margin-top: 44px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 18px 16px; }
  .tiles dd { font-size: 22px; }
  .cards { gap: 26px 16px; }
  .sides { gap: 14px 16px; }
  .pairs .sides, .recovered .sides { gap: 10px; }
  .pairs article, .recovered article { width: calc(2 * var(--side) + 22px); }
  .candidates .side { width: 100%; }
  .label { display: block; }
}
"""


# ---------------------------------------------------------------------------------------------------------------------
# Command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="the directory that self_improve.sh wrote (its OUT)")
    parser.add_argument("--out", type=Path, help="page to write (default: RUN_DIR/report.html)")
    parser.add_argument("--model", help="checkpoint that decodes the pictures (default: one that the run's files name)")
    parser.add_argument("--batch", type=int, default=16, help="pictures decoded at a time (default 16)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    args = parser.parse_args(argv)
    if args.batch < 1:
        parser.error(f"--batch must be at least 1, found {args.batch}")
    args.out = args.out or args.run / "report.html"
    return args


def main(args: argparse.Namespace) -> None:
    ranks = Ranks()
    if ranks.world > 1:
        raise BadInput("report.py is one process; start it without torchrun")
    rounds = read_run(args.run)
    out = check_out_file(args.out)

    policy, why = find_decoder(rounds, args, ranks)
    side = picture_side(policy, rounds[0].heldout[0]) if policy else 0
    galleries = choose(rounds, tiny=side <= TINY)
    uris: dict[tuple[Path, int], str] = {}
    if policy:
        rows = [row for gallery in galleries for card in gallery.cards for row in card.pictures()]
        uris = decode_pictures(policy, rows, args.batch)
        galleries = within_budget(galleries, lambda row: len(uris[picture_key(row)]), PICTURE_BYTES)
    else:
        print(f"warning        the page has no pictures: {why}; give --model")

    page = make_page(args.run, rounds, galleries, uris, side, why)
    if (size := len(page.encode())) > PAGE_BYTES:
        raise BadInput(f"{args.run}: its settings and tables make a page of {size} bytes, more than {PAGE_BYTES}")
    with whole_file(out, "w") as file:
        file.write(page)
    print(f"page           {len(rounds) - 1} rounds, {page.count('<img ')} pictures, {size / 1e6:.2f} MB")
    print(out)


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
