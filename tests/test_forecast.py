"""forecast.py: the law by hand, what is counted of which pictures, intervals, what it says, and what it refuses."""

import json
import math

import numpy as np
import pytest
from conftest import run

from analysis import forecast
from analysis.advantage import STRATA, count_cells, mean_rates, rates, take
from analysis.comparison import read_scored_file
from analysis.forecast import Line, accepted_right, break_even, gain_of, labels_to_settle, read_law
from analysis.measures import Estimate
from common.records import PAIRS, SFT, Tokens, read_rows, write_tokens
from common.writing import write_rows

HEADER = {"codebook_size": "9999", "image_tokens": "2", "threshold": "0.5", "questions": '["Q {prompt}"]', "seed": "0"}
HEADER |= {"model": "m", "model_hash": "h-m", "guidance": "1.0", "temperature": "1.0"}


def write_scored(path, p_yes: dict[str, list[float]], **header):
    """A scored file from id -> P(yes) of its candidates; the category is the id's first word. Tokens are the row's number."""
    rows = []
    for id, values in p_yes.items():
        for candidate, value in enumerate(values):
            row = {"id": id, "prompt": f"a {id}", "category": id.split("-")[0], "candidate": candidate, "p_yes": value}
            rows.append(row | {"coverage": 0.9, "foil": "no", "p_yes_foil": 0.1, "row": len(rows)})
    write_rows(path, rows)
    write_tokens(path.with_suffix(".safetensors"), np.repeat(np.arange(len(rows))[:, None], 2, 1), HEADER | header)
    return path


def write_csv(path, labels: dict):
    lines = [f"{id},{candidate},{label}" for (id, candidate), label in labels.items()]
    path.write_text("\n".join(["id,candidate,label", *lines]) + "\n")
    return path


def world(generator, a: float, t: float, f: float, n_prompts: int, category: str, candidates: int = 8):
    """P(yes) and truth of a category's pictures by a judge of these rates; prompts differ in how well they are drawn."""
    p_yes, truth = {}, {}
    for number in range(n_prompts):
        id = f"{category}-{number:03d}"
        right = generator.random(candidates) < generator.beta(6 * a, 6 * (1 - a))
        accepted = generator.random(candidates) < np.where(right, t, f)
        p_yes[id] = np.where(accepted, 0.6 + 0.4 * generator.random(candidates), 0.4 * generator.random(candidates)).tolist()
        truth |= {(id, candidate): int(it) for candidate, it in enumerate(right)}
    return p_yes, truth


# ---------------------------------------------------------------------------------------------------------------------
# The law


def test_the_law_by_hand():
    assert accepted_right(0.4, 0.9, 0.1) == pytest.approx(0.36 / 0.42)
    assert accepted_right(0.4, 1 - 0.9, 1 - 0.1) == pytest.approx(0.04 / 0.58)  # of what is rejected
    assert accepted_right(0.4, 0.7, 0.7) == pytest.approx(0.4) and math.isnan(accepted_right(0.4, 0, 0))
    assert gain_of(0.5, 0.6, 0.02) == pytest.approx(0.28)


@pytest.mark.parametrize(("a", "t", "k", "c"), [(0.4, 0.98, 0.6, 0.02), (0.48, 0.99, 0.43, 0.1), (0.7, 0.9, 1.0, 0.0)])
def test_a_round_breaks_even_where_its_gain_is_zero(a, t, k, c):
    f = break_even(a, t, k, c)
    assert gain_of(accepted_right(a, t, f) - a, k, c) == pytest.approx(0, abs=1e-12)
    assert gain_of(accepted_right(a, t, f - 0.01) - a, k, c) > 0
    assert break_even(0.8, t, 0.4, 0.1) == 0 and break_even(a, t, k, -0.1) == pytest.approx(t)


