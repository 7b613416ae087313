"""From scores to training data: the selection, the gate, joining by id, and what is refused."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run, spawn

import make_pairs
from common import candidates as scored_files
from common.records import DISCARD, PAIRS, SFT, Tokens, read_rows, write_tokens
from common.writing import write_rows
from make_pairs import Candidate, Quality, Settings, quality_problems, select

METADATA = {"model": "m", "model_hash": "abc", "seed": "0", "guidance": "1.0", "temperature": "1.0"}
METADATA |= {"judge": "m", "judge_hash": "abc", "codebook_size": "1000", "image_tokens": "4", "kind": "scored"}
OUTPUTS = sorted(make_pairs.OUTPUTS)


def write_scored(path, p_yes: dict[str, list[float]], order=None, foil: float = 0.1, coverage: float = 0.9, **metadata):
    """scored.jsonl and its tokens from id -> P(yes) of its candidates; `order` shuffles the rows, not the tokens.

    A picture's first two tokens say which it is: the number of its prompt's place in `p_yes`, and its candidate.
    """
    rows, pictures = [], []
    for place, (key, values) in enumerate(p_yes.items()):
        for candidate, value in enumerate(values):
            row = {"id": key, "prompt": f"prompt {key}", "category": key[0], "candidate": candidate, "p_yes": value}
            rows.append(row | {"coverage": coverage, "foil": "another", "p_yes_foil": foil, "row": len(rows)})
            pictures.append([place, candidate, 7, 7])
    write_rows(path, rows if order is None else (rows[i] for i in order))
    write_tokens(path.with_suffix(".safetensors"), np.array(pictures), METADATA | metadata)
    return path


def rows_of(path, columns) -> list[dict]:
    return [row for _, row in read_rows(path, columns)]


def everything(directory) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


def candidates(*p_yes: float) -> list[Candidate]:
    return [Candidate(0, number, 10 + number, value) for number, value in enumerate(p_yes)]


def numbers(selection: make_pairs.Selection) -> tuple[list[int], list[tuple[int, int]]]:
    """The candidate numbers of (SFT pictures, pairs)."""
    pairs = [(chosen.candidate, rejected.candidate) for chosen, rejected in selection.pairs]
    return [one.candidate for one in selection.sft], pairs


# ---------------------------------------------------------------------------------------------------------------------
# The rules


@pytest.mark.parametrize(
    ("p_yes", "settings", "sft", "pairs"),
    [
        ((0.6, 0.9, 0.2, 0.4), Settings(), [1, 0], [(1, 2)]),
        ((0.5, 0.51), Settings(), [1], [(1, 0)]),  # P(yes) = threshold is not aligned
        ((0.6, 0.9, 0.2, 0.4), Settings(threshold=0.8), [1], [(1, 2)]),
        ((0.9, 0.9, 0.1, 0.1), Settings(), [0, 1], [(0, 2)]),  # ties go to the lower number
        ((0.9, 0.8, 0.7), Settings(), [0, 1, 2], []),
        ((0.1, 0.2), Settings(), [], []),
        ((0.7, 0.9, 0.8, 0.1), Settings(per_prompt=2), [1, 2], [(1, 3)]),
        ((0.6, 0.9, 0.2, 0.4), Settings(pairs_per_prompt=2), [1, 0], [(1, 2), (0, 3)]),
        ((0.6, 0.9, 0.2, 0.4), Settings(pairs_per_prompt=9), [1, 0], [(1, 2), (0, 3)]),
        ((0.6, 0.9, 0.2), Settings(pairs_per_prompt=9), [1, 0], [(1, 2)]),
        ((0.6, 0.9, 0.2, 0.4), Settings(pairs_per_prompt=2, margin=0.3), [1, 0], [(1, 2)]),
        ((0.7, 0.2), Settings(margin=0.5), [0], [(0, 1)]),  # 0.7 - 0.2 < 0.5 in floating point
        ((0.7, 0.2), Settings(margin=0.51), [0], []),
    ],
)
def test_the_selection_of_one_prompt(p_yes, settings, sft, pairs):
    selection = select(candidates(*p_yes), settings)
    assert numbers(selection) == (sft, pairs)
    assert numbers(select(candidates(*p_yes)[::-1], settings)) == (sft, pairs)


def test_the_selection_counts_what_it_drops():
    selection = select(candidates(0.6, 0.9, 0.2, 0.4, 0.8), Settings(per_prompt=1, margin=0.5, pairs_per_prompt=2))
    assert (selection.accepted, len(selection.sft), selection.too_close, len(selection.pairs)) == (3, 1, 1, 1)


def test_ties_go_to_the_earlier_file():
    selection = select([Candidate(1, 0, 0, 0.9), Candidate(0, 5, 1, 0.9), Candidate(0, 6, 2, 0.1)], Settings())
    assert selection.pairs == [(Candidate(0, 5, 1, 0.9), Candidate(0, 6, 2, 0.1))]


@pytest.mark.parametrize(
    ("quality", "problems"),
    [
        (Quality(0.05, 0.5, 1, 2), []),
        (Quality(0.0499, 0.5, 1, 2), ["separation 0.0499 is under 0.05"]),
        (Quality(-0.3, 0.49, 1, 2), ["separation -0.3 is under 0.05", "coverage 0.49 is under 0.5"]),
        (Quality(0.5, 0.9, 2, 2), ["all 2 candidates were accepted"]),
        (Quality(0.5, 0.9, 0, 2), ["all 2 candidates were rejected"]),
    ],
)
def test_the_gate_names_every_problem_with_its_numbers(quality, problems):
    found = quality_problems(quality, min_separation=0.05, min_coverage=0.5)
    assert len(found) == len(problems) and all(map(str.startswith, found, problems))


# ---------------------------------------------------------------------------------------------------------------------
# The files

P_YES = {"c1": [0.9, 0.1, 0.6], "c2": [0.2, 0.4, 0.3], "s1": [0.8, 0.7, 0.95], "s2": [0.3, 0.5, 0.55]}


@pytest.mark.parametrize("block", [2, 128])
@pytest.mark.parametrize("order", [None, [11, 4, 7, 0, 3, 9, 8, 1, 2, 10, 5, 6]])
def test_every_row_finds_its_own_picture_whatever_the_order(tmp_path, monkeypatch, order, block):
    monkeypatch.setattr(scored_files, "BLOCK", block)
    scored = write_scored(tmp_path / "scored.jsonl", P_YES, order=order)
    done = run("make_pairs.py", "--scored", scored, "--out", tmp_path / "out")
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == OUTPUTS and done.stdout.splitlines()[-1] == str(out)
    ids = list(P_YES) if order is None else ["s2", "c2", "s1", "c1"]  # by first appearance

    tokens, sft = Tokens(out / "sft.jsonl"), rows_of(out / "sft.jsonl", SFT)
    found = [(row["id"], row["p_yes"], *tokens[[row["row"]]][0, :2]) for row in sft]
    best_first = {key: sorted(((-p, i) for i, p in enumerate(P_YES[key]) if p > 0.5)) for key in ids}
    assert found == [(key, -p, list(P_YES).index(key), i) for key in ids for p, i in best_first[key]]

    tokens, pairs = Tokens(out / "pairs.jsonl"), rows_of(out / "pairs.jsonl", PAIRS)
    expected = {"c1": (0, 1), "s2": (2, 0)}
    assert [row["id"] for row in pairs] == [key for key in ids if key in expected]
    for i, row in enumerate(pairs):
        chosen, rejected = expected[row["id"]]
        assert (row["chosen"], row["rejected"]) == (2 * i, 2 * i + 1)
        assert (row["p_yes_chosen"], row["p_yes_rejected"]) == (P_YES[row["id"]][chosen], P_YES[row["id"]][rejected])
        place = list(P_YES).index(row["id"])
        assert tokens[[2 * i, 2 * i + 1]][:, :2].tolist() == [[place, chosen], [place, rejected]]

    assert rows_of(out / "discard.jsonl", DISCARD) == [{"id": "c2", "prompt": "prompt c2", "category": "c", "best_p_yes": 0.4}]


def test_the_report_counts_everything(tmp_path):
    scored = write_scored(tmp_path / "scored.jsonl", P_YES)
    flags = ("--per-prompt", 2, "--margin", 0.3, "--out", tmp_path / "out")
    lines = run("make_pairs.py", "--scored", scored, *flags).stdout.splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["category", "prompts", "candidates", "accepted", "sft", "pairs", "discard", "nonunified"],
        ["c", "2", "6", "2", "2", "1", "1", "0.667"],
        ["s", "2", "6", "4", "3", "0", "0", "0.333"],
        ["total", "4", "12", "6", "5", "1", "1", "0.500"],
    ]
    assert lines[4] == "nonunified score 0.5000, mean over 4 prompts"
    assert lines[5] == "dropped: 1 pairs by --margin 0.3, 1 aligned pictures by --per-prompt 2"
    separation = np.mean([p for values in P_YES.values() for p in values]) - 0.1
    assert f"separation {separation:.4f} (least 0.05), coverage 0.9000" in lines[6] and "6 of 12 (50.0%)" in lines[6]


def test_the_nonunified_score_is_a_mean_over_prompts_not_candidates(tmp_path):
    scored = write_scored(tmp_path / "scored.jsonl", {"a": [0.9], "b": [0.1, 0.9, 0.1, 0.1]})
    done = run("make_pairs.py", "--scored", scored, "--out", tmp_path / "out")
    assert "nonunified score 0.3750, mean over 2 prompts" in done.stdout


def test_categories_that_are_left_out_give_nothing_and_are_counted(tmp_path):
    """The same data, and the same numbers for the gate, as of a file without them; a category named twice is one."""
    scored = write_scored(tmp_path / "scored.jsonl", P_YES | {"x1": [0.9, 0.99, 0.9], "y1": [0.1, 0.2, 0.3, 0.9]})
    done = run("make_pairs.py", "--scored", scored, "--out", tmp_path / "out", "--leave-out", "x", "y", "x")
    without = run("make_pairs.py", "--scored", write_scored(tmp_path / "few.jsonl", P_YES), "--out", tmp_path / "few")
    told = ["left out: x, 1 prompts with 3 candidates", "left out: y, 1 prompts with 4 candidates"]
    assert done.stdout.splitlines()[:-1] == [*told, *without.stdout.splitlines()[:-1]]
    for name in OUTPUTS:
        if name.endswith(".jsonl"):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "few" / name).read_bytes()
    assert Tokens(tmp_path / "out" / "sft.jsonl").metadata["left_out"] == '["x", "y"]'


def test_the_metadata_says_where_the_data_comes_from(tmp_path):
    scored = write_scored(tmp_path / "scored.jsonl", P_YES, questions='["Q?"]', versions="torch 1")
    run("make_pairs.py", "--scored", scored, "--out", tmp_path / "out", "--margin", 0.25)
    kept = {key: METADATA[key] for key in METADATA if key != "kind"} | {"questions": '["Q?"]', "versions": "torch 1"}
    ours = {"threshold": "0.5", "margin": "0.25", "per_prompt": "0", "pairs_per_prompt": "1"}
    ours |= {"sources": json.dumps([str(scored)]), "separation": "0.425000", "coverage": "0.900000", "nonunified": "0.500000"}
    for kind in ("sft", "pairs"):
        assert Tokens(tmp_path / "out" / f"{kind}.jsonl").metadata == kept | ours | {"kind": kind}


@pytest.mark.parametrize("other", [{"seed": "1"}, {"steps": "8"}])
def test_candidates_of_several_files_drawn_otherwise_are_joined_by_id(tmp_path, other):
    first = write_scored(tmp_path / "1.jsonl", {"a": [0.9, 0.8], "b": [0.1]})
    second = write_scored(tmp_path / "2.jsonl", {"b": [0.2, 0.7], "a": [0.3, 0.95]}, **other)
    run("make_pairs.py", "--scored", first, second, "--out", tmp_path / "out")
    pairs, tokens = rows_of(tmp_path / "out" / "pairs.jsonl", PAIRS), Tokens(tmp_path / "out" / "pairs.jsonl")
    assert [(row["id"], row["p_yes_chosen"], row["p_yes_rejected"]) for row in pairs] == [
        ("a", 0.95, 0.3),
        ("b", 0.7, 0.1),
    ]
    assert tokens[[0, 1, 2, 3]][:, :2].tolist() == [[1, 1], [1, 0], [0, 1], [1, 0]]
    assert other.items() <= tokens.metadata.items() and "models" not in tokens.metadata


def test_parts_of_one_run_may_come_in_several_files(tmp_path):
    first = write_scored(tmp_path / "1.jsonl", {"a": [0.9, 0.1]})
    second = write_scored(tmp_path / "2.jsonl", {"b": [0.9, 0.1, 0.2, 0.3], "a": [0.5]})
    lines = second.read_text().splitlines(keepends=True)
    lines[4] = lines[4].replace('"candidate": 0', '"candidate": 2')
    second.write_text("".join(lines))
    run("make_pairs.py", "--scored", first, second, "--out", tmp_path / "out")
    assert [row["id"] for row in rows_of(tmp_path / "out" / "pairs.jsonl", PAIRS)] == ["a", "b"]


def test_mixed_models_are_allowed_when_asked_for_and_named_in_the_metadata(tmp_path):
    first = write_scored(tmp_path / "1.jsonl", P_YES)
    second = write_scored(tmp_path / "2.jsonl", P_YES, model="m2", model_hash="def")
    run("make_pairs.py", "--scored", first, second, "--out", tmp_path / "out", "--mix-models")
    metadata = Tokens(tmp_path / "out" / "sft.jsonl").metadata
    assert (metadata["model"], metadata["model_hash"], metadata["models"]) == ("m2", "def", '["m", "m2"]')


def test_rounds_that_are_merged_say_which_model_drew_each_row_and_count_by_round(tmp_path):
    """The growing set of Algorithm 2: round 2 drew again what round 1 had discarded. Training goes on from the last model."""
    first = write_scored(tmp_path / "1.jsonl", {"a": [0.9, 0.1], "b": [0.1, 0.2], "c": [0.3, 0.3]})
    second = write_scored(tmp_path / "2.jsonl", {"b": [0.8, 0.4, 0.7], "c": [0.2, 0.1]}, model="m2", model_hash="def", seed="1")
    done = run("make_pairs.py", "--scored", first, second, "--out", tmp_path / "out", "--mix-models")
    lines = (tmp_path / "out" / "sft.jsonl").read_text().splitlines()
    base, later = ({"model": "m", "model_hash": "abc"}, {"model": "m2", "model_hash": "def"})
    found = [(row["id"], row["p_yes"], {key: row[key] for key in base}) for row in map(json.loads, lines)]
    assert found == [("a", 0.9, base), ("b", 0.8, later), ("b", 0.7, later)]
    (one, two) = map(json.loads, (tmp_path / "out" / "pairs.jsonl").read_text().splitlines())
    assert one.items() >= base.items() and two.items() >= later.items()
    assert [row["id"] for row in rows_of(tmp_path / "out" / "discard.jsonl", DISCARD)] == ["c"]
    for kind in ("sft", "pairs"):
        header = Tokens(tmp_path / "out" / f"{kind}.jsonl").metadata
        assert (header["model"], header["model_hash"], header["base"], header["base_hash"]) == ("m2", "def", "m", "abc")
        assert "nonunified" not in header  # of which model would it be?
    table = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith(str(tmp_path)) and "jsonl" in line]
    assert table == [["m", "6", "1", "1", "1", "1"], ["m2", "5", "2", "1", "2", "1"]]
    alone = run("make_pairs.py", "--scored", first, "--out", tmp_path / "alone")
    assert "drawn by" not in alone.stdout and "model" not in (tmp_path / "alone" / "sft.jsonl").read_text()


def test_both_pictures_of_a_pair_are_of_one_model():
    """The base's worst is under the later model's worst, and is not set against the later model's best."""
    drawn = [Candidate(0, 0, 0, 0.1, "old"), Candidate(0, 1, 1, 0.6, "old"), Candidate(1, 0, 0, 0.9, "new")]
    drawn.append(Candidate(1, 1, 1, 0.3, "new"))
    assert select(drawn, Settings()).pairs == [(drawn[2], drawn[3])]
    assert select(drawn, Settings(pairs_per_prompt=2)).pairs == [(drawn[2], drawn[3]), (drawn[1], drawn[0])]
    assert select(drawn[:3], Settings()).pairs == [(drawn[1], drawn[0])]  # the new one has nothing to stand against


