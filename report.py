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
import html
import io
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
BOUND = 416  # pixels a side: larger pictures are scaled down to it, twice what is shown on a screen
CARDS = 8  # prompts a gallery shows, at most
POINTS = 75  # of a training curve, each the mean of a stretch of steps
TEXT = 240  # characters of a prompt or setting that are shown

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
    starts = range(0, len(values), size)
    return [(start + (len(values[start : start + size]) - 1) / 2, float(np.mean(values[start : start + size]))) for start in starts]


def nice_ticks(low: float, high: float, least: float = 0.0) -> list[float]:
    """Round numbers, evenly spaced by `least` or more, about five, that enclose low .. high."""
    rough = max((high - low) / 5, least, 1e-9)
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
    discard: list[str] | None
    training: list[tuple[str, Row, list[Row]]]  # (model or model-sft, settings, metrics)
    source: str  # who labelled
    header: dict[str, str]


def read_judged(path: Path, labels: dict[tuple[str, int], bool] | None = None) -> list[Row]:
    """The pictures of a scored file, [] where there is none; with `labels` each one's label."""
    if not os.path.lexists(path):
        return []
    tokens = Tokens(path)
    threshold = tokens.metadata.get("threshold", "0.5")
    try:
        threshold = float(threshold)
    except ValueError:
        raise BadInput(f"{tokens.path}: metadata threshold must be a number, found {threshold[:20]!r}") from None
    rows, seen = [], set()
    for number, row in read_rows(path, SCORED):
        tokens.check_row(row["row"], f"{path}:{number}")
        if (key := (row["id"], row["candidate"])) in seen:
            raise BadInput(f"{path}:{number}: candidate {key[1]} of id {key[0]!r} is given twice")
        seen.add(key)
        if labels is not None and key not in labels:
            raise BadInput(f"{path}:{number}: candidate {key[1]} of id {key[0]!r} has no label")
        extra = {"accepted": row["p_yes"] > threshold, "label": labels[key] if labels is not None else None, "tokens": tokens}
        rows.append({column: row[column] for column in SCORED} | extra)
    if not rows:
        raise BadInput(f"{path}: holds no scored candidate")
    return rows


def read_labels(path: Path) -> tuple[dict[tuple[str, int], bool] | None, str]:
    """labels.jsonl as (id, candidate) -> right, and who says so; None where there is none."""
    if not os.path.lexists(path):
        return None, ""
    rows = [row for _, row in read_rows(path, LABELS)]
    return {(row["id"], row["candidate"]): bool(row["label"]) for row in rows}, ", ".join(sorted({row["source"] for row in rows}))[:40]


def read_pairs(path: Path) -> list[tuple[Row, Row]]:
    """The (chosen, rejected) pictures of pairs.jsonl."""
    if not os.path.lexists(path):
        return []
    tokens, pairs = Tokens(path), []
    for number, row in read_rows(path, PAIRS):
        sides = []
        for side, accepted in (("chosen", True), ("rejected", False)):
            tokens.check_row(row[side], f"{path}:{number}", side)
            picture = {"row": row[side], "p_yes": row[f"p_yes_{side}"], "accepted": accepted, "label": None, "tokens": tokens}
            sides.append({key: row[key] for key in ("id", "prompt", "category")} | picture)
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


def read_round(directory: Path, number: int, base_labels: dict[tuple[str, int], bool] | None) -> Round:
    """One round of a run. base_labels: of the base model's held-out pictures, which `rejudged` judges again."""
    labels, source = read_labels(directory / "labels.jsonl")
    heldout = read_judged(directory / "heldout.jsonl", labels)
    scored = read_judged(directory / "scored.jsonl")
    sft, discard = directory / "sft.jsonl", directory / "discard.jsonl"
    return Round(
        number=number,
        heldout=heldout,
        rejudged=read_judged(directory / "rejudged.jsonl", base_labels) if number else heldout,
        scored=scored,
        pairs=read_pairs(directory / "pairs.jsonl"),
        sft=[row["id"] for _, row in read_rows(sft, SFT)] if os.path.lexists(sft) else [],
        discard=[row["id"] for _, row in read_rows(discard, DISCARD)] if os.path.lexists(discard) else None,
        training=read_training(directory),
        source=source,
        header=(heldout or scored)[0]["tokens"].metadata if heldout or scored else {},
    )


def read_run(run: Path) -> list[Round]:
    """The rounds of a run, as far as it has come. Raises BadInput where there is nothing to report."""
    rounds: list[Round] = []
    base_labels = read_labels(run / "round0" / "labels.jsonl")[0]
    while (run / f"round{len(rounds)}").is_dir():
        rounds.append(read_round(run / f"round{len(rounds)}", len(rounds), base_labels))
    if not any(one.heldout for one in rounds):
        raise BadInput(f"{run}: holds no finished round (no round0/heldout.jsonl)")
    return rounds


def read_settings(path: Path) -> list[tuple[str, str]]:
    """The variables of self_improve.sh, as far as they say anything."""
    settings = []
    for _, line in read_lines(path) if os.path.lexists(path) else []:
        name, _, value = line.partition("=")
        try:
            value = " ".join(shlex.split(value))
        except ValueError:  # bash quotes control characters in a way that shlex does not know
            pass
        if value:
            settings.append((name, value))
    return settings


