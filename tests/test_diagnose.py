"""diagnose.py: its statistics by hand and against independent ones, every verdict, its files, and what it refuses."""

import json
import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT, run, spawn

import score
from analysis import diagnose
from analysis.columns import read_labels
from analysis.comparison import Pictures
from analysis.diagnose import credible_direction, direction, verdict
from analysis.levels import SHAPES, SURVEY, find_levels, make_survey, print_survey
from analysis.measures import (
    BETWEEN_JUDGES,
    BETWEEN_LIKELIHOODS,
    FIXED_LIKELIHOODS,
    FIXED_PICTURES,
    OWN_PICTURES,
    Estimate,
    measure_all,
    outranked,
    win_rate,
)
from analysis.summary import judge_rates, read_judged, weak_generation
from common import stats
from common.records import Tokens, write_tokens
from common.stats import bootstrap_interval
from common.writing import write_rows

HEADER = {"codebook_size": "1000", "image_tokens": "4", "threshold": "0.5", "questions": '["Q {prompt}"]'}
HEADER |= {"seed": "0", "guidance": "5.0", "temperature": "1.0"}


def pictures(id, p_yes, label=None, p_yes_foil=None, coverage=1.0, threshold=0.5) -> Pictures:
    """Pictures from plain lists; one category."""
    n = len(id)
    numbers = [np.broadcast_to(np.array(x, float), n) for x in (p_yes, 0.1 if p_yes_foil is None else p_yes_foil, coverage)]
    labels = np.full(n, np.nan) if label is None else np.array([np.nan if x is None else x for x in label], float)
    return Pictures(np.array(list(id), object), np.array(["c"] * n, object), *numbers, labels, threshold)


def random_pictures(generator, n_prompts=40, accuracy=0.6) -> Pictures:
    """1 to 5 labelled pictures a prompt, by a judge that is often right; pictures of a prompt are alike."""
    ids = [f"p{i:03d}" for i in range(n_prompts) for _ in range(generator.integers(1, 6))]
    ease = generator.normal(0, 0.3, n_prompts)
    label = generator.random(len(ids)) < [accuracy + ease[int(id[1:])] for id in ids]
    p_yes = np.clip(0.3 + 0.4 * label + generator.normal(0, 0.2, len(ids)), 0, 1)
    return pictures(ids, p_yes, label.astype(int), generator.random(len(ids)) * 0.6)


# ---------------------------------------------------------------------------------------------------------------------
# The numbers, by hand

#            a      a      a      a      b      b      (prompts; "a" has four pictures, "b" two)
P_BEFORE = [0.9, 0.8, 0.2, 0.1, 0.6, 0.4]
P_AFTER = [0.9, 0.3, 0.2, 0.7, 0.6, 0.8]
LABELS = [1, 0, 0, 1, 0, 1]


def value(measure, before, after, side="before"):
    found = (OWN_PICTURES | FIXED_PICTURES)[measure](before, after)[side]
    return found.value if found.value is None else round(found.value, 5)


@pytest.mark.parametrize(
    ("measure", "before", "after"),
    [
        ("nonunified", (2 / 4 + 1 / 2) / 2, (2 / 4 + 0) / 2),  # a mean over prompts, not over pictures
        ("yes_rate", 0.5, 0.75),
        ("separation", (2.0 / 4 + 1.0 / 2) / 2 - 0.1, (2.1 / 4 + 1.4 / 2) / 2 - 0.1),
        ("drawing_accuracy", 0.5, 0.5),
        ("judge_accuracy", (2 / 4 + 0) / 2, (4 / 4 + 1 / 2) / 2),
        ("false_positive_rate", (1 / 4 + 1 / 2) / (2 / 4 + 1 / 2), (0 + 1 / 2) / (2 / 4 + 1 / 2)),
        ("false_negative_rate", (1 / 4 + 1 / 2) / (2 / 4 + 1 / 2), 0),
        ("weak_generation", (1 / 4 + 0) / (2 / 4 + 1 / 2), (2 / 4 + 0) / (2 / 4)),
        ("separation_if_right", (0.8 / 4 + 0.3 / 2) / (2 / 4 + 1 / 2), ((0.8 + 0.6) / 4 + 0.7 / 2) / (2 / 4 + 1 / 2)),
    ],
)
def test_a_measure_counts_every_prompt_once(measure, before, after):
    sides = pictures("aaaabb", P_BEFORE, LABELS), pictures("aaaabb", P_AFTER, LABELS)
    assert value(measure, *sides) == round(before, 5)
    assert value(measure, *sides, "after") == round(after, 5)
    assert value(measure, *sides, "difference") == pytest.approx(after - before, abs=1e-5)


def test_n_is_the_pictures_that_a_rate_is_over():
    sides = pictures("aaaabb", P_BEFORE, LABELS), pictures("aaaabb", P_AFTER, LABELS)
    found = OWN_PICTURES["weak_generation"](*sides)  # given that the judge rejects
    assert [found[side].n_pictures for side in ("before", "after", "difference")] == [3, 2, 2]
    assert {found[side].n_prompts for side in found} == {2}


def test_foils_count_as_accepted_over_the_same_threshold():
    sides = [pictures("ab", 0.9, None, [0.6, 0.2], threshold=t) for t in (0.5, 0.7)]
    assert (value("foil_yes_rate", *sides), value("foil_yes_rate", *sides, "after")) == (0.5, 0.0)


def test_a_picture_at_the_threshold_is_rejected():
    assert pictures("ab", [0.5, 0.50001]).accepted.tolist() == [False, True]


def test_a_rate_over_nothing_is_unknown():
    perfect = pictures("ab", [0.9, 0.9], [1, 1])
    found = FIXED_PICTURES["false_positive_rate"](perfect, perfect)
    assert all(number[:3] == (None, None, None) for number in found.values()) and found["before"].n_pictures == 0
    assert BETWEEN_JUDGES["kappa"](perfect, perfect).value is None  # by chance they agree always


def test_unlabelled_pictures_count_where_no_label_is_wanted_and_nowhere_else():
    sides = [pictures("aabb", [0.9, 0.1, 0.9, 0.9], [1, None, None, None])] * 2
    assert value("judge_accuracy", *sides) == 1 and value("nonunified", *sides) == 0.25
    assert FIXED_PICTURES["judge_accuracy"](*sides)["before"][3:] == (1, 1)  # prompts, pictures


def test_prompts_without_a_counterpart_are_left_out_of_both_sides():
    before, after = pictures("aab", [0.9, 0.9, 0.1]), pictures("acc", [0.1, 0.9, 0.9])
    found = OWN_PICTURES["nonunified"](before, after)
    assert [found[side].value for side in ("before", "after", "difference")] == [0, 1, 1] and found["after"].n_prompts == 1


def test_one_side_with_labels_is_measured_alone():
    labelled, bare = pictures("ab", [0.9, 0.1], [1, 0]), pictures("ab", [0.9, 0.1])
    assert OWN_PICTURES["drawing_accuracy"](labelled, bare).keys() == {"before"}
    assert OWN_PICTURES["drawing_accuracy"](bare, labelled).keys() == {"after"}
    assert OWN_PICTURES["drawing_accuracy"](bare, bare) == {}


