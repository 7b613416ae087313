"""What the tiny model is taught about a picture: questions with their answers, as text, from a scene of the shapes world.

Besides the two things it is for (yes or no, and captions) the model learns to say where things are, how many there are and
how one lies to another. Telling "left of" from "right of" stays near chance without that: it takes two look-ups and a
comparison, and yes or no alone is too thin a signal to find them.

A yes/no question also carries whether its prompt can still be true after each of its words (`truths`): dense labels for the
hidden states of pretraining, without which yes and no stay near chance for long.
"""

import random
from typing import NamedTuple

from world import (
    COLORS,
    GRID,
    KINDS,
    NUMBERS,
    OPPOSITE,
    SHAPES,
    Object,
    Spec,
    corrupt,
    holds,
    matches,
    meaning,
    plural,
    realise,
    sample_spec,
    text,
    true_specs,
)

YES_NO = (("Does this image describe ", "?"), ("Is this a picture of ", "?"))
CAPTION = "Describe this image."
LAYOUT = "Where is everything?"
# How often an unspoilt picture is asked about truly, so that half of all answers are yes in every category: spoilt pictures
# mostly answer no, and the picture of a spatial prompt is also asked about its shapes.
YES_SHARE = {"color": 0.67, "shape": 0.53, "spatial": 0.78, "numeracy": 0.65}
NEAR_YES_SHARE = {"color": 0.64, "shape": 0.38, "spatial": 0.92, "numeracy": 0.65}  # with pictures that are nearly right
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")


ABSENT = GRID * GRID


class Lesson(NamedTuple):
    """One question, in three parts, and its answer."""

    head: str
    prompt: str
    tail: str
    answer: str
    truths: tuple[tuple[int, bool], ...] = ()  # (word of `prompt`, whether the prompt can still be true after it)
    places: tuple[tuple[int, int], ...] = ()  # (noun of `prompt`, the cell where it is, or ABSENT)

    @property
    def is_yes_no(self) -> bool:
        return self.answer in ("yes", "no")


def places(objects: list[Object], nouns: list[tuple[int, tuple[str | None, str]]]) -> tuple[tuple[int, int], ...]:
    """(word, cell) of the nouns (word, kind) that are there at most once."""
    labels = []
    for word, kind in nouns:
        cells = [o.row * GRID + o.column for o in objects if o.kind == kind]
        if len(cells) < 2:
            labels.append((word, cells[0] if cells else ABSENT))
    return tuple(labels)


def truths(objects: list[Object], spec: Spec) -> tuple[tuple[int, bool], ...]:
    """(index, truth) for the words of a prompt that say something: whether the prompt up to there holds for the scene."""
    right, first, last = matches(objects, spec), spec.terms[0], spec.terms[-1]
    if spec.category in ("color", "spatial"):
        n_words = len(text(spec).split())
        found = [o for o in objects if o.kind == (first.color, first.shape)]
        labels = ((1, any(o.color == first.color for o in objects)), (2, bool(found)))
        there = [o for one in found for o in objects if o is not one]  # what the rest of the prompt may speak of
        if spec.category == "spatial":  # the relation word: is anything there, seen from the first object?
            there = [o for one in found for o in objects if o is not one and holds(one, spec.relation, o)]
            labels += ((3, bool(there)),)
        return (*labels, (n_words - 2, any(o.color == last.color for o in there)), (n_words - 1, right))
    n = len(objects)
    if spec.category == "numeracy":
        return (0, n == first.count), (1, n == first.count and all(o.color == first.color for o in objects)), (2, right)
    counted = {shape: sum(o.shape == shape for o in objects) for shape in SHAPES}
    so_far = counted[first.shape] == first.count
    return (0, first.count in counted.values()), (1, so_far), (3, so_far and n == first.count + last.count), (4, right)


def yes_no(objects: list[Object], spec: Spec, wording: int = 0) -> Lesson:
    head, tail = YES_NO[wording]
    answer = "yes" if matches(objects, spec) else "no"
    nouns = []
    if spec.category in ("color", "spatial"):
        first, last = spec.terms
        nouns = [(2, (first.color, first.shape)), (len(text(spec).split()) - 1, (last.color, last.shape))]
    return Lesson(head, text(spec), tail, answer, truths(objects, spec), places(objects, nouns))