def round_numbers(one: Round, before: Round | None) -> dict[str, Any]:
    """All numbers of a round; None where its files do not say."""
    numbers: dict[str, Any] = dict.fromkeys(COLUMNS)
    numbers["round"] = one.number
    if one.heldout:
        numbers["nonunified"], numbers["low"], numbers["high"] = rejected_share(one.heldout)
        numbers["separation"] = mean(row["p_yes"] - row["p_yes_foil"] for row in one.heldout)
        numbers["accuracy"] = mean(row["label"] for row in one.heldout if row["label"] is not None)
    numbers |= judge_rates(one.rejudged)
    if one.number and one.discard is not None:
        numbers["discard"] = len(one.discard)
        numbers["recovered"] = len({*(before.discard or [])} & {*one.sft}) if before else None
        numbers["n_sft"], numbers["n_pairs"] = len(one.sft), len(one.pairs)
    return numbers


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


# ---------------------------------------------------------------------------------------------------------------------
# Which pictures are shown


class Card(NamedTuple):
    """One prompt with one or two groups of pictures of it, each with its heading."""

    prompt: str
    category: str
    sides: list[tuple[str, list[Row]]]

    def pictures(self) -> list[Row]:
        return [row for _, rows in self.sides for row in rows]


class Gallery(NamedTuple):
    """Some cards with what they show. `of` counts what they were taken from; `none` is said where there are no cards."""

    name: str
    title: str
    text: str
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


def lottery(ids: Iterable[str], category: Callable[[str], str]) -> list[str]:
    """The ids in an order that nobody chose and that never changes, categories taking turns."""
    queues = defaultdict(list)
    for one in sorted(ids, key=lambda one: stable_seed("report", one)):
        queues[category(one)].append(one)
    turns = [(place, name, one) for name, queue in queues.items() for place, one in enumerate(queue)]
    return [one for *_, one in sorted(turns)]


def before_and_after(rounds: list[Round], most: int) -> Gallery:
    """The first pictures of the same held-out prompts, by the first and the last model."""
    drawn = [one for one in rounds if one.heldout]
    sides = [("before training", by_prompt(drawn[0].heldout))]
    if len(drawn) > 1:
        sides.append((f"after round {drawn[-1].number}", by_prompt(drawn[-1].heldout)))
    common = set.intersection(*(set(groups) for _, groups in sides))
    first = sides[0][1]
    cards = [
        Card(first[one][0]["prompt"], first[one][0]["category"], [(title, groups[one][:most]) for title, groups in sides])
        for one in lottery(common, lambda one: first[one][0]["category"])
    ]
    text = (
        "Held-out prompts, drawn by lot, none of them trained on. Each picture carries the verdict of the model that drew it. "
        "Look for crosses that turned into ticks, and whether you would agree with the ticks."
    )
    title = "Before and after" if len(drawn) > 1 else "Before training"
    return Gallery("before-after", title, text, cards, len(common), "held-out prompts", "No held-out pictures yet.")


def accepted_and_rejected(rounds: list[Round], most: int) -> Gallery:
    """All candidates of a prompt in the first training round, the model's yes and no apart."""
    drawn = next((one for one in rounds if one.scored), None)
    groups = by_prompt(drawn.scored) if drawn else {}
    mixed = {one: rows for one, rows in groups.items() if len({row["accepted"] for row in rows}) == 2}
    cards = []
    for one in lottery(mixed, lambda one: mixed[one][0]["category"]):
        order = sorted(mixed[one], key=lambda row: -row["p_yes"])
        yes, no = [row for row in order if row["accepted"]], [row for row in order if not row["accepted"]]
        sides = [(f"accepted, {len(yes)} of {len(order)}", yes[:most]), (f"rejected, {len(no)} of {len(order)}", no[::-1][:most])]
        cards.append(Card(order[0]["prompt"], order[0]["category"], sides))
    text = (
        f"Training prompts of round {drawn.number if drawn else 1}: one model drew all of these, then said yes to some and no to the "
        "others; surest verdicts first. This disagreement with itself is all the teaching there is."
    )
    none = "No prompt has both accepted and rejected candidates yet."
    return Gallery("candidates", "Accepted and rejected", text, cards, len(mixed), "prompts with both", none)


def chosen_against_rejected(rounds: list[Round]) -> Gallery:
    """Preference pairs of the first training round."""
    paired = next((one for one in rounds if one.pairs), None)
    pairs = {f"{number} {chosen['id']}": (chosen, rejected) for number, (chosen, rejected) in enumerate(paired.pairs if paired else [])}
    cards = [
        Card(pairs[one][0]["prompt"], pairs[one][0]["category"], [("chosen", [pairs[one][0]]), ("rejected", [pairs[one][1]])])
        for one in lottery(pairs, lambda one: pairs[one][0]["category"])
    ]
    used = any("margin" in row for one in rounds for _, _, metrics in one.training for row in metrics[:1])
    text = (
        f"Of each prompt's candidates in round {paired.number if paired else 1}, the one with the highest P(yes) and the rejected one "
        "with the lowest. Their difference should be what the prompt asks for, and little else. "
        + ("DPO trained on these." if used else "The pairs are there for DPO; this run trained on accepted pictures alone.")
    )
    return Gallery("pairs", "Chosen against rejected", text, cards, len(pairs), "pairs", "No pairs yet.")


def recovered(rounds: list[Round]) -> Gallery:
    """Prompts of the discard pool that the next round's model could draw: its best attempt then and now."""
    cards = []
    for before, after in zip(rounds, rounds[1:]):
        then, now = by_prompt(before.scored), by_prompt(after.scored)
        back = {*(before.discard or [])} & {*after.sft} & then.keys() & now.keys()
        for one in lottery(back, lambda one: then[one][0]["category"]):
            best = [max(rows[one], key=lambda row: row["p_yes"]) for rows in (then, now)]
            sides = [(f"round {side.number}, best of {len(rows[one])}", [row]) for side, rows, row in zip((before, after), (then, now), best)]
            cards.append(Card(best[0]["prompt"], best[0]["category"], sides))
    text = (
        "Prompts of which the model once accepted no candidate at all. The improved model tried again; what it now accepts joined "
        "the training data. Left the best attempt then, right the best one a round later."
    )
    return Gallery("recovered", "Out of the discard pool", text, cards, len(cards), "prompts", "Nothing has come out of the discard pool yet.")