def test_what_lies_between_two_judges():
    first, second = pictures("aaaabb", P_BEFORE, LABELS), pictures("aaaabb", P_AFTER, LABELS)
    assert BETWEEN_JUDGES["drift"](first, second).value == pytest.approx(((0 + 0.5 + 0 + 0.6) / 4 + 0.4 / 2) / 2)
    assert BETWEEN_JUDGES["shift"](first, second).value == pytest.approx(((-0.5 + 0.6) / 4 + 0.4 / 2) / 2)
    assert BETWEEN_JUDGES["agreement"](first, second).value == (2 / 4 + 1 / 2) / 2
    assert BETWEEN_JUDGES["win_rate"](first, second)[:1] + BETWEEN_JUDGES["win_rate"](first, second)[3:] == (1.0, 2, 3)


def test_kappa_of_the_textbook_table():
    """Two readers, 50 cases: both yes 20, only the first 5, only the second 10, both no 15. kappa = (.7 - .5) / (1 - .5)."""
    table = [(0.9, 0.9)] * 20 + [(0.9, 0.1)] * 5 + [(0.1, 0.9)] * 10 + [(0.1, 0.1)] * 15
    first, second = (pictures([str(i) for i in range(50)], side) for side in zip(*table, strict=True))
    assert BETWEEN_JUDGES["kappa"](first, second).value == pytest.approx(0.4)


def test_the_win_rate_is_of_labelled_pictures_on_which_the_judges_disagree():
    first = pictures("abcde", [0.9, 0.9, 0.9, 0.1, 0.9], [0, 1, 1, 1, None])
    second = pictures("abcde", [0.1, 0.1, 0.9, 0.9, 0.1], [0, 1, 1, 1, None])
    found = win_rate(first, second)  # wins a and d, loses b; c is agreed on, e has no label
    assert (found.value, found.n_pictures) == (round(2 / 3, 6), 3)
    assert win_rate(first, first)[:3] == (None, None, None)


def likelihoods(own, foil, p_yes=P_BEFORE) -> Pictures:
    """The six pictures with log p given their prompts and given their foils."""
    found = pictures("aaaabb", p_yes, LABELS)
    return found._replace(log_likelihood=np.array(own, float), log_likelihood_foil=np.array(foil, float))


def test_a_judge_that_draws_says_yes_where_the_picture_is_likelier_given_its_prompt():
    x = likelihoods([-1, -5, -2, -9, -4, -4], [-3, -4, -3, -8, -4, -5])  # yes no yes no no yes; right is 1 0 0 1 0 1
    found = {name: measure(x, x)["before"] for name, measure in FIXED_LIKELIHOODS.items()}
    assert found["likelihood_margin"].value == pytest.approx(((2 - 1 + 1 - 1) / 4 + (0 + 1) / 2) / 2)
    assert found["likelihood_accuracy"].value == pytest.approx((2 / 4 + 2 / 2) / 2)
    assert found["likelihood_false_positive_rate"].value == pytest.approx((1 / 4 + 0) / (2 / 4 + 1 / 2))
    assert found["likelihood_false_negative_rate"].value == pytest.approx((1 / 4 + 0) / (2 / 4 + 1 / 2))
    # of a: margins 2 and -1 of the right ones over 1 and -1 of the wrong ones, of b: 1 over 0
    assert found["likelihood_ranking_accuracy"].value == pytest.approx(((1 + 0.25) / 4 + 1 / 2) / (2 / 4 + 1 / 2), abs=1e-6)
    assert found["ranking_accuracy"].value == pytest.approx(((1 + 0) / 4 + 0) / (2 / 4 + 1 / 2))


def test_pictures_are_ranked_beside_the_wrong_ones_of_their_own_prompt():
    x = pictures("abababc", [0.5] * 7, [1, 1, 0, 1, 0, 1, 1])
    score = np.array([3.0, 3, 2, 1, 3, 0, 9])
    assert outranked(x, score)[[0, 2]].tolist() == [0.75, 0.25] and np.isnan(outranked(x, score)[[1, 3, 5, 6]]).all()
    generator = np.random.default_rng(0)
    y = random_pictures(generator)
    score = generator.integers(0, 6, len(y.id)).astype(float)
    for i, (found, id) in enumerate(zip(outranked(y, score), y.id, strict=True)):
        others = score[(y.id == id) & (y.label == 0)]
        wanted = np.mean((score[i] > others) + 0.5 * (score[i] == others)) if len(others) else np.nan
        assert found == pytest.approx(wanted, nan_ok=True)


def test_whether_log_p_fell_is_counted_apart_for_what_was_corrected_and_what_stayed():
    first = likelihoods([-1, -5, -2, -9, -4, -4], [-9] * 6)  # accepted: 0, 1, 4; wrong ones: 1, 4
    second = likelihoods([-0, -6, -9, -1, -3, -9], [-9] * 6, P_AFTER)  # 1 is corrected and fell, 4 stayed and rose
    found = {name: measure(first, second) for name, measure in BETWEEN_LIKELIHOODS.items()}
    corrected, stayed, right = (found[f"likelihood_fell_if_{name}"] for name in ("corrected", "not", "right"))
    assert (corrected.value, stayed.value, right.value) == (1, 0, 0)
    assert (corrected.n_pictures, stayed.n_pictures, right.n_pictures, right.n_prompts) == (1, 1, 1, 1)
    assert found["likelihood_shift"].value == pytest.approx(((1 - 1 - 7 + 8) / 4 + (1 - 5) / 2) / 2)


def test_the_calibration_error_by_hand():
    sides = [pictures("abcd", [0.05, 0.95, 0.92, 1.0], [0, 1, 0, 0])] * 2  # bins: 0.05; 0.95, 0.92 and 1.0 in the last
    assert value("calibration_error", *sides) == round((0.05 + abs(0.95 + 0.92 + 1.0 - 1)) / 4, 5)


def test_the_calibration_error_is_the_usual_sum_over_bins():
    """Written out: bin by bin, share of pictures in it times |mean P(yes) - share right|."""
    some = random_pictures(np.random.default_rng(3))
    some = some._replace(id=np.array([str(i) for i in range(len(some.id))], object))  # one picture a prompt
    total = 0.0
    for k in range(10):
        inside = (some.p_yes >= k / 10) & ((some.p_yes < (k + 1) / 10) | (k == 9))
        if inside.any():
            total += inside.mean() * abs(some.p_yes[inside].mean() - some.label[inside].mean())
    assert value("calibration_error", some, some) == pytest.approx(total, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def test_the_interval_of_a_rate_is_the_one_that_score_prints():
    some = random_pictures(np.random.default_rng(0))
    found = OWN_PICTURES["nonunified"](some, some)["before"]
    assert found.value == pytest.approx(score.nonunified_score(some.p_yes, some.id, 0.5), abs=1e-6)
    shares = score.rejected_shares(some.p_yes, some.id, 0.5)
    assert found[1:3] == pytest.approx(score.bootstrap_interval(shares), abs=1e-6)


def test_the_interval_of_a_difference_is_that_of_the_prompts_own_differences():
    generator = np.random.default_rng(1)
    before, after = random_pictures(generator), random_pictures(generator, accuracy=0.7)
    found = OWN_PICTURES["drawing_accuracy"](before, after)["difference"]
    means = [[side.label[side.id == id].mean() for id in sorted(set(side.id))] for side in (before, after)]
    assert found[1:3] == pytest.approx(bootstrap_interval(np.subtract(*means[::-1])), abs=1e-6)


def test_a_change_that_all_prompts_share_has_no_width_however_they_differ():
    before = pictures([str(i) for i in range(30)], np.linspace(0, 0.9, 30))
    found = FIXED_PICTURES["separation"](before, before._replace(p_yes=before.p_yes + 0.1))
    assert found["difference"][:3] == pytest.approx((0.1, 0.1, 0.1)) and found["before"].high - found["before"].low > 0.1


def test_the_interval_of_a_conditional_rate_resamples_whole_prompts():
    """Against a plain loop: draw prompts, take all their pictures with their weights, compute the rate."""
    some = random_pictures(np.random.default_rng(2))
    ids = sorted(set(some.id))
    of = {id: np.flatnonzero(some.id == id) for id in ids}
    generator, draws = np.random.default_rng(0), []
    for row in (row for _ in range(20) for row in generator.integers(0, len(ids), (100, len(ids)))):
        above = below = 0.0
        for id in (ids[i] for i in row):
            for place in of[id]:
                if some.label[place] == 0:
                    below += 1 / len(of[id])
                    above += (some.p_yes[place] > 0.5) / len(of[id])
        draws.append(above / below)
    found = FIXED_PICTURES["false_positive_rate"](some, some)["before"]
    assert found[1:3] == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=1e-6)