def caption(spec: Spec) -> Lesson:
    return Lesson(CAPTION, "", "", text(spec))


def position(o: Object) -> str:
    return f"{ROWS[o.row]} {COLUMNS[o.column]}"


def layout_text(objects: list[Object]) -> str:
    """A caption with positions, such as "a red circle at top left and a blue square at middle right"."""
    return " and ".join(f"a {o.color} {o.shape} at {position(o)}" for o in objects)


def layout(objects: list[Object]) -> Lesson:
    return Lesson(LAYOUT, "", "", layout_text(objects))


def where(objects: list[Object], kind: tuple[str, str]) -> Lesson:
    """ "Where is the red circle?" of a kind that is there at most once."""
    answer = next((position(o) for o in objects if o.kind == kind), "nowhere")
    return Lesson("Where is the ", " ".join(kind), "?", answer, places=places(objects, [(1, kind)]))


def seen_from(first: Object, second: Object) -> Lesson:
    """ "Where is the red circle seen from the blue square?": a word for the columns, a word for the rows."""
    across = next((r.split()[0] for r in ("left of", "right of") if holds(first, r, second)), "same")
    down = next((r for r in ("above", "below") if holds(first, r, second)), "same")
    prompt = f"{first.color} {first.shape} seen from the {second.color} {second.shape}"
    nouns = [(1, first.kind), (6, second.kind)]
    return Lesson("Where is the ", prompt, "?", f"{across} {down}", places=places([first, second], nouns))


def how_many(rng: random.Random, objects: list[Object]) -> Lesson:
    """ "How many circles?" or "How many red circles?", of something that is there three times in four."""
    color, shape = rng.choice(objects).kind if rng.random() < 0.75 else rng.choice(KINDS)
    color = color if rng.random() < 0.5 else None
    count = sum(o.shape == shape and color in (None, o.color) for o in objects)
    prompt = f"{color} {plural(shape)}" if color else plural(shape)
    return Lesson("How many ", prompt, "?", NUMBERS[count])


# Which lessons a picture gives.


def near_kind(rng: random.Random, kind: tuple[str, str]) -> tuple[str, str]:
    """Another kind of the same colour or of the same shape."""
    return rng.choice([k for k in KINDS if (k[0] == kind[0]) != (k[1] == kind[1])])


