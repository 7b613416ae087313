"""Which prompts a round gets: merging prompt files, the four states, replay, rest; and what is refused."""

import json
import sys
from collections import Counter

import pytest
from conftest import ROOT, run, spawn

import curriculum
from common.prompts import read_prompts
from common.writing import write_rows
from curriculum import DISCARDED, LEARNABLE, MASTERED, History


def write_prompts(path, prompts: dict[str, str], category: str = "color"):
    """prompts.jsonl from id -> prompt."""
    write_rows(path, ({"id": key, "prompt": text, "category": category} for key, text in prompts.items()))
    return path


def write_scored(path, p_yes: dict[str, list[float]], prompts: dict[str, str] | None = None):
    """scored.jsonl from id -> P(yes) of its candidates; a prompt's text is 'prompt ID' where `prompts` is silent."""
    rows = []
    for key, values in p_yes.items():
        prompt = (prompts or {}).get(key, f"prompt {key}")
        row = {"id": key, "prompt": prompt, "category": "color", "coverage": 1.0, "foil": "another", "p_yes_foil": 0.1}
        rows += [row | {"candidate": i, "p_yes": value, "row": len(rows) + i} for i, value in enumerate(values)]
    write_rows(path, rows)
    return path


def texts(*ids: str) -> dict[str, str]:
    return {key: f"prompt {key}" for key in ids}


def chosen_ids(path) -> list[str]:
    return [row["id"] for row in read_prompts(path)]


def table(stdout: str) -> dict[str, dict[str, int]]:
    """The printed table: category -> column -> number."""
    lines = stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("category"))
    names = lines[start].replace("this round", "this_round").split()[1:]
    rows = {}
    for line in lines[start + 1 :]:
        category, *numbers = line.split()
        rows[category] = dict(zip(names, map(int, numbers), strict=True))
        if category == "total":
            return rows
    raise AssertionError("no total")


def everything(directory) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# The rules


@pytest.mark.parametrize(
    ("aligned", "candidates", "state"), [(0, 4, DISCARDED), (1, 4, LEARNABLE), (3, 4, LEARNABLE), (4, 4, MASTERED)]
)
def test_a_prompts_state_is_how_many_of_its_candidates_are_aligned(aligned, candidates, state):
    assert curriculum.state_of(aligned, candidates) == state


def test_prompts_that_differ_in_space_case_and_full_stop_are_the_same():
    same = ["A red  book and a yellow vase.", " a red book\tand a yellow vase", "A RED BOOK AND A YELLOW VASE ."]
    assert len({curriculum.normalise(text) for text in same}) == 1
    assert curriculum.normalise("a red book") != curriculum.normalise("a red books")


def test_halves_round_up_and_a_positive_share_keeps_at_least_one():
    shares = {
        (0.1, 0): 0,
        (0.1, 1): 1,
        (0.1, 14): 1,
        (0.1, 15): 2,
        (0.5, 3): 2,
        (0.0, 50): 0,
        (1.0, 7): 7,
        (1e-9, 9): 1,
    }
    assert {key: curriculum.share_of(*key) for key in shares} == shares


def test_the_kept_share_is_of_all_and_spread_over_the_categories_and_changes_with_seed_and_round():
    mastered = [
        {"id": f"{name}{i}", "category": name} for name, count in (("a", 100), ("b", 20), ("c", 1)) for i in range(count)
    ]
    kept = curriculum.choose_kept(mastered, 0.1, seed=0, n_rounds=1)
    assert Counter(key[0] for key in kept) == {"a": 10, "b": 2}  # 12 of 121
    assert kept == curriculum.choose_kept(mastered[::-1], 0.1, seed=0, n_rounds=1)
    assert kept != curriculum.choose_kept(mastered, 0.1, seed=1, n_rounds=1)
    assert kept != curriculum.choose_kept(mastered, 0.1, seed=0, n_rounds=2)