def test_resamples_in_which_a_rate_is_undefined_are_left_out():
    rare = pictures("abc", [0.9, 0.9, 0.9], [0, 1, 1])  # a resample without "a" has no wrong picture
    assert FIXED_PICTURES["false_positive_rate"](rare, rare)["before"][:3] == (1, 1, 1)


def test_intervals_of_differences_hold_the_truth_in_about_95_percent():
    generator, held = np.random.default_rng(5), 0
    for _ in range(300):
        ease = generator.random(50)
        before = generator.binomial(4, ease) / 4
        after = generator.binomial(4, np.clip(ease + 0.1, 0, 1)) / 4
        truth = np.mean(np.clip(np.linspace(0, 1, 100001) + 0.1, 0, 1)) - 0.5
        _, low, high = stats.bootstrap_of_means(stats.mean_itself, (after - before)[:, None])
        held += low <= truth <= high
    assert 0.90 < held / 300 < 0.98


# ---------------------------------------------------------------------------------------------------------------------
# The verdict

B, W, S, U, N = "better", "worse", "unchanged", "unclear", "unknown"
EXPECTED = {
    (B, B): "co-improvement",
    (W, W): "co-degradation",
    (B, S): "generation only",
    (S, B): "understanding only",
    (S, S): "no change",
    (W, S): "generation only, for the worse",
    (S, W): "understanding only, for the worse",
    (B, W): "generation at the cost of understanding",
    (W, B): "understanding at the cost of generation",
}


@pytest.mark.parametrize("generation", [B, W, S, U, N])
@pytest.mark.parametrize("understanding", [B, W, S, U, N])
def test_a_verdict_needs_both_directions(generation, understanding):
    assert verdict(generation, understanding) == EXPECTED.get((generation, understanding), "cannot tell")


@pytest.mark.parametrize(
    ("low", "high", "n_prompts", "n_pictures", "shown"),
    [
        (0.01, 0.30, 100, 400, B),
        (-0.30, -0.01, 100, 400, W),
        (-0.01, 0.01, 100, 400, S),
        (-0.02, 0.02, 100, 400, S),  # the margin itself is within
        (-0.021, 0.01, 100, 400, U),
        (-0.01, 0.021, 100, 400, U),
        (0.0, 0.30, 100, 400, U),  # an interval that holds 0 shows no change
        (-0.30, 0.0, 100, 400, U),
        (0.0, 0.0, 100, 149, U),  # none of 149 changed: up to 3 / 149 of others may
        (0.0, 0.0, 100, 150, S),
        (0.10, 0.30, 19, 400, U),  # too few prompts for the bootstrap
        (0.10, 0.30, 20, 400, B),
        (0.001, 0.01, 5000, 20000, B),  # shown, though small: the evidence says how small
    ],
)
def test_a_direction_is_what_the_interval_shows(low, high, n_prompts, n_pictures, shown):
    assert direction(Estimate((low + high) / 2, low, high, n_prompts, n_pictures), margin=0.02) == shown


def test_a_wider_margin_makes_unclear_unchanged():
    change = Estimate(0.0, -0.04, 0.03, 100, 400)
    assert direction(change, 0.02) == U and direction(change, 0.05) == S


def test_what_was_not_measured_is_unknown():
    assert direction(None, 0.02) == direction(Estimate(None, None, None, 0, 0), 0.02) == N


@pytest.mark.parametrize(
    ("found", "unanswered", "blind_before", "blind_after", "shown"),
    [
        *((found, False, False, False, found) for found in (B, W, S, U, N)),
        *((found, True, False, False, U) for found in (B, W, S, U)),
        (B, False, False, True, U),  # it says yes to everything, and most pictures are right
        (S, False, False, True, U),
        (W, False, False, True, W),  # it went blind: that is a loss
        (B, False, True, False, B),  # it learnt to see
        (W, False, True, False, U),
        (B, False, True, True, U),
        (W, False, True, True, U),
        (N, True, True, True, N),
    ],
)
def test_a_blind_judge_is_believed_only_to_be_the_worse(found, unanswered, blind_before, blind_after, shown):
    assert credible_direction(found, unanswered, blind_before, blind_after) == shown


# ---------------------------------------------------------------------------------------------------------------------
# The survey, by level


def test_the_levels_are_the_papers_and_each_task_has_one():
    tasks = [task for group in SURVEY.values() for task in group]
    assert list(SURVEY) == ["easy", "medium", "hard"] and len(tasks) == len(set(tasks)) == 9
    assert {level: len(group) for level, group in SURVEY.items()} == {"easy": 3, "medium": 3, "hard": 3}
    # spatial is medium in T2I-CompBench, and means other pictures in the shapes world
    assert find_levels(["color", "shape", "texture", "spatial", "non_spatial", "complex"]) is SURVEY
    assert find_levels(["color", "shape", "texture", "spatial", "numeracy", "3d_spatial"]) is SURVEY
    assert find_levels(["spatial"]) is SURVEY
    assert find_levels(["color", "shape", "spatial", "numeracy"]) is SHAPES
    assert find_levels(["color", "shape", "spatial", "numeracy", "single"]) is SHAPES


#         id   category       accepted label
SURVEYED = [
    ("a", "two_object", False, 0),
    ("a", "two_object", False, 1),
    ("a", "two_object", True, 0),
    ("a", "two_object", True, 1),
    ("b", "single_object", True, 1),
    ("b", "single_object", False, 0),
    ("c", "Physics", False, 1),
    ("c", "Physics", False, None),
    ("d", "counting", False, 0),
]


def surveyed(rows=SURVEYED):
    columns = list(zip(*rows, strict=True))
    label = np.array([np.nan if value is None else value for value in columns[3]], float)
    return make_survey(np.array(columns[0], object), np.array(columns[1], object), np.array(columns[2], bool), label)


