"""A hard foil for a prompt: the same words with one attribute, number or relation changed, so that it contradicts the prompt.

    >>> from common.foils import hard_foil
    >>> hard_foil("a red car and a blue bird", seed=0)
    'a blue car and a red bird'

A judge that tells "a cube" from "a dog on a beach" has not shown that it looks closely; one that tells a prompt from its
hard foil has. The rules are word lists, so they know English only, and no grammar: where they are not sure they say None.
In order of preference: two objects exchange their colours, shapes, materials, sizes or numbers; one of these, or a spatial
relation, is replaced; a state, a posture or a person's sex is. Numbers are read as exact: three dogs are not two dogs.
This file needs `stable_seed` of records.py and nothing else.
"""

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

from common.records import stable_seed

Edits = dict[tuple[int, int], str]  # (start, end) in the prompt -> the text that takes its place


def looks(families: dict[str, str]) -> dict[str, set[str]]:
    """{"red": "red crimson"} -> {"red": {"red"}, "crimson": {"red"}}: what looks alike is in one family."""
    return {word: set(names.split()) for names, words in families.items() for word in words.split()}


LONGEST = 2000  # characters: the pairs of attributes of a whole book would take for ever
NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()
# For each kind of attribute its words by family; words in one family (some are in two) do not contradict each other.
KINDS = {
    "color": looks(
        {
            "red": "red crimson scarlet",
            "red brown": "maroon burgundy",
            "orange": "orange",
            "yellow": "yellow gold golden",
            "green": "green",
            "blue": "blue navy",
            "blue green": "turquoise teal",
            "purple": "purple violet",
            "pink purple": "magenta",
            "pink": "pink",
            "brown": "brown",
            "brown white": "beige tan",
            "gray": "gray grey silver",
            "black": "black",
            "white": "white",
        }
    ),
    "shape": looks(
        {
            "round": "round circular spherical oval cylindrical",
            "round box": "oblong",  # a long circle or a long box
            "box": "square rectangular cubic",  # every square is a rectangle
            "cone": "triangular conical pyramidal",
            "pentagon": "pentagonal",
            "hexagon": "hexagonal",
            "octagon": "octagonal",
            "diamond": "diamond diamond-shaped",
            "teardrop": "teardrop teardrop-shaped",
            "crescent": "crescent crescent-shaped",
            "star": "star-shaped",
            "heart": "heart-shaped",
        }
    ),
    "material": looks(
        {
            "wood": "wooden wood",
            "metal": "metallic metal steel iron copper brass bronze",
            "glass": "glass",
            "plastic": "plastic rubber",
            "leather": "leather",
            "cloth": "fabric cotton woolen silk velvet denim linen fluffy furry fuzzy plush",
            "stone": "stone marble concrete brick granite",
            "paper": "paper cardboard",
        }
    ),
    "size": looks({"big": "big large huge enormous gigantic massive", "small": "small tiny miniature"}),
    "height": looks({"tall": "tall", "long": "long", "short": "short"}),
    "number": looks({word: f"{word} {value}" for value, word in enumerate(NUMBERS) if value > 1}),
    "surface": looks({"smooth": "smooth", "rough": "rough bumpy jagged rugged"}),
    "shine": looks({"shiny": "shiny polished gleaming", "dull": "dull matte rusty"}),
    "firmness": looks({"soft": "soft", "hard": "hard"}),
    "water": looks({"wet": "wet soaked", "dry": "dry"}),
    "thickness": looks({"thick": "thick", "thin": "thin"}),
    "width": looks({"wide": "wide", "narrow": "narrow"}),
    "door": looks({"open": "open", "closed": "closed"}),
    "dirt": looks({"clean": "clean", "dirty": "dirty muddy"}),
}
# What may replace a word of a kind, or one word of it; those of a family that the prompt names already are left out.
REPLACEMENTS = {
    "color": "red yellow green blue purple pink brown black white",
    "shape": "round square triangular hexagonal",
    "material": "wooden metallic glass plastic leather",
    "size": "big small",
    "height": "short",
    "short": "",  # a short man is not tall as short hair is not long
    "surface": "smooth rough",
    "shine": "shiny dull",
    "water": "wet dry",
    "thickness": "thick thin",
    "width": "wide narrow",
    "door": "open closed",
    "dirt": "clean dirty",
}
SECOND_CHOICE = ("surface", "shine", "firmness", "water", "thickness", "width", "door", "dirt")  # often not to be seen
SHADES = set("light dark bright pale deep vivid dull".split())  # these go with the colour after them
NOT_SHADED = {"black", "white"}
# Nouns, verbs or prepositions too: attributes only where a noun follows and no other noun goes before.
AMBIGUOUS = set(
    "orange gold silver violet tan round square oval diamond teardrop crescent oblong wood metal steel iron copper brass "
    "bronze glass plastic rubber leather fabric cotton silk velvet denim linen plush stone marble concrete brick granite "
    "paper cardboard tall long short smooth rough rugged dull polished gleaming soft hard wet soaked dry thick thin wide "
    "narrow open closed clean".split()
)
ATTRIBUTES = SHADES.union(*KINDS.values())
UNITS = set("year years month months week weeks day days hour hours minute minutes second seconds o'clock percent".split())
SAME_PLURAL = set("sheep deer fish goldfish shrimp aircraft".split())
PLURALS = {
    "man": "men", "woman": "women", "person": "people", "child": "children", "mouse": "mice", "goose": "geese",
    "ox": "oxen", "foot": "feet", "tooth": "teeth", "knife": "knives", "leaf": "leaves", "shelf": "shelves",
    "loaf": "loaves", "wolf": "wolves", "scarf": "scarves", "tomato": "tomatoes", "potato": "potatoes", "mango": "mangoes",
}  # fmt: skip

