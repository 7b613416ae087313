"""A hard foil for a prompt: the same words with one attribute, number or relation changed, so that it contradicts the prompt.

    >>> from common.foils import hard_foil
    >>> hard_foil("a red car and a blue bird", seed=0)
    'a blue car and a red bird'

A judge that tells "a cube" from "a dog on a beach" has not shown that it looks closely; one that tells a prompt from its
hard foil has. The rules are word lists, so they know English only, and little grammar: where they are not sure they say None.
In order of preference: two objects exchange their colours, shapes, materials, sizes or numbers; one of these, or a spatial
relation, is replaced; a state, a posture or a person's sex is; what is done, and to which thing; who does it. Numbers are read
as exact: three dogs are not two dogs. What is denied ("no red flowers"), left open ("red or blue") or compared stays as it is.
The words are in foil_words.py, their reading in foil_reading.py; `stable_seed` of records.py is all that these three need.
"""

import itertools
import re
from collections.abc import Iterator

from common import foil_words as lists
from common.foil_reading import Mention, Token, fixed, is_content, is_label, read_mentions, tokenize, words_after
from common.foil_words import ATTRIBUTES, KINDS, REPLACEMENTS, SECOND_CHOICE
from common.records import stable_seed

Edits = dict[tuple[int, int], str]  # (start, end) in the prompt -> the text that takes its place
LONGEST = 2000  # characters: the pairs of attributes of a whole book would take for ever


def swaps(prompt: str, tokens: list[Token], found: list[Mention]) -> Iterator[Edits]:
    """Two objects exchange their attributes of one kind: the hardest foil, since every word of it is in the prompt."""
    for one, other in itertools.combinations(found, 2):
        look, other_look = (KINDS[mention.kind][tokens[mention.place].word] for mention in (one, other))
        between = (token for token in tokens[one.place + 1 : other.first] if is_content(token))
        if one.kind != other.kind or look & other_look or all(token.word in ATTRIBUTES for token in between):
            continue  # the last: "a black and white cat" is one object
        if bool(one.noun) != bool(other.noun) or alike(one.noun) & set(other.noun) - ATTRIBUTES:
            continue  # "a red bird and a blue bird" would stay what it is
        if any(is_other(tokens, place) for place in range(max(0, one.first - 3), min(len(tokens), other.place + 4))):
            continue  # so would "a red bird and a blue one"
        subject, other_subject = (object_before(tokens, tokens[mention.first].start) for mention in (one, other))
        if not one.noun and other_subject <= subject:
            continue  # and "a bird that is red and a bird that is blue"
        if one.kind == "color" and lists.PATTERNS.intersection(one.noun + other.noun):
            continue
        spans = [(tokens[mention.first].start, tokens[mention.place].end) for mention in (one, other)]
        yield dict(zip(spans, [prompt[start:end].lower() for start, end in reversed(spans)], strict=True))


def is_other(tokens: list[Token], place: int) -> bool:
    """Whether a word stands for a thing like one that was named: "one is red"."""
    return tokens[place].word in lists.OTHERS and not set(words_after(tokens, place)) - ATTRIBUTES - lists.OTHERS


def alike(words: list[str] | set[str]) -> set[str]:
    """The words, and all that may be said of the same things: a sofa is a couch."""
    return set(words).union(*(lists.ALIKE.get(word, ()) for word in words))


def replacements(tokens: list[Token], found: list[Mention]) -> Iterator[Edits]:
    """One attribute becomes one that the prompt has nowhere."""
    for mention in found:
        word, kind = tokens[mention.place].word, mention.kind
        if kind == "number":
            of_two = "all" in (token.word for token in tokens[max(0, mention.place - 2) : mention.place])  # not "all two"
            numbers = (near for near in near_numbers(word) if near > 2 or not of_two)
            words = [lists.NUMBERS[number] if word.isalpha() else str(number) for number in numbers]
        else:
            words = REPLACEMENTS.get(word, REPLACEMENTS.get(kind, "")).split()
        looks_there = [KINDS[kind][token.word] for token in tokens if token.word in KINDS[kind]]
        if kind in SECOND_CHOICE and looks_there.count(KINDS[kind][word]) > 1:
            continue  # "a rough, bumpy road" would be smooth and bumpy
        for new in words:
            shaded = mention.first < mention.place
            named = shaded and tokens[mention.first].word not in lists.SHADES
            if not KINDS[kind][new] & set().union(*looks_there) and (named or not shaded or new not in lists.NOT_SHADED):
                yield {(tokens[mention.first if named else mention.place].start, tokens[mention.place].end): new}


def near_numbers(word: str) -> list[int]:
    """Other numbers of things (at least two: a plural stays one), near enough to be hard and far enough to be counted."""
    number = int(word) if word.isdecimal() else lists.NUMBERS.index(word)
    step = 1 if number < 5 else 2
    return [near for near in (number - step, number + step) if 2 <= near < len(lists.NUMBERS)]