def test_the_survey_by_hand():
    found = surveyed()
    assert list(found.levels) == ["easy", "hard"] and list(found.tasks["easy"]) == ["single_object", "two_object"]
    easy, hard = found.levels["easy"], found.levels["hard"]
    assert easy["nonunified"] == (0.5, *np.round(stats.wilson(3, 6)[1:], 6), 2, 6)  # 3 of 6 pictures of 2 prompts
    assert easy["weak_generation"][0] == pytest.approx(2 / 3, abs=1e-6) and easy["weak_generation"].n_pictures == 3
    assert easy["drawing_accuracy"].value == 0.5 and easy["judge_accuracy"].value == pytest.approx(4 / 6, abs=1e-6)
    assert found.tasks["easy"]["two_object"]["weak_generation"][0] == 0.5
    assert (hard["nonunified"].value, hard["weak_generation"].value, hard["weak_generation"].n_pictures) == (1, 0, 1)
    assert found.without_level == {"counting": 1}
    assert "weak_generation" not in surveyed([(*row[:3], None) for row in SURVEYED]).levels["easy"]


def test_what_has_no_level_is_said_to_have_none(capsys):
    print_survey("by level", surveyed())
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:3] == ["easy", "0.500", "(3/6),"] and "0.667 (2/3), " in lines[2]
    assert [line.split()[0] for line in lines[2:7]] == ["easy", "single_object", "two_object", "hard", "Physics"]
    assert lines[-1] == "no level: counting (1 pictures)"


# ---------------------------------------------------------------------------------------------------------------------
# The command, on small files


def write_scored(path, answers: dict, model="base", judge=None, drawn=None, foil=0.1, coverage=0.9, turn=0, **header):
    """A scored file from (id, candidate) -> P(yes); `drawn` names who drew (the tokens say it too); rows begin at `turn`."""
    drawn, judge = drawn or model, judge or model
    rows, tokens = [], []
    for id, candidate in [*list(answers)[turn:], *list(answers)[:turn]]:
        row = {"id": id, "prompt": f"a {id}", "category": id[0], "candidate": candidate, "p_yes": answers[id, candidate]}
        rows.append(row | {"coverage": coverage, "foil": "no", "p_yes_foil": foil, "row": len(rows)})
        tokens.append([len(drawn), candidate, sum(map(ord, id)), 7])
    write_rows(path, rows)
    identity = {"model": drawn, "model_hash": f"h-{drawn}", "judge": judge, "judge_hash": f"h-{judge}"}
    write_tokens(path.with_suffix(".safetensors"), np.array(tokens), HEADER | identity | header)
    return path


def write_labels(path, labels: dict):
    write_rows(path, [{"id": i, "candidate": c, "label": v, "source": "oracle"} for (i, c), v in labels.items()])
    return path


def rename_categories(path, names: dict):
    write_rows(path, [json.loads(line) | {"category": names[json.loads(line)["category"]]} for line in path.open()])
    return path


def test_one_model_alone_gets_its_survey(tmp_path):
    """Labels of a third model; without --after a survey.json; a survey that is there is replaced, a diagnosis is not."""
    drawn = write_scored(tmp_path / "drawn.jsonl", answers(TRUTH, 7))
    judged = write_scored(tmp_path / "judged.jsonl", {key: float(right) for key, right in TRUTH.items()}, "base", "qwen")
    names = {"c": "color_attr", "s": "chemistry"}
    for path in (drawn, judged):
        rename_categories(path, names)
    arguments = ["--before", drawn, "--labels", judged]
    for _ in range(2):
        lines = run("diagnose.py", *arguments).stdout.splitlines()
    found = json.loads((tmp_path / "survey.json").read_text())
    levels = found["levels"]["before"]["levels"]
    rejected = {c: [key for key, p in answers(TRUTH, 7).items() if key[0][0] == c and p < 0.5] for c in names}
    for level, c in (("easy", "c"), ("hard", "s")):
        weak = sum(not TRUTH[key] for key in rejected[c])
        assert levels[level]["nonunified"]["value"] == pytest.approx(len(rejected[c]) / 120, abs=1e-6)
        assert levels[level]["weak_generation"]["value"] == pytest.approx(weak / len(rejected[c]), abs=1e-6)
        assert levels[level]["tasks"][names[c]] == {key: value for key, value in levels[level].items() if key != "tasks"}
    assert "verdict" not in found and lines[-1] == str(tmp_path / "survey.json")
    assert any(line.startswith("hard ") for line in lines) and "240 by qwen (h-qwen)" in lines[1]
    compared = scene(tmp_path)
    for name in ("before", "after", "again"):
        rename_categories(tmp_path / f"{name}.jsonl", names)
    assert "levels" in diagnosed(tmp_path, compared)[0]
    done = run("diagnose.py", *arguments, "--out", tmp_path / "diagnosis.json", ok=False)
    assert done.returncode == 2 and "is not a survey" in done.stderr


def test_two_models_are_surveyed_each_by_level(tmp_path):
    arguments = scene(tmp_path)
    for name in ("before", "after", "again"):
        rename_categories(tmp_path / f"{name}.jsonl", {"c": "texture", "s": "counting"})
    found, lines = diagnosed(tmp_path, arguments)
    assert list(found["levels"]) == ["before", "after"] and lines[-2].startswith("verdict ")
    for side in ("before", "after"):
        assert list(found["levels"][side]["levels"]) == ["medium"]
        by_category = found["drawn"]["nonunified"]["categories"]["texture"][side]["value"]
        assert found["levels"][side]["levels"]["medium"]["nonunified"]["value"] == by_category
    assert lines.count("no level: counting (120 pictures)") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no category has a level (single_object, two_object, color_attr, texture, "),
        (["--rejudged", "again.jsonl"], "--rejudged needs --after"),
        (["--labels-after", "labels_after.jsonl"], "--labels-after needs --after"),
    ],
)
def test_a_survey_of_nothing_is_refused(tmp_path, flags, message):
    scene(tmp_path)
    done = run("diagnose.py", "--before", tmp_path / "before.jsonl", *flags, ok=False)
    assert done.returncode == 2 and message in done.stderr and not (tmp_path / "survey.json").exists()


def test_a_survey_is_of_a_models_word_on_its_own_pictures(tmp_path):
    drawn = write_scored(tmp_path / "before.jsonl", answers(TRUTH), "base", "another")
    done = run("diagnose.py", "--before", rename_categories(drawn, {"c": "texture", "s": "complex"}), ok=False)
    assert done.returncode == 2 and "drawn by base, but judged by another" in done.stderr


KEYS = [(f"{'cs'[i % 2]}{i:02d}", candidate) for i in range(60) for candidate in range(4)]
TRUTH = {key: int(n % 5 < 2) for n, key in enumerate(KEYS)}  # 40 % right
TRUTH_AFTER = {key: int(n % 5 < 4) for n, key in enumerate(KEYS)}  # 80 %


def answers(truth: dict, wrong_every: int = 0, yes: float = 0.9, no: float = 0.1) -> dict:
    """P(yes) of a judge that errs on every so many pictures."""
    return {key: yes if right != (wrong_every and n % wrong_every == 0) else no for n, (key, right) in enumerate(truth.items())}


