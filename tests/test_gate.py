"""gate.py: what it calls a bad round, on numbers made up for it and on real files."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import run

from common.records import Tokens, write_tokens
from common.writing import write_rows
from gate import LEVEL, OWN, SIGNALS, Answers, Difference, compare, differences, look, problems, together, verdict

UP, FLAT, DOWN = Difference(0.3, 0.6, 0.2, 0.4), Difference(0.3, 0.3, -0.1, 0.1), Difference(0.6, 0.3, -0.4, -0.2, 0.3)


def judged(*changes: Difference) -> dict[str, Difference]:
    return dict(zip(SIGNALS, changes, strict=True))


CASES = {  # own pictures against the base's, against the last round's, judge against judge -> what is wrong, if anything
    "better in all": (judged(UP, UP, UP), {}, judged(FLAT, FLAT, FLAT), []),
    "better in one": (judged(FLAT, UP, FLAT), {}, judged(FLAT, FLAT, FLAT), []),
    "inverted data": (judged(DOWN, DOWN, DOWN), {}, judged(FLAT, FLAT, FLAT), ["less than the base's"]),
    "one read-out that training did not use falls": (
        judged(UP, UP, DOWN),
        {},
        judged(FLAT, FLAT, FLAT),
        ["less than the base's"],
    ),
    "random data": (judged(FLAT, FLAT, FLAT), {}, judged(FLAT, FLAT, FLAT), []),
    "one falls since the last round": (judged(UP, UP, UP), judged(FLAT, FLAT, DOWN), judged(FLAT, FLAT, FLAT), []),
    "two fall since the last round": (
        judged(UP, UP, UP),
        judged(FLAT, DOWN, DOWN),
        judged(FLAT, FLAT, FLAT),
        ["the last good round's"],
    ),
    "a ruined judge": (judged(UP, UP, UP), {}, judged(FLAT, FLAT, DOWN), ["as a judge"]),
}


LIMITS = {"tolerance": 0.1, "round_tolerance": 0.04, "min_coverage": 0.5}  # the defaults


@pytest.mark.parametrize("case", CASES)
def test_what_is_a_bad_round(case):
    drawing, since_last, judging, expected = CASES[case]
    found = problems(drawing, since_last, judging, FLAT, coverage=0.9, **LIMITS)
    assert len(found) == len(expected)
    assert all(text in problem for problem, text in zip(found, expected, strict=True))
    assert verdict(found, drawing) == ("bad" if expected else "undecided" if case == "random data" else "good")


def test_a_judge_may_be_shown_to_have_lost_a_tenth_in_all_and_4_percent_of_the_caption_in_one_round():
    for name in SIGNALS:
        for lost, bad in ((0.099, False), (0.101, True), (None, False)):
            judging = judged(FLAT, FLAT, FLAT) | {name: Difference(1.0, 0.5, -0.6, -0.4, lost)}
            assert bool(problems(judged(UP, UP, UP), {}, judging, FLAT, 0.9, **LIMITS)) is bad
    for lost, bad in ((0.039, False), (0.041, True), (None, False)):
        eroding = Difference(1.0, 0.5, -0.6, -0.4, lost)
        assert bool(problems(judged(UP, UP, UP), {}, judged(FLAT, FLAT, FLAT), eroding, 0.9, **LIMITS)) is bad


def test_what_a_judge_has_lost_is_the_least_that_is_shown():
    generator = np.random.default_rng(0)
    before = generator.normal(6, 2, 128)
    exact, noisy, sightless = differences(
        [(before, 0.9 * before), (before, 0.9 * before + generator.normal(0, 1, 128)), (before - 6, before)]
    )
    assert exact.least_loss == pytest.approx(0.1) and exact.lost(0.099) and not exact.lost(0.101)
    assert 0.03 < noisy.least_loss < 0.1 and sightless.least_loss is None and not sightless.lost(0)
    for seed in range(20):  # what is weak, but there, can be shown to be lost
        weak = generator.normal(0, 0.2, 128)
        weak += 0.07 - weak.mean()  # four standard errors above 0
        assert differences([(weak, generator.normal(0, 0.02, 128))])[0].lost(0.1), seed


def called_bad(true_loss: float, share: float, rounds: int, seed: int = 0) -> float:
    """How often a judge that has lost so much is shown to have lost more than a share, looking at 4, 8 and 16 pictures.

    A caption read-out of 128 prompts. Its mean, and the standard deviations of read-out and change between prompts and within
    one, are those of the tiny Show-o's judge after SFT (seed 0): 5.5; 5.5 and 3.4; .53 and .40.
    """
    generator, drawn, bad = np.random.default_rng(seed), 0, np.zeros(rounds, bool)
    own = generator.normal(5.5, 5.5, (rounds, 128))
    changes = -true_loss * own + generator.normal(0, 0.53, own.shape)
    sums = np.zeros((2, rounds, 128))
    for more in (4, 4, 8):
        sums += np.sqrt(more) * np.stack([generator.normal(0, spread, own.shape) for spread in (3.4, 0.4)])
        drawn += more
        before = own + sums[0] / drawn
        bad |= [one.lost(share) for one in differences(list(zip(before, before + changes + sums[1] / drawn, strict=True)))]
    return float(bad.mean())


def test_answers_that_are_not_yes_or_no_are_a_bad_round():
    assert "coverage is 0.400" in problems(judged(UP, UP, UP), {}, judged(FLAT, FLAT, FLAT), FLAT, 0.4, **LIMITS)[0]


def test_differences_are_paired_by_prompt():
    """Prompts that differ much from each other, each a little better: only pairing sees it."""
    generator = np.random.default_rng(0)
    before = generator.normal(0, 10, 100)
    [found] = differences([(before, before + 0.1)])
    assert found.better and found.low == pytest.approx(0.1) and found.high == pytest.approx(0.1)


def test_prompts_are_paired_by_id_whatever_their_order_and_number():
    before = answers([[0.0], [10.0]], ["x", "y"])
    after = answers([[11.0], [1000.0], [1.0]], ["y", "only after", "x"])
    found = compare({OWN: (before, after)})
    assert found == {OWN: judged(*[Difference(5.0, 6.0, 1.0, 1.0)] * 3)}  # of 0 before nothing can be lost


def answers(values, ids=None) -> Answers:
    """What read_answers makes of pictures (P, n), or a list a prompt, that have the same value in every read-out."""
    values = [np.array(own, float) for own in values]
    columns = [[len(own), own.mean(), ((own - own.mean()) ** 2).sum()] for own in values]
    pictures, means, squares = (np.array(column)[:, None].repeat(3, 1) for column in zip(*columns, strict=True))
    places = {id: i for i, id in enumerate(ids or map(str, range(len(values))))}
    return Answers(Path("a"), places, pictures[:, 0].astype(int), means, squares, 1.0, {})


def test_several_files_are_as_one_with_all_their_pictures():
    generator = np.random.default_rng(0)
    values = generator.normal(0, 1, (5, 9))
    parts = [answers(values[:, :4]), answers(values[::-1, 4:5], "43210"), answers(values[:, 5:])._replace(coverage=0.1)]
    found, wanted = together(parts), answers(values)
    for key in ("pictures", "means", "squares"):
        assert np.allclose(getattr(found, key), getattr(wanted, key)), key
    assert found.coverage == pytest.approx((5 + 4 * 0.1) / 9) and found.prompts == wanted.prompts


def test_what_can_be_seen_is_what_a_simulation_sees():
    """Chance from the pictures at hand is that of drawing again; and seen, prompts and pictures each show it in 80 %."""

    def draw(means, pictures=4):
        return means[..., None] + generator.normal(0, 0.4, (*means.shape, pictures))

    generator = np.random.default_rng(0)
    means, changes = generator.normal(0.5, 0.3, 400), generator.normal(0, 0.1, 400)  # each prompt has a change of its own
    base = draw(means)
    found = look(answers(base), answers(draw(means + changes)), matters=0.1)["question"]
    again = [draw(means).mean() for _ in range(400)]
    assert found.by_chance == pytest.approx(np.sqrt(2) * np.std(again), rel=0.1)  # 3.5 % of it are the 400 draws'
    assert found.matters == pytest.approx(0.1 * base.mean())
    wanted = ((found.seen, 400, 4), (found.matters, found.prompts, 4), (found.matters, 400, found.pictures))
    for change, n_prompts, pictures in wanted:
        pairs = []
        for _ in range(300):
            before = generator.normal(0.5, 0.3, n_prompts)
            after = before + generator.normal(change, 0.1, n_prompts)
            pairs.append((draw(before, pictures).mean(1), draw(after, pictures).mean(1)))
        shown = [one.better for one in differences(pairs)]
        assert np.mean(shown) == pytest.approx(0.8, abs=0.1)  # 2.3 points are the 300 rounds', 4 the first one's variances'
    assert look(answers(base), answers(draw(3 * means)), matters=0.01)["question"].pictures is None  # too different prompts


def test_what_cannot_be_said_is_not():
    one, several = answers([[0.1], [0.5], [0.2]]), answers([[0.3, 0.4], [0.5, 0.5], [0.9, 0.2]])
    found = look(one, several, 0.2)["question"]
    assert found.by_chance is None and found.pictures is None and found.seen > 0 and found.prompts > 0  # one picture each
    assert look(answers([[0.1, 0.2]]), answers([[0.1, 0.3]]), 0.2)["question"].seen is None  # one prompt
    found = look(answers([[-0.1, 0.0], [0.1, -0.2]]), several, 0.2)["question"]
    assert found.matters is None and found.prompts is None and found.by_chance > 0  # a share of less than nothing


def misled(level: float, rounds: int, seed: int = 0, later: bool = False) -> dict[str, float]:
    """How often a round that changed nothing ends as what, after at most three looks at 4, 8 and 16 pictures of 128 prompts.

    Base and new model draw alike, the pictures of a prompt with the correlations that the read-outs have in the shipped
    models' held-out pictures (tiny Janus .99 and .65, tiny Show-o .98 and .58). later: a last good round too, of 4 pictures.
    """
    generator, drawn, ends = np.random.default_rng(seed), 0, np.array(["undecided"] * rounds)
    mixed = np.linalg.cholesky([[1, 0.98, 0.6], [0.98, 1, 0.6], [0.6, 0.6, 1]])
    base, new, last = sums = np.zeros((3, rounds, 128, 3))
    for more in (4, 4, 8):
        who = sums[: 2 if drawn else 3]  # the last good round draws no more
        who += generator.normal(0, np.sqrt(more), who.shape) @ mixed.T
        drawn += more
        befores = [base / drawn, last / 4] if later else [base / drawn]
        columns = [(new / drawn - before).transpose(0, 2, 1).reshape(-1, 128) for before in befores]
        pairs = [(np.zeros(128), change) for change in np.concatenate(columns)]
        found = np.array([one[:4] for one in differences(pairs, level)]).reshape(len(befores), rounds, 3, 4)
        for i in np.flatnonzero(ends == "undecided"):
            drawing, *others = (judged(*(Difference(*one) for one in side)) for side in found[:, i])
            wrong = problems(drawing, others[0] if later else {}, judged(FLAT, FLAT, FLAT), FLAT, 0.9, **LIMITS)
            ends[i] = verdict(wrong, drawing)
    return {name: float((ends == name).mean()) for name in ("good", "bad")}


def test_who_looks_three_times_is_rarely_misled():
    """At most 5 % good and 5 % bad by the intervals that gate.py has, and more by those of one look."""
    assert max(misled(LEVEL, 1000).values()) <= 0.05 < min(misled(0.95, 200).values())


def test_a_judge_that_lost_what_it_may_is_rarely_called_bad():
    """By each look 1 %, by up to three hardly more, and one that lost twice as much nearly always."""
    assert called_bad(0.04, 0.04, 2000) <= 0.02 and called_bad(0.03, 0.04, 500) <= 0.002
    assert called_bad(0.08, 0.04, 200) >= 0.95


# Files


def scored_file(path, better: float, judge: str = "after", drawn: str = "after", named: str = "", **header) -> None:
    """40 prompts with two pictures each, the read-outs of which lie `better` above a middling model's."""
    generator = np.random.default_rng(len(path.name) + int(header.get("seed", 0)))
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
    assert done.stdout.splitlines()[-2:] == ["a good round", str(tmp_path / "gate.json")] and "warning" not in done.stdout
    found = json.loads((tmp_path / "gate.json").read_text())
    assert found["good"] and found["verdict"] == "good" and found["problems"] == []
    assert found["models"] == {"base": "base", "after": "after"}
    own = found["own pictures, against the base's"]
    assert own.keys() == SIGNALS.keys() and own["question"]["after"] - own["question"]["before"] == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize(("after", "rejudged", "said"), [(-0.2, 0.0, "less than the base's"), (0.2, -0.2, "as a judge")])
