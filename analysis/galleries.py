"""Which pictures report.py's page shows: drawn by lot where nothing else is said, the worst where a gallery says so.

A gallery is a section of the page: cards of one prompt each, and on them pictures (rows of summary.py) side by side.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from analysis.columns import Pictures
from analysis.page import answered_in_words, quoted
from analysis.summary import Round, methods
from common.records import Row, stable_seed


class Card(NamedTuple):
    """One prompt with one or two groups of pictures of it, each with its heading."""

    prompt: str
    sides: list[tuple[str, list[Row]]]

    def pictures(self) -> list[Row]:
        return [row for _, rows in self.sides for row in rows]


class Gallery(NamedTuple):
    """Some cards with what they show. text: HTML. n_found: of how many, in `unit`; if_empty: the text where it is 0."""

    name: str
    title: str
    text: str
    cards: list[Card]
    n_found: int
    unit: str
    if_empty: str


# ---------------------------------------------------------------------------------------------------------------------
# In which order


def group_by_prompt(pictures: Pictures) -> dict[str, list[int]]:
    """The indices of each prompt id's pictures, in their order."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, id in enumerate(pictures.columns["id"]):
        groups[id].append(i)
    return groups


def categories_of(pictures: Pictures, groups: dict[str, list[int]], keys: Iterable[str]) -> dict[str, str]:
    """The categories of some prompt ids."""
    return {key: pictures.columns["category"][groups[key][0]] for key in keys}


def stable_shuffle(categories: dict[str, str]) -> list[str]:
    """The keys in an order that nobody chose and that never changes, their categories taking turns."""
    queues = defaultdict(list)
    for key in sorted(categories, key=lambda key: stable_seed("report", key)):
        queues[categories[key]].append(key)
    turns = [(turn, category, key) for category, queue in queues.items() for turn, key in enumerate(queue)]
    return [key for *_, key in sorted(turns)]


def by_certainty(pictures: Pictures, sign: int) -> np.ndarray:
    """Indices (R,) from the lowest `sign` times P(yes) up; ties, such as all replies, by a lot that never changes."""
    return np.lexsort((np.random.default_rng(0).random(len(pictures)), sign * pictures.columns["p_yes"]))


def in_order(pictures: Pictures, surest: str) -> str:
    """In which order pictures are shown, in words."""
    return "by lot, as replies are all equally sure" if len(pictures) and answered_in_words(pictures[0]) else surest


def single_cards(pictures: Pictures, limit: int) -> tuple[list[Card], int]:
    """One picture a prompt, the first of its pictures, of the first `limit` prompts; and how many prompts there are."""
    firsts = [group[0] for group in group_by_prompt(pictures).values()]
    return [Card(row["prompt"], [("", [row])]) for row in map(pictures.__getitem__, firsts[:limit])], len(firsts)


def stage(one: Round) -> str:
    return f"after round {one.number}" if one.number else "before training"


# ---------------------------------------------------------------------------------------------------------------------
# The galleries


def before_and_after(rounds: list[Round], limit: int, n_cards: int) -> Gallery:
    """The first pictures of the same held-out prompts, by the first and the last model."""
    drawn = [one for one in rounds if one.heldout]
    first, last = group_by_prompt(drawn[0].heldout), group_by_prompt(drawn[-1].heldout)
    cards, found = [], stable_shuffle(categories_of(drawn[0].heldout, first, first.keys() & last.keys()))
    for key in found[:n_cards]:
        then, now = ([one.heldout[i] for i in of[key][:limit]] for one, of in ((drawn[0], first), (drawn[-1], last)))
        sides = [("before training", then), (f"after round {drawn[-1].number}", now)]
        cards.append(Card(then[0]["prompt"], sides[: len(drawn)]))
    text = (
        "Held-out prompts, drawn by lot, none of them trained on. Each picture carries the verdict of the model that drew it. "
        "Look for crosses that turned into ticks, and whether you would agree with the ticks."
    )
    title = "Before and after" if len(drawn) > 1 else "Before training"
    if_empty = "The rounds share no held-out prompt."
    return Gallery("before-after", title, text, cards, len(found), "held-out prompts", if_empty)


def accepted_and_rejected(rounds: list[Round], limit: int, n_cards: int) -> Gallery:
    """The candidates of a prompt in the first training round, the model's yes and no apart."""
    drawn = next((one for one in rounds if one.scored), rounds[0])
    groups, accepted = group_by_prompt(drawn.scored), drawn.scored.accepted.tolist()
    mixed = [key for key, places in groups.items() if len({accepted[i] for i in places}) == 2]
    cards, found = [], stable_shuffle(categories_of(drawn.scored, groups, mixed))
    for key in found[:n_cards]:
        order = sorted((drawn.scored[i] for i in groups[key]), key=lambda row: row["p_yes"])
        no, yes = [row for row in order if not row["accepted"]], [row for row in order[::-1] if row["accepted"]]
        sides = [(f"accepted, {len(yes)} of {len(order)}", yes[:limit]), (f"rejected, {len(no)} of {len(order)}", no[:limit])]
        cards.append(Card(order[0]["prompt"], sides))
    text = (
        f"Training prompts of round {drawn.number or 1}: one model drew all of these, then said yes to some and no "
        f"to the others; {in_order(drawn.scored, 'surest verdicts first')}. This disagreement with itself is all the teaching "
        "there is."
    )
    if_empty = "No prompt has both accepted and rejected candidates yet."
    return Gallery("candidates", "Accepted and rejected", text, cards, len(found), "prompts with both", if_empty)