def scene(tmp_path, before=7, after=7, again=7, truth_after=TRUTH_AFTER, **after_options) -> list:
    """Files of a base and an improved model whose judges err on every so many pictures: the arguments of the command."""
    improved = {"yes": 0.9, "no": 0.1} | {key: after_options.pop(key) for key in ("yes", "no") if key in after_options}
    return [
        "--before", write_scored(tmp_path / "before.jsonl", answers(TRUTH, before)),
        "--after", write_scored(tmp_path / "after.jsonl", answers(truth_after, after, **improved), "better", **after_options),
        "--rejudged",
        write_scored(tmp_path / "again.jsonl", answers(TRUTH, again, **improved), "base", "better", **after_options),
        "--labels", write_labels(tmp_path / "labels.jsonl", TRUTH),
        "--labels-after", write_labels(tmp_path / "labels_after.jsonl", truth_after),
    ]  # fmt: skip


def diagnosed(tmp_path, arguments, *more) -> tuple[dict, list[str]]:
    done = run("diagnose.py", *arguments, *more)
    return json.loads((tmp_path / "diagnosis.json").read_text()), done.stdout.splitlines()


WORSE = {key: int(n % 5 < 1) for n, key in enumerate(KEYS)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"before": 3, "again": 0}, "co-improvement"),
        ({"again": 3, "truth_after": WORSE}, "co-degradation"),
        ({}, "generation only"),
        ({"before": 3, "again": 0, "truth_after": TRUTH}, "understanding only"),
        ({"truth_after": TRUTH}, "no change"),
        ({"truth_after": WORSE}, "generation only, for the worse"),
        ({"again": 3, "truth_after": TRUTH}, "understanding only, for the worse"),
        ({"again": 3}, "generation at the cost of understanding"),
        ({"before": 3, "again": 0, "truth_after": WORSE}, "understanding at the cost of generation"),
        ({"again": 8}, "cannot tell"),  # a judge that errs elsewhere, about as often
    ],
)
def test_the_command_reaches_every_verdict(tmp_path, options, expected):
    found, lines = diagnosed(tmp_path, scene(tmp_path, **options))
    assert found["verdict"]["verdict"] == expected
    assert lines[-2].startswith(f"verdict        {expected}: drawing accuracy 0.400 -> ")
    assert "levels" not in found and not any(line.startswith(("by level", "no level")) for line in lines)
    assert "; judge accuracy on the pictures before 0." in lines[-2] and lines[-1] == str(tmp_path / "diagnosis.json")


def test_a_judge_that_says_yes_to_everything_has_a_perfect_score_and_no_good_verdict(tmp_path):
    """The drawings stay as they are, the nonunified score falls to 0: degradation, if anything."""
    found, lines = diagnosed(tmp_path, scene(tmp_path, truth_after=TRUTH, yes=0.9, no=0.8, foil=0.85))
    assert found["drawn"]["nonunified"]["all"]["after"]["value"] == 0
    assert found["verdict"]["verdict"] == "understanding only, for the worse"
    assert "warning: the judge after has separation -0.0" in lines[-2] and "on the pictures before, has separation" in lines[-2]


def test_where_most_pictures_are_right_a_yes_sayer_is_not_believed(tmp_path):
    """The base judge is right on 76 % of pictures of which 80 % are right; yes to everything would beat it."""
    arguments = scene(tmp_path)
    write_scored(tmp_path / "before.jsonl", answers(TRUTH_AFTER, 4))
    write_scored(tmp_path / "again.jsonl", dict.fromkeys(KEYS, 0.9), "base", "better", foil=0.9)
    write_labels(tmp_path / "labels.jsonl", TRUTH_AFTER)
    found, lines = diagnosed(tmp_path, arguments)
    assert found["judged"]["judge_accuracy"]["all"]["difference"]["value"] > 0
    assert found["verdict"]["understanding"] == "unclear" and "unclear (a judge does not answer, or is blind)" in lines[-2]


def test_a_judge_that_rightly_rejects_nearly_all_is_not_blind(tmp_path):
    """Where 1 picture in 20 is right, own prompt and foil are rejected alike; the right ones show that the judge sees."""
    few = {key: int(n % 20 == 0) for n, key in enumerate(KEYS)}
    arguments = scene(tmp_path, truth_after=few)
    write_scored(tmp_path / "before.jsonl", answers(few, 3))
    write_scored(tmp_path / "again.jsonl", answers(few), "base", "better")
    write_labels(tmp_path / "labels.jsonl", few)
    found, _ = diagnosed(tmp_path, arguments)
    assert found["judged"]["separation"]["all"]["after"]["value"] < 0.05 and found["verdict"]["understanding"] == "better"


def test_a_judge_that_does_not_answer_is_named_and_not_believed(tmp_path):
    found, lines = diagnosed(tmp_path, scene(tmp_path, again=3, coverage=0.31))
    assert found["verdict"]["understanding"] == "unclear" and found["verdict"]["generation"] == "better"
    assert "warning: the judge after has coverage 0.310, under 0.5: its answers are not yes or no" in lines[-2]


def test_without_labels_the_verdict_is_cannot_tell_and_says_what_it_saw(tmp_path):
    arguments = scene(tmp_path, before=3, again=0)[:6]
    found, lines = diagnosed(tmp_path, arguments)
    assert found["drawn"]["nonunified"]["all"]["after"]["value"] < found["drawn"]["nonunified"]["all"]["before"]["value"]
    verdict = found["verdict"]
    assert [verdict[key] for key in ("verdict", "generation", "understanding")] == ["cannot tell", "unknown", "unknown"]
    assert "drawing unknown (that takes labels" in lines[-2]
    # the judge got better here, from 2 in 3 to all right, and yet
    assert "without labels, separation on the pictures before 0.373 -> 0.320" in lines[-2] and lines[-2].endswith(": narrower")
    assert not any(line.startswith(("drawing accuracy", "judge accuracy")) for line in lines)
    found, lines = diagnosed(tmp_path, arguments[:4])
    assert found["judged"] == {} and "judging unknown (that takes --rejudged" in lines[-2]
    found, lines = diagnosed(tmp_path, scene(tmp_path)[:8])  # no labels of the pictures after
    assert (found["verdict"]["verdict"], found["verdict"]["understanding"]) == ("cannot tell", "unchanged")


def test_few_prompts_are_never_enough(tmp_path):
    """Five prompts that all improve: the bootstrap's interval has no width, and shows nothing."""
    keys = [key for key in KEYS if key[0] < "c10"]
    write = {"before": answers(dict.fromkeys(keys, 0)), "after": answers(dict.fromkeys(keys, 1))}
    arguments = ["--before", write_scored(tmp_path / "b.jsonl", write["before"])]
    arguments += ["--after", write_scored(tmp_path / "a.jsonl", write["after"], "better")]
    arguments += ["--labels", write_labels(tmp_path / "l.jsonl", dict.fromkeys(keys, 0))]
    arguments += ["--labels-after", write_labels(tmp_path / "m.jsonl", dict.fromkeys(keys, 1))]
    found, lines = diagnosed(tmp_path, arguments)
    assert found["drawn"]["drawing_accuracy"]["all"]["difference"]["low"] == 1 and found["verdict"]["generation"] == "unclear"
    assert "over 5 prompts (fewer than 20): unclear" in lines[-2]