DETERMINERS = set("a an the this that its his her their my your some another one two three four five six".split())
_NOUN = rf"(?=\s+(?:{'|'.join(sorted(DETERMINERS))})\b)"  # "behind a tree", but not "behind schedule"
RELATIONS = [  # pattern, what may take its place, whether it also turns when its two objects are exchanged
    (r"(?<=\bon the )left\b|(?<=\bto the )left\b|\bleft(?= of\b| side of\b)", ["right"], True),
    (r"(?<=\bon the )right\b|(?<=\bto the )right\b|\bright(?= of\b| side of\b)", ["left"], True),
    (r"(?<=\b[oa][nt] the )top(?= of\b)", ["bottom"], True),
    (r"(?<=\b[oa][nt] the )bottom(?= of\b)", ["top"], True),
    (rf"\b(?:on top of|atop){_NOUN}", ["under", "next to"], True),
    (rf"\babove{_NOUN}", ["below"], True),
    (rf"\bbelow{_NOUN}", ["above"], True),
    (rf"\b(?:under|underneath|beneath){_NOUN}(?!\s+\w+ (?:sun|moon|stars|sky|sea|water|rain|\w*light)\b)", ["on top of"], True),
    (rf"\bin front of{_NOUN}", ["behind"], True),
    (rf"\b(?:hidden behind|hidden by|behind){_NOUN}", ["in front of"], True),
    (rf"\binside{_NOUN}", ["outside"], True),
    (rf"\boutside{_NOUN}", ["inside"], True),
    (rf"\b(?:near|next to|beside|on (?:the )?side of){_NOUN}", ["far away from"], False),
    (rf"\bfar (?:away )?from{_NOUN}", ["next to"], False),
]

SEXES = {"man": "woman", "men": "women", "boy": "girl", "boys": "girls"}
SEXES |= {other: one for one, other in SEXES.items()}
PRONOUNS = set("he she his her hers him himself herself".split())
POSTURES = {"sitting": "standing", "standing": "sitting", "lying": "standing", "walking": "running"}
POSTURES |= {"running": "walking", "jogging": "walking"}
LIVING = set("person man woman men women boy girl child baby people couple dog cat friends family student".split())

FUNCTION_WORDS = set(
    "a an the this that these those some another each every all both its his her their my your and or but nor of in on at by "
    "to from with without into onto over under above below beneath behind beside near through along across around against "
    "between inside outside next up down off out for as while when where which who is are was were be been being has have "
    "had do does it he she they him them there not very so than then".split()
)


class Token(NamedTuple):
    word: str  # in lower case
    start: int
    end: int
    spaced: bool  # whether blanks alone lie between it and the token before
    name: bool  # capital letters that no start of a sentence asks for, here or in the next word: "Big Ben"


