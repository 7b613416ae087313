"""The shapes world: small pictures of coloured shapes, prompts about them, and an exact oracle that reads a picture back.

A picture is 48 x 48 pixels: a 3 x 3 grid of cells of 16 pixels, at most one object (a colour and a shape) a cell. Prompts
fall in four categories:

    color      a red circle and a blue square           exactly these two objects
    shape      two circles and one square               exactly these shapes, so often, in any colours
    spatial    a red circle left of a blue square       exactly these two objects, at the picture's two sides
    numeracy   three green crosses                      exactly so many objects, all alike

A picture with anything more than the prompt says does not match it. `parse` and `matches` decide that without any model,
so they can play the independent judge and the held-out truth of every experiment.

    python shapes/world.py prompts --out-dir shapes                      writes prompts_train.jsonl, prompts_heldout.jsonl
    python shapes/world.py label scored.jsonl --out labels.jsonl         reads scored.jsonl + .safetensors, decodes, labels

Shapes of arrays: B batch.
"""

import argparse
import itertools
import random
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from cells import (  # noqa: F401 (one world to its users)  # noqa: F401
    BACKGROUND,
    CELL,
    CELL_PICTURES,
    COLORS,
    GRID,
    KINDS,
    SHAPES,
    SIZE,
    Object,
    cells_of,
    parse,
    render,
    render_cells,
)

CATEGORIES = ("color", "shape", "spatial", "numeracy")
SINGLE = "single"  # "a red circle", exactly this object: can be asked for and read, but the models are not taught it
ATTRIBUTES = ("shape", "side", "number")  # in which alone a picture can miss its prompt, as `label` says where it does
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHAPE_COUNTS = range(1, 5)  # "shape": so many of each of two shapes ...
MAX_OBJECTS = 6  # ... and no more than this altogether
NUMERACY_COUNTS = range(2, MAX_OBJECTS + 1)
N_HELDOUT = 32  # meanings a category
N_TRAIN = 192  # prompts a category, where there are so many


class Term(NamedTuple):
    """`count` objects of one shape; `color` None means any colours."""

    count: int
    color: str | None
    shape: str


class Spec(NamedTuple):
    """What a prompt says. `relation` is one of OPPOSITE for spatial prompts and None otherwise."""

    category: str
    terms: tuple[Term, ...]
    relation: str | None = None


# Prompts and what they mean.


def plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


SINGULAR = {plural(shape): shape for shape in SHAPES}


def _phrase(category: str, term: Term) -> str:
    number = "a" if category in ("color", "spatial", SINGLE) else NUMBERS[term.count]
    noun = term.shape if term.count == 1 else plural(term.shape)
    return " ".join(word for word in (number, term.color, noun) if word)


def text(spec: Spec) -> str:
    """The prompt of a spec, such as "a red circle left of a blue square"."""
    return f" {spec.relation or 'and'} ".join(_phrase(spec.category, term) for term in spec.terms)


def is_stated(spec: Spec) -> bool:
    """Whether a spec is in the world: counts in range, and the two objects of color and spatial different in both ways."""
    terms = spec.terms
    if spec.category == SINGLE:
        return len(terms) == 1 and terms[0].count == 1
    if spec.category == "numeracy":
        return len(terms) == 1 and terms[0].count in NUMERACY_COUNTS
    if len(terms) != 2 or terms[0].shape == terms[1].shape:
        return False
    if spec.category == "shape":
        counts = [term.count for term in terms]
        return all(count in SHAPE_COUNTS for count in counts) and sum(counts) <= MAX_OBJECTS
    return terms[0].color != terms[1].color


def _parse_phrase(words: list[str]) -> tuple[str, Term]:
    """The number word and the term of "a red circle", "two circles" or "three green crosses"; ValueError otherwise."""
    number, *middle, noun = words
    count = 1 if number == "a" else NUMBERS.index(number)
    shape = noun if count == 1 else SINGULAR.get(noun)
    if shape not in SHAPES or len(middle) > 1 or (middle and middle[0] not in COLORS):
        raise ValueError(noun)
    return number, Term(count, middle[0] if middle else None, shape)