@pytest.mark.parametrize(
    ("sizes", "share", "kept"),
    [
        ([1] * 40, 0.1, [1] * 4),
        ([1] * 4, 0.1, [1]),
        ([100, 20, 1], 0.1, [10, 2]),
        ([6, 3, 1], 0.5, [3, 2]),  # of 3, 1.5, 0.5: one more to either of two equal rests
        ([7, 2], 1.0, [7, 2]),
        ([7, 2], 0.0, []),
        ([15, 5], 1e-9, [1]),
    ],
)
def test_what_is_kept_is_the_share_of_all_mastered_by_largest_remainder(sizes, share, kept):
    mastered = [{"id": f"{name}-{i}", "category": str(name)} for name, size in enumerate(sizes) for i in range(size)]
    found = [Counter(key.split("-")[0] for key in curriculum.choose_kept(mastered, share, seed, 1)) for seed in range(20)]
    assert {count.total() for count in found} == {curriculum.share_of(share, sum(sizes))} == {sum(kept)}
    for count in found:
        for name, size in enumerate(sizes):  # never further than one from its exact part
            assert abs(count[str(name)] - sum(kept) * size / sum(sizes)) < 1
    assert sizes[0] > 1 or len({*map(str, found)}) > 1  # which of equal rests: others every time


@pytest.mark.parametrize(
    ("history", "recovered"),
    [
        (History(DISCARDED, LEARNABLE, 1), True),
        (History(DISCARDED, MASTERED, 1), True),
        (History(DISCARDED, DISCARDED, 1), False),
        (History(LEARNABLE, MASTERED, 1), False),
        (History(None, MASTERED, 1), False),
        (History(DISCARDED, LEARNABLE, 0), False),  # recovered earlier, and not scored since
    ],
)
def test_recovered_is_drawn_in_the_newest_round_after_a_discard(history, recovered):
    assert history.recovered(n_rounds=2) is recovered


# ---------------------------------------------------------------------------------------------------------------------
# Rounds


def test_round_one_is_every_prompt_once_in_file_order(tmp_path):
    (tmp_path / "color_train.txt").write_bytes(b"A red cube.\r\na blue vase\r\na  red cube\r\na green cat")
    (tmp_path / "shape_train.txt").write_bytes(b"a round dog\nA Blue Vase\n")
    out = tmp_path / "prompts.jsonl"
    done = run("curriculum.py", "--prompts", tmp_path / "color_train.txt", tmp_path / "shape_train.txt", "--out", out)
    rows = [(row["prompt"], row["category"]) for row in read_prompts(out)]
    assert rows == [
        ("A red cube.", "color"),
        ("a blue vase", "color"),
        ("a green cat", "color"),
        ("a round dog", "shape"),
    ]
    assert "color_train.txt: 4 prompts, 1 duplicates and 0 excluded dropped" in done.stdout
    assert "shape_train.txt: 2 prompts, 1 duplicates and 0 excluded dropped" in done.stdout
    assert table(done.stdout)["total"]["this_round"] == 4
    assert done.stdout.splitlines()[-1] == str(out)


