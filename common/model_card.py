"""The README.md of a saved model, in the form of the hub's model cards: where it comes from, how it was trained, its scores.

    training/history.json    what is known of every training on the way from the base model, the last one at the end
    README.md                the same for people, with the hub's YAML header; analysis/summary.py fills its scores in

So a model can be uploaded as it is: `hf upload NAME round3/model`.
"""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

from common.answers import answer_form
from common.records import parse_json
from common.writing import whole_file, write_json

HISTORY = Path("training") / "history.json"
SCORES = re.compile("(?<=<!-- scores -->\n).*?(?=<!-- end of scores -->)", re.DOTALL)  # what may be filled in later
PAPER = "https://arxiv.org/abs/2507.16663"
ANSWERED = {"reply": ", to be answered in words, which were read", "score": ", of whose answer P(1) was read"}  # by form
COLUMNS = {  # of the history's table
    "script": "script",
    "examples": "examples",
    "prompts": "prompts",
    "steps": "steps",
    "batch_size": "batch",
    "lr": "learning rate",
    "train": "trained",
    "seed": "seed",
    "nonunified": "score before",
}


def read_history(model: str) -> list[dict[str, Any]]:
    """The trainings that a model has gone through, by the record in its directory; [] where there is none to read."""
    try:
        found = parse_json((Path(model) / HISTORY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    sound = isinstance(found, list) and all(isinstance(one, dict) and isinstance(one.get("model"), str) for one in found)
    return found if sound else []


def describe_training(
    script: str, settings: dict[str, Any], model: str, examples: list[dict], steps: int, header: dict[str, str], world: int
) -> dict[str, Any]:
    """What the history says of one training; header: of the data's tensor file, world: the number of processes.

    Of a directory its name alone is told: where it lay is nobody's business.
    """
    flags = ["batch_size", "lr", "warmup", "weight_decay", "train", "layers", "lora_rank", "beta", "nll_weight", "seed"]
    flags += ["reference_hash"]  # of dpo.py, where it is not the model that was trained
    found = {"script": script, "model": model, "model_hash": settings["model_hash"], "data_hash": settings["data_hash"]}
    if Path(model).is_dir():
        found["model"] = f"./{Path(model).resolve().name}"  # never to be taken for the hub's owner/name
    found |= {"examples": len(examples), "prompts": len({row["id"] for row in examples}), "steps": steps}
    found |= {key: settings[key] for key in flags if settings.get(key) is not None}
    if re.fullmatch(r"[01]\.\d+", header.get("nonunified", "")):  # make_pairs.py has put it there
        found["nonunified"] = float(header["nonunified"])  # of the model that drew, over the training prompts
    found["own_judge"] = header.get("judge_hash", header.get("model_hash")) == header.get("model_hash")
    launch = f"torchrun --nproc-per-node {world}" if world > 1 else "python"
    return found | {
        "question": first_question(header),
        "answer": answer_form(header),
        "command": f"{launch} {script} {shlex.join(sys.argv[1:])}",
    }


def first_question(header: dict[str, str]) -> str:
    """The first of the questions by which the pictures were judged; "" where the header does not say."""
    try:
        questions = parse_json(header.get("questions", ""))
    except ValueError:
        return ""
    return str(questions[0]) if isinstance(questions, list) and questions else ""


def write_model_card(directory: Path, history: list[dict[str, Any]]) -> None:
    """Write HISTORY and README.md into the directory of a saved model."""
    write_json(directory / HISTORY, history)
    config = parse_json((directory / "config.json").read_text(encoding="utf-8"))
    with whole_file(directory / "README.md", "w") as file:
        file.write(card(history, config.get("model_type") is not None))


def card(history: list[dict[str, Any]], by_transformers: bool) -> str:
    """A model card. by_transformers: whether that library loads the model."""
    base, last = history[0]["model"], history[-1]
    on_hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", base) is not None
    header = [f"base_model: {base}", "base_model_relation: finetune"] if on_hub else []
    header += ["library_name: transformers"] if by_transformers else []
    header += ["pipeline_tag: text-to-image", "tags:", "- nonunified", "- self-improvement", "- any-to-any"]
    name = f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{base.removeprefix('./')}`"
    own = all(one.get("own_judge") is True for one in history)
    judged = "judged itself, with no label and no other model" if own else "another model judged"
    answered = ANSWERED.get(last.get("answer", ""), "")
    times = f"{len(history)} trainings" if len(history) > 1 else "one training"
    rows = [[str(one.get(key, "")) for key in COLUMNS] for one in history]
    lines = ["| " + " | ".join(cells) + " |" for cells in ([*COLUMNS.values()], ["---"] * len(COLUMNS), *rows)]
    return "\n".join(
        [
            *("---", *header, "---", ""),
            f"# {Path(base).name}, improved by itself",
            "",
            f"{name} after {times} on pictures that it drew and {judged}: the method of "
            f"[Self-Contradiction as Self-Improvement]({PAPER}), also called Turning Internal Gap into Self-Improvement. "
            f"For each prompt several pictures were drawn, of each `{last['question']}` was asked{answered}, and the "
            "model learnt from those that were accepted.",
            "",
            "## Scores",
            "",
            "<!-- scores -->\nNot measured yet.\n<!-- end of scores -->",
            "",
            "## Training",
            "",
            "The score before is the nonunified score of the model that drew the training pictures, over the training prompts: "
            "the share of its own pictures that it rejects.",
            "",
            *lines,
            "",
            "The last one was:",
            "",
            f"```bash\n{last['command']}\n```",
            "",
            f"Everything that decides the result is in `{HISTORY}` and `training/settings.json`.",
            "",
        ]
    )


def fill_scores(file: Path, rows: list[list[str]]) -> None:
    """Write a table, its headings first, between the marks of a model card; a file without them is left as it is."""
    text = file.read_text(encoding="utf-8")
    lines = ["| " + " | ".join(cells) + " |" for cells in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    new = SCORES.sub(lambda _: "\n".join(["", *lines, "", ""]), text, count=1)
    if new != text:
        with whole_file(file, "w") as card:
            card.write(new)
