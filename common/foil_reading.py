"""What foils.py reads in a prompt: words, attributes, and what may not be changed since the prompt would stay as true."""

import itertools
import re
from typing import NamedTuple

from common import foil_words as lists
from common.foil_words import AMBIGUOUS, ATTRIBUTES, FUNCTION_WORDS, KINDS


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
    return noun.endswith("s") or noun in lists.SAME_PLURAL or noun in lists.PLURALS.values()


def read_mentions(tokens: list[Token]) -> list[Mention]:
    """Every attribute that the word lists know, in order."""
    found = []
    for place, token in enumerate(tokens):
        kind = next((kind for kind, known in KINDS.items() if token.word in known), None)
        if kind is None or token.name:
            continue
        noun = words_after(tokens, place)
        before = tokens[place - 1] if place and token.spaced else None
        if (token.word, "".join(noun[:1])) in lists.NAMES or (kind in ("color", "size") and is_thing(tokens, place, noun)):
            continue
        if token.word in AMBIGUOUS and (not noun or (before and is_content(before) and before.word not in ATTRIBUTES)):
            continue
        if kind == "material" and token.word in AMBIGUOUS and noun[0] in lists.PEOPLE:
            continue  # a glass painter
        if token.word in AMBIGUOUS and is_verb(noun, tokens[max(0, place - 1)].word):
            continue
        if kind == "number" and (not any(map(is_plural, noun)) or (place and not before) or is_label(before)):
            continue
        if token.word in ("two", "2") and "both" in (near.word for near in tokens[max(0, place - 3) : place]):
            continue
        if kind == "number" and (noun[0] in lists.UNITS or (noun[0] in lists.PARTS and noun[1:])):
            continue
        if f"{token.word}-{''.join(noun[:1])}" in lists.COLOR_NAMES:
            continue  # navy blue is one colour
        named = before is not None and f"{before.word}-{token.word}" in lists.COLOR_NAMES
        shaded = kind == "color" and before is not None and (named or before.word in lists.SHADES)
        found.append(Mention(kind, place - shaded, place, noun))
    return found


def is_verb(noun: list[str], before: str) -> bool:
    """Whether what follows an ambiguous word begins with a verb, so that the word itself is a noun: "the diamond shone"."""
    if noun[0] in lists.NOT_VERBS:
        return False
    last = len(noun) == 1 or noun[1].endswith("ly")
    ends = "(ed|ing|[^su]s)$" if before in ("a", "an") else "(ed|ing)$"
    return noun[0] in lists.VERBS or noun[0].endswith("ly") or (last and bool(re.search(ends, noun[0])))


def is_thing(tokens: list[Token], place: int, noun: list[str]) -> bool:
    """Whether a colour or size is one of many, or a noun: "colorful green parrots", "on the green", "egg white", "at large"."""
    before, after = (tokens[i].word if 0 <= i < len(tokens) else "" for i in (place - 1, place + 1))
    near = {token.word for token in tokens[max(0, place - 3) : place]} | set(noun)
    return bool(near & lists.MANY_COLORS) or (
        not noun and (before in ("egg", "it", "at") or (before in ("a", "an", "the") and after not in ("and", ",")))
    )


def is_label(before: Token | None) -> bool:
    """Whether a number after this word is a name, "route 66", or only about right, "about three"."""
    return before is not None and (before.name or before.word in lists.ABOUT | lists.LABELS)


# ---------------------------------------------------------------------------------------------------------------------
# What may not be changed

_COUNT = "|".join(["\\d+", *lists.NUMBERS[2:]])
OPEN_PHRASES = (  # as lists.OPEN, in several words
    rf"\bas (?:\w+ ){{1,3}}as\b|\b(?:at (?:least|most)|up to (?:{_COUNT})|between (?:{_COUNT}) and (?:{_COUNT}))\b"
    r"|\b(?:maximum|minimum|upwards?|excess) of\b"
    r"|\bfor (?:example|instance)\b|\b(?:same (?:\w+ )?as|similar to|compared)\b|\w/\w"
    r"|\b(?:every|all|various|varied|different|many|multiple|several|assorted|mixed|multi)\W+(?:\w+ )?"
    r"(?:colou?rs?|shades?|hues?|shapes?|sizes?|kinds?|types?|materials?|sorts?|textures?)\b"
)


def fixed(prompt: str, tokens: list[Token]) -> list[tuple[int, int]]:
    """The spans (start, end) in which a change might leave the prompt as true as it was."""
    words, spans = [token.word.replace("’", "'") for token in tokens], []
    reach = {True: 0, False: 0}  # where the clause of the last denial ends, "no" and others: one within it ends there too
    for place, word in enumerate(words):
        phrase = any(words[place : place + len(parts)] == parts for parts in map(str.split, lists.NEGATING))
        far = words[place : place + 2] == ["far", "from"] and not lists.DETERMINERS.intersection(words[place + 2 : place + 3])
        few = word == "few" and "".join(words[:place][-1:]) not in ("a", "the", "his", "her", "their", "these", "those")
        if phrase or far or few or word in lists.NEGATIONS or word.endswith("n't"):
            if place + 1 >= reach[word in lists.NO]:
                reach[word in lists.NO] = clause_end(words, place)
            end, start = reach[word in lists.NO], place
            placed = (word == "not" or word.endswith("n't")) and lists.PLACED.intersection(words[place + 1 : place + 2])
            after = word in lists.GONE and (end == place + 1 or words[place + 1] in ("from", "and") or word == "nowhere")
            while (placed or after) and start and words[start - 1] not in lists.ENDS | {"but", "while", "that", "which", "who"}:
                start -= 1
            spans.append((tokens[start].start, tokens[end - 1].end))
    opened = [token.start for token in tokens if token.word in lists.OPEN]
    opened += [match.start() for match in re.finditer(OPEN_PHRASES, prompt, re.IGNORECASE)]
    opened = [position for position in opened if not any(start <= position < end for start, end in spans)]
    ends = [token.start for token in tokens if token.word in (*".!?;",)]
    for position in opened:
        first = max((end for end in ends if end < position), default=0)
        spans.append((first, min((end for end in ends if end > position), default=len(prompt))))
    return spans


def clause_end(words: list[str], place: int) -> int:
    """Number of the first word (or of the end) that a negation at `place` no longer denies; rather too late than too early."""
    for i in range(place + 1, len(words)):
        word, following = words[i], "".join(words[i + 1 : i + 2])
        if word in lists.ENDS - {","}:
            return i
        if word in ("but", "while", "whereas", "although", "though", "however", "yet", "because") and i > place + 1:
            return i
        if word not in ("and", ","):
            continue
        rest = list(itertools.takewhile(lambda word: word not in (*".!?;",), words[i + 1 :]))
        clause = list(itertools.takewhile(lambda word: word not in ("and", ",", "that", "which", "who"), rest))
        says = lists.FINITE.intersection(clause) and following in lists.STARTS
        one = words[place] in lists.NO and following in lists.DETERMINERS
        if word == "and" and (says or one or following == "with"):
            return i
        if word == "," and not {"or", "nor"}.intersection(rest):
            listed = following in lists.DETERMINERS and words[place] not in lists.NO and "and" in rest and not says
            goes_on = following == "and" and not (
                set(rest[1:2]) & (lists.STARTS if words[place] in lists.NO else lists.STARTS - lists.DETERMINERS)
            )
            if not listed and not goes_on and (following in lists.STARTS | {"and", "but"} or following.endswith("ing")):
                return i
    return len(words)