def test_how_many_labels_settle_a_doubt():
    """Without a spread of the law: the distance must be 1.645 + 0.842 of what is left open, which shrinks with the root."""
    assert labels_to_settle(0.1, 0.0, 0.1, 100) == pytest.approx(100 * (1.6449 + 0.8416) ** 2, rel=0.01)
    assert labels_to_settle(-0.1, 0.03, 0.1, 100) > labels_to_settle(0.1, 0.0, 0.1, 100)
    assert labels_to_settle(0.04, 0.03, 0.1, 100) == math.inf
    generator = np.random.default_rng(0)
    distance, spread, sd, labels = 0.12, 0.03, 0.2, 60
    left = sd * math.sqrt(labels / labels_to_settle(distance, spread, sd, labels))
    found = distance + left * generator.normal(size=20_000)  # what so many labels would give
    assert np.mean(found - 1.6449 * math.hypot(spread, left) > 0) == pytest.approx(0.8, abs=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# What is counted


@pytest.mark.parametrize(
    ("per_prompt", "pairs", "threshold", "margin"), [(0, 1, 0.5, 0), (3, 1, 0.5, 0.7), (2, 3, 0.7, 0), (2, 3, 0.5, 0.5)]
)
def test_what_would_become_data_is_what_make_pairs_takes(tmp_path, per_prompt, pairs, threshold, margin):
    generator = np.random.default_rng(1)
    p_yes = {f"c-{n:02d}": generator.random(7).round(1).tolist() for n in range(40)}  # with ties
    scored = write_scored(tmp_path / "scored.jsonl", p_yes)
    flags = ("--per-prompt", per_prompt, "--pairs-per-prompt", pairs, "--threshold", threshold, "--margin", margin)
    run("make_pairs.py", "--scored", scored, "--out", tmp_path / "data", *flags, "--min-separation", 0)
    taken = take(read_scored_file(scored), threshold, per_prompt, pairs, margin)
    for stem, shape, parts in (("sft", SFT, {"row": "sft"}), ("pairs", PAIRS, {"chosen": "chosen", "rejected": "rejected"})):
        tokens = Tokens(tmp_path / "data" / f"{stem}.jsonl")[:][:, 0]
        rows = [row for _, row in read_rows(tmp_path / "data" / f"{stem}.jsonl", shape)]
        for part, name in parts.items():
            assert {int(tokens[row[part]]) for row in rows} == set(np.flatnonzero(getattr(taken, name)))


def test_the_numbers_of_a_labelled_file_by_hand(tmp_path):
    """Two categories, all labelled: every number is a share that one can count."""
    p_yes = {"c-1": [0.9, 0.8, 0.7, 0.2], "c-2": [0.6, 0.1, 0.3, 0.4], "s-1": [0.95, 0.55, 0.45, 0.05]}
    truth = {"c-1": [1, 1, 0, 0], "c-2": [1, 0, 1, 0], "s-1": [0, 1, 0, 1]}
    labels = {(id, n): value for id, values in truth.items() for n, value in enumerate(values)}
    scored = write_scored(tmp_path / "scored.jsonl", p_yes)
    done = run("forecast.py", scored, "--labels", write_csv(tmp_path / "mine.csv", labels), "--per-prompt", 2)
    found = json.loads((tmp_path / "forecast.json").read_text())["forecast"]

    def value(method, key, category=None):
        of = found[method]["all"] if category is None else found[method]["categories"][category]
        return of[key]["value"]

    rights = {"a": 6 / 12, "t": 4 / 6, "f": 2 / 6, "p": 4 / 6}
    for key, expected in rights.items():
        assert value("sft", key) == value("dpo", key) == pytest.approx(expected, abs=1e-6)
    by_category = {"c": (3 / 3, 4 / 8), "s": (1 / 2, 2 / 4)}  # not the third best of c-1
    for category, (taken, drawn) in by_category.items():
        assert value("sft", "taken_right", category) == pytest.approx(taken, abs=1e-6)
        assert value("sft", "advantage", category) == pytest.approx(taken - drawn, abs=1e-6)
    assert value("sft", "taken_right") == pytest.approx(3 / 4, abs=1e-6)  # the mean over categories; 4 of 5 pictures
    assert value("sft", "advantage") == pytest.approx(3 / 4 - 1 / 2, abs=1e-6)
    # the pairs of c: chosen 0.9 and 0.6, both right, rejected 0.2 and 0.1, both wrong; of s: 0.95, wrong, and 0.05, right
    assert value("dpo", "chosen_right") == value("dpo", "rejected_right") == pytest.approx(1 / 2, abs=1e-6)
    assert (value("dpo", "advantage", "c"), value("dpo", "advantage", "s")) == (pytest.approx(1), pytest.approx(-1))
    assert value("dpo", "advantage") == pytest.approx(0, abs=1e-6)
    for world_, line in read_law()["sft"].items():
        gain = found["sft"]["all"]["gains"][world_]
        assert gain["gain"] == pytest.approx(line.k * 0.25 - line.c) and gain["low"] < gain["gain"] < gain["high"]
    assert done.stdout.splitlines()[-1] == str(tmp_path / "forecast.json") and "later rounds gained less" in done.stdout


def test_a_judge_that_only_knows_which_category_is_easy_has_no_advantage():
    """It accepts nine of ten pictures of an easy category and one of ten of a hard one, right ones as often as wrong ones."""
    pictures = np.array([[0.0, 540, 60], [0.0, 60, 540]])
    shares = np.array([[0.9] * 3, [0.2] * 3])
    assert rates(shares, pictures, "sft")["advantage"] == pytest.approx(0.9 * 0.9 + 0.2 * 0.1 - 0.55)
    assert mean_rates(shares, pictures, "sft")["advantage"] == pytest.approx(0, abs=1e-12)


def test_in_the_mean_a_category_without_data_neither_wins_nor_loses():
    pictures, shares = np.array([[0.0, 10, 10], [0, 0, 20]]), np.array([[np.nan, 0.9, 0.1], [np.nan, np.nan, 0.3]])
    found = mean_rates(shares, pictures, "sft")
    assert found["advantage"] == pytest.approx((0.9 - 0.5) / 2) and found["taken_right"] == pytest.approx(0.9)
    assert found["drawn_right"] == pytest.approx((0.5 + 0.3) / 2)


def test_no_gain_is_larger_than_what_is_drawn_wrong():
    gain = forecast.judge_gain(0.9, np.full(1000, 0.9), 0.1, Line(0.5, 0.0, 0.02), 0.0, 50)
    assert gain.gain == 0.1 and gain.high == 0.1 and gain.verdict == "worth it"


def test_labels_of_a_part_and_more_of_one_kind_give_the_whole_files_numbers(tmp_path):
    """200 labels of 4,000 pictures, of accepted ones twice as many; a blind category is found and named."""
    generator = np.random.default_rng(3)
    rates_ = {"good": (0.4, 0.95, 0.05), "fair": (0.6, 0.9, 0.4), "blind": (0.6, 0.2, 0.8)}
    p_yes, truth = {}, {}
    for name, (a, t, f) in rates_.items():
        some, right = world(generator, a, t, f, 167, name)
        p_yes, truth = p_yes | some, truth | right
    scored = write_scored(tmp_path / "scored.jsonl", p_yes)
    accepted = np.array([p > 0.5 for values in p_yes.values() for p in values])
    weight = np.where(accepted, 2.0, 1.0)
    picks = generator.choice(len(truth), 200, replace=False, p=weight / weight.sum())
    labels = {key: value for n, (key, value) in enumerate(truth.items()) if n in set(picks.tolist())}
    done = run(
        "forecast.py", scored, "--labels", write_csv(tmp_path / "mine.csv", labels), "--per-prompt", 4, "--like", "janus"
    )
    found = json.loads((tmp_path / "forecast.json").read_text())["forecast"]["sft"]
    right = np.array([*truth.values()])
    whole = {"a": right.mean(), "t": accepted[right == 1].mean(), "f": accepted[right == 0].mean(), "p": right[accepted].mean()}
    for key, expected in whole.items():
        it = found["all"][key]
        assert it["low"] <= expected <= it["high"] and it["high"] - it["low"] < 0.35
    assert found["leave_out"] == ["blind"] and "make_pairs.py --leave-out blind\n" in done.stdout
    advantages = [found["categories"][name]["advantage"]["value"] for name in ("good", "fair")]
    assert f"the advantage is then {sum(advantages) / 3:+.3f}\n" in done.stdout and found["all"]["labels"] == 200
    assert not {"gains", "verdict"} & found["categories"]["good"].keys() and found["all"]["gains"].keys() == {"janus"}


@pytest.mark.parametrize("method", STRATA)
def test_intervals_hold_the_truth_in_about_95_percent(method):
    """80 labels of 400 pictures, 4 a prompt, of prompts that differ; what is drawn again is prompts, truth and labels."""
    generator, hits, n_runs = np.random.default_rng(5), np.zeros(3), 120
    strata = len(STRATA[method])
    shares = np.array([0.7, 0.9, 0.1, 0.05][:strata])  # of right ones
    sizes = np.array([0.3, 0.2, 0.35, 0.15]) if strata == 4 else np.array([0.3, 0.2, 0.5])
    true = rates(shares[None], sizes[None], method)
    for _ in range(n_runs):
        prompt = np.repeat(np.arange(100), 4)
        stratum = generator.choice(strata, 400, p=sizes)
        ease = generator.normal(0, 0.4, 100)[prompt]
        odds = np.log(shares / (1 - shares))[stratum] * np.sqrt(1 + 0.4**2 * 0.35) + ease  # the mean share stays about the same
        label = np.where(generator.random(400) < 1 / (1 + np.exp(-odds)), 1.0, 0.0)
        label[np.isin(prompt, generator.choice(100, 80, replace=False))] = np.nan
        cells = count_cells(prompt.astype(str), np.zeros(400, int), stratum, label, (1, strata))
        draws = rates(cells.draws(), cells.resampled, method)
        ends = np.array([np.percentile(draws[key], (2.5, 97.5)) for key in ("a", "p", "advantage")])
        hits += [low <= true[key] <= high for key, (low, high) in zip(("a", "p", "advantage"), ends)]
    assert (hits / n_runs > 0.89).all() and (hits[:1] / n_runs < 1).all(), hits / n_runs


def test_intervals_hold_the_truth_where_all_pictures_of_a_prompt_are_labelled_and_right_together():
    """30 prompts of 60, 10 pictures each, every prompt's share of right ones from Beta(.5, .5)."""
    generator, hits, n_runs, (t, f) = np.random.default_rng(1), np.zeros(2), 100, (0.8, 0.3)
    for _ in range(n_runs):
        prompt = np.repeat(np.arange(60), 10)
        right = generator.random(600) < generator.beta(0.5, 0.5, 60)[prompt]
        stratum = np.where(generator.random(600) < np.where(right, t, f), 1, 2)
        label = np.where(np.isin(prompt, generator.choice(60, 30, replace=False)), right.astype(float), np.nan)
        cells = count_cells(prompt.astype(str), np.zeros(600, int), stratum, label, (1, 3))
        draws = rates(cells.draws(), cells.resampled, "sft")
        for i, (key, true) in enumerate((("a", 0.5), ("p", t / (t + f)))):
            low, high = np.percentile(draws[key], (2.5, 97.5))
            hits[i] += low <= true <= high
    assert (hits / n_runs > 0.88).all(), hits / n_runs


# ---------------------------------------------------------------------------------------------------------------------
# What is said, and refused


@pytest.fixture
def small(tmp_path):
    """40 prompts of 4, a judge that errs now and then, everything labelled."""
    p_yes, truth = world(np.random.default_rng(0), 0.5, 0.9, 0.1, 40, "c", candidates=4)
    return write_scored(tmp_path / "scored.jsonl", p_yes), write_csv(tmp_path / "mine.csv", truth), truth


@pytest.mark.parametrize(
    ("k", "c", "spread", "said"),
    [
        (0.5, 0.0, 0.01, "SFT: worth it (a gain of more than 0): as yours worth it"),
        (0.5, 0.5, 0.01, "SFT: not worth it (a gain of more than 0): as yours not worth it"),
        (0.5, 0.0, 1.0, "doubt, as yours: no number of labels settles it"),
    ],
)
def test_whether_it_is_worth_it_is_what_the_interval_shows(small, k, c, spread, said):
    scored, labels, _ = small
    flags = ("--method", "sft", "--k", k, "--c", c, "--spread", spread)
    assert said in run("forecast.py", scored, "--labels", labels, *flags).stdout


def test_few_labels_leave_a_doubt_and_say_how_many_would_end_it(small, tmp_path):
    scored, _, truth = small
    few = write_csv(tmp_path / "few.csv", dict(list(truth.items())[::10]))
    flags = ("--method", "sft", "--k", 0.5, "--c", 0.1, "--spread", 0.0)
    done = run("forecast.py", scored, "--labels", few, *flags)
    gain = json.loads((tmp_path / "forecast.json").read_text())["forecast"]["sft"]["all"]["gains"]["yours"]
    assert gain["verdict"] == "in doubt" and gain["labels"] > 16 and not gain["hopeless"]
    assert f"about {gain['labels']:.0f} labels, placed like these, settle it 4 times of 5" in done.stdout
    assert "16 are there, of 160 pictures" in done.stdout


def test_a_category_is_left_out_only_where_its_data_are_surely_worse():
    ends = {None: (-0.5, -0.2), "worse": (-0.3, -0.1), "either": (-0.3, 0.1), "better": (0.1, 0.3), "unknown": (None, None)}
    found = {name: {"advantage": Estimate(low, low, high, 9, 9)} for name, (low, high) in ends.items()}
    assert forecast.left_out(found) == (["worse"], ["either", "unknown"])


REFUSALS = {
    "no label of what is rejected": ((), "no label of a picture that the judge rejects; label some of both kinds"),
    "threshold": (("--threshold", 1), "--threshold must be at least 0 and less than 1, found 1.0"),
    "per prompt": (("--per-prompt", -1), "--per-prompt must be at least 0, found -1"),
    "pairs": (("--pairs-per-prompt", 0), "--pairs-per-prompt must be at least 1, found 0"),
    "margin": (("--margin", 2), "--margin must be from 0 to 1, found 2.0"),
    "k alone": (("--k", 0.5, "--method", "sft"), "--c goes with --method, and --k with both"),
    "c of both methods": (("--c", 0), "--c goes with --method, and --k with both"),
    "k of both methods": (("--k", 0.5, "--c", 0), "--c goes with --method, and --k with both"),
    "k and like": (("--k", 0.5, "--c", 0, "--method", "sft", "--like", "janus"), "--like names a world of law.json"),
    "no number": (("--k", "nan", "--c", 0, "--method", "sft"), "--k must be a number under 10, found nan"),
    "spread alone": (("--spread", 0.1), "--spread goes with --k and --c and is at least 0, found 0.1"),
    "another world": (("--like", "emu"), "--like emu: law.json has janus, showo"),
    "least gain": (("--least-gain", 2), "--least-gain must lie between -1 and 1, found 2.0"),
    "what is read": (("--out", "DIR/mine.csv"), "mine.csv: is also read"),
    "another kind": (("--out", "DIR/other.json"), "is there already and is not a forecast"),
}


@pytest.mark.parametrize(("flags", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_meant_is_refused_in_one_line(small, tmp_path, flags, message):
    scored, labels, truth = small
    (tmp_path / "other.json").write_text('{"verdict": 1}')
    if not flags:
        accepted = dict(zip(truth, read_scored_file(scored).pictures.accepted))
        write_csv(labels, {key: value for key, value in truth.items() if accepted[key]})
    before = sorted(tmp_path.iterdir())
    flags = (str(flag).replace("DIR", str(tmp_path)) for flag in flags)
    done = run("forecast.py", scored, "--labels", labels, *flags, ok=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
    assert sorted(tmp_path.iterdir()) == before and done.stdout == ""


def test_your_own_law_has_the_widest_spread_unless_you_say(small):
    args = forecast.parse_args(["x.jsonl", "--labels", "y.csv", "--method", "dpo", "--k", "0.3", "--c", "0.1"])
    widest = max(line.spread for line in read_law()["dpo"].values())
    assert forecast.choose_laws(args) == {"dpo": {"yours": Line(0.3, 0.1, widest)}}


def test_your_own_c_goes_with_the_k_of_each_world():
    found = forecast.choose_laws(forecast.parse_args(["x.jsonl", "--labels", "y.csv", "--method", "sft", "--c", "0.2"]))
    expected = {f"{world}, with your c": line._replace(c=0.2) for world, line in read_law()["sft"].items()}
    assert found == {"sft": expected} and len(expected) > 1
    args = forecast.parse_args(["x.jsonl", "--labels", "y.csv", "--method", "sft", "--c", "0.2", "--like", "showo"])
    assert [*forecast.choose_laws(args)["sft"]] == ["showo, with your c"]