def test_the_table_has_a_line_a_measure_and_a_category(tmp_path):
    found, lines = diagnosed(tmp_path, scene(tmp_path, before=3, again=0))
    words = [line.split() for line in lines]
    where = words.index(next(line for line in words if line[:1] == ["nonunified"]))
    assert lines[where - 1].split()[-7:] == "prompts before after change 95 % interval".split()
    assert [line[0] for line in words[where : where + 3]] == ["nonunified", "c", "s"]
    for line, numbers in (
        (words[where], found["drawn"]["nonunified"]["all"]),
        (words[where + 2], found["drawn"]["nonunified"]["categories"]["s"]),
    ):
        change = numbers["difference"]
        told = [f"{numbers['before']['value']:.3f}", f"{numbers['after']['value']:.3f}", f"{change['value']:+.3f}"]
        assert line[1:] == [str(change["n_prompts"]), *told, f"{change['low']:+.3f}", "..", f"{change['high']:+.3f}"]
    assert ["judge", "accuracy", "60", "0.667", "1.000", "+0.333"] in [line[:6] for line in words]
    assert ["win", "rate", "60", "1.000"] in [line[:4] for line in words]


def with_likelihoods(path, kind="exact"):
    """The same file as score.py --readouts likelihood writes it: right pictures are likelier given their prompt."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    right = [TRUTH[row["id"], row["candidate"]] for row in rows]
    rows = [
        row | {"log_likelihood": -5.0, "log_likelihood_foil": -6.0 if it else -4.0} for row, it in zip(rows, right, strict=True)
    ]
    write_rows(path, rows)
    tokens = Tokens(path)
    write_tokens(path.with_suffix(".safetensors"), tokens[:], tokens.metadata | {"likelihood": kind})


def test_likelihoods_are_compared_where_the_files_have_them_made_alike(tmp_path):
    plain, lines = diagnosed(tmp_path, scene(tmp_path))
    assert not any(line.startswith("likelihood") for line in lines)
    arguments = scene(tmp_path)
    for name in ("before", "again"):
        with_likelihoods(tmp_path / f"{name}.jsonl")
    found, lines = diagnosed(tmp_path, arguments)
    accuracy = found["judged"]["likelihood_accuracy"]["all"]
    assert accuracy["before"]["value"] == accuracy["after"]["value"] == 1 and accuracy["difference"]["n_pictures"] == len(KEYS)
    assert found["between_judges"]["likelihood_fell_if_not"]["all"]["value"] == 0 and "likelihood_margin" not in found["drawn"]
    assert sum(line.startswith("likelihood") for line in lines) == 9 and found["files"]["before"]["likelihood"] == "exact"
    assert {name: found["judged"][name] for name in plain["judged"]} == plain["judged"]  # the rest stays
    with_likelihoods(tmp_path / "again.jsonl", "estimated from 8 masks")
    assert "likelihood_margin" not in diagnosed(tmp_path, arguments)[0]["judged"]
    spoilt = (tmp_path / "before.jsonl").read_text().splitlines()
    row = json.loads(spoilt[4])
    del row["log_likelihood_foil"]
    (tmp_path / "before.jsonl").write_text("\n".join([*spoilt[:4], json.dumps(row), *spoilt[5:]]) + "\n")
    done = run("diagnose.py", *arguments, ok=False)
    assert done.returncode == 2 and "before.jsonl:5: key 'log_likelihood_foil' is missing" in done.stderr


def test_the_json_holds_every_number_and_who_drew_and_judged(tmp_path):
    found, _ = diagnosed(tmp_path, scene(tmp_path))
    assert found["drawn"].keys() == OWN_PICTURES.keys() and found["judged"].keys() == FIXED_PICTURES.keys()
    for part in (found["drawn"], found["judged"]):
        for numbers in part.values():
            for one in (numbers["all"], *numbers["categories"].values()):
                assert one.keys() == {"before", "after", "difference"}
                assert all(number.keys() == set(Estimate._fields) for number in one.values())
                assert all(number["low"] <= number["value"] <= number["high"] for number in (one["before"], one["after"]))
    rejudged = found["files"]["rejudged"]
    assert [rejudged[key] for key in ("model", "model_hash", "judge", "judge_hash")] == ["base", "h-base", "better", "h-better"]
    assert (rejudged["n_pictures"], rejudged["n_prompts"], found["calibration_bins"]) == (240, 60, 10)
    assert found["labels"]["before"]["sources"] == {"oracle": 240}


def test_the_same_files_give_the_same_bytes_in_any_order(tmp_path):
    arguments = scene(tmp_path, again=5)
    diagnosed(tmp_path, arguments)
    before = (tmp_path / "diagnosis.json").read_bytes()
    write_scored(tmp_path / "again.jsonl", answers(TRUTH, 5), "base", "better", turn=7)  # other rows, other token rows
    diagnosed(tmp_path, arguments)
    assert (tmp_path / "diagnosis.json").read_bytes() == before


def test_unpaired_prompts_and_partial_labels_are_counted_and_printed(tmp_path):
    arguments = scene(tmp_path)
    some = {key: p for key, p in answers(TRUTH_AFTER, 7).items() if key[0] > "c05"}
    write_scored(tmp_path / "after.jsonl", {("new", 0): 0.9} | some, "better")
    write_labels(tmp_path / "labels.jsonl", dict(list(TRUTH.items())[:100]))
    write_labels(tmp_path / "labels_after.jsonl", {key: TRUTH_AFTER[key] for key in KEYS[130:]})
    found, lines = diagnosed(tmp_path, arguments)
    gone = sum(key[0] <= "c05" for key in KEYS) // 4
    assert found["unpaired_prompts"] == {"before": gone, "after": 1}
    assert f"unpaired       {gone} prompts of before and 1 of after: left out of own pictures" in lines
    assert "labels before  100 of 240 pictures, 100 by oracle" in lines
    assert found["drawn"]["nonunified"]["all"]["difference"]["n_prompts"] == 60 - gone
    assert found["judged"]["judge_accuracy"]["all"]["before"]["n_pictures"] == 100
    assert found["drawn"]["drawing_accuracy"]["all"] == {}  # the labels of the two sides share no prompt
    assert found["verdict"]["generation"] == "unknown"


def test_the_thresholds_of_the_headers_decide(tmp_path):
    arguments = scene(tmp_path)[:4]
    write_scored(tmp_path / "before.jsonl", answers(TRUTH), threshold="0.95")
    write_scored(tmp_path / "after.jsonl", answers(TRUTH_AFTER, yes=0.96), "better", threshold="0.95")
    found, _ = diagnosed(tmp_path, arguments)
    assert found["drawn"]["nonunified"]["all"]["before"]["value"] == 1
    assert found["drawn"]["nonunified"]["all"]["after"]["value"] == 0.2


# Labels of three kinds


def test_a_persons_csv_is_read_whatever_its_columns_and_line_ends(tmp_path):
    lines = ["candidate, label ,remark,id", *(f'{c},{v},"well, yes",{i}' for (i, c), v in TRUTH.items()), ""]
    (tmp_path / "mine.CSV").write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    arguments = scene(tmp_path)
    wanted, _ = diagnosed(tmp_path, arguments)
    found, told = diagnosed(tmp_path, [*arguments[:6], "--labels", tmp_path / "mine.CSV", *arguments[8:]])
    assert found["judged"] == wanted["judged"] and found["verdict"] == wanted["verdict"]
    assert "labels before  240 of 240 pictures, 240 by a person" in told


def test_labels_may_come_in_several_files_from_several_sources(tmp_path):
    half = dict(list(TRUTH.items())[:120])
    rest = {key: v for key, v in TRUTH.items() if key not in half}
    write_labels(tmp_path / "half.jsonl", half)
    lines = ["id,candidate,label,source", *(f"{i},{c},{v},Ada" for (i, c), v in rest.items())]
    (tmp_path / "rest.csv").write_text("\n".join(lines))
    arguments = scene(tmp_path)
    wanted, _ = diagnosed(tmp_path, arguments)
    several = ("--labels", tmp_path / "half.jsonl", tmp_path / "rest.csv")
    found, told = diagnosed(tmp_path, [*arguments[:6], *several, *arguments[8:]])
    assert found["judged"] == wanted["judged"]
    assert "labels before  240 of 240 pictures, 120 by oracle, 120 by Ada" in told


def test_an_independent_judges_scored_file_labels_by_its_own_threshold(tmp_path):
    arguments = scene(tmp_path)
    wanted, _ = diagnosed(tmp_path, arguments)
    words = answers(TRUTH, yes=0.75, no=0.65)
    judged = write_scored(tmp_path / "third.jsonl", words, "base", "third", threshold="0.7", turn=7, questions='["other"]')
    found, told = diagnosed(tmp_path, [*arguments[:6], "--labels", judged, *arguments[8:]])
    assert found["judged"] == wanted["judged"] and "labels before  240 of 240 pictures, 240 by third (h-third)" in told


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def edit(name: str, number: int, **changes):
    """Spoil a row of a JSONL file; without changes, give the row a second time."""

    def spoil(directory) -> None:
        lines = (directory / name).read_text().splitlines()
        if changes:
            lines[number] = json.dumps(json.loads(lines[number]) | changes)
        else:
            lines.append(lines[number])
        (directory / name).write_text("\n".join(lines) + "\n")

    return spoil


def rewrite(name: str, *args, **options):
    return lambda directory: write_scored(directory / name, *args, **options)


def csv_labels(text: str):
    def spoil(directory) -> None:
        (directory / "labels.csv").write_text(text)

    return spoil


HEAD = "id,candidate,label\n"
REFUSALS = {
    "candidate twice": (edit("before.jsonl", 3), "before.jsonl:241: candidate 3 of id 'c00' is given twice"),
    "an id of two prompts": (edit("after.jsonl", 1, prompt="x"), "after.jsonl:2: id 'c00' has another prompt or category here"),
    "another prompt after": (
        lambda d: [edit("after.jsonl", n, prompt="x")(d) for n in range(4)],
        "after.jsonl:1: id 'c00' has another prompt or category in",
    ),
    "no common prompt": (rewrite("after.jsonl", {("x", 0): 0.9}, "better"), "has no prompt id in common with"),
    "another threshold": (
        rewrite("after.jsonl", answers(TRUTH_AFTER), "better", threshold="0.7"),
        "threshold was '0.5', now '0.7'",
    ),
    "another guidance": (rewrite("after.jsonl", answers(TRUTH), "better", guidance="1.0"), "guidance was '5.0', now '1.0'"),
    "a rejudged file as --after": (
        rewrite("after.jsonl", answers(TRUTH), "base", "better"),
        "after.jsonl: drawn by base, but judged by better",
    ),
    "rejudged by another": (
        rewrite("again.jsonl", answers(TRUTH), "base", "other"),
        "again.jsonl: judged by other, not by better",
    ),
    "rejudged with another question": (
        rewrite("again.jsonl", answers(TRUTH), "base", "better", questions="[]"),
        "again.jsonl: not made like",
    ),
    "a picture rejudged that is not there": (
        edit("again.jsonl", 5, candidate=9),
        "again.jsonl:6: candidate 9 of id 's01' is not in",
    ),
    "a picture not rejudged": (
        rewrite("again.jsonl", answers(dict(list(TRUTH.items())[:-2])), "base", "better"),
        "again.jsonl: lacks 2 pictures of",
    ),
    "other pictures of the same names": (
        rewrite("again.jsonl", answers(TRUTH), "base", "better", drawn="another"),
        "again.jsonl:1: its image tokens are not those of this candidate in",
    ),
    "one picture that is another": (
        lambda d: [edit("again.jsonl", 5, row=6)(d)],
        "again.jsonl:6: its image tokens are not those of this candidate in",
    ),
    "another foil": (edit("again.jsonl", 5, foil="x"), "again.jsonl:6: id 's01' has another prompt, category or foil in"),
    "a row that is not there": (edit("before.jsonl", 3, row=240), "before.jsonl:4: row is 240, but before.safetensors has"),
    "no model": (rewrite("before.jsonl", answers(TRUTH), model_hash=""), "metadata model_hash is missing"),
    "a threshold of no sense": (rewrite("before.jsonl", answers(TRUTH), threshold="no"), "metadata threshold must be a number"),
    "empty": (lambda d: (d / "before.jsonl").write_text(""), "before.jsonl: holds no scored candidate"),
    "a label of no picture": (edit("labels.jsonl", 8, candidate=4), "labels.jsonl:9: candidate 4 of id 'c02' is not in"),
    "a label twice": (edit("labels.jsonl", 8), "labels.jsonl:241: candidate 0 of id 'c02' is labelled twice"),
    "a label that is none": (edit("labels.jsonl", 8, label=2), "labels.jsonl:9: label must be 0 or 1, found 2"),
    "no label at all": (lambda d: (d / "labels.jsonl").write_text("\n"), "labels.jsonl: holds no label"),
    "neither kind": (edit("labels.jsonl", 0, label=None), "labels.jsonl:1: label must be 0 or 1, found null"),
    "no labels file": (lambda d: (d / "labels.jsonl").unlink(), "labels.jsonl: cannot be read: not a file"),
    "a judge that judged before": (
        rewrite("labels.jsonl", answers(TRUTH), "base"),
        "labels.jsonl: judged by base, which also judged",
    ),
    "a judge that judged after": (
        rewrite("labels.jsonl", answers(TRUTH), "base", "better"),
        "labels.jsonl: judged by better, which also judged",
    ),
    "a judge of other pictures": (
        rewrite("labels.jsonl", answers(TRUTH), "x", "third", drawn="another"),
        "labels.jsonl:1: its image tokens are not those",
    ),
    "a judge that does not answer": (
        rewrite("labels.jsonl", answers(TRUTH), "base", "third", coverage=0.2),
        "labels.jsonl: coverage is 0.200, under 0.5: third says neither yes nor no",
    ),
    "a judge without its tokens": (
        lambda d: (rewrite("labels.jsonl", answers(TRUTH), "base", "third")(d), (d / "labels.safetensors").unlink()),
        "labels.safetensors: not found",
    ),
    "csv: semicolons": (csv_labels("id;candidate;label\n"), "labels.csv:1: expected the columns id,candidate,label"),
    "csv: a column twice": (csv_labels("id,candidate,label,id\n"), "labels.csv:1: expected the columns"),
    "csv: empty": (csv_labels(""), "labels.csv:1: expected the columns"),
    "csv: header alone": (csv_labels(HEAD), "labels.csv: holds no label"),
    "csv: a word": (csv_labels(HEAD + "c00,0,yes\n"), "labels.csv:2: label must be 0 or 1, found 'yes'"),
    "csv: a fraction": (csv_labels(HEAD + "\nc00,0.5,1\n"), "labels.csv:3: candidate must be an integer of at least 0"),
    "csv: too short": (csv_labels(HEAD + "c00,0\n"), "labels.csv:2: 2 columns, but the header has 3"),
    "csv: too long": (csv_labels(HEAD + "c00,0,1,1\n"), "labels.csv:2: 4 columns, but the header has 3"),
    "csv: quotes": (csv_labels(HEAD + '"c00"x,0,1\n'), "labels.csv:2: not CSV"),
    "csv: no picture": (csv_labels(HEAD + "c00,0,1\nnobody,0,1\n"), "labels.csv:3: candidate 0 of id 'nobody' is not in"),
    "csv: twice": (csv_labels(HEAD + "c00,0,1\nc00,00,1\n"), "labels.csv:3: candidate 0 of id 'c00' is labelled twice"),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_meant_is_refused_in_one_line(tmp_path, spoil, message):
    arguments = scene(tmp_path)
    spoil(tmp_path)
    if (tmp_path / "labels.csv").exists():
        arguments[7] = tmp_path / "labels.csv"
    before = sorted(tmp_path.iterdir())
    done = run("diagnose.py", *arguments, ok=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
    assert sorted(tmp_path.iterdir()) == before and done.stdout == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--margin", "0"), "--margin must lie between 0 and 1, found 0.0"),
        (("--margin", "nan"), "--margin must lie between 0 and 1, found nan"),
        (("--out", "DIR/before.jsonl"), "is also read"),
        (("--out", "DIR/again.safetensors"), "is also read"),
        (("--out", "DIR/labels.jsonl"), "is also read"),
        (("--out", "DIR"), "is a directory"),
        (("--labels-after", "DIR/labels.jsonl"), "given as --labels and as --labels-after"),
        (("--after", ""), "is not the name of a file"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_read(tmp_path, monkeypatch, flags, message):
    arguments = scene(tmp_path)
    monkeypatch.setattr(diagnose, "read_scored_file", None)
    done = run("diagnose.py", *arguments, *(flag.replace("DIR", str(tmp_path)) for flag in flags), ok=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
    assert not (tmp_path / "diagnosis.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Size


def test_a_picture_more_takes_less_than_200_bytes_of_memory_more(tmp_path):
    """Kept after reading, the table of shared texts included; of four pictures a prompt, as dictionaries they took 700 each."""
    for n in (1000, 5000):
        rows = [
            {"id": f"{n}-{i // 4}", "prompt": f"a picture of thing {n}-{i // 4}", "category": "c", "candidate": i % 4, "row": i}
            | {"p_yes": i / n, "coverage": 1.0, "foil": f"a picture of another thing {n}-{i // 4}", "p_yes_foil": 0.1}
            for i in range(n)
        ]
        write_rows(tmp_path / f"{n}.jsonl", rows)
        write_tokens(tmp_path / f"{n}.safetensors", np.zeros((n, 4), np.int64), HEADER | {"model": "m", "model_hash": "m"})
    code = """
