"""The card of a saved model: its header as the hub reads it, its history over rounds, its scores filled in afterwards."""

import json
import shutil

import pytest
from conftest import pair_up, run, score

from common import model_card
from common.model_card import SCORES, card, fill_scores, read_history

ONE = {"script": "sft.py", "model": "deepseek-community/Janus-Pro-1B", "model_hash": "a", "data_hash": "b", "examples": 7}
ONE |= {
    "prompts": 3,
    "steps": 2,
    "batch_size": 64,
    "lr": 1e-5,
    "nonunified": 0.25,
    "question": "q {prompt}?",
    "own_judge": True,
}
ONE |= {"command": "sft.py --data x.jsonl"}


def header_of(text: str) -> dict[str, str]:
    """The YAML header of a card, its plain keys."""
    start, header, _ = text.split("---\n", 2)
    assert start == ""
    return dict(line.split(": ", 1) for line in header.splitlines() if ": " in line)


def test_a_hub_model_is_named_as_the_base_and_a_directory_is_not():
    header = header_of(card([ONE], by_transformers=True))
    assert header["base_model"] == ONE["model"] and header["library_name"] == "transformers"
    assert header["base_model_relation"] == "finetune" and header["pipeline_tag"] == "text-to-image"
    header = header_of(card([ONE | {"model": "./base"}], by_transformers=False))
    assert "base_model" not in header and "library_name" not in header


def test_the_huggingface_library_reads_the_header():
    from huggingface_hub import ModelCard

    data = ModelCard(card([ONE], by_transformers=True)).data
    assert data.base_model == ONE["model"] and "nonunified" in data.tags and data.library_name == "transformers"


def test_a_model_that_another_judged_says_so():
    own, other = (card([ONE, ONE | {"own_judge": own}], by_transformers=True) for own in (True, False))
    assert "judged itself, with no label" in own and "another model judged" in other and "judged itself" not in other


def test_scores_are_filled_in_between_the_marks_and_nowhere_else(tmp_path):
    file = tmp_path / "README.md"
    file.write_text(card([ONE], by_transformers=True))
    before = file.read_text()
    fill_scores(file, [["round", "score"], ["0", "0.500"], ["1", "0.250"]])
    assert "| 0 | 0.500 |\n| 1 | 0.250 |" in file.read_text()
    assert SCORES.sub("", file.read_text()) == SCORES.sub("", before)
    fill_scores(file, [["round", "score"], ["0", "0.125"]])
    assert "0.500" not in file.read_text() and "| 0 | 0.125 |" in file.read_text()
    file.write_text("somebody's own card")
    fill_scores(file, [["round", "score"], ["0", "0.125"]])
    assert file.read_text() == "somebody's own card"


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"model": 3}]', "[[]]"])
def test_a_history_that_is_none_is_empty(tmp_path, content):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "history.json").write_text(content)
    assert read_history(str(tmp_path)) == []


def test_a_trained_model_has_its_card_and_the_next_round_goes_on_with_it(trained_dpo, pairs, tmp_path):
    first = trained_dpo[1]
    text, history = (first / "README.md").read_text(), read_history(str(first))
    assert header_of(text)["library_name"] == "transformers" and "python dpo.py --pairs" in text
    assert [(one["script"], one["examples"]) for one in history] == [("dpo.py", len(pairs.read_text().splitlines()))]
    assert 0 < history[0]["nonunified"] < 1 and f"| {history[0]['nonunified']} |" in text
    data = pair_up(score(first, tmp_path), tmp_path / "data").with_name("sft.jsonl")
    run("sft.py", "--data", data, "--out", tmp_path / "second", "--max-steps", 1, "--device", "cpu")
    later = read_history(str(tmp_path / "second"))
    assert later[0] == history[0] and later[1]["script"] == "sft.py" and later[1]["model"] == f"./{first.name}"
    assert "after 2 trainings" in (tmp_path / "second" / "README.md").read_text()


def test_the_summary_of_a_run_fills_the_cards_of_its_rounds(scored, tmp_path):
    for number in range(3):
        directory = tmp_path / f"round{number}"
        (directory / "model").mkdir(parents=True)
        for suffix in (".jsonl", ".safetensors"):
            shutil.copy(scored.with_suffix(suffix), directory / f"heldout{suffix}")
        (directory / "model" / "README.md").write_text(card([ONE], by_transformers=True))
    run("summary.py", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "summary.jsonl").read_text().splitlines()]
    first, second = ((tmp_path / f"round{number}" / "model" / "README.md").read_text() for number in (1, 2))
    assert f"| 1 | {rows[1]['nonunified']:.3f} |" in first and "\n| 2 |" not in first and "\n| 2 |" in second
    assert model_card.PAPER in first
