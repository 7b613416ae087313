"""The prompts of a run: each with its foils, and those that a model cannot read left out.

A foil is what a picture's judge is also asked about: the prompt row's own, else the prompt with one attribute changed by rule
(foils.py), else another prompt of the category. Only a judge that looks says no to it.
"""

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.command import BadInput, printable
from common.foils import hard_foil
from common.prompt_files import print_notes, read_prompt_files
from common.prompt_files import prompt_id as prompt_id  # the rest of what there is to know of a prompt
from common.prompt_files import read_prompts as read_prompts
from common.records import stable_seed

# ---------------------------------------------------------------------------------------------------------------------
# The prompts of a run, each with its foils


def easy_foils(prompts: list[dict[str, str]], seed: int) -> dict[str, str]:
    """id -> another prompt of its category (of any, if it is alone), fixed by (seed, id); nothing for a single prompt."""
    by_category = defaultdict(set)
    for prompt in prompts:
        by_category[prompt["category"]].add(prompt["prompt"])
    pools, everything = {name: sorted(texts) for name, texts in by_category.items()}, sorted(set().union(*by_category.values()))
    foils = {}
    for prompt in prompts:
        for pool in (pools[prompt["category"]], everything):
            if others := [text for text in pool if text != prompt["prompt"]]:
                foils[prompt["id"]] = others[stable_seed("foil", seed, prompt["id"]) % len(others)]
                break
    return foils


def add_foils(prompts: list[dict[str, str]], seed: int, which: str = "hard") -> list[bool]:
    """Give every prompt without a foil one, fixed by (seed, prompts); returns which have a hard one, their own or by rule.

    which: "hard", the prompt with one attribute changed, or another prompt where no rule applies; "easy", another prompt;
    "both", as hard, and another prompt as easy_foil beside it.
    """
    easy, hard = easy_foils(prompts, seed), []
    for prompt in prompts:
        other = easy.get(prompt["id"])
        found = prompt.get("foil") or (hard_foil(prompt["prompt"], seed) if which != "easy" else None)
        if not (foil := found or other):
            raise BadInput(f"prompt {prompt['prompt'][:60]!r} needs a foil: give it one, or a second prompt beside it")
        prompt["foil"] = foil
        if which == "both" and other:
            prompt["easy_foil"] = other
        hard.append(found is not None)
    return hard


def hard_shares(prompts: list[dict[str, str]], hard: list[bool]) -> str:
    """For people to read: how many prompts have a hard foil, over all and per category."""
    by_category = defaultdict(list)
    for prompt, is_hard in zip(prompts, hard, strict=True):
        by_category[prompt["category"]].append(is_hard)
    shares = ", ".join(f"{printable(name)} {100 * sum(group) // len(group)} %" for name, group in sorted(by_category.items()))
    return f"hard for {sum(hard)} of {len(hard)} prompts ({shares})"


def print_foils(prompts: list[dict[str, str]], seed: int, which: str) -> None:
    """add_foils, and a line that says how many are hard."""
    print(f"foils          {hard_shares(prompts, add_foils(prompts, seed, which))}")


def prompts_to_draw(paths: list[Path], category: str | None = None) -> tuple[list[dict[str, str]], list[str]]:
    """The prompts of all files, duplicates dropped and counted, and where each stands (file:line)."""
    files = read_prompt_files(paths, category)
    print_notes(files)
    prompts: dict[str, dict[str, str]] = {}
    places: dict[str, str] = {}
    for file in files:
        for row, place in zip(file.rows, file.places, strict=True):
            if prompts.setdefault(row["id"], row)["prompt"] != row["prompt"]:
                raise BadInput(f"{file.path}: id {row['id']!r} names two prompts")
            places.setdefault(row["id"], place)
    texts = {row["prompt"]: row for row in reversed(prompts.values())}  # the first of equal texts wins
    rows = [row for row in prompts.values() if texts[row["prompt"]] is row]
    seen = sum(len(file.rows) for file in files)
    print(f"prompts        {len(rows)} ({seen - len(rows)} duplicates dropped)")
    return rows, [places[row["id"]] for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Prompts that a model cannot read


def text_check(
    policy: Any,
    judge: Any,
    wordings: Sequence[str],
    captions: bool = False,
    scored: Sequence[str] = (),
    drawn: Sequence[str] = ("prompt",),
) -> Callable[..., None]:
    """What raises PromptError for a row of which `drawn` cannot be drawn, or about whose `texts` cannot be asked.

    scored: the wordings whose answer is begun for the judge. CheckpointError for one that no answer can be begun for.
    """
    if scored:
        judge.question_ids("yes", scored=True)  # now: what is wrong with the tokenizer is of no row

    @functools.cache
    def check(text: str, is_prompt: bool) -> None:
        if is_prompt:
            policy.prompt_ids(text)
        for wording in wordings:
            judge.question_ids(wording.replace("{prompt}", text), scored=wording in scored)
        if captions:
            policy.caption_ids(text)

    def check_row(row: dict[str, Any], texts: Sequence[str] = ("prompt", "foil", "easy_foil")) -> None:
        for key in texts:
            if key in row:
                check(row[key], key in drawn)

    return check_row


def find_too_long(
    rows: Sequence[dict[str, Any]], places: Sequence[str], check: Callable[[dict[str, Any]], object], skip: bool = False
) -> tuple[list[int], str]:
    """Which rows the model finds too long, and in words the first of them, how many more, and the limit.

    check: raises the model's PromptError for a row that cannot be given to it. For a reason other than its length that is
    BadInput, unless without `skip` a row before it is too long, which is then what to say first.
    """
    found, first = [], ""
    for index, (row, place) in enumerate(zip(rows, places, strict=True)):
        try:
            check(row)
        except ValueError as error:
            if not hasattr(error, "exit_code"):
                raise
            if getattr(error, "too_long", False):
                found.append(index)
                first = first or f"{place}: {error}"
            elif skip or not found:
                raise BadInput(f"{place}: {error}") from None
    others = len({rows[index]["prompt"] for index in found}) - 1
    more = f"{others} more prompts are too long" if others > 1 else "1 more prompt is too long" if others else "no other is"
    return found, f"{first}; {more}"


def keep_readable(
    rows: list[dict[str, Any]],
    places: list[str],
    check: Callable[..., object],
    skip: bool,
    foils: tuple[int, str] | None = None,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The rows that text_check's `check` passes, and with `skip` how many prompts of each category were too long.

    Without `skip` BadInput for these. First the prompts are looked at, then the foils: an easy one is another prompt. foils:
    with `skip` the seed and kind of those that the rows still want, found among what is left.
    """
    left_out: set[tuple[str, str]] = set()
    for texts in (("prompt",), ("foil", "easy_foil")):
        found, words = find_too_long(rows, places, functools.partial(check, texts=texts), skip)
        if found and not skip:
            raise BadInput(f"{words}; --skip-long leaves them out")
        gone = set(found)
        left_out |= {(rows[index]["category"], rows[index]["id"]) for index in gone}
        rows = [row for index, row in enumerate(rows) if index not in gone]
        places = [place for index, place in enumerate(places) if index not in gone]
        if not rows:
            raise BadInput(f"{words}; --skip-long leaves nothing")
        if skip and foils and texts == ("prompt",):
            print_foils(rows, *foils)
    if skip:
        print(f"too long       {len(left_out)} prompts left out")
    return rows, Counter(category for category, _ in left_out)
