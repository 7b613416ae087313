"""gate.py: what it calls a bad round, on numbers made up for it and on real files."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import run

from common.records import Tokens, write_tokens
from common.writing import write_rows
from gate import SIGNALS, Answers, Difference, compare, differences, problems

UP, FLAT, DOWN = Difference(0.3, 0.6, 0.2, 0.4), Difference(0.3, 0.3, -0.1, 0.1), Difference(0.6, 0.3, -0.4, -0.2)


def judged(*changes: Difference) -> dict[str, Difference]:
    return dict(zip(SIGNALS, changes, strict=True))


CASES = {  # own pictures against the base's, against the last round's, judge against judge -> what is wrong
    "better in all": (judged(UP, UP, UP), {}, judged(FLAT, FLAT, FLAT), []),
    "better in one": (judged(FLAT, UP, FLAT), {}, judged(FLAT, FLAT, FLAT), []),
    "inverted data": (judged(DOWN, DOWN, DOWN), {}, judged(FLAT, FLAT, FLAT), ["less than the base's"]),
    "one read-out that training did not use falls": (
        judged(UP, UP, DOWN),
        {},
        judged(FLAT, FLAT, FLAT),
        ["less than the base's"],
    ),
    "random data": (judged(FLAT, FLAT, FLAT), {}, judged(FLAT, FLAT, FLAT), ["nothing says"]),
    "one falls since the last round": (judged(UP, UP, UP), judged(FLAT, FLAT, DOWN), judged(FLAT, FLAT, FLAT), []),
    "two fall since the last round": (
        judged(UP, UP, UP),
        judged(FLAT, DOWN, DOWN),
        judged(FLAT, FLAT, FLAT),
        ["the last good round's"],
    ),
    "a ruined judge": (judged(UP, UP, UP), {}, judged(FLAT, FLAT, DOWN), ["as a judge"]),
}


LIMITS = {"tolerance": 0.1, "round_tolerance": 0.055, "min_coverage": 0.5}  # the defaults


@pytest.mark.parametrize("case", CASES)
def test_what_is_a_bad_round(case):
    drawing, since_last, judging, expected = CASES[case]
    found = problems(drawing, since_last, judging, FLAT, coverage=0.9, **LIMITS)
    assert len(found) == len(expected)
    assert all(text in problem for problem, text in zip(found, expected, strict=True))


def test_a_judge_may_lose_a_tenth_in_all_and_5_5_percent_of_the_caption_in_one_round():
    for name in SIGNALS:
        for after, bad in ((0.91, False), (0.89, True)):
            judging = judged(FLAT, FLAT, FLAT) | {name: Difference(1.0, after, after - 1.01, after - 0.99)}
            assert bool(problems(judged(UP, UP, UP), {}, judging, FLAT, 0.9, **LIMITS)) is bad
    for after, bad in ((0.946, False), (0.944, True)):
        eroding = Difference(1.0, after, after - 1.01, after - 0.99)
        assert bool(problems(judged(UP, UP, UP), {}, judged(FLAT, FLAT, FLAT), eroding, 0.9, **LIMITS)) is bad


def test_answers_that_are_not_yes_or_no_are_a_bad_round():
    assert "coverage is 0.400" in problems(judged(UP, UP, UP), {}, judged(FLAT, FLAT, FLAT), FLAT, 0.4, **LIMITS)[0]


def test_differences_are_paired_by_prompt():
    """Prompts that differ much from each other, each a little better: only pairing sees it."""
    generator = np.random.default_rng(0)
    before = generator.normal(0, 10, 100)
    [found] = differences([(before, before + 0.1)])
    assert found.better and found.low == pytest.approx(0.1) and found.high == pytest.approx(0.1)


def test_prompts_are_paired_by_id_whatever_their_order_and_number():
    before = Answers(Path("b"), {"x": 0, "y": 1}, dict.fromkeys(SIGNALS, np.array([0.0, 10.0])), 1.0, {})
    after = Answers(
        Path("a"), {"y": 0, "only after": 1, "x": 2}, dict.fromkeys(SIGNALS, np.array([11.0, 1000.0, 1.0])), 1.0, {}
    )
    [found] = compare([(before, after)])
    assert found == judged(*[Difference(5.0, 6.0, 1.0, 1.0)] * 3)


# Files


def scored_file(path, better: float, judge: str = "after", drawn: str = "after", named: str = "", **header) -> None:
    """40 prompts with two pictures each, the read-outs of which lie `better` above a middling model's."""
    generator = np.random.default_rng(len(path.name))
    rows = []
    for i in range(80):
        own = float(np.clip(0.5 + better + generator.normal(0, 0.05), 0, 1))
        row = {"id": f"{named}{i // 2}", "prompt": f"prompt {i // 2}", "category": "color", "candidate": i % 2, "p_yes": own}
        row |= {"coverage": 0.9, "foil": "foil", "p_yes_foil": 0.3, "p_yes_again": own, "p_yes_foil_again": 0.3}
        rows.append(row | {"caption": -5.0 + 10 * (own - 0.5), "caption_foil": -8.0, "row": i})
    metadata = {"kind": "scored", "model": drawn, "model_hash": drawn, "judge": judge, "judge_hash": judge, "threshold": "0.5"}
    metadata |= {"questions": '["{prompt}?"]', "readouts": "{prompt}!", "seed": "0", "guidance": "1", "temperature": "1"}
    metadata |= {"codebook_size": "16", "image_tokens": "4"} | header
    write_tokens(path.with_suffix(".safetensors"), np.zeros((80, 4), np.int64), metadata)
    write_rows(path, rows)