def test_a_picture_that_comes_twice_is_refused_among_merged_rounds(tmp_path):
    first = write_scored(tmp_path / "1.jsonl", P_YES)
    second = write_scored(tmp_path / "2.jsonl", {"c2": [0.9, 0.2]}, model="m2", model_hash="def", seed="1")
    again = write_scored(tmp_path / "3.jsonl", {"c2": [0.3]}, model="m2", model_hash="def", seed="1", judge="m3")
    flags = ("--scored", first, second, again, "--mix-models", "--out", tmp_path / "out")
    done = run("make_pairs.py", *flags, ok=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
    assert f"{again}: holds pictures of {second} (same model" in done.stderr and "candidate 0 of id 'c2'" in done.stderr


def test_files_take_their_names_together_tensors_first_and_the_discard_pool_last(tmp_path, monkeypatch):
    """self_improve.sh goes on where it stopped: discard.jsonl says that the others are there."""
    names, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (names.append(target.name), replace(source, target)))
    run("make_pairs.py", "--scored", write_scored(tmp_path / "scored.jsonl", P_YES), "--out", tmp_path / "out")
    assert names[-5:] == ["sft.safetensors", "pairs.safetensors", "sft.jsonl", "pairs.jsonl", "discard.jsonl"]


def test_a_rerun_writes_the_same_bytes_over_the_old(tmp_path):
    scored = write_scored(tmp_path / "scored.jsonl", P_YES)
    run("make_pairs.py", "--scored", scored, "--out", tmp_path / "out")
    before = everything(tmp_path)
    run("make_pairs.py", "--scored", scored, "--out", tmp_path / "out")
    assert everything(tmp_path) == before