class Mention(NamedTuple):
    """An attribute of some object of the prompt."""

    kind: str
    first: int  # number of its first token, that of its shade ("light brown") if it has one
    place: int  # number of the token itself
    noun: list[str]  # the words that follow, up to the next function word or sign


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def tokenize(prompt: str) -> list[Token]:
    """Words (with their hyphens and apostrophes), numbers and signs, in order."""
    tokens, end, begins = [], 0, True
    matches = list(re.finditer(r"\w+(?:['’.,:/-]\w+)*|\S", prompt))
    for match, following in itertools.zip_longest(matches, matches[1:]):
        word = match.group()
        name = word.istitle() and (not begins or (following is not None and following.group().istitle()))
        tokens.append(Token(word.lower(), match.start(), match.end(), prompt[end : match.start()].isspace(), name))
        begins = word in ".!?" or (begins and not word[0].isalnum())
        end = match.end()
    return tokens


def is_content(token: Token) -> bool:
    """Whether it is a word, but no function word."""
    return token.word[0].isalpha() and token.word not in FUNCTION_WORDS


def words_after(tokens: list[Token], place: int) -> list[str]:
    """The content words that follow token `place` without a function word or a sign in between."""
    following = itertools.takewhile(lambda token: token.spaced and is_content(token), tokens[place + 1 :])
    return [token.word for token in following]


def is_plural(noun: str) -> bool:
    return noun.endswith("s") or noun in SAME_PLURAL or noun in PLURALS.values()


def read_mentions(tokens: list[Token]) -> list[Mention]:
    """Every attribute that the word lists know, in order."""
    found = []
    for place, token in enumerate(tokens):
        kind = next((kind for kind, known in KINDS.items() if token.word in known), None)
        if kind is None or token.name:
            continue
        noun = words_after(tokens, place)
        before = tokens[place - 1] if place and token.spaced else None
        if token.word in AMBIGUOUS and (not noun or (before and is_content(before) and before.word not in ATTRIBUTES)):
            continue
        if kind == "number" and (not noun or noun[0] in UNITS or (place and not before)):
            continue
        if token.word.isdecimal() and not any(map(is_plural, noun)):
            continue
        shaded = kind == "color" and before is not None and before.word in SHADES
        found.append(Mention(kind, place - shaded, place, noun))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Changing


def swaps(prompt: str, tokens: list[Token], found: list[Mention]) -> Iterator[Edits]:
    """Two objects exchange their attributes of one kind: the hardest foil, since every word of it is in the prompt."""
    for one, other in itertools.combinations(found, 2):
        look, other_look = (KINDS[mention.kind][tokens[mention.place].word] for mention in (one, other))
        between = (token for token in tokens[one.place + 1 : other.first] if is_content(token))
        if one.kind != other.kind or look & other_look or all(token.word in ATTRIBUTES for token in between):
            continue  # the last: "a black and white cat" is one object
        if bool(one.noun) != bool(other.noun) or set(one.noun) & set(other.noun) - ATTRIBUTES:
            continue  # "a red bird and a blue bird" would stay what it is
        spans = [(tokens[mention.first].start, tokens[mention.place].end) for mention in (one, other)]
        yield dict(zip(spans, [prompt[start:end].lower() for start, end in reversed(spans)], strict=True))


def replacements(tokens: list[Token], found: list[Mention]) -> Iterator[Edits]:
    """One attribute becomes one that the prompt has nowhere."""
    for mention in found:
        word, kind = tokens[mention.place].word, mention.kind
        if kind == "number":
            words = [NUMBERS[number] if word.isalpha() else str(number) for number in near_numbers(word)]
        else:
            words = REPLACEMENTS.get(word, REPLACEMENTS.get(kind, "")).split()
        looks_there = [KINDS[kind][token.word] for token in tokens if token.word in KINDS[kind]]
        if kind in SECOND_CHOICE and looks_there.count(KINDS[kind][word]) > 1:
            continue  # "a rough, bumpy road" would be smooth and bumpy
        for new in words:
            if not KINDS[kind][new] & set().union(*looks_there) and not (mention.first < mention.place and new in NOT_SHADED):
                yield {tokens[mention.place][1:3]: new}


def near_numbers(word: str) -> list[int]:
    """Other numbers of things (at least two: a plural stays one), near enough to be hard and far enough to be counted."""
    number = int(word) if word.isdecimal() else NUMBERS.index(word)
    step = 1 if number < 5 else 2
    return [near for near in (number - step, number + step) if 2 <= near < len(NUMBERS)]