def plurals(tokens: list[Token]) -> Iterator[Edits]:
    """ "one dog" becomes "two dogs", where the dog is not said to do or be anything."""
    for place, token in enumerate(tokens):
        noun, then = words_after(tokens, place), [other.word for other in tokens[place + 2 : place + 3]]
        before = tokens[place - 1].word if place else ""
        if token.word != "one" or len(noun) != 1 or is_label(tokens[place - 1] if place else None):
            continue
        counted = noun[0] not in lists.UNITS | ATTRIBUTES | lists.VERBS and not re.search("[^su]s$|ed$|ing$|ly$", noun[0])
        agrees = before not in lists.FINITE | lists.DETERMINERS | {"each", "every"}
        if counted and agrees and not set(then) & (lists.FINITE | {"does", "that", "which", "who"}):
            yield {token[1:3]: "two", tokens[place + 1][1:3]: plural(noun[0])}


def plural(noun: str) -> str:
    if noun in lists.SAME_PLURAL or noun in lists.PLURALS:
        return lists.PLURALS.get(noun, noun)
    if re.search("[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search("(s|x|z|ch|sh)$", noun) else "s")


def relations(prompt: str, tokens: list[Token]) -> Iterator[Edits]:
    """A spatial relation turns into one that excludes it."""
    for pattern, others, turns in lists.RELATIONS:
        for match in re.finditer(pattern, prompt, re.IGNORECASE):
            before, after = object_before(tokens, match.start()), object_after(tokens, match.end())
            this, that = ({word.rstrip("s") for word in words} for words in (before, after))
            follows = next((i for i, token in enumerate(tokens) if token.start >= match.end()), len(tokens))
            same = that and (that <= this or (this and this <= that) or alike(that) & this - that)
            if turns and (same or any(is_other(tokens, i) for i in range(follows, min(len(tokens), follows + 2)))):
                continue  # "a cup behind a cup" is also a cup in front of a cup
            if after & lists.NO_PLACE or (not turns and (after | before) & lists.NEVER_FAR):
                continue
            around = prompt[max(0, match.start() - 12) : match.end() + 12].lower()
            if re.search(r"\b(left|right|top|bottom)( side)?( and|,| to|/)( the| on the)? ?(left|right|top|bottom)\b", around):
                continue
            for other in others:
                if not any(object_before(tokens, there) == before for there in starts_of(other, prompt)):
                    yield {match.span(): other}  # "a lamp above the bed and a lamp below the bed" has one there


def starts_of(words: str, prompt: str) -> list[int]:
    return [match.start() for match in re.finditer(rf"\b{words}\b", prompt, re.IGNORECASE)]


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
        if token.word in lists.POSTURES:
            subject = [word for word in words[max(0, place - 2) : place] if word not in ("is", "are", "was", "were")][-1:]
            goes_on = words_after(tokens, place) or lists.DETERMINERS.intersection(words[place + 1 : place + 2])  # "a dog"
            stands = not lists.NOT_STANDING.intersection(words[place + 2 : place + 5])  # but not "on its hind legs"
            said = lists.POSTURES[token.word] in words  # of another, or of the same: "standing up from sitting"
            if lists.LIVING.intersection(subject) and stands and not goes_on and not said:
                yield {token[1:3]: lists.POSTURES[token.word]}
        sexes = {token.word, lists.SEXES.get(token.word)}
        if token.word in lists.SEXES and not token.name and not (sexes - {token.word} | lists.PRONOUNS).intersection(words):
            yield {other[1:3]: lists.SEXES[token.word] for other in tokens if other.word == token.word}


def actions(tokens: list[Token]) -> Iterator[Edits]:
    """Somebody does the same with another thing, or does what nobody does at the same time."""
    words = [token.word for token in tokens]
    for place, token in enumerate(tokens):
        n_words = next((n for n in (3, 2, 1) if " ".join(words[place : place + n]) in lists.ACTIONS), 0)
        if n_words and (span := object_span(tokens, place + n_words)) and not alike(words[slice(*span)]) & lists.VAGUE:
            for new in lists.ACTIONS[" ".join(words[place : place + n_words])]:
                if not alike(new.split()) & set(words):
                    yield {(tokens[span[0]].start, tokens[span[1] - 1].end): new}
        if token.word in ("playing", "practicing", "doing"):
            at = place + 1 + (words[place + 1 : place + 2] in (["the"], ["a"], ["an"]))
            for olds, news in lists.FAMILIES:
                if set(words[at : at + 1]) & set(olds.split()) and not words_after(tokens, at):
                    named = {form for word in words for form in (word, word + "s")}
                    yield from ({tokens[at][1:3]: new} for new in news.split() if new not in named)
        following = "".join(words[place + 1 : place + 2])
        if place < 2 or words[place - 1] not in lists.FINITE or words[place - 2] not in lists.ALIVE:
            continue
        new = "crying" * (token.word in lists.HAPPY) or "laughing" * (token.word in lists.UNHAPPY)
        if following in lists.STAYS or not (following and following[0].isalnum()):
            new = new or "dancing" * (token.word in lists.RESTING) or "sleeping" * (token.word in lists.BUSY)
        new = new or "crawling" * (token.word in lists.MOVING and following in lists.GOES)
        if new and new not in words:
            yield {token[1:3]: new}


def object_span(tokens: list[Token], place: int) -> tuple[int, int] | None:
    """First and last but one token of the singular object whose "a", "the" or "his" is at `place`, with what it is of."""
    if place >= len(tokens) or tokens[place].word not in lists.SINGULAR:
        return None
    first = end = place + 1
    while end < len(tokens) and tokens[end].spaced and is_content(tokens[end]) and not tokens[end].name:
        word = tokens[end].word
        if end > first and (re.search("(ing|ed|ly)$", word) or word in lists.VERBS):
            break
        if end > first and word.endswith("s") and not re.search("'s|ss$|us$", word):
            if tokens[place].word not in ("a", "an"):
                return None  # "the cup smiles" or "the cups"
            break
        end += 1
    if end == first or tokens[end - 1].word.endswith("ing"):
        return None
    if end + 1 < len(tokens) and tokens[end].word == "of":
        inner = end + 1 + (tokens[end + 1].word in lists.DETERMINERS)
        end = inner + len(words_after(tokens, inner - 1))
        if end == inner or any(re.search("(ing|ed)$", token.word) for token in tokens[inner:end]):
            return None
    return first, end


def others(tokens: list[Token]) -> Iterator[Edits]:
    """Somebody else does it: with other pronouns where they tell a man from a woman, a child from a robot."""
    words = [token.word for token in tokens]
    sexed = {word for word in words if word in lists.SEXES}
    is_name = any(token.name for token in tokens if token.word in lists.SEXES)
    if len(sexed) == 1 and not is_name and not lists.KIN.intersection(words):
        edits = {token[1:3]: lists.SEXES[token.word] for token in tokens if token.word in lists.SEXES}
        for place, token in enumerate(tokens):
            if token.word in ("his", "her"):
                owned = bool(words_after(tokens, place)) and not lists.STARTS.intersection(words[place + 1 : place + 2])
                edits[token[1:3]] = {"his": ("hers", "her"), "her": ("him", "his")}[token.word][owned]
            elif token.word in lists.HIS:
                edits[token[1:3]] = lists.HIS[token.word]
        yield edits
    for place, token in enumerate(tokens):
        before, following = ("".join(words[i : i + 1]) if i >= 0 else "" for i in (place - 1, place + 1))
        subject = following in lists.FINITE or following.endswith("ing") or (place == 1 and following.endswith(("ed", "ly")))
        named = before in lists.DETERMINERS | {"of"} or (place and is_content(tokens[place - 1]))
        new = lists.PEOPLE.get(token.word)
        if new and new not in words and subject and named and words.count(token.word) == 1:
            yield {token[1:3]: new}


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
    found, left = read_mentions(tokens), fixed(prompt, tokens)
    first = [mention for mention in found if mention.kind not in SECOND_CHOICE]
    second = [mention for mention in found if mention.kind in SECOND_CHOICE]
    for choices in (
        swaps(prompt, tokens, first),
        itertools.chain(replacements(tokens, first), relations(prompt, tokens)),
        itertools.chain(plurals(tokens), swaps(prompt, tokens, second)),
        itertools.chain(replacements(tokens, second), people(tokens)),
        actions(tokens),
        others(tokens),
    ):
        free = (
            edits for edits in choices if not any(start < end_ and begin < end for start, end in edits for begin, end_ in left)
        )
        foils = sorted({apply(prompt, edits) for edits in free} - {prompt})
        if foils:
            return foils[stable_seed("hard foil", seed, prompt) % len(foils)]
    return None


SIDES, HEIGHTS = {"left", "right"}, set("above below top bottom under underneath beneath over atop".split())
PLACES = {word for _, others, _ in lists.RELATIONS for other in others for word in other.split()}
CHANGES = {kind: set(words) for kind, words in KINDS.items()}  # what tells of which kind a change is, the first that fits
CHANGES |= {"left or right": SIDES, "above or below": HEIGHTS, "place": PLACES - set("of to on in from the".split())}


def kind_of_change(prompt: str, foil: str) -> str:
    """What a foil says otherwise, whoever wrote it: one of CHANGES, of several the first ("color", "number", "left or right"),
    or "other words"."""
    old, new = ([token.word for token in tokenize(text)] for text in (prompt, foil))
    if len(old) == len(new):
        changed = {word for pair in zip(old, new, strict=True) if len({*pair}) > 1 for word in pair}
    else:
        changed = {*old} ^ {*new}
    if len(changed) > 4 and 2 * len({*old} & {*new}) < len({*old}):  # another prompt
        return "other words"
    return next((kind for kind, words in CHANGES.items() if changed & words), "other words")