def spoil(rng: random.Random, objects: list[Object], near: bool = False) -> list[Object]:
    """The scene with an object or two added, taken away, or replaced: what a bad drawing looks like.

    near: mostly one object is replaced by one like it, which is what a drawing that is nearly right looks like.
    """
    objects = list(objects)
    if near and rng.random() < 0.7:
        odd = rng.randrange(len(objects))
        color, shape = near_kind(rng, objects[odd].kind)
        objects[odd] = objects[odd]._replace(color=color, shape=shape)
        return objects
    for _ in range(rng.choice((1, 1, 2))):
        free = [c for c in range(GRID * GRID) if c not in {o.row * GRID + o.column for o in objects}]
        change = rng.choice(("add", "remove", "replace"))
        if change != "add" and len(objects) > 1:
            objects.pop(rng.randrange(len(objects)))
        if change != "remove":
            cell = rng.choice(free)
            kind = rng.choice(KINDS) if rng.random() < 0.5 else rng.choice(objects).kind
            objects.append(Object(*kind, cell // GRID, cell % GRID))
    return sorted(objects, key=lambda o: (o.row, o.column))


def by_category(rng: random.Random, specs: list[Spec]) -> Spec | None:
    """One of the specs, every category among them equally often."""
    if not specs:
        return None
    category = rng.choice(sorted({spec.category for spec in specs}))
    return rng.choice([spec for spec in specs if spec.category == category])


def wrong_spec(rng: random.Random, objects: list[Object], right: Spec) -> Spec:
    """A spec like `right` that the scene does not match: mostly one attribute off, else colours swapped or all at random."""
    while True:
        chance = rng.random()
        if chance < 0.15:
            wrong = sample_spec(rng, right.category)
        elif chance < 0.3 and right.category in ("color", "spatial"):
            a, b = right.terms
            wrong = right._replace(terms=(a._replace(color=b.color), b._replace(color=a.color)))
        elif chance < 0.55 and right.category == "spatial":
            wrong = right._replace(relation=rng.choice(list(OPPOSITE)))
        else:
            wrong = corrupt(rng, right)
        if not matches(objects, wrong):
            return wrong


class Picture(NamedTuple):
    objects: list[Object]
    lessons: list[Lesson]


def picture_lessons(rng: random.Random, spec: Spec, secret: frozenset[Spec], n_yes_no: int, near: bool = False) -> Picture:
    """A picture for the spec, now and then spoilt, and lessons about it; no caption or question means a secret spec.

    near: spoilt pictures are mostly nearly right (see spoil), and mostly asked about with the spec they missed.
    """
    objects, yes_share = realise(rng, spec), NEAR_YES_SHARE if near else YES_SHARE
    spoilt = rng.random() < 0.3
    if spoilt:
        objects = spoil(rng, objects, near)
    true = [s for s in true_specs(objects) if meaning(s) not in secret]
    lessons = []
    for _ in range(n_yes_no):
        right = by_category(rng, true)
        if right is None or (spoilt and rng.random() < (0.8 if near else 0.5)):
            asked = spec
        elif rng.random() < (0.1 if spoilt else yes_share[right.category]):
            asked = right
        else:
            asked = wrong_spec(rng, objects, right)
        if meaning(asked) not in secret:
            lessons.append(yes_no(objects, asked, wording=int(rng.random() < 0.35)))
    if true:
        lessons.append(caption(by_category(rng, true)))
    single = [o for o in objects if sum(p.kind == o.kind for p in objects) == 1]
    if len(single) > 1:
        if rng.random() < 0.6:
            lessons.append(seen_from(*rng.sample(single, 2)))
        related = [s for s in true if s.category == "spatial"]
        if related and rng.random() < 0.8:  # a relation must be told before the second object is named
            lessons.append(caption(rng.choice(related)))
        elif rng.random() < 0.3 and len(objects) <= 3:
            lessons.append(layout(objects))
    elif rng.random() < 0.3:
        lessons.append(how_many(rng, objects))
    if rng.random() < 0.5:
        absent = rng.random() < 0.15 or not single
        kind = rng.choice([k for k in KINDS if k not in {o.kind for o in objects}]) if absent else rng.choice(single).kind
        lessons.append(where(objects, kind))
    return Picture(objects, lessons)


def drawing_caption(
    rng: random.Random, spec: Spec, secret: frozenset[Spec], noise: float, layouts: float
) -> tuple[str, list[Object]]:
    """A caption and the scene to draw for it. With probability `noise` the caption has one attribute wrong.

    With probability `layouts` the caption gives positions; those are always right.
    """
    objects = realise(rng, spec)
    if rng.random() < layouts and len(objects) <= 3:
        return layout_text(rng.sample(objects, len(objects))), objects
    if rng.random() < noise:
        wrong = corrupt(rng, spec)
        if meaning(wrong) not in secret:
            return text(wrong), objects
    return text(spec), objects


def vocabulary() -> list[str]:
    """Every word of the prompts, questions and answers, and the punctuation."""
    sentences = [
        *(head + tail for head, tail in YES_NO),
        CAPTION,
        LAYOUT,
        "Where is the seen from the",
        "How many",
        "at nowhere same",
    ]
    words = " ".join(sentences).replace("?", " ").replace(".", " ").split() + ["yes", "no", "Yes", "No", "a", "and"]
    words += [*COLORS, *SHAPES, *map(plural, SHAPES), *" ".join(OPPOSITE).split(), *NUMBERS, *ROWS, *COLUMNS]
    return list(dict.fromkeys([*"?.:", *words]))