def test_the_outputs_may_lie_beside_their_scores(tmp_path):
    scored = write_scored(tmp_path / "scored.jsonl", P_YES)
    run("make_pairs.py", "--scored", scored, "--out", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*OUTPUTS, "scored.jsonl", "scored.safetensors"])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Peak memory of the real command on 30,000 pictures of 576 tokens (35 MB) against 300 of them."""
    peaks = []
    for n_prompts in (30, 3000):
        directory = tmp_path / str(n_prompts)
        directory.mkdir()
        rows = (
            {"id": f"p{i // 10}", "prompt": "x" * 200, "category": "c", "candidate": i % 10, "p_yes": i % 10 / 10}
            | {"coverage": 1.0, "foil": "y", "p_yes_foil": 0.1, "row": i}
            for i in range(10 * n_prompts)
        )
        write_rows(directory / "scored.jsonl", rows)
        write_tokens(
            directory / "scored.safetensors", np.zeros((10 * n_prompts, 576), np.uint16), METADATA | {"image_tokens": "576"}
        )
        argv = ["--scored", str(directory / "scored.jsonl"), "--out", str(directory / "out")]
        code = f"import make_pairs; make_pairs.main(make_pairs.parse_args({argv})); "
        code += "print(open('/proc/self/status').read())"
        status = spawn(sys.executable, "-c", code).stdout
        # VmHWM, because ru_maxrss would start at pytest's own size
        peaks.append(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)
    assert peaks[1] - peaks[0] < 20, peaks


# ---------------------------------------------------------------------------------------------------------------------
# The gate

GATE = {
    "no separation": ({"foil": 0.52}, (), "separation 0.005 is under 0.05"),
    "a higher bar": ({}, ("--min-separation", 0.5), "separation 0.425 is under 0.5"),
    "low coverage": ({"coverage": 0.3}, (), "coverage 0.3 is under 0.5"),
    "all accepted": ({}, ("--threshold", 0.05), "all 12 candidates were accepted"),
    "all rejected": ({}, ("--threshold", 0.99), "all 12 candidates were rejected"),
    "two reasons": ({"foil": 0.52, "coverage": 0.3}, (), "about the same P(yes); coverage 0.3 is under"),
}


@pytest.mark.parametrize(("data", "flags", "message"), GATE.values(), ids=GATE)
def test_the_gate_refuses_with_exit_code_3_and_writes_nothing(tmp_path, data, flags, message):
    scored = write_scored(tmp_path / "scored.jsonl", P_YES, **data)
    before = everything(tmp_path)
    done = run("make_pairs.py", "--scored", scored, "--out", tmp_path / "out", *flags, ok=False)
    assert done.returncode == 3 and done.stderr.count("\n") == 1 and message in done.stderr
    assert "refused" in done.stdout and everything(tmp_path) == before


def test_a_kind_of_foil_that_the_judge_does_not_see_is_named(tmp_path):
    """Of ten prompts or more, two accepted pictures each: numbers it does not see, colors it does; of nine nothing is said."""
    rows, kinds = [], {"two dogs": ("three dogs", 10, 0.9), "a red car": ("a blue car", 30, 0.0), "a dog": ("a cat", 9, 0.9)}
    for prompt, (foil, count, p_yes_foil) in kinds.items():
        for number in range(count):
            row = {"id": f"{prompt} {number}", "prompt": f"{prompt} {number}x", "category": "c", "coverage": 1.0}
            row |= {"foil": f"{foil} {number}x", "p_yes_foil": p_yes_foil}
            rows += [row | {"candidate": i, "p_yes": p, "row": len(rows) + i} for i, p in enumerate((0.9, 0.8, 0.1))]
    write_rows(tmp_path / "scored.jsonl", rows)
    write_tokens(tmp_path / "scored.safetensors", np.zeros((len(rows), 4), int), METADATA)
    said = run("make_pairs.py", "--scored", tmp_path / "scored.jsonl", "--out", tmp_path / "out").stdout.splitlines()
    at = next(i for i, line in enumerate(said) if line.startswith("foil changes"))
    assert said[at + 1].split() == ["color", "60", "0", "0.000"] and said[at + 2].split() == ["number", "20", "20", "1.000"]
    assert said[at + 3].split() == ["other", "words", "18", "18", "1.000"]
    (warning,) = (line for line in said if line.startswith("warning"))
    assert "of foils that change number, 20 of 20 accepted pictures were accepted too: the judge hardly sees it" in warning


def test_force_overrides_the_gate_and_is_recorded(tmp_path):
    scored = write_scored(tmp_path / "scored.jsonl", P_YES, foil=0.52)
    done = run("make_pairs.py", "--scored", scored, "--out", tmp_path / "out", "--force")
    assert "forced" in done.stdout
    for kind in ("sft", "pairs"):
        assert Tokens(tmp_path / "out" / f"{kind}.jsonl").metadata["forced"].startswith("separation 0.005 is under 0.05")
    run("make_pairs.py", "--scored", scored, "--out", tmp_path / "fine", "--force", "--min-separation", 0)
    assert "forced" not in Tokens(tmp_path / "fine" / "sft.jsonl").metadata


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def line(**changes) -> str:
    row = {"id": "c1", "prompt": "prompt c1", "category": "c", "candidate": 7, "p_yes": 0.5, "coverage": 1.0}
    return json.dumps(row | {"foil": "x", "p_yes_foil": 0.1, "row": 3} | changes) + "\n"


REFUSALS = {
    "candidate twice": (line(candidate=1), (), "s.jsonl:13: candidate 1 of id 'c1' is given twice"),
    "another text": (line(prompt="other"), (), "s.jsonl:13: id 'c1' has prompt 'other' here and 'prompt c1' before"),
    "another category": (line(category="x"), (), "s.jsonl:13: id 'c1' has category 'x' here and 'c' before"),
    "another text, next line": (
        line() + line(candidate=8, prompt="other"),
        (),
        "s.jsonl:14: id 'c1' has prompt 'other'",
    ),
    "row outside": (line(row=12), (), "s.jsonl:13: row is 12, but s.safetensors has 12 rows"),
    "NaN": (line(p_yes=float("nan")), (), "s.jsonl:13: not JSON: NaN"),
    "bool": (line(candidate=True), (), "s.jsonl:13: candidate must be an integer"),
    "missing": ("", ("--scored", "none.jsonl"), "none.safetensors: not found"),
    "missing rows": ("", ("--scored", "lone.jsonl"), "lone.jsonl: cannot be read"),
    "empty": ("", ("--scored", "s.jsonl", "empty.jsonl"), "empty.jsonl: holds no scored candidate"),
    "truncated tensors": ("", ("--scored", "cut.jsonl"), "cut.safetensors: not a readable safetensors file"),
    "bad token, met while writing": (
        "",
        ("--scored", "bad.jsonl"),
        "bad.safetensors: token 7 is outside the codebook of 5",
    ),
    "no model": ("", ("--scored", "nobody.jsonl"), "nobody.safetensors: metadata model_hash is missing"),
    "same file twice": ("", ("--scored", "s.jsonl", "s.jsonl"), "s.jsonl: holds pictures of s.jsonl (same model"),
    "rejudged copy": ("", ("--scored", "s.jsonl", "rejudged.jsonl"), "rejudged.jsonl: holds pictures of s.jsonl"),
    "other model": (
        "",
        ("--scored", "s.jsonl", "later.jsonl"),
        "drawn by different models: s.safetensors by m (abc) and later.safetensors by m2 (def)",
    ),
    "other length": (
        "",
        ("--scored", "s.jsonl", "long.jsonl"),
        "long.safetensors: 6 tokens a picture, but s.safetensors has 4",
    ),
    "other codebook": (
        "",
        ("--scored", "s.jsonl", "code.jsonl"),
        "code.safetensors: codebook of 999, but s.safetensors: 1000",
    ),
    "zero pairs": ("", ("--margin", "0.9"), "no pair is left: 2 dropped by --margin 0.9"),
    "zero pairs, forced": ("", ("--threshold", "0.99", "--force"), "no pair is left: 0 dropped by --margin 0"),
    "a category that is not there": (
        "",
        ("--leave-out", "c", "x"),
        "--leave-out x: no prompt is of this category; there are c, s",
    ),
    "nothing left": ("", ("--leave-out", "c", "s"), "--leave-out c s: leaves no prompt"),
    "out of other categories": (
        "",
        ("--out", "earlier", "--leave-out", "s"),
        "holds another run: in sft.safetensors left_out is",
    ),
    "in a file": ("", ("--out", "s.jsonl/out"), "--out s.jsonl/out: Not a directory"),
    "out is a file": ("", ("--out", "s.jsonl"), "--out s.jsonl: is a file"),
    "out of other flags": (
        "",
        ("--out", "earlier", "--margin", "0.1"),
        "holds another run: in sft.safetensors margin is 0.0",
    ),
    "out of other sources": (
        "",
        ("--out", "earlier", "--scored", "rejudged.jsonl"),
        "holds another run: in sft.safetensors",
    ),
    "out of unknown origin": ("", ("--out", "stray"), "--out stray: holds pairs.jsonl, but no safetensors file"),
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A directory with s.jsonl, which is fine, and its troublesome relatives."""
    monkeypatch.chdir(tmp_path)
    write_scored(tmp_path / "s.jsonl", P_YES)
    run("make_pairs.py", "--scored", "s.jsonl", "--out", "earlier")
    write_scored(tmp_path / "rejudged.jsonl", P_YES, judge="m2", judge_hash="def")
    write_scored(tmp_path / "later.jsonl", P_YES, model="m2", model_hash="def")
    write_scored(tmp_path / "code.jsonl", P_YES, codebook_size="999")
    write_scored(tmp_path / "bad.jsonl", P_YES, codebook_size="5")
    write_scored(tmp_path / "nobody.jsonl", P_YES, model_hash="")
    write_scored(tmp_path / "empty.jsonl", P_YES, seed="1").write_text("\n")
    write_scored(tmp_path / "lone.jsonl", P_YES).unlink()
    write_scored(tmp_path / "long.jsonl", P_YES)
    write_tokens(tmp_path / "long.safetensors", np.zeros((12, 6), int), METADATA | {"image_tokens": "6"})
    write_scored(tmp_path / "cut.jsonl", P_YES)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "s.safetensors").read_bytes()[:-1])
    (tmp_path / "stray").mkdir()
    (tmp_path / "stray" / "pairs.jsonl").touch()
    return tmp_path