def single_cards(rows: list[Row]) -> list[Card]:
    """One picture a prompt, the first of its rows."""
    return [Card(group[0]["prompt"], group[0]["category"], [("", group[:1])]) for group in by_prompt(rows).values()]


def false_positives(rounds: list[Round]) -> Gallery | None:
    """What the last labelled round's model drew wrongly and accepted, surest first; None without labels."""
    labelled = [one for one in rounds if one.source]
    if not labelled:
        return None
    last = labelled[-1]
    wrong = sorted((row for row in last.heldout if row["accepted"] and not row["label"]), key=lambda row: -row["p_yes"])
    cards = single_cards(wrong)
    text = (
        f"Held-out pictures after round {last.number} that the model accepts and the independent judge ({last.source}) calls wrong, "
        "surest mistakes first. Training on such pictures teaches the mistake: this is the method's blind spot."
    )
    none = "None: whatever the model accepts is right."
    return Gallery("false-positives", "Fooled by itself", text, cards, len(cards), "prompts with such a picture", none)


def contradictions(rounds: list[Round]) -> Gallery:
    """The last model's own pictures that it rejects most surely, one a prompt."""
    last = [one for one in rounds if one.heldout][-1]
    rejected = sorted((row for row in last.heldout if not row["accepted"]), key=lambda row: row["p_yes"])
    cards = single_cards(rejected)
    text = (
        f"Held-out pictures after round {last.number} that the model itself rejects most surely: it draws this and sees at once that "
        "it is not what was asked for. What is left to learn."
    )
    none = "None: the model accepts every picture that it drew."
    return Gallery("contradictions", "The worst contradictions", text, cards, len(cards), "prompts with a rejected picture", none)


def choose(rounds: list[Round], tiny: bool) -> list[Gallery]:
    """All galleries, in the page's order, with the cards that may be shown; tiny pictures come in larger groups."""
    galleries = [
        before_and_after(rounds, 4 if tiny else 2),
        accepted_and_rejected(rounds, 6 if tiny else 3),
        chosen_against_rejected(rounds),
        recovered(rounds),
        false_positives(rounds),
        contradictions(rounds),
    ]
    return [one._replace(cards=one.cards[:CARDS]) for one in galleries if one]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def find_decoder(run: Path, rounds: list[Round], args: argparse.Namespace, ranks: Ranks) -> tuple[Any, str]:
    """(model, "") or (None, why there is none). Without --model nothing is fetched from the hub."""
    files = {row["tokens"].path: row["tokens"] for one in rounds for row in all_pictures(one)}
    named = list(dict.fromkeys(tokens.metadata.get("model", "") for tokens in files.values()))
    local = [name for name in named if Path(name).is_absolute() and Path(name).is_dir()]
    local += [str(place) for place in sorted(run.glob("round*/model")) if place.is_dir()]
    hub = [name for name in named if name and not Path(name).is_absolute()]
    if not args.model:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a page is not worth gigabytes; what is in the cache is found

    from model import CheckpointError, load

    ranks.join(args.device)
    why = f"No model is where the files say it was ({', '.join(named)})"
    for name in [args.model] if args.model else [*local, *hub]:
        try:
            policy = load(name, device=ranks.device)
        except CheckpointError as error:
            if args.model:
                raise
            why = str(error)
            continue
        for tokens in files.values():
            if (policy.codebook_size, policy.image_tokens) != (tokens.codebook_size, tokens.length):
                raise BadInput(
                    f"{tokens.path}: holds pictures of {tokens.length} tokens of a codebook of {tokens.codebook_size}, "
                    f"but {name} draws {policy.image_tokens} of {policy.codebook_size}"
                )
        return policy, ""
    return None, why


def all_pictures(one: Round) -> list[Row]:
    """Every picture that a round's files hold."""
    return [*one.heldout, *one.scored, *(row for pair in one.pairs for row in pair)]