def test_evaluation_prompts_are_taken_out_and_counted_per_file(tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", {"a": "a red cube", "b": "a cat", "c": "a dog", "d": "a cat."})
    (tmp_path / "v1.txt").write_text("A cat.\na cow\n")
    (tmp_path / "v2.txt").write_text("a  cat\nA Red Cube")
    flags = ("--exclude", tmp_path / "v1.txt", tmp_path / "v2.txt", "--out", tmp_path / "out.jsonl")
    done = run("curriculum.py", "--prompts", prompts, *flags)
    assert chosen_ids(tmp_path / "out.jsonl") == ["c"]
    assert "p.jsonl: 4 prompts, 1 duplicates and 2 excluded dropped" in done.stdout
    assert "v1.txt: takes out 1 prompts" in done.stdout and "v2.txt: takes out 2 prompts" in done.stdout


def test_foils_travel_with_their_prompts(tmp_path):
    rows = [
        {"id": "a", "prompt": "a cube", "category": "c", "foil": "a ball"},
        {"id": "b", "prompt": "x", "category": "c"},
    ]
    write_rows(tmp_path / "p.jsonl", rows)
    run("curriculum.py", "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "out.jsonl")
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == rows


def test_later_rounds_replay_the_discarded_keep_the_learnable_and_rest_the_mastered(tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", texts("unseen", "good", "mixed", "bad", "edge"))
    scored = write_scored(tmp_path / "s.jsonl", {"good": [0.9, 0.6], "bad": [0.1, 0.2], "mixed": [0.9, 0.1], "edge": [0.5]})
    common = ("--prompts", prompts, "--scored", scored, "--keep-mastered", 0, "--out", tmp_path / "out.jsonl")
    done = run("curriculum.py", *common)
    assert chosen_ids(tmp_path / "out.jsonl") == ["unseen", "mixed", "bad", "edge"]  # P(yes) = threshold is not aligned
    assert table(done.stdout)["color"] == {
        "prompts": 5,
        "mastered": 1,
        "kept": 0,
        "learnable": 1,
        "discarded": 2,
        "recovered": 0,
        "unseen": 1,
        "this_round": 4,
    }
    run("curriculum.py", *common, "--no-replay")
    assert chosen_ids(tmp_path / "out.jsonl") == ["unseen", "mixed"]
    run("curriculum.py", *common, "--threshold", 0.05)
    assert chosen_ids(tmp_path / "out.jsonl") == ["unseen"]
    run("curriculum.py", *common[:4], "--keep-mastered", 0.01, "--out", tmp_path / "out.jsonl")
    assert chosen_ids(tmp_path / "out.jsonl") == ["unseen", "good", "mixed", "bad", "edge"]


def test_the_last_round_that_scored_a_prompt_decides(tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", texts("a", "b", "c", "d"))
    first = write_scored(tmp_path / "1.jsonl", {"a": [0.1], "b": [0.1], "c": [0.9], "d": [0.1]})
    second = write_scored(tmp_path / "2.jsonl", {"a": [0.9], "b": [0.1], "d": [0.9]})
    third = write_scored(tmp_path / "3.jsonl", {"d": [0.9], "b": [0.6, 0.1]})
    flags = ("--prompts", prompts, "--keep-mastered", 0, "--out", tmp_path / "out.jsonl")
    done = run("curriculum.py", *flags, "--scored", first, second)
    assert chosen_ids(tmp_path / "out.jsonl") == ["b"]
    assert table(done.stdout)["total"]["recovered"] == 2  # a and d
    done = run("curriculum.py", *flags, "--scored", first, second, third)
    assert chosen_ids(tmp_path / "out.jsonl") == ["b"]
    assert table(done.stdout)["total"]["recovered"] == 1  # b; a and d were recovered a round ago
    run("curriculum.py", *flags, "--scored", second, first)
    assert chosen_ids(tmp_path / "out.jsonl") == ["a", "b", "d"]


def test_only_discarded_is_what_no_round_ever_accepted_a_picture_of(tmp_path):
    """Algorithm 2's pool: `lost` was accepted once and stays out of it, although a later round, drawn anew, accepts none."""
    prompts = write_prompts(tmp_path / "p.jsonl", texts("unseen", "lost", "never", "edge", "late", "good", "mixed"))
    answers = {"lost": [0.9, 0.1], "never": [0.1, 0.2], "edge": [0.5], "late": [0.3], "good": [0.9, 0.8], "mixed": [0.9, 0.1]}
    first = write_scored(tmp_path / "1.jsonl", answers)
    second = write_scored(tmp_path / "2.jsonl", {"lost": [0.1], "never": [0.3], "late": [0.9, 0.2]})
    flags = ("--prompts", prompts, "--out", tmp_path / "out.jsonl", "--only-discarded")
    run("curriculum.py", *flags, "--scored", first)
    assert chosen_ids(tmp_path / "out.jsonl") == ["never", "edge", "late"]
    done = run("curriculum.py", *flags, "--scored", first, second)
    assert chosen_ids(tmp_path / "out.jsonl") == ["never", "edge"]
    total = table(done.stdout)["total"]
    assert (total["recovered"], total["kept"], total["this_round"]) == (1, 0, 2)
    run("curriculum.py", *flags, "--scored", first, second, "--threshold", 0.4)
    assert chosen_ids(tmp_path / "out.jsonl") == ["never"]


def test_an_empty_pool_is_said_and_nothing_is_written(tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", texts("a", "b", "unseen"))
    scored = write_scored(tmp_path / "s.jsonl", {"a": [0.9, 0.1], "b": [0.9]})
    before = everything(tmp_path)
    flags = ("--scored", scored, "--only-discarded", "--out", tmp_path / "round2" / "out.jsonl")
    done = run("curriculum.py", "--prompts", prompts, *flags)
    assert done.returncode == 0 and not done.stderr and "nothing is left to be drawn again" in done.stdout.splitlines()[-1]
    assert everything(tmp_path) == before and not (tmp_path / "round2").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [((), "--only-discarded needs --scored"), (("--scored", "s.jsonl", "--no-replay"), "--no-replay: not allowed with")],
)
def test_only_discarded_needs_scores_and_is_a_replay(tmp_path, flags, message):
    done = run("curriculum.py", "--prompts", "p.jsonl", "--out", tmp_path / "o.jsonl", "--only-discarded", *flags, ok=False)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_category_left_out_is_neither_drawn_nor_counted_nor_in_the_pool(tmp_path):
    color = write_prompts(tmp_path / "c.jsonl", texts("good", "never"))
    spatial = write_prompts(tmp_path / "s.jsonl", texts("near", "far"), "spatial")
    flags = ("--prompts", color, spatial, "--out", tmp_path / "out.jsonl", "--leave-out", "spatial", "spatial")
    done = run("curriculum.py", *flags)
    assert chosen_ids(tmp_path / "out.jsonl") == ["good", "never"]
    assert "left out: spatial, 2 prompts\n" in done.stdout and table(done.stdout)["total"]["prompts"] == 2
    scored = write_scored(tmp_path / "1.jsonl", {"good": [0.9, 0.1], "never": [0.1], "near": [0.1], "far": [0.9, 0.1]})
    for more, expected in (((), ["good", "never"]), (("--only-discarded",), ["never"])):
        done = run("curriculum.py", *flags, "--scored", scored, *more)
        assert chosen_ids(tmp_path / "out.jsonl") == expected and "ignored" not in done.stdout


def test_scored_prompts_that_are_not_asked_for_are_ignored_and_counted(tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", texts("a", "held"))
    scored = write_scored(tmp_path / "s.jsonl", {"gone": [0.1], "held": [0.1], "a": [0.1]})
    (tmp_path / "v.txt").write_text("prompt held")
    flags = ("--scored", scored, "--exclude", tmp_path / "v.txt", "--out", tmp_path / "out.jsonl")
    done = run("curriculum.py", "--prompts", prompts, *flags)
    assert "2 prompts ignored" in done.stdout and chosen_ids(tmp_path / "out.jsonl") == ["a"]


def test_the_same_command_writes_the_same_bytes_in_another_process(tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", texts(*(f"p{i}" for i in range(200))))
    scored = write_scored(tmp_path / "s.jsonl", {f"p{i}": [0.9] for i in range(200)})
    command = (sys.executable, ROOT / "curriculum.py", "--prompts", prompts, "--scored", scored, "--out")
    spawn(*command, tmp_path / "one.jsonl", env={"PYTHONHASHSEED": "1"})
    spawn(*command, tmp_path / "two.jsonl", env={"PYTHONHASHSEED": "2"})
    assert len(chosen_ids(tmp_path / "one.jsonl")) == 20
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Refusals

GOOD = {"a": [0.9, 0.1], "b": [0.1, 0.1]}


def line(**changes) -> str:
    row = {"id": "a", "prompt": "prompt a", "category": "color", "candidate": 7, "p_yes": 0.5, "coverage": 1.0}
    return json.dumps(row | {"foil": "x", "p_yes_foil": 0.1, "row": 9} | changes) + "\n"


REFUSALS = {
    "candidate twice": (line(candidate=1), (), "s.jsonl:5: candidate 1 of id 'a' is given twice"),
    "another text": (line(prompt="prompt b"), (), "s.jsonl:5: id 'a' is 'prompt b' here and 'prompt a' elsewhere"),
    "absurd candidate": (line(candidate=2**40), (), f"s.jsonl:5: candidate is {2**40}, but numbers end at 65535"),
    "NaN": (line(p_yes=float("nan")), (), "s.jsonl:5: not JSON: NaN"),
    "missing scores": ("", ("--scored", "none.jsonl"), "none.jsonl: cannot be read"),
    "empty scores": ("", ("--scored", "empty.jsonl"), "empty.jsonl: holds no scored candidate"),
    "a round twice": ("", ("--scored", "s.jsonl", "./s.jsonl"), "s.jsonl is given twice"),
    "missing prompts": ("", ("--prompts", "none.txt"), "none.txt: cannot be read"),
    "empty prompts": ("", ("--prompts", "p.jsonl", "empty.jsonl"), "empty.jsonl: holds no prompt"),
    "one id, two texts": ("", ("--prompts", "p.jsonl", "q.jsonl"), "q.jsonl: id 'a' is 'other' here and 'prompt a'"),
    "all excluded": ("", ("--exclude", "p.jsonl"), "--exclude takes out all 2 prompts"),
    "unknown category": ("", ("--leave-out", "color", "x"), "--leave-out x: no prompt is of this category; there are color"),
    "no category": ("", ("--leave-out", "color"), "--leave-out color: leaves no prompt"),
    "nothing left": ("", ("--threshold", "0.05", "--keep-mastered", "0"), "2 of 2 are mastered (--keep-mastered 0.0)"),
    "in a file": ("", ("--out", "p.jsonl/out.jsonl"), "--out p.jsonl/out.jsonl: Not a directory"),
    "out is a directory": ("", ("--out", "."), "is a directory"),
    "out is an input": ("", ("--out", "./p.jsonl"), "--out p.jsonl: is also given to --prompts"),
}


@pytest.mark.parametrize(("extra", "flags", "message"), REFUSALS.values(), ids=REFUSALS)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(tmp_path, monkeypatch, extra, flags, message):
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path / "p.jsonl", texts("a", "b"))
    write_prompts(tmp_path / "q.jsonl", {"a": "other"})
    (tmp_path / "empty.jsonl").touch()
    with open(write_scored(tmp_path / "s.jsonl", GOOD), "a") as file:
        file.write(extra)
    before = everything(tmp_path)
    done = run("curriculum.py", "--prompts", "p.jsonl", "--scored", "s.jsonl", "--out", "out.jsonl", *flags, ok=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
    assert everything(tmp_path) == before


@pytest.mark.parametrize("flags", [("--threshold", "1"), ("--threshold", "nan"), ("--keep-mastered", "-0.1"), ("--keep", "1")])
def test_a_number_out_of_range_is_refused_with_flag_and_value(tmp_path, flags):
    done = run("curriculum.py", "--prompts", "p.jsonl", "--out", tmp_path / "out.jsonl", *flags, ok=False)
    assert done.returncode == 2 and flags[0] in done.stderr.splitlines()[-1] and flags[1] in done.stderr.splitlines()[-1]


def test_the_real_command_refuses_with_one_line(tmp_path):
    command = (
        sys.executable,
        ROOT / "curriculum.py",
        "--prompts",
        tmp_path / "none.txt",
        "--out",
        tmp_path / "out.jsonl",
    )
    done = spawn(*command, ok=False)
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []
    assert done.stderr == f"curriculum.py: {tmp_path}/none.txt: cannot be read: No such file or directory\n"