@pytest.mark.parametrize(("extra", "flags", "message"), REFUSALS.values(), ids=REFUSALS)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(files, extra, flags, message):
    with open("s.jsonl", "a") as file:
        file.write(extra)
    before = everything(files)
    done = run("make_pairs.py", "--scored", "s.jsonl", "--out", "out", *flags, ok=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
    assert everything(files) == before


@pytest.mark.parametrize(
    "flags",
    [
        ("--threshold", "1.0"),
        ("--margin", "-0.1"),
        ("--margin", "nan"),
        ("--per-prompt", "-1"),
        ("--pairs-per-prompt", "0"),
        ("--min-separation", "2.0"),
        ("--min-coverage", "-1.0"),
        ("--mix", "1"),
    ],
)
def test_a_number_out_of_range_is_refused_with_flag_and_value(files, flags):
    before = everything(files)
    done = run("make_pairs.py", "--scored", "s.jsonl", "--out", "out", *flags, ok=False)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and flags[0] in last and flags[1] in last and everything(files) == before


def test_the_real_command_exits_with_2_for_bad_input_and_3_for_the_gate(files):
    command = (sys.executable, ROOT / "make_pairs.py", "--scored", files / "s.jsonl", "--out", files / "out")
    for flags, code, start in (
        (("--margin", "0.9"), 2, "no pair"),
        (("--min-coverage", "0.95"), 3, "data-quality gate: "),
    ):
        done = spawn(*command, *flags, ok=False)
        assert done.returncode == code and done.stderr.startswith(f"make_pairs.py: {start}")
        assert done.stderr.count("\n") == 1 and not (files / "out").exists()


def test_a_failure_while_writing_takes_nothing_of_an_earlier_run_away(files, monkeypatch):
    before = everything(files)
    monkeypatch.setattr(make_pairs.PictureCopy, "close", lambda self: (_ for _ in ()).throw(OSError(28, "No space left")))
    done = run("make_pairs.py", "--scored", "s.jsonl", "--out", "earlier", ok=False)
    assert done.returncode == 1 and "No space left" in done.stderr and len(done.stderr.splitlines()) == 1
    assert everything(files) == before