@pytest.fixture
def files(tmp_path):
    """A function that writes the three files of a round and returns the command."""

    def make(after: float, rejudged: float = 0.0, **header):
        scored_file(tmp_path / "base.jsonl", 0.0, "base", "base")
        scored_file(tmp_path / "after.jsonl", after, **header)
        scored_file(tmp_path / "rejudged.jsonl", rejudged, "after", "base")
        return ["gate.py", *(x for name in ("base", "after", "rejudged") for x in (f"--{name}", tmp_path / f"{name}.jsonl"))]

    return make


def test_a_good_round_passes_and_is_written_down(files, tmp_path):
    done = run(*files(0.2))
    assert done.stdout.splitlines()[-2:] == ["a good round", str(tmp_path / "gate.json")]
    found = json.loads((tmp_path / "gate.json").read_text())
    assert found["good"] and found["problems"] == [] and found["models"] == {"base": "base", "after": "after"}
    own = found["own pictures, against the base's"]
    assert own.keys() == SIGNALS.keys() and own["question"]["after"] - own["question"]["before"] == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize(("after", "rejudged", "said"), [(-0.2, 0.0, "less than the base's"), (0.2, -0.2, "as a judge")])
def test_a_bad_round_exits_3_with_one_line_and_is_written_down(files, tmp_path, after, rejudged, said):
    done = run(*files(after, rejudged), ok=False)
    assert done.returncode == 3 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("gate.py: after is a bad round: ") and said in done.stderr
    assert json.loads((tmp_path / "gate.json").read_text())["good"] is False


def test_a_round_worse_than_the_last_is_bad_though_better_than_the_base(files, tmp_path):
    command = files(0.1)
    run(*command)
    scored_file(tmp_path / "last.jsonl", 0.3, "last", "last")
    scored_file(tmp_path / "last_rejudged.jsonl", 0.0, "last", "base")
    done = run(*command, "--last", tmp_path / "last.jsonl", "--last-rejudged", tmp_path / "last_rejudged.jsonl", ok=False)
    assert done.returncode == 3 and "the last good round's" in done.stderr
    done = run(*command, "--last", tmp_path / "last.jsonl", ok=False)
    assert done.returncode == 2 and "give both or neither" in done.stderr