def test_a_bad_round_exits_3_with_one_line_and_is_written_down(files, tmp_path, after, rejudged, said):
    done = run(*files(after, rejudged), ok=False)
    assert done.returncode == 3 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("gate.py: after is a bad round: ") and said in done.stderr
    found = json.loads((tmp_path / "gate.json").read_text())
    assert found["good"] is False and found["verdict"] == "bad"


def test_intervals_over_few_prompts_come_with_a_warning(files, tmp_path):
    command = files(0.2)
    lines = (tmp_path / "base.jsonl").read_text().splitlines()
    (tmp_path / "base.jsonl").write_text("\n".join(lines[:30]) + "\n")
    assert "warning: intervals over 15 prompts are too narrow to be relied upon; give 20 at least" in run(*command).stdout


def test_a_round_of_which_nothing_is_shown_is_undecided_and_says_what_would_show_it(files, tmp_path):
    done = run(*files(0.0), ok=False)
    assert done.returncode == 4 and len(done.stderr.splitlines()) == 1
    assert (
        done.stderr.startswith("gate.py: after is undecided: nothing says") and "40 prompts of 2 pictures show" in done.stderr
    )
    found = json.loads((tmp_path / "gate.json").read_text())
    assert found["good"] is False and found["verdict"] == "undecided" and found["problems"] == []
    seen = found["what can be seen"]["question"]
    assert (
        f"{seen['seen']:.3f} or more four times in five; {seen['matters']:.3f} takes {seen['prompts']} prompts" in done.stdout
    )
    assert seen["by_chance"] == pytest.approx(0.05 / np.sqrt(40), rel=0.2)  # 2 x .05^2 / 2 pictures, over 40 prompts