import pathlib, sys, tracemalloc
from analysis.columns import read_columns
from common.records import Tokens
files = [pathlib.Path(word) for word in sys.argv[1:]]
kept = []
read_columns(files[0], Tokens(files[0]))  # what is imported and made once
tracemalloc.start()
for file in files:
    before = tracemalloc.get_traced_memory()[0]
    kept.append(read_columns(file, Tokens(file)))
    print(tracemalloc.get_traced_memory()[0] - before)
"""
    few, many = map(int, spawn(sys.executable, "-c", code, tmp_path / "1000.jsonl", tmp_path / "5000.jsonl").stdout.split())
    assert many - few < 200 * 4000, (few, many)


def test_categories_of_equally_many_prompts_share_their_draws(monkeypatch):
    """What is drawn for 50 categories is at most what is drawn for all prompts together, a few times over."""
    some = random_pictures(np.random.default_rng(6), 200)
    some = some._replace(category=np.array([str(int(id[1:]) % 50) for id in some.id], object))
    drawn = []
    resample = stats.resampled_means
    monkeypatch.setattr(stats, "resampled_means", lambda columns: drawn.append(len(columns)) or resample(columns))
    found = measure_all({**FIXED_PICTURES, **BETWEEN_JUDGES}, some, some)
    assert sum(drawn) < 4 * 200
    one = some.take(some.category == "7")
    for name, measure in (FIXED_PICTURES | BETWEEN_JUDGES).items():
        assert found[name]["categories"]["7"] == measure(one, one), name


# ---------------------------------------------------------------------------------------------------------------------
# A real model, damaged


def damage(model, out) -> None:
    """A copy of a checkpoint whose language model's weights are disturbed: it draws and judges worse."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, out)
    weights, generator = load_file(out / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if "language_model.layers" in name and weight.ndim == 2:
            noise = 1 + 0.6 * torch.randn(weight.shape, generator=generator)
            weights[name] = (weight.float() * noise).to(weight.dtype)
    save_file(weights, out / "model.safetensors", {"format": "pt"})


def test_a_damaged_model_is_a_co_degradation_with_the_numbers_of_summary(tmp_path, monkeypatch):
    """Drawn, judged, rejudged and labelled by the real commands; rates against those of summary.py, which counts by itself."""
    monkeypatch.syspath_prepend(str(ROOT / "shapes"))
    base, damaged = ROOT / "shapes" / "base", tmp_path / "damaged"
    damage(base, damaged)
    lines = (ROOT / "shapes" / "prompts_heldout.jsonl").read_text().splitlines()
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines[::6]) + "\n")  # 22 prompts
    flags = ("--batch", 64, "--chunk", 32, "--device", "cpu")
    for name, model in (("before", base), ("after", damaged)):
        drawing = ("--prompts", tmp_path / "prompts.jsonl", "--candidates", 2, "--guidance", 1, *flags)
        run("score.py", "--model", model, "--out", tmp_path / f"{name}.jsonl", *drawing)
        run("world.py", "label", tmp_path / f"{name}.jsonl", "--out", tmp_path / f"{name}_labels.jsonl")
    run("score.py", "--model", damaged, "--rejudge", tmp_path / "before.jsonl", "--out", tmp_path / "again.jsonl", *flags)

    files = {"--before": "before", "--after": "after", "--rejudged": "again"}
    files |= {"--labels": "before_labels", "--labels-after": "after_labels"}
    found, _ = diagnosed(tmp_path, [word for flag, name in files.items() for word in (flag, tmp_path / f"{name}.jsonl")])
    assert found["verdict"]["verdict"] == "co-degradation", found["verdict"]

    def value(part: str, measure: str, side: str) -> float:
        return round(found[part][measure]["all"][side]["value"], 4)

    labels = {side: read_labels(tmp_path / f"{side}_labels.jsonl") for side in ("before", "after")}
    for side, name in (("before", "before"), ("after", "again")):
        for measure, number in judge_rates(read_judged(tmp_path / f"{name}.jsonl", labels["before"])).items():
            assert value("judged", measure, side) == pytest.approx(number, abs=1e-4), measure
    for side in ("before", "after"):
        pictures = read_judged(tmp_path / f"{side}.jsonl", labels[side])
        assert value("drawn", "weak_generation", side) == pytest.approx(weak_generation(pictures), abs=1e-4)
        accuracy = np.mean([picture["label"] for picture in pictures])
        assert value("drawn", "drawing_accuracy", side) == pytest.approx(accuracy, abs=1e-4)


def test_importing_it_leaves_torch_out():
    code = "import sys, analysis.diagnose; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    spawn(sys.executable, "-c", code)
