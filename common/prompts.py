"""Prompts: files as they are published, one id for one text, and a foil for each.

A foil is what a picture's judge is also asked about: the prompt row's own, else the prompt with one attribute changed by rule
(foils.py), else another prompt of the category. Only a judge that looks says no to it.
"""

import hashlib
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from common.command import BadInput, printable
from common.foils import hard_foil
from common.records import check_value, read_lines, read_rows, stable_seed

# ---------------------------------------------------------------------------------------------------------------------
# Files


def prompt_id(category: str, prompt: str) -> str:
    """A short id that depends on the prompt's text alone, so that files can be reordered, merged and split."""
    slug = re.sub(r"[^a-z0-9]+", "_", category.lower()).strip("_") or "prompt"
    return f"{slug[:32]}-{hashlib.sha256(prompt.encode()).hexdigest()[:10]}"


def read_prompts(path: str | Path) -> list[dict[str, str]]:
    """Rows of id, prompt, category and, where the file has one, foil; in file order, duplicates left in.

    Three formats, told apart by content: T2I-CompBench text (one prompt a line, category = the file's stem without
    ``_train``, ``_val`` or ``_test``), GenEval ``evaluation_metadata.jsonl`` (``prompt`` and ``tag``), and our own
    ``prompts.jsonl`` (``id``, ``prompt``, ``category``, optionally ``foil``). Raises BadInput for a file with no prompt.
    """
    path = Path(path)
    if path.suffix in (".jsonl", ".json"):
        rows = [_jsonl_prompt(path, number, row) for number, row in read_rows(path, {"prompt": "text"})]
    else:
        category = re.sub(r"(?<=.)_(train|val|test)$", "", path.stem)
        rows = []
        for _number, line in read_lines(path):
            if prompt := line.strip():
                rows.append({"id": prompt_id(category, prompt), "prompt": prompt, "category": category})
    if not rows:
        raise BadInput(f"{path}: holds no prompt")
    return rows


def _jsonl_prompt(path: Path, number: int, row: dict[str, Any]) -> dict[str, str]:
    """One row of our own format or of GenEval's, in our own columns."""
    category = row.get("category", row.get("tag"))
    if category is None:
        raise BadInput(f"{path}:{number}: key 'category' (or GenEval's 'tag') is missing")
    prompt = {"id": row.get("id"), "prompt": row["prompt"], "category": category}
    if "foil" in row:
        prompt["foil"] = row["foil"]
    for key in ("category", "foil", "id"):
        if (key in row or key == "category") and (problem := check_value(prompt[key], "text")):
            raise BadInput(f"{path}:{number}: {key} {problem}, found {json.dumps(prompt[key])[:60]}")
    if "id" not in row:
        prompt["id"] = prompt_id(category, row["prompt"])
    return prompt


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


def prompts_to_draw(paths: list[Path], seed: int, foils: str) -> list[dict[str, str]]:
    """The prompts of all files, duplicates dropped and counted, each with its foils."""
    prompts: dict[str, dict[str, str]] = {}
    seen = 0
    for path in paths:
        for row in read_prompts(path):
            seen += 1
            if prompts.setdefault(row["id"], row)["prompt"] != row["prompt"]:
                raise BadInput(f"{path}: id {row['id']!r} names two prompts")
    texts = {row["prompt"]: row for row in reversed(prompts.values())}  # the first of equal texts wins
    rows = [row for row in prompts.values() if texts[row["prompt"]] is row]
    print(f"prompts        {len(rows)} ({seen - len(rows)} duplicates dropped)")
    print(f"foils          {hard_shares(rows, add_foils(rows, seed, foils))}")
    return rows
