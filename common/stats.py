"""The statistics behind the analysis scripts: bootstrap and binomial intervals, agreement, calibration, correlation.

Pure functions of numpy arrays, each with its source. Intervals are 95 %. What is undefined, such as a rate over nothing, is
NaN inside a computation and None as its result.

Legend: R rows, P prompts, K columns.
"""

import math
import statistics
from collections.abc import Callable

import numpy as np

RESAMPLES = 2000

Interval = tuple[float, float, float]  # a number, and the ends of its interval


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def bootstrap_interval(per_prompt: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the mean of `per_prompt` (P,), resampling prompts (Efron 1979)."""
    values = np.asarray(per_prompt, dtype=np.float64)
    if len(values) == 0:
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, 100):  # in blocks: 2000 x 5600 indices at once would be 90 MB
        block = means[start : start + 100]
        picks = generator.integers(0, len(values), (len(block), len(values)))
        block[:] = values[picks].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def percentile_interval(value: np.ndarray, draws: np.ndarray) -> Interval | None:
    """A number () with the 2.5 and 97.5 percentiles of its resamples (N,) (Efron 1979); None where it is undefined.

    Resamples in which it is undefined are left out.
    """
    if not np.isfinite(value):
        return None
    low, high = np.percentile(draws[np.isfinite(draws)], [2.5, 97.5])
    return float(value), float(low), float(high)


def bootstrap(statistic: Callable[..., np.ndarray], *columns: np.ndarray) -> Interval | None:
    """`statistic` of columns (R,), each row drawn with replacement. It maps columns (..., R) to (...)."""
    n_rows = len(columns[0])
    if not n_rows:
        return None
    picks = np.random.default_rng(0).integers(0, n_rows, (RESAMPLES, n_rows))
    return percentile_interval(statistic(*columns), statistic(*(column[picks] for column in columns)))


def bootstrap_of_means(statistic: Callable[[np.ndarray], np.ndarray], columns: np.ndarray) -> Interval | None:
    """`statistic` of the means over P prompts of columns (P, K), prompts drawn with replacement. It maps (..., K) to (...)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return percentile_interval(statistic(columns.mean(0)), statistic(resampled_means(columns)))


def resampled_means(columns: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """(resamples, K): the means of columns (P, K) over P prompts drawn with replacement.

    The draws are those of `bootstrap_interval`, so that a rate has here the interval that score.py prints.
    """
    generator = np.random.default_rng(seed)
    n_prompts = len(columns)
    means = np.empty((resamples, columns.shape[1]))
    for start in range(0, resamples, 100):
        block = means[start : start + 100]
        picks = generator.integers(0, n_prompts, (len(block), n_prompts))
        picks += n_prompts * np.arange(len(block))[:, None]  # so that one count serves all resamples of the block
        counts = np.bincount(picks.ravel(), minlength=picks.size).reshape(picks.shape)
        block[:] = counts @ columns / n_prompts
    return means


def per_prompt(ids: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Means over each prompt's rows: ids (R,), columns (R, K) -> (P, K), prompts in the order of their ids."""
    _, index = np.unique(ids, return_inverse=True)
    return np.stack([np.bincount(index, column) for column in columns.T], 1) / np.bincount(index)[:, None]


def wilson(successes: int, trials: int) -> Interval | None:
    """A binomial share with its score interval (Wilson 1927); None for no trial."""
    if not trials:
        return None
    z = statistics.NormalDist().inv_cdf(0.975)
    share, room = successes / trials, z * z / trials
    middle = share + room / 2
    half = z * math.sqrt(share * (1 - share) / trials + room / (4 * trials))
    return share, max(0.0, (middle - half) / (1 + room)), min(1.0, (middle + half) / (1 + room))


# ---------------------------------------------------------------------------------------------------------------------
# Statistics of means over prompts: (..., K) -> (...)


def mean_itself(means: np.ndarray) -> np.ndarray:
    """(..., 1) -> (...): the mean over prompts itself."""
    return means[..., 0]


def ratio(means: np.ndarray) -> np.ndarray:
    """(..., 2) -> (...): the first mean per unit of the last."""
    return means[..., 0] / means[..., -1]


def summed_gaps(means: np.ndarray) -> np.ndarray:
    """(..., K + 1) -> (...): the sum of K absolute means per unit of the last."""
    return np.abs(means[..., :-1]).sum(-1) / means[..., -1]


def kappa(means: np.ndarray) -> np.ndarray:
    """Cohen's kappa (1960) from (..., 3): shares of agreement, of the first judge's yes, of the second's."""
    agree, first, second = np.moveaxis(means, -1, 0)
    by_chance = first * second + (1 - first) * (1 - second)
    return (agree - by_chance) / (1 - by_chance)


def calibration_gaps(probability: np.ndarray, label: np.ndarray, bins: int) -> np.ndarray:
    """probability - label, both (R,), in the column of the probability's bin, 0 elsewhere: (R, bins).

    Expected calibration error = sum over bins of |mean over all rows of this| (`summed_gaps`): the usual sum of (share of
    rows in the bin) |mean probability - share of right ones|, bins equally wide (Naeini et al. 2015). Resampling adds noise
    to every bin, so its interval lies rather high.
    """
    places = np.minimum((probability * bins).astype(int), bins - 1)  # the last bin holds a probability of 1
    return np.where(places[:, None] == np.arange(bins), (probability - label)[:, None], 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics of rows: (..., R) -> (...)


def mean(x: np.ndarray) -> np.ndarray:
    """(..., R) -> (...)."""
    return x.mean(axis=-1)


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's correlation of two (..., R) -> (...); NaN where one does not vary."""
    x, y = (values - values.mean(axis=-1, keepdims=True) for values in (x, y))
    with np.errstate(invalid="ignore"):
        return (x * y).sum(axis=-1) / np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))


def midranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value in its row, (..., R) -> (..., R) from 1; equal values share the mean of their ranks."""
    ranks = np.full(values.shape, 0.5)
    for i in range(values.shape[-1]):
        other = values[..., i : i + 1]
        ranks += (values > other) + 0.5 * (values == other)
    return ranks


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of two (..., R) -> (...)."""
    return pearson(midranks(x), midranks(y))


def residual(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Root mean square of what a prediction leaves over, per root mean square of what was measured: (..., R) -> (...)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(mean((measured - predicted) ** 2) / mean(measured**2))