def plurals(tokens: list[Token]) -> Iterator[Edits]:
    """ "one dog" becomes "two dogs", where the dog is not said to do or be anything."""
    for place, token in enumerate(tokens):
        noun, then = words_after(tokens, place), [other.word for other in tokens[place + 2 : place + 3]]
        if token.word == "one" and len(noun) == 1 and noun[0] not in UNITS and not set(then) & {"is", "was", "has", "does"}:
            yield {token[1:3]: "two", tokens[place + 1][1:3]: plural(noun[0])}


def plural(noun: str) -> str:
    if noun in SAME_PLURAL or noun in PLURALS:
        return PLURALS.get(noun, noun)
    if re.search("[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search("(s|x|z|ch|sh)$", noun) else "s")


def relations(prompt: str, tokens: list[Token]) -> Iterator[Edits]:
    """A spatial relation turns into one that excludes it."""
    for pattern, others, turns in RELATIONS:
        for match in re.finditer(pattern, prompt, re.IGNORECASE):
            before, after = object_before(tokens, match.start()), object_after(tokens, match.end())
            if not (turns and after and after <= before):  # "a cup behind a cup" is also a cup in front of a cup
                for other in others:
                    yield {match.span(): other}


def object_before(tokens: list[Token], position: int) -> set[str]:
    """The content words of the last object named before a position of the text."""
    words = [token for token in tokens if token.end <= position]
    while words and not is_content(words[-1]):
        words.pop()
    return {token.word for token in itertools.takewhile(is_content, reversed(words))}


def object_after(tokens: list[Token], position: int) -> set[str]:
    """The content words of the first object named after a position of the text."""
    words = itertools.dropwhile(lambda token: token.start < position or not is_content(token), tokens)
    return {token.word for token in itertools.takewhile(is_content, words)}


def people(tokens: list[Token]) -> Iterator[Edits]:
    """Somebody's posture or sex changes."""
    words = [token.word for token in tokens]
    for place, token in enumerate(tokens):
        if token.word in POSTURES:
            subject = [word for word in words[max(0, place - 2) : place] if word not in ("is", "are", "was", "were")][-1:]
            goes_on = words_after(tokens, place) or DETERMINERS.intersection(words[place + 1 : place + 2])  # "walking a dog"
            if LIVING.intersection(subject) and not goes_on:
                yield {token[1:3]: POSTURES[token.word]}
        if token.word in SEXES and SEXES[token.word] not in words and not PRONOUNS.intersection(words):
            yield {token[1:3]: SEXES[token.word]}


def apply(prompt: str, edits: Edits) -> str:
    """The prompt with its edits, capital letters and articles put right."""
    for (start, end), new in sorted(edits.items(), reverse=True):
        old, before = prompt[start:end], prompt[:start]
        if old.isupper() and len(old) > 1:
            new = new.upper()
        elif old[0].isupper():
            new = new[0].upper() + new[1:]
        if article := re.search(r"\b(a)n?(\s+)$", before, re.IGNORECASE):
            n = "n" if new[0].lower() in "aeiou" else ""
            before = before[: article.start()] + article[1] + (n.upper() if old.isupper() else n) + article[2]
        prompt = before + new + prompt[end:]
    return prompt


def hard_foil(prompt: str, seed: int) -> str | None:
    """The prompt with one attribute, number or relation changed, or None where no rule applies. Fixed by (seed, prompt)."""
    if len(prompt) > LONGEST:
        return None
    tokens = tokenize(prompt)
    found = read_mentions(tokens)
    first = [mention for mention in found if mention.kind not in SECOND_CHOICE]
    second = [mention for mention in found if mention.kind in SECOND_CHOICE]
    for choices in (
        swaps(prompt, tokens, first),
        itertools.chain(replacements(tokens, first), relations(prompt, tokens)),
        itertools.chain(plurals(tokens), swaps(prompt, tokens, second)),
        itertools.chain(replacements(tokens, second), people(tokens)),
    ):
        foils = sorted({apply(prompt, edits) for edits in choices} - {prompt})
        if foils:
            return foils[stable_seed("hard foil", seed, prompt) % len(foils)]
    return None