def encode(picture: np.ndarray) -> str:
    """A picture (H, W, 3) uint8 as a data URI: tiny ones exact, larger ones scaled down, as PNG or JPEG by size."""
    from PIL import Image

    image, kinds = Image.fromarray(picture), ["PNG"]
    if max(picture.shape[:2]) > TINY:
        image.thumbnail((BOUND, BOUND))
        kinds.append("JPEG")
    encoded = []
    for kind in kinds:
        data = io.BytesIO()
        image.save(data, kind, **({"optimize": True} if kind == "PNG" else {"quality": 82}))
        encoded.append((data.tell(), f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"))
    return min(encoded)[1]


def decode_pictures(policy: Any, rows: list[Row], batch: int) -> dict[tuple[Path, int], str]:
    """Data URIs of the rows' pictures by (file, row)."""
    import torch
    from tqdm import tqdm

    wanted = list({(row["tokens"].path, row["row"]): row for row in rows}.values())
    uris = {}
    with tqdm(total=len(wanted), unit="picture", dynamic_ncols=True) as bar:
        for start in range(0, len(wanted), batch):
            part = wanted[start : start + batch]
            tokens = torch.from_numpy(np.concatenate([row["tokens"][[row["row"]]] for row in part]))  # (b, T)
            with memory_advice(f"decoding with --batch {batch}", f"--batch {max(1, batch // 2)}", policy.device):
                pictures = policy.decode(tokens.to(policy.device), batch=batch).cpu().numpy()  # (b, H, W, 3)
            for row, drawn in zip(part, pictures, strict=True):
                uris[row["tokens"].path, row["row"]] = encode(drawn)
            bar.update(len(part))
    return uris


def picture_side(policy: Any, one: Round) -> int:
    """The larger side of a model's pictures, in pixels."""
    import torch

    row = one.heldout[0]
    return max(policy.decode(torch.from_numpy(row["tokens"][[row["row"]]]).to(policy.device)).shape[1:3])


def within_budget(galleries: list[Gallery], size: Callable[[Row], int], budget: int) -> list[Gallery]:
    """The galleries with as many cards each as fit: first cards first, galleries taking turns, none after the first that
    does not fit. Every gallery loses its last cards before any loses its first."""
    kept: list[list[Card]] = [[] for _ in galleries]
    for place in range(max((len(gallery.cards) for gallery in galleries), default=0)):
        for gallery, cards in zip(galleries, kept, strict=True):
            if place >= len(gallery.cards):
                continue
            budget -= sum(size(row) for row in gallery.cards[place].pictures())
            if budget < 0:
                return [one._replace(cards=cards) for one, cards in zip(galleries, kept, strict=True)]
            cards.append(gallery.cards[place])
    return [one._replace(cards=cards) for one, cards in zip(galleries, kept, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Charts, as SVG

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 190, 38, 46, 12, 30


class Line(NamedTuple):
    """One curve: points (x, y), where there is an interval (x, low, high). color: a CSS variable. Its last value is written
    beside it if it has a name."""

    name: str
    color: str
    points: list[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()


def escape(value: object) -> str:
    """Anything as HTML text, cut to a length that a page can show."""
    value = str(value)
    return html.escape(value if len(value) <= TEXT else value[: TEXT - 1] + "…")


def short(value: float | None) -> str:
    """A number as the tables and curves show it; a dash where it is unknown."""
    if value is None:
        return "–"
    if isinstance(value, int) or value == int(value) and abs(value) >= 10:
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) >= 10 else f"{value:.3f}"


def percent(value: float) -> str:
    return f"{100 * value:.0f}\u00a0%"


def axis_number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.10g}"


def line_chart(lines: list[Line], x_ticks: list[tuple[float, str]], y_ticks: list[float], said: str) -> str:
    """An SVG of curves over common axes, the last value of each written beside it. said: the same in words."""
    xs = [x for x, _ in x_ticks] + [x for line in lines for x, _ in line.points]
    first, last = min(xs), max(max(xs), min(xs) + 1e-9)
    low, high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> str:
        return f"{LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT):.1f},{across(y):.1f}"

    def across(y: float) -> float:
        return TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in y_ticks:
        y = across(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{axis_number(tick)}</text>')
    for x, label in x_ticks:
        at = place(x, low).split(",")[0]
        parts.append(f'<text class="tick" x="{at}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{escape(label)}</text>')
    for line in lines:
        if line.band:
            edge = [place(x, top) for x, _, top in line.band] + [place(x, bottom) for x, bottom, _ in reversed(line.band)]
            parts.append(f'<polygon points="{" ".join(edge)}" fill="var(--{line.color})" opacity=".18"/>')
            for x, bottom, top in line.band if len(line.band) == 1 else []:
                ends = f'M{place(x, bottom).replace(",", " ")}L{place(x, top).replace(",", " ")}'
                parts.append(f'<path d="{ends}" stroke="var(--{line.color})" stroke-width="6" opacity=".25"/>')
        if len(line.points) > 1:
            path = " ".join(place(x, y) for x, y in line.points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="var(--{line.color})" stroke-width="1.8"/>')
        if len(line.points) <= 12:
            for x, y in line.points:
                cx, cy = place(x, y).split(",")
                parts.append(f'<circle cx="{cx}" cy="{cy}" r="3" fill="var(--{line.color})"/>')
    beside = -math.inf
    for line in sorted((line for line in lines if line.name), key=lambda line: across(line.points[-1][1])):
        beside = max(across(line.points[-1][1]) + 3.5, beside + 13)  # values that are close are written apart
        x = float(place(*line.points[-1]).split(",")[0]) + 7
        parts.append(f'<text class="value" x="{x:.1f}" y="{beside:.1f}" fill="var(--{line.color})">{short(line.points[-1][1])}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(said)}">{"".join(parts)}</svg>'


def bar_chart(groups: list[tuple[str, list[float | None]]], color: str, said: str) -> str:
    """An SVG of bars from 0 to 1: for each (name, values) one bar a value, the last one in full colour."""
    bar, gap, head, most = 11, 3, 17, WIDTH - RIGHT
    parts, y = [], 4.0
    for name, values in groups:
        label = name if len(name) <= 40 else name[:39] + "…"
        parts.append(f'<text class="name" x="0" y="{y + 11:.1f}">{escape(label)}</text>')
        y += head
        for number, value in enumerate(values):
            if value is not None:
                faint = "" if number == len(values) - 1 else ' opacity=".38"'
                parts.append(f'<rect x="0" y="{y:.1f}" width="{most}" height="{bar}" fill="var(--wash)"/>')
                parts.append(f'<rect x="0" y="{y:.1f}" width="{value * most:.1f}" height="{bar}" fill="var(--{color})"{faint}/>')
                parts.append(f'<text class="tick" x="{most + 6}" y="{y + 9.5:.1f}">{short(value)}</text>')
            y += bar + gap
        y += 9
    return f'<svg viewBox="0 0 {WIDTH} {y:.0f}" role="img" aria-label="{escape(said)}">{"".join(parts)}</svg>'


def figure(title: str, chart: str, caption: str, lines: Sequence[Line] = ()) -> str:
    """A chart with its heading, a legend where there are several lines, and a sentence on what to look for."""
    keys = "".join(f'<span class="key"><i style="background:var(--{line.color})"></i>{escape(line.name)}</span>' for line in lines)
    legend = f'<p class="legend">{keys}</p>' if len(lines) > 1 else ""
    return f'<figure class="chart"><h3>{escape(title)}</h3>{chart}{legend}<figcaption>{caption}</figcaption></figure>'


def round_chart(title: str, numbers: list[Row], keys: dict[str, tuple[str, str]], caption: str, share: bool = True) -> str:
    """Some columns of the rounds' numbers as curves; nothing where no round knows them. keys: column -> (name, colour)."""
    lines = []
    for key, (name, color) in keys.items():
        points = [(row["round"], row[key]) for row in numbers if row[key] is not None]
        band = [(row["round"], row["low"], row["high"]) for row in numbers if row["low"] is not None] if key == "nonunified" else []
        if points:
            lines.append(Line(name, color, points, band))
    if not lines:
        return ""
    values = [y for line in lines for _, y in line.points]
    ticks = nice_ticks(min(0, *values), max(1 if share else 0, *values), 0 if share else 1)  # prompts come whole
    every = math.ceil(len(numbers) / 8)
    x_ticks = [(row["round"], f"round {row['round']}" if len(numbers) < 5 else str(row["round"])) for row in numbers[::every]]
    x_ticks = [(x, "base" if x == 0 else label) for x, label in x_ticks]
    told = "; ".join(f"{line.name} from {short(line.points[0][1])} to {short(line.points[-1][1])}" for line in lines)
    return figure(title, line_chart(lines, x_ticks, ticks, f"{title} over rounds: {told}"), caption, lines)


def training_chart(title: str, rounds: list[Round], kind: str, key: str, caption: str) -> str:
    """One logged number over the steps of all rounds' SFT or DPO, one after the other; only DPO logs a margin."""
    runs = [
        (one.number, name, [float(row[key]) for row in metrics if isinstance(row.get(key), int | float)])
        for one in rounds
        for name, _, metrics in one.training
        if metrics and ("margin" in metrics[0]) == (kind == "dpo")
    ]
    runs = [(number, name, values) for number, name, values in runs if values]
    if not runs:
        return ""
    lines, ticks, start = [], [], 0
    for number, name, values in runs:
        points = [(start + x, y) for x, y in thin(values, max(10, POINTS // len(runs)))]
        lines.append(Line("", "model", points))
        ticks.append((start + len(values) / 2, f"round {number}"))
        start += len(values)
    values = [y for line in lines for _, y in line.points]
    ends = "; ".join(f"from {short(line.points[0][1])} to {short(line.points[-1][1])}" for line in lines)
    said = f"{title} over {start} steps, round by round: {ends}"
    lines[-1] = lines[-1]._replace(name=title)
    return figure(title, line_chart(lines, ticks[:: math.ceil(len(ticks) / 4)], nice_ticks(min(values), max(values)), said), caption)


# ---------------------------------------------------------------------------------------------------------------------
# The page


def headline(numbers: list[Row]) -> str:
    """The run in one or two sentences."""
    drawn = [row for row in numbers if row["nonunified"] is not None]
    first, last = drawn[0], drawn[-1]
    if len(drawn) == 1:
        return f"This model rejects {percent(first['nonunified'])} of its own pictures."
    count = f"{last['round']} rounds" if last["round"] > 1 else "one round"
    return (
        f"This model rejected {percent(first['nonunified'])} of its own pictures. "
        f"After {count} of learning from that, it rejects {percent(last['nonunified'])}."
    )


def introduction(rounds: list[Round], n_prompts: int) -> str:
    """What a reader has to know who has not read the paper."""
    dpo = any("margin" in row for one in rounds for _, _, metrics in one.training for row in metrics[:1])
    sft = any(metrics and "margin" not in metrics[0] for one in rounds for _, _, metrics in one.training)
    trained = {
        (True, False): "trained on the pictures that it accepted",
        (False, True): "trained to prefer a picture that it accepted to one that it rejected",
        (True, True): "trained on the pictures that it accepted, then to prefer them to those that it rejected",
        (False, False): "trained on its own verdicts",
    }[sft, dpo]
    return (
        "<p>One model does two things here: it <b>draws</b> pictures from prompts, and it <b>looks</b> at pictures and answers "
        "questions about them. Asked whether its own picture shows what the prompt wanted, it often says no. The share of such "
        "pictures is its <b>nonunified score</b>: the model contradicts itself.</p>"
        f"<p>Each round it draws several pictures a prompt, judges every one itself, and is {trained}. No person and no other model "
        f"tells it what is right. The numbers below are of {n_prompts:,} held-out prompts that it is never trained on.</p>"
    )


def change(before: float, after: float) -> str:
    """A change in words; less than a point is none."""
    verb = "stayed at" if abs(after - before) < 0.01 else "rose from" if after > before else "fell from"
    return f"{verb} {percent(after)}" if verb == "stayed at" else f"{verb} {percent(before)} to {percent(after)}"


def verdict(numbers: list[Row], rounds: list[Round]) -> str:
    """Whether to believe the score: a judge that says yes to everything has a score of 0."""
    drawn = [row for row in numbers if row["nonunified"] is not None]
    first, last = drawn[0], drawn[-1]
    if len(drawn) == 1:
        return "<p>Nothing has been trained and drawn yet: this is where the run starts.</p>"
    apart = (
        f"Its separation, how much surer it says yes to a picture's own prompt than to a wrong one, went from "
        f"{short(first['separation'])} to {short(last['separation'])}; a judge that says yes to everything would be at 0."
    )
    if first["accuracy"] is None or last["accuracy"] is None:
        return (
            "<p><b>Is the lower score real?</b> A score also falls when the judge grows lax. This run has no independent labels, so "
            f"look at the pictures, and at the check that needs none. {apart}</p>"
        )
    source = next(one.source for one in rounds if one.source)
    judge = [row["judge_accuracy"] for row in drawn if row["judge_accuracy"] is not None]
    looking = f"The share of the model's own verdicts that are right, on one fixed set of pictures, {change(judge[0], judge[-1])}."
    return (
        "<p><b>Is the change real?</b> A score also falls when the judge grows lax, so an independent judge "
        f"({escape(source)}) looked at the same pictures. The share that it calls right {change(first['accuracy'], last['accuracy'])}. "
        f"{looking} {apart}</p>"
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
        interval = f" (95 % interval {known[-1]['low']:.3f} to {known[-1]['high']:.3f})" if key == "nonunified" else ""
        parts.append(f"<div><dt>{name}</dt><dd>{was}<b>{short(known[-1][key])}</b><small>{note}{interval}</small></dd></div>")
    return f'<dl class="tiles">{"".join(parts)}</dl>'


def table(head: list[str], rows: list[list[str]], title: str) -> str:
    """A table that is folded away and scrolls sideways by itself."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<details><summary>{escape(title)}</summary><div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></details>"
    )


def curves(numbers: list[Row], rounds: list[Round]) -> str:
    """The curves over rounds and steps, with their numbers."""
    charts = [
        round_chart(
            "Nonunified score",
            numbers,
            {"nonunified": ("nonunified", "model")},
            "Share of held-out pictures that the model itself rejects, with its 95 % interval. It should fall.",
        ),
        round_chart(
            "Accuracy and judge accuracy",
            numbers,
            {"judge_accuracy": ("its judging", "model"), "accuracy": ("its drawing", "other")},
            "By the independent judge: how often the drawings are right, and how often the model's verdicts are. Drawing should "
            "rise; judging must not fall, or the score means less and less.",
        ),
        round_chart(
            "Separation",
            numbers,
            {"separation": ("separation", "model")},
            "Mean P(yes) for a picture's own prompt less that for a foil, a wrong one. At 0 the judge does not look.",
        ),
        round_chart(
            "Discard pool",
            numbers,
            {"discard": ("prompts", "model")},
            "Training prompts with no accepted candidate. They come back next round; the pool should shrink.",
            share=False,
        ),
        training_chart("SFT loss", rounds, "sft", "loss", "-log p of the accepted pictures, per image token. It should fall within a round."),
        training_chart("DPO loss", rounds, "dpo", "loss", "It starts at ln 2 = 0.693, where the policy still is its reference, and should fall."),
        training_chart("DPO margin", rounds, "dpo", "margin", "Reward of the chosen less that of the rejected picture. It starts at 0 and should grow."),
    ]
    rows = [[short(row[key]) for key in COLUMNS] for row in numbers]
    return f'<div class="charts">{"".join(charts)}</div>' + table(list(COLUMNS.values()), rows, "The numbers behind the curves")


def categories(rounds: list[Round]) -> str:
    """Bars by category, before and after."""
    drawn = [one for one in rounds if one.heldout]
    sides = [drawn[0], drawn[-1]] if len(drawn) > 1 else drawn
    names = list(dict.fromkeys(row["category"] for one in sides for row in one.heldout))
    rejected: list[tuple[str, list[float | None]]] = []
    right: list[tuple[str, list[float | None]]] = []
    for name in names:
        groups = [[row for row in one.heldout if row["category"] == name] for one in sides]
        rejected.append((name, [rejected_share(group)[0] if group else None for group in groups]))
        right.append((name, [mean(row["label"] for row in group if row["label"] is not None) for group in groups]))
    when = "Pale: before training. Full: " + f"after round {sides[-1].number}. " if len(sides) > 1 else ""
    most = 16
    more = f" The {most} first of {len(names)} categories; the table has all." if len(names) > most else ""
    charts = [figure("Nonunified score", bar_chart(rejected[:most], "model", "Nonunified score by category; numbers in the table"), when + "Shorter is better." + more)]
    if any(value is not None for _, values in right for value in values):
        charts.append(figure("Accuracy", bar_chart(right[:most], "other", "Accuracy by category; numbers in the table"), when + "Longer is better." + more))
    ends = ["before", "after"][: len(sides)]
    head = ["category", *(f"nonunified {end}" for end in ends), *(f"accuracy {end}" for end in ends)]
    rows = [[name, *map(short, values), *map(short, true)] for (name, values), (_, true) in zip(rejected[:200], right[:200])]
    return f'<div class="charts">{"".join(charts)}</div>' + table(head, rows, "The numbers behind the bars")


def picture(row: Row, uris: dict[tuple[Path, int], str]) -> str:
    """One picture with its judge's verdict, and the independent judge's where there is one."""
    said = ("accepted" if row["accepted"] else "rejected") + f", P(yes) {row['p_yes']:.2f}"
    mark, kind = ("✓", "yes") if row["accepted"] else ("✗", "no")
    label = ""
    if row["label"] is not None:
        word = "right" if row["label"] else "wrong"
        said += f"; independent judge: {word}"
        label = f' <span class="{"label" if row["label"] == row["accepted"] else "label odd"}">{word}</span>'
    uri = uris.get((row["tokens"].path, row["row"]))
    alt = escape(f"Drawing of: {row['prompt']}. {said}")
    shown = f'<img src="{uri}" alt="{alt}" loading="lazy">' if uri else f'<span class="blank" role="img" aria-label="{alt}"></span>'
    return f'<figure class="picture {kind}">{shown}<figcaption><b>{mark}</b> {row["p_yes"]:.2f}{label}</figcaption></figure>'


def gallery_section(gallery: Gallery, uris: dict[tuple[Path, int], str]) -> str:
    """A gallery as HTML; without pictures only its words."""
    if not gallery.of:
        return section(gallery.name, gallery.title, f"<p>{escape(gallery.none)}</p>")
    body = f'<p>{html.escape(gallery.text)}</p><p class="count">Shown: {len(gallery.cards)} of {gallery.of:,} {gallery.unit}.</p>'
    cards = []
    for card in gallery.cards if uris else []:
        sides = "".join(
            f'<div class="side">{f"<h4>{escape(title)}</h4>" if title else ""}<div class="strip">'
            f"{''.join(picture(row, uris) for row in rows)}</div></div>"
            for title, rows in card.sides
        )
        cards.append(f'<article><h3>{escape(card.prompt)}</h3><div class="sides">{sides}</div></article>')
    return section(gallery.name, gallery.title, body + (f'<div class="cards {gallery.name}">{"".join(cards)}</div>' if cards else ""))


def section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2>{body}</section>'


def settings_section(settings: list[tuple[str, str]], rounds: list[Round]) -> str:
    """How the run was made: the loop's variables, what the tensor files' headers say, the trainings' flags."""
    header = next(one.header for one in rounds if one.header)
    wanted = ("model", "model_hash", "questions", "threshold", "guidance", "temperature", "image_tokens", "codebook_size", "versions")
    rows = [[name, value] for name, value in settings]
    rows += [[f"held-out pictures: {key}", header[key]] for key in wanted if header.get(key)]
    listed = "".join(f"<tr><th scope='row'>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    body = f'<div class="scroll" tabindex="0"><table class="settings">{listed}</table></div>'
    runs = [(f"round {one.number} {name}", flags, len(metrics)) for one in rounds for name, flags, metrics in one.training]
    if runs:
        keys = sorted({key for _, flags, _ in runs for key in flags})
        rows = [[name, str(steps), *(json.dumps(flags.get(key)).strip('"') for key in keys)] for name, flags, steps in runs]
        body += table(["training", "steps", *keys], rows, "The trainings' settings")
    return section("settings", "Settings", body)


def make_page(run: Path, rounds: list[Round], galleries: list[Gallery], uris: dict, side: int, why: str) -> str:
    """The whole page. why: the reason where there are no pictures."""
    before: list[Round | None] = [None, *rounds[:-1]]
    numbers = [round_numbers(one, previous) for one, previous in zip(rounds, before)]
    first = next(one for one in rounds if one.heldout)
    n_prompts = len({row["id"] for row in first.heldout})
    warning = f'<p class="warning" role="alert"><b>This page has no pictures.</b> {escape(why)}. Give report.py a --model.</p>' if why else ""
    key = (
        '<p class="reading"><b>Reading the pictures.</b> <span class="yes">✓ 0.98</span>: the model accepts its picture, with P(yes) = '
        '0.98. <span class="no">✗ 0.03</span>: it rejects it. '
        + ("<i>right</i> or <i>wrong</i> is the independent judge's word, set apart where the two disagree." if first.source else "")
        + "</p>"
    )
    body = [
        f"<header><p class='eyebrow'>nonunified · report of {escape(run.resolve().name)}</p><h1>{headline(numbers)}</h1>",
        f"<div class='lead'>{introduction(rounds, n_prompts)}{verdict(numbers, rounds)}</div>{tiles(numbers)}{warning}</header><main>",
    ]
    shown = {gallery.name: gallery_section(gallery, uris) for gallery in galleries}
    body.append((key if uris else "") + shown.pop("before-after"))
    body.append(section("curves", "Round by round", "<p>A point a round; base is the model before training.</p>" + curves(numbers, rounds)))
    body.append(section("categories", "By category", "<p>Where it helped, and where it did not.</p>" + categories(rounds)))
    body += shown.values()
    body.append(settings_section(read_settings(run / "settings.txt"), rounds))
    scale = max(1, round(96 / side)) if 0 < side <= TINY else 0
    size = f"{scale * side}px" if scale else "204px"
    style = STYLE.replace("SIDE_WIDE", size).replace("SIDE_NARROW", f"{0.75 * scale * side:g}px" if scale else "150px")
    style = style.replace("COLUMNS", "2" if scale else "1").replace("RENDERING", "pixelated" if scale else "auto")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        # nothing of what the page quotes can load or run anything, whatever it is
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f'<meta name="color-scheme" content="light dark"><title>nonunified: {escape(run.resolve().name)}</title>'
        f"<style>{style}</style></head>\n<body>" + "\n".join(body) + "</main></body></html>\n"
    )


STYLE = """
:root { --paper: #fff; --ink: #1b1d20; --muted: #59616b; --rule: #dcdfe4; --wash: #f0f2f4;
  --model: #2257b0; --other: #a95500; --yes: #17774a; --no: #b92d25; --side: SIDE_WIDE;
  --serif: Charter, "Bitstream Charter", "Iowan Old Style", Georgia, "Liberation Serif", serif;
  --sans: system-ui, -apple-system, "Segoe UI", "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
@media (prefers-color-scheme: dark) { :root { --paper: #141619; --ink: #e7e9ec; --muted: #a1a9b3; --rule: #31363d;
  --wash: #23272c; --model: #7fb0ff; --other: #f2a65a; --yes: #5ccf97; --no: #ff8b80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 0 24px 96px; max-width: 968px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 var(--sans); overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; }
header { padding: 56px 0 8px; }
.eyebrow { margin: 0 0 12px; color: var(--muted); font-size: 13px; letter-spacing: .02em; }
h1 { margin: 0 0 24px; max-width: 25em; font: 600 clamp(27px, 4.2vw, 42px)/1.16 var(--serif); letter-spacing: -.012em; text-wrap: balance; }
.lead, section > p { max-width: 44em; font: 17px/1.58 var(--serif); }
.lead p { margin: 0 0 14px; }
section { margin-top: 56px; padding-top: 22px; border-top: 1px solid var(--rule); }
h2 { margin: 0 0 8px; font: 600 25px/1.2 var(--serif); letter-spacing: -.005em; }
section > p { margin: 0 0 6px; }
section > p.count, .reading, .legend { font: 13px/1.5 var(--sans); color: var(--muted); }
.reading { margin: 40px 0 -24px; max-width: 60em; }
.yes b, span.yes { color: var(--yes); } .no b, span.no { color: var(--no); }
.warning { margin: 28px 0 0; padding: 14px 18px; border-left: 5px solid var(--no); background: var(--wash); font-size: 16px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 20px 24px; margin: 34px 0 0; }
.tiles div { border-top: 2px solid var(--ink); padding-top: 8px; }
.tiles dt { font-size: 13px; font-weight: 600; }
.tiles dd { margin: 2px 0 0; font: 600 25px/1.25 var(--serif); font-variant-numeric: lining-nums tabular-nums; white-space: nowrap; }
.tiles .was { color: var(--muted); font-weight: 400; font-size: 16px; }
.tiles small { display: block; margin-top: 3px; color: var(--muted); font: 12.5px/1.4 var(--sans); white-space: normal; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(270px, 100%), 1fr)); gap: 32px 40px; margin: 22px 0; }
.chart { margin: 0; max-width: 440px; display: flex; flex-direction: column; }
h3 { margin: 0 0 8px; font: 600 15px/1.35 var(--sans); }
.chart figcaption { margin-top: 4px; color: var(--muted); font-size: 13px; line-height: 1.45; }
.legend { display: flex; gap: 16px; margin: 2px 0 0; }
.key i { display: inline-block; width: 14px; height: 3px; margin-right: 6px; vertical-align: middle; }
svg { display: block; width: 100%; height: auto; font-family: var(--sans); overflow: visible; }
.grid { stroke: var(--rule); } .tick { fill: var(--muted); font-size: 11px; } .name { fill: var(--ink); font-size: 12px; }
.value { font-size: 12px; font-weight: 600; }
details { margin-top: 14px; font-size: 14px; } summary { cursor: pointer; color: var(--muted); width: fit-content; }
.scroll { overflow-x: auto; margin-top: 10px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top; white-space: nowrap; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; }
.settings th { color: var(--muted); font-weight: 400; }
.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 12em; }
.cards { display: flex; flex-wrap: wrap; align-items: flex-end; gap: 30px 44px; margin-top: 22px; }
article { min-width: 0; max-width: 100%; } article h3 { font: italic 16px/1.35 var(--serif); margin-bottom: 8px; }
.before-after article, .recovered article, .pairs article { width: calc(COLUMNS * 2 * var(--side) + (COLUMNS - 1) * 16px + 28px); }
.recovered article, .pairs article { width: calc(2 * var(--side) + 28px); }
.false-positives article, .contradictions article { width: calc(var(--side) + 34px); }
.false-positives, .contradictions { column-gap: 24px; }
.sides { display: flex; flex-wrap: wrap; gap: 14px 28px; } .pairs .sides, .recovered .sides, .before-after .sides { flex-wrap: nowrap; }
h4 { margin: 0 0 6px; color: var(--muted); font: 12.5px/1.4 var(--sans); }
.strip { display: flex; flex-wrap: wrap; gap: 8px; } .before-after .strip { width: calc(COLUMNS * var(--side) + (COLUMNS - 1) * 8px); }
.recovered .side, .pairs .side { width: var(--side); }
.picture { margin: 0; width: var(--side); }
.picture img, .blank { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; image-rendering: RENDERING; background: var(--wash); }
.picture.yes { border-bottom: 3px solid var(--yes); } .picture.no { border-bottom: 3px solid var(--no); }
.picture figcaption { padding: 3px 0 2px; font-size: 12.5px; line-height: 1.35; font-variant-numeric: tabular-nums; white-space: nowrap; }
.label { color: var(--muted); } .label.odd { color: var(--other); font-weight: 600; }
@media (max-width: 640px) { :root { --side: SIDE_NARROW; } body { padding: 0 16px 64px; } header { padding-top: 28px; }
  section { margin-top: 44px; } .tiles { grid-template-columns: 1fr 1fr; gap: 18px 16px; } .tiles dd { font-size: 22px; } .tiles .was { font-size: 15px; }
  .cards { gap: 26px 16px; } .sides, .before-after .sides { gap: 14px 16px; }
  .candidates .side { width: 100%; } .label { display: block; } }
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
    policy, why = find_decoder(args.run, rounds, args, ranks)
    side = picture_side(policy, next(one for one in rounds if one.heldout)) if policy else 0
    galleries = choose(rounds, tiny=side <= TINY)

    uris: dict[tuple[Path, int], str] = {}
    if policy:
        uris = decode_pictures(policy, [row for gallery in galleries for card in gallery.cards for row in card.pictures()], args.batch)
        galleries = within_budget(galleries, lambda row: len(uris[row["tokens"].path, row["row"]]), PICTURE_BYTES)
    else:
        print(f"warning        the page has no pictures: {why}; give --model")
    page = make_page(args.run, rounds, galleries, uris, side, why)
    assert len(page.encode()) < PAGE_BYTES, len(page.encode())
    with whole_file(out, "w") as file:
        file.write(page)
    print(f"page           {len(rounds) - 1} rounds, {page.count('<img ')} pictures, {len(page.encode()) / 1e6:.2f} MB")
    print(out)


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