def test_further_pictures_decide_what_was_undecided(files, tmp_path):
    command = files(0.0)
    assert run(*command, ok=False).returncode == 4
    more = {"base": ("base", "base"), "after": ("after", "after"), "rejudged": ("after", "base")}
    for seed in ("1", "2"):
        for name, (judge, drawn) in more.items():
            scored_file(tmp_path / f"{name}-{seed}.jsonl", 0.05 * (name == "after"), judge, drawn, seed=seed)
    command = ["gate.py"]
    for name in more:
        command += [f"--{name}", *(tmp_path / f"{name}{number}.jsonl" for number in ("", "-1", "-2"))]
    for name, drawn in (("last", "last"), ("last_rejudged", "base")):  # which was decided by one file
        scored_file(tmp_path / f"{name}.jsonl", 0.0, "last", drawn)
        command += [f"--{name.replace('_', '-')}", tmp_path / f"{name}.jsonl"]
    assert "40 prompts of 6 pictures show" in run(*command).stdout
    scored_file(tmp_path / "rejudged-2.jsonl", -0.3, "after", "base", seed="2")
    found = run(*command, ok=False)  # the judge is worse on the third file, which the last good round's judge never saw
    assert found.returncode == 3 and "as a judge" in found.stderr and "erodes" not in found.stderr