def chosen_against_rejected(rounds: list[Round], n_cards: int) -> Gallery:
    """Preference pairs of the first training round."""
    paired = next((one for one in rounds if one.pairs[0]), rounds[0])
    columns = paired.pairs[0].columns
    found = stable_shuffle({f"{i} {columns['id'][i]}": category for i, category in enumerate(columns["category"])})
    cards = []
    for key in found[:n_cards]:
        chosen, rejected = (pictures[int(key.split()[0])] for pictures in paired.pairs)
        cards.append(Card(chosen["prompt"], [("chosen", [chosen]), ("rejected", [rejected])]))
    of_equals = ", of equal ones the first" if cards and answered_in_words(cards[0].pictures()[0]) else ""
    text = (
        f"Of each prompt's candidates in round {paired.number}, the one with the highest P(yes) and the rejected one with the "
        f"lowest{of_equals}. Their difference should be what the prompt asks for, and little else. "
    )
    text += "DPO trained on these." if "dpo" in methods(rounds) else "DPO would train on these; this run has not."
    return Gallery("pairs", "Chosen against rejected", text, cards, len(found), "pairs", "No pairs yet.")


def recovered(rounds: list[Round], n_cards: int) -> Gallery:
    """Prompts of the discard pool that the next round's model could draw: the best attempt then and now."""
    cards: list[Card] = []
    n_found = 0
    for before, after in itertools.pairwise(rounds):
        then, now = group_by_prompt(before.scored), group_by_prompt(after.scored)
        back = {*(before.discard or [])} & {*after.sft} & then.keys() & now.keys()
        n_found += len(back)
        for key in stable_shuffle(categories_of(before.scored, then, back))[: n_cards - len(cards)]:
            drawn = [[one.scored[i] for i in of[key]] for one, of in ((before, then), (after, now))]
            best = [max(rows, key=lambda row: row["p_yes"]) for rows in drawn]
            sides = [(f"round {before.number}", best[:1]), (f"round {after.number}", best[1:])]
            cards.append(Card(best[0]["prompt"], sides))
    text = (
        "Prompts of which the model once accepted no candidate at all. The improved model tried again; what it now accepts "
        "joined the training data. Left the best attempt then, right the best one a round later."
    )
    if_empty = "Nothing has come out of the discard pool yet."
    return Gallery("recovered", "Out of the discard pool", text, cards, n_found, "prompts", if_empty)


def false_positives(rounds: list[Round], n_cards: int) -> Gallery | None:
    """What the last labelled round's model drew wrongly and accepted, surest first; None without labels."""
    labelled = [one for one in rounds if one.label_source]
    if not labelled:
        return None
    last = labelled[-1]
    wrong = last.heldout.take(last.heldout.accepted & (last.heldout.label != 1))
    cards, n_found = single_cards(wrong.take(by_certainty(wrong, -1)), n_cards)
    text = (
        f"Held-out pictures {stage(last)} that the model accepts and the independent judge ({quoted(last.label_source)}) "
        f"calls wrong, {in_order(wrong, 'surest mistakes first')}. Training on such pictures teaches the mistake: this is the "
        "method's blind spot."
    )
    if_empty = "None: all that the model accepts is right."
    return Gallery("false-positives", "Fooled by itself", text, cards, n_found, "prompts with such a picture", if_empty)


def contradictions(rounds: list[Round], n_cards: int) -> Gallery:
    """The last model's own pictures that it rejects, most surely first."""
    last = [one for one in rounds if one.heldout][-1]
    rejected = last.heldout.take(~last.heldout.accepted)
    cards, n_found = single_cards(rejected.take(by_certainty(rejected, 1)), n_cards)
    text = (
        f"Held-out pictures {stage(last)} that the model itself rejects, {in_order(rejected, 'most surely first')}: it draws "
        "this and sees at once that it is not what was asked for. What is left to learn."
    )
    if_empty, unit = "None: the model accepts every picture that it drew.", "prompts with a rejected picture"
    return Gallery("contradictions", "The worst contradictions", text, cards, n_found, unit, if_empty)


# ---------------------------------------------------------------------------------------------------------------------
# How many


def make_galleries(rounds: list[Round], tiny: bool) -> list[Gallery]:
    """All galleries, in the page's order, with as many cards as fill rows; tiny pictures come in larger groups."""
    galleries = [
        before_and_after(rounds, 4 if tiny else 2, 8),
        accepted_and_rejected(rounds, 6 if tiny else 3, 6),
        chosen_against_rejected(rounds, 9),
        recovered(rounds, 9),
        false_positives(rounds, 12),
        contradictions(rounds, 12),
    ]
    return [gallery for gallery in galleries if gallery]


def within_budget(galleries: list[Gallery], size: Callable[[Row], int], budget: int) -> list[Gallery]:
    """The galleries with the cards that fit: all first cards, all second ones, ..., up to the first that does not fit."""
    kept: list[list[Card]] = [[] for _ in galleries]
    turns = [(turn, number) for number, gallery in enumerate(galleries) for turn in range(len(gallery.cards))]
    for turn, number in sorted(turns):
        card = galleries[number].cards[turn]
        budget -= sum(size(row) for row in card.pictures())
        if budget < 0:
            break
        kept[number].append(card)
    return [gallery._replace(cards=cards) for gallery, cards in zip(galleries, kept, strict=True)]