def test_a_judge_that_erodes_since_the_last_round_is_bad_though_little_worse_than_the_base(files, tmp_path):
    command = files(0.3, -0.02)
    run(*command)
    scored_file(tmp_path / "last.jsonl", 0.1, "last", "last")
    scored_file(tmp_path / "last_rejudged.jsonl", 0.3, "last", "base")
    done = run(*command, "--last", tmp_path / "last.jsonl", "--last-rejudged", tmp_path / "last_rejudged.jsonl", ok=False)
    assert done.returncode == 3 and "its judging erodes: caption" in done.stderr


def test_files_that_cannot_be_compared_are_refused(files, tmp_path, scored):
    done = run(*files(0.2, questions='["other {prompt}?"]'), ok=False)
    assert done.returncode == 2 and "questions is" in done.stderr
    command = files(0.2)
    scored_file(tmp_path / "rejudged.jsonl", 0.0, "someone else", "base")
    done = run(*command, ok=False)
    assert done.returncode == 2 and "judge_hash is 'someone else', but" in done.stderr
    done = run("gate.py", "--base", scored, "--after", scored, "--rejudged", scored, "--out", tmp_path / "g.json", ok=False)
    assert done.returncode == 2 and "has no read-outs; score it with --readouts" in done.stderr
    command = files(0.2)
    scored_file(tmp_path / "other.jsonl", 0.2, named="other")
    done = run(*command[:3], "--after", tmp_path / "other.jsonl", *command[5:], ok=False)
    assert done.returncode == 2 and "other.jsonl: has no prompt id in common with" in done.stderr
    assert not (tmp_path / "g.json").exists() and not (tmp_path / "gate.json").exists()


@pytest.mark.parametrize("flag", ["--tolerance", "--round-tolerance", "--min-coverage"])
@pytest.mark.parametrize("value", ["-0.1", "nan", "inf"])
def test_a_limit_that_is_none_is_refused(files, tmp_path, flag, value):
    done = run(*files(0.2), flag, value, ok=False)
    assert done.returncode == 2 and f"{flag} must be at least 0, found {value}" in done.stderr
    assert not (tmp_path / "gate.json").exists()


def test_a_header_that_does_not_say_who_judged_is_refused(files, tmp_path):
    command = files(0.2)
    scored_file(tmp_path / "rejudged.jsonl", 0.0, "", "base")
    done = run(*command, ok=False)
    assert done.returncode == 2 and "rejudged.safetensors: metadata judge_hash is missing" in done.stderr


def test_readouts_are_the_models_own_answers(scored, tiny, policy, tmp_path):
    """score.py --readouts writes what look() says; the answers that train are those without it."""
    import torch

    from common.records import READOUTS, SCORED, read_rows

    out = tmp_path / "again.jsonl"
    run("score.py", "--model", tiny, "--rejudge", scored, "--out", out, "--readouts", "--device", "cpu")
    rows = [row for _, row in read_rows(out, SCORED | READOUTS)]
    before = [row for _, row in read_rows(scored, SCORED)]
    assert [row["p_yes"] for row in rows] == pytest.approx([row["p_yes"] for row in before], abs=1e-3)  # a pixel's rounding
    tokens = Tokens(out)
    assert tokens.metadata["readouts"] == "Is this a picture of {prompt}?"
    for i in (0, 7):
        row, picture = rows[i], policy.decode(torch.from_numpy(tokens[[i]]))
        asked = [f"Is this a picture of {row[key]}?" for key in ("prompt", "foil")]
        p_yes, _, logps = policy.judge_with_captions(picture, [asked], [[row["prompt"], row["foil"]]])
        assert [row["p_yes_again"], row["p_yes_foil_again"]] == pytest.approx(p_yes[0].tolist(), abs=1e-3)
        assert [row["caption"], row["caption_foil"]] == pytest.approx(logps[0].tolist(), abs=1e-2)