def test_files_that_do_not_go_together_are_refused(files, tmp_path):
    command = files(0.2)
    for name, drawn, seed, named in (("again", "base", "0", ""), ("other", "base", "1", "other"), ("third", "third", "1", "")):
        scored_file(tmp_path / f"{name}.jsonl", 0.0, drawn, drawn, named, seed=seed)
    base, after, rejudged = command[2], command[4], command[6]
    for second, said in (
        ("again", "again.jsonl: seed is '0', as of"),
        ("other", "other.jsonl: expected pictures of the prompts of"),
        ("third", "third.jsonl: model_hash is 'third', but"),
    ):
        second = tmp_path / f"{second}.jsonl"
        done = run("gate.py", "--base", base, second, "--after", after, second, "--rejudged", rejudged, second, ok=False)
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    done = run(*command, second, ok=False)
    assert done.returncode == 2 and "take equally many files, found 1, 1 and 2" in done.stderr
    done = run(*command, "--last", base, "--last-rejudged", rejudged, second, ok=False)
    assert done.returncode == 2 and "--last-rejudged has 2 files, but --base has 1" in done.stderr
    assert not (tmp_path / "gate.json").exists()


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


@pytest.mark.parametrize("flag", ["--tolerance", "--round-tolerance", "--min-coverage", "--matters"])
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
