"""stats.py: by hand, against published values, and against plain loops."""

import math

import numpy as np
import pytest

from common.stats import (
    bootstrap,
    bootstrap_interval,
    bootstrap_of_means,
    bootstraps_of_means,
    calibration_gaps,
    kappa,
    mean,
    mean_itself,
    midranks,
    pearson,
    per_prompt,
    percentile_intervals,
    ratio,
    residual,
    slope,
    spearman,
    summed_gaps,
    wilson,
)

# ---------------------------------------------------------------------------------------------------------------------
# Intervals


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),  # Newcombe 1998, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_binomial_interval_has_the_published_values(successes, trials, low, high):
    value, *ends = wilson(successes, trials)
    assert value == successes / trials and [round(end, 4) for end in ends] == [low, high]
    mirrored = wilson(trials - successes, trials)
    assert mirrored[1:] == pytest.approx((1 - ends[1], 1 - ends[0]))


def test_a_share_of_nothing_is_unknown_and_one_of_all_ends_at_1():
    assert wilson(0, 0) is None and wilson(2, 2)[2] == 1.0


def test_the_bootstraps_interval_is_that_of_a_normal_mean():
    values = np.random.default_rng(1).normal(3, 2, 400)
    half = 1.96 * values.std() / 20
    for found in (bootstrap(mean, values), bootstrap_of_means(mean_itself, values[:, None])):
        assert found == pytest.approx((values.mean(), values.mean() - half, values.mean() + half), abs=0.04)
    assert bootstrap(mean, values) == pytest.approx(bootstrap_of_means(mean_itself, values[:, None]))  # the same draws


def test_the_mean_over_prompts_has_the_interval_that_score_prints():
    values = np.random.default_rng(2).random(137)
    assert bootstrap_of_means(mean_itself, values[:, None])[1:] == pytest.approx(bootstrap_interval(values))


def test_what_is_undefined_is_none_and_a_resample_in_which_it_is_is_left_out():
    assert bootstrap(mean, np.array([])) is None
    assert bootstrap(pearson, np.ones(5), np.arange(5.0)) is None
    assert bootstrap_of_means(ratio, np.zeros((4, 2))) is None
    rare = np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])  # without the first row 0 / 0
    assert bootstrap_of_means(ratio, rare) == (1, 1, 1)


@pytest.mark.parametrize("undefined", [0, 1, 1999, 2000])
def test_percentiles_of_many_numbers_are_numpys_of_each(undefined):
    draws = np.random.default_rng(4).normal(size=(2000, 3))
    draws[:undefined, 1] = np.where(np.arange(undefined) % 2, np.nan, np.inf)
    wanted = [
        np.percentile(column[np.isfinite(column)], [2.5, 97.5]) if np.isfinite(column).any() else None for column in draws.T
    ]
    found = percentile_intervals(np.array([0.0, np.nan if undefined == 2000 else 1.0, 2.0]), draws)
    for i, (interval, ends) in enumerate(zip(found, wanted, strict=True)):
        assert interval == (None if ends is None else (i, *ends))


def test_estimates_made_together_are_those_made_one_by_one():
    """Other numbers of prompts and columns, in any order, more columns than are resampled at a time."""
    generator = np.random.default_rng(5)
    shapes = [(9, 2), (1, 2), (30, 2), (9, 2), (9, 3), *[(7, 2)] * 600]
    tables = [(generator.random(shape), (ratio,) if shape[1] == 2 else (summed_gaps, ratio)) for shape in shapes]
    for (columns, statistics), found in zip(tables, bootstraps_of_means(tables), strict=True):
        assert [*found] == [pytest.approx(bootstrap_of_means(statistic, columns)) for statistic in statistics]


def test_prompts_are_drawn_once_for_all_columns(monkeypatch):
    """Or a million pictures take an hour: 10 tables of 9 prompts and their 20 statistics need the draws of one."""
    drawn = []
    monkeypatch.setattr(
        "common.stats.resampled_means", lambda columns: drawn.append(columns.shape) or np.ones((4, columns.shape[1]))
    )
    bootstraps_of_means([(np.ones((9, 2)), (ratio, mean_itself))] * 10)
    assert drawn == [(9, 20)]


def test_every_prompt_counts_once():
    ids = np.array(["b", "a", "b", "b"])
    columns = np.array([[1.0, 0], [5, 1], [2, 0], [6, 3]])
    assert per_prompt(ids, columns).tolist() == [[5, 1], [3, 1]]


# ---------------------------------------------------------------------------------------------------------------------
# Judges


def test_kappa_of_the_textbook_table():
    """Two readers, 50 cases: both yes 20, only the first 5, only the second 10, both no 15. kappa = (.7 - .5) / (1 - .5)."""
    assert kappa(np.array([35 / 50, 25 / 50, 30 / 50])) == pytest.approx(0.4)
    assert kappa(np.array([[1.0, 0.5, 0.5], [0.5, 0.5, 0.5]])) == pytest.approx([1, 0])  # a row of resamples each


def test_the_calibration_error_is_the_usual_sum_over_bins():
    """Written out: bin by bin, share of rows in it times |mean probability - share right|."""
    generator = np.random.default_rng(3)
    probability = np.append(generator.random(200), [0.0, 1.0])
    label = (generator.random(202) < probability**2).astype(float)
    total = 0.0
    for k in range(10):
        inside = (probability >= k / 10) & ((probability < (k + 1) / 10) | (k == 9))
        total += inside.mean() * abs(probability[inside].mean() - label[inside].mean())
    gaps = calibration_gaps(probability, label, 10)
    assert gaps.shape == (202, 10)
    assert summed_gaps(np.append(gaps.mean(0), 1.0)) == pytest.approx(total)


# ---------------------------------------------------------------------------------------------------------------------
# Correlations


def test_correlations_by_hand():
    x, y = np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 3, -6])
    assert pearson(x, y) == pytest.approx(-10 / math.sqrt(5 * 50))
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert spearman(x, y) == pytest.approx(1 - 6 * (1 + 1 + 1 + 9) / (4 * 15))  # no ties: 1 - 6 sum d^2 / n (n^2 - 1)
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert math.isnan(pearson(x, np.ones(4)))
    both = np.stack([x, np.exp(x)]), np.stack([y, x])
    assert spearman(*both) == pytest.approx([spearman(x, y), 1])  # a row of resamples each


def test_equal_values_share_the_mean_of_their_ranks():
    assert midranks(np.array([0.5, 0.1, 0.5, 0.9, 0.5])).tolist() == [3, 1, 3, 5, 3]


def test_the_slope_goes_through_the_origin():
    assert slope(np.array([1.0, 2]), np.array([3.0, 5])) == pytest.approx((1 * 3 + 2 * 5) / 5)
    assert not np.isfinite(slope(np.zeros(2), np.ones(2)))


def test_residual_is_what_a_prediction_leaves_over():
    assert residual(np.array([1.0, -1]), np.array([2.0, -2])) == pytest.approx(0.5)
    assert not np.isfinite(residual(np.ones(2), np.zeros(2)))