def parse_prompt(prompt: str) -> Spec:
    """The spec a prompt states, `parse_prompt(text(spec)) == spec`; ValueError for a prompt outside the world."""
    padded = " ".join(prompt.split())
    relation = next((r for r in OPPOSITE if f" {r} " in padded), None)
    try:
        phrases = [_parse_phrase(part.split()) for part in padded.split(f" {relation or 'and'} ")]
        forms = {(number == "a", term.color is not None) for number, term in phrases}
        (articled, coloured), *more = forms
        pair = "color" if len(phrases) > 1 else SINGLE
        category = {(True, True): "spatial" if relation else pair, (False, True): "numeracy", (False, False): "shape"}[
            articled, coloured
        ]
        spec = Spec(category, tuple(term for _, term in phrases), relation)
        if more or not is_stated(spec) or (relation and category != "spatial"):
            raise ValueError
    except (ValueError, KeyError, IndexError):
        raise ValueError(f"not a prompt of the shapes world: {prompt!r}") from None
    return spec


def matches(objects: list[Object] | None, spec: Spec) -> bool:
    """Whether a scene is what the spec says: exactly these objects and no others; an unrecognisable scene never is."""
    if objects is None:
        return False
    if spec.category == "shape":
        wanted = sorted(term.shape for term in spec.terms for _ in range(term.count))
        return sorted(o.shape for o in objects) == wanted
    wanted = sorted((term.color, term.shape) for term in spec.terms for _ in range(term.count))
    if sorted(o.kind for o in objects) != wanted:
        return False
    if spec.category != "spatial":
        return True
    first, second = (next(o for o in objects if o.kind == (term.color, term.shape)) for term in spec.terms)
    return holds(first, spec.relation, second)


def near_misses(spec: Spec, attribute: str) -> list[Spec]:
    """All specs of the world that differ from this one in one value of the attribute: shape, side or number."""
    if attribute == "side":
        return [spec._replace(relation=OPPOSITE[spec.relation])] if spec.relation in ("left of", "right of") else []
    changed = []
    for i, term in enumerate(spec.terms):
        if attribute == "shape":
            others = [term._replace(shape=shape) for shape in SHAPES if shape != term.shape]
        else:
            others = [term._replace(count=term.count + more) for more in (-1, 1) if spec.category in ("shape", "numeracy")]
        changed += [spec._replace(terms=(*spec.terms[:i], other, *spec.terms[i + 1 :])) for other in others]
    return [other for other in changed if is_stated(other)]


def misses_only(objects: list[Object] | None, spec: Spec, attribute: str) -> bool:
    """Whether a scene misses a spec, and in that attribute alone."""
    return not matches(objects, spec) and any(matches(objects, near) for near in near_misses(spec, attribute))


def holds(first: Object, relation: str, second: Object) -> bool:
    """Whether `first` is clearly left of (right of, above, below) `second`: they stand at the two sides of the picture."""
    last = GRID - 1
    return {
        "left of": first.column == 0 and second.column == last,
        "right of": first.column == last and second.column == 0,
        "above": first.row == 0 and second.row == last,
        "below": first.row == last and second.row == 0,
    }[relation]


def meaning(spec: Spec) -> Spec:
    """The same for two specs exactly when they hold for the same scenes: "A and B", "B and A"; "A above B", "B below A"."""
    terms = tuple(sorted(spec.terms, key=lambda term: (term.shape, term.color or "", term.count)))
    relation = spec.relation if terms == spec.terms or not spec.relation else OPPOSITE[spec.relation]
    return Spec(spec.category, terms, relation)


def all_specs(category: str) -> list[Spec]:
    """Every spec of a category, in a fixed order; both orders of two terms are there."""
    kinds = [Term(1, color, shape) for color, shape in KINDS]
    if category == "numeracy":
        specs = [Spec(category, (Term(n, *kind),)) for n in NUMERACY_COUNTS for kind in KINDS]
    elif category == "shape":
        terms = [Term(n, None, shape) for n in SHAPE_COUNTS for shape in SHAPES]
        specs = [Spec(category, pair) for pair in itertools.permutations(terms, 2)]
    else:
        relations = tuple(OPPOSITE) if category == "spatial" else (None,)
        specs = [Spec(category, pair, r) for pair in itertools.permutations(kinds, 2) for r in relations]
    return [spec for spec in specs if is_stated(spec)]


_SPECS = {category: all_specs(category) for category in CATEGORIES}


def sample_spec(rng: random.Random, category: str | None = None) -> Spec:
    """A spec at random: of the category, or of a category at random."""
    return rng.choice(_SPECS[category or rng.choice(CATEGORIES)])


def realise(rng: random.Random, spec: Spec) -> list[Object]:
    """A scene at random that matches the spec, its objects row by row."""
    kinds = [(t.color or rng.choice(list(COLORS)), t.shape) for t in spec.terms for _ in range(t.count)]
    while True:
        cells = rng.sample(range(GRID * GRID), len(kinds))
        objects = [Object(*kind, cell // GRID, cell % GRID) for kind, cell in zip(kinds, cells)]
        if matches(objects, spec):
            return sorted(objects, key=lambda o: (o.row, o.column))


def corrupt(rng: random.Random, spec: Spec) -> Spec:
    """The spec with one attribute changed: a colour, a shape, a count (by one), or the relation turned round.

    No scene matches both: of relations only the opposite is taken, because "A left of B" and "A above B" can both hold.
    Half of the changes of a spatial or a counting prompt are to what its category is about.
    """
    while True:
        i = rng.randrange(len(spec.terms))
        term = spec.terms[i]
        kind_of_change = rng.choice({"color": "cs", "shape": "ns", "spatial": "rrcs", "numeracy": "nncs"}[spec.category])
        relation = spec.relation
        if kind_of_change == "r":
            relation = OPPOSITE[spec.relation]
        elif kind_of_change == "c":
            term = term._replace(color=rng.choice([c for c in COLORS if c != term.color]))
        elif kind_of_change == "s":
            term = term._replace(shape=rng.choice([s for s in SHAPES if s != term.shape]))
        else:
            term = term._replace(count=term.count + rng.choice((-1, 1)))
        changed = Spec(spec.category, (*spec.terms[:i], term, *spec.terms[i + 1 :]), relation)
        if is_stated(changed):
            return changed


def true_specs(objects: list[Object]) -> list[Spec]:
    """Every spec that a scene matches."""
    kinds, shapes = sorted({o.kind for o in objects}), sorted({o.shape for o in objects})
    if len(kinds) == 1:
        candidates = [Spec("numeracy", (Term(len(objects), *kinds[0]),))]
    else:
        counts = [Term(sum(o.shape == shape for o in objects), None, shape) for shape in shapes]
        candidates = [Spec("shape", pair) for pair in itertools.permutations(counts)]
    if len(objects) == 2:
        for pair in itertools.permutations([Term(1, *kind) for kind in kinds]):
            candidates += [Spec("color", pair), *(Spec("spatial", pair, relation) for relation in OPPOSITE)]
    return [spec for spec in candidates if is_stated(spec) and matches(objects, spec)]


# Prompt files.


def prompt_sets() -> tuple[list[dict], list[dict]]:
    """The rows of prompts_train.jsonl and prompts_heldout.jsonl, always the same ones.

    Disjoint by meaning: no training prompt, and no foil of one, means what a held-out prompt means. Held-out prompts are
    balanced over the categories; a training category has N_TRAIN prompts, or all there are.
    """
    train, heldout = [], []
    for category in CATEGORIES:
        rng = random.Random(f"prompts {category}")
        groups: dict[Spec, list[Spec]] = {}
        for spec in _SPECS[category]:
            groups.setdefault(meaning(spec), []).append(spec)
        meanings = list(groups)
        rng.shuffle(meanings)
        secret = set(meanings[:N_HELDOUT])
        rest = [spec for m in meanings[N_HELDOUT:] for spec in groups[m]]
        rng.shuffle(rest)
        number = itertools.count()
        for rows, specs in ((heldout, [rng.choice(groups[m]) for m in meanings[:N_HELDOUT]]), (train, rest[:N_TRAIN])):
            for spec in specs:
                foil = corrupt(rng, spec)
                while rows is train and meaning(foil) in secret:
                    foil = corrupt(rng, spec)
                rows.append(
                    {"id": f"{category}-{next(number):04d}", "prompt": text(spec), "category": category, "foil": text(foil)}
                )
    return train, heldout


def heldout_meanings() -> frozenset[Spec]:
    """The meanings that pretraining must not put into words."""
    return frozenset(meaning(parse_prompt(row["prompt"])) for row in prompt_sets()[1])


# Commands. The project is imported here only: the world itself needs nothing but numpy.


def find_project() -> None:
    """Let the project's files, which lie one folder up, be imported."""
    root = str(Path(__file__).resolve().parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)


def write_prompts(args: argparse.Namespace) -> None:
    from common.outputs import check_outputs
    from common.writing import write_rows

    names = ("prompts_train.jsonl", "prompts_heldout.jsonl")
    check_outputs([], {args.out_dir / name: "prompts" for name in names})
    for name, rows in zip(names, prompt_sets()):
        write_rows(args.out_dir / name, rows)
        print(f"{args.out_dir / name}: {len(rows)} prompts")


def label(args: argparse.Namespace) -> None:
    """The oracle's word on every candidate of a scored file: decode its tokens, read the picture, compare with the prompt."""
    from common.command import BadInput, printable, progress_bar
    from common.outputs import check_outputs
    from common.records import Tokens, read_scored
    from common.writing import write_rows

    out = args.out
    check_outputs([args.scored], {out: "labels"})
    tokens = Tokens(args.scored)
    rows, specs = [], []
    for line, row in read_scored(args.scored, tokens):
        try:
            specs.append(parse_prompt(row["prompt"]))
        except ValueError as error:
            raise BadInput(f"{args.scored}:{line}: {error}") from None
        rows.append(row)
    name = tokens.model_name(args.model)

    import torch

    from model import load

    policy = load(name, device="cpu")  # wherever it was drawn: the oracle reads a CPU's pixels
    tokens.check_codebook(policy, name)
    labels = []
    bar = progress_bar(len(rows), "picture", name="label")
    for start in range(0, len(rows), 32):
        chunk = rows[start : start + 32]
        pictures = policy.decode(torch.from_numpy(tokens[[row["row"] for row in chunk]]).to(policy.device))
        if pictures.shape[1:3] != (SIZE, SIZE):
            height, width = pictures.shape[1:3]
            raise BadInput(f"{tokens.path}: pictures of {width} x {height} pixels; the oracle reads {SIZE} x {SIZE}")
        for row, spec, objects in zip(chunk, specs[start:], parse(pictures.cpu().numpy())):
            right = int(matches(objects, spec))
            missed = [] if right else [name for name in ATTRIBUTES if misses_only(objects, spec, name)]
            told = {"misses": missed[0]} if missed else {}
            labels.append({"id": row["id"], "candidate": row["candidate"], "label": right, "source": "oracle"} | told)
        bar.update(len(chunk))
    bar.close()
    tokens.check_unchanged()
    write_rows(out, labels)
    print(f"{printable(out)}: {len(labels)} candidates, {sum(row['label'] for row in labels)} right")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    find_project()
    from common.command import Parser

    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    prompts = commands.add_parser("prompts", help="write the two prompt files")
    prompts.add_argument("--out-dir", type=Path, required=True, help="folder to write them to, made if missing")
    prompts.set_defaults(run=write_prompts)
    labels = commands.add_parser("label", help="label scored candidates by the oracle")
    labels.add_argument("scored", type=Path, help="scored.jsonl, with its .safetensors beside it")
    labels.add_argument("--out", type=Path, required=True, help="labels.jsonl to write")
    labels.add_argument("--model", help="checkpoint that decodes the tokens (default: the one that drew them)")
    labels.set_defaults(run=label)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    args.run(args)


if __name__ == "__main__":
    args = parse_args()
    from common.command import run_script

    sys.exit(run_script(main, args))
