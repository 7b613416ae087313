"""The statistics behind the analysis scripts: bootstrap and binomial intervals, agreement, calibration, correlation.

Pure functions of numpy arrays, each with its source. Intervals are 95 %. What is undefined, such as a rate over nothing, is
NaN inside a computation and None as its result.

Legend: R rows, P prompts, K columns.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence

import numpy as np

RESAMPLES = 2000
MIN_PROMPTS = 20  # over fewer the percentile bootstrap finds too much: at 8, of 99 % and no difference, 5 % good and 5 % bad
MAX_COUNTS = 2**22  # prompts drawn at a time, in all resamples of a block: 32 MB
MAX_COLUMNS = 1024  # resampled at a time: 16 MB of means

Interval = tuple[float, float, float]  # a number, and the ends of its interval
Statistic = Callable[[np.ndarray], np.ndarray]  # of means over prompts, (..., K) -> (...)


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def bootstrap_interval(per_prompt: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the mean of `per_prompt` (P,), resampling prompts (Efron 1979)."""
    values = np.asarray(per_prompt, dtype=np.float64)
    if len(values) == 0:
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, min(100, MAX_COUNTS // len(values)))  # the draws are the same in blocks of any size
    for start in range(0, resamples, step):
        block = means[start : start + step]
        picks = generator.integers(0, len(values), (len(block), len(values)))
        block[:] = values[picks].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def percentile_interval(value: np.ndarray, draws: np.ndarray) -> Interval | None:
    """A number () with the 2.5 and 97.5 percentiles of its resamples (N,) (Efron 1979); None where it is undefined.

    Resamples in which it is undefined are left out.
    """
    return percentile_intervals(value[None], draws[:, None])[0]


def percentile_intervals(values: np.ndarray, draws: np.ndarray) -> list[Interval | None]:
    """`percentile_interval` of n numbers (n,) with resamples (N, n), sorted at once. The percentiles are np.percentile's."""
    ordered = np.where(np.isfinite(draws), draws, np.nan).T.copy()  # (n, N)
    ordered.sort(axis=1)  # NaN comes last
    last = np.isfinite(ordered).sum(1) - 1
    ends = []
    for share in (0.025, 0.975):
        place = share * last
        below = np.maximum(np.floor(place).astype(int), 0)
        low, high = (np.take_along_axis(ordered, at[:, None], 1)[:, 0] for at in (below, np.clip(below + 1, 0, last.clip(0))))
        part, step = place - below, high - low
        ends.append(np.where(part < 0.5, low + step * part, high - step * (1 - part)))
    found = zip(values.tolist(), ends[0].tolist(), ends[1].tolist(), strict=True)
    return [interval if math.isfinite(interval[0]) else None for interval in found]


def bootstrap(statistic: Callable[..., np.ndarray], *columns: np.ndarray) -> Interval | None:
    """`statistic` of columns (R,), each row drawn with replacement. It maps columns (..., R) to (...)."""
    n_rows = len(columns[0])
    if not n_rows:
        return None
    picks = np.random.default_rng(0).integers(0, n_rows, (RESAMPLES, n_rows))
    return percentile_interval(statistic(*columns), statistic(*(column[picks] for column in columns)))


def bootstrap_of_means(statistic: Statistic, columns: np.ndarray) -> Interval | None:
    """`statistic` of the means over P prompts of columns (P, K), prompts drawn with replacement. It maps (..., K) to (...)."""
    return bootstraps_of_means([(columns, (statistic,))])[0][0]


def bootstraps_of_means(tables: Sequence[tuple[np.ndarray, Sequence[Statistic]]]) -> list[list[Interval | None]]:
    """`bootstrap_of_means` of each statistic of each table of columns (P, K), in a fraction of the time.

    Tables of equally many prompts have the same draws anyway: they are drawn and counted once for many tables. Neighbours
    with the same statistics go through these together.
    """
    found: list[list[Interval | None]] = [[] for _ in tables]
    alike: dict[int, list[int]] = {}
    for i, (columns, _) in enumerate(tables):
        alike.setdefault(len(columns), []).append(i)
    for n_prompts, places in alike.items():
        width, start = 0, 0
        for end, i in enumerate(places, 1):
            width += tables[i][0].shape[1]
            if end == len(places) or width >= MAX_COLUMNS:
                some = places[start:end]
                values = np.concatenate([tables[j][0].mean(0) for j in some])
                # all resamples of one prompt are that prompt
                means = resampled_means(np.hstack([tables[j][0] for j in some])) if n_prompts > 1 else values[None]
                for j, intervals in zip(some, intervals_of_means([tables[j] for j in some], values, means), strict=True):
                    found[j] = intervals
                width, start = 0, end
    return found


def intervals_of_means(
    tables: Sequence[tuple[np.ndarray, Sequence[Statistic]]], values: np.ndarray, means: np.ndarray
) -> list[list[Interval | None]]:
    """The intervals of each table, their columns' means (K,) and resampled means (N, K) side by side."""
    found, start = [], 0
    for (n_columns, wanted), group in itertools.groupby(tables, key=lambda table: (table[0].shape[1], table[1])):
        count = len(list(group))
        columns = slice(start, start := start + count * n_columns)
        with np.errstate(divide="ignore", invalid="ignore"):
            parts = [
                percentile_intervals(
                    statistic(values[columns].reshape(count, n_columns)),
                    statistic(means[:, columns].reshape(len(means), count, n_columns)),
                )
                for statistic in wanted
            ]
        found += [list(intervals) for intervals in zip(*parts, strict=True)]
    return found


def resampled_means(columns: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """(resamples, K): the means of columns (P, K) over P prompts drawn with replacement.

    The draws are those of `bootstrap_interval`, so that a rate has here the interval that score.py prints.
    """
    generator = np.random.default_rng(seed)
    n_prompts = len(columns)
    means = np.empty((resamples, columns.shape[1]))
    step = max(1, min(100, MAX_COUNTS // n_prompts))
    for start in range(0, resamples, step):
        block = means[start : start + step]
        picks = generator.integers(0, n_prompts, (len(block), n_prompts))
        if len(block) == 100:
            picks += n_prompts * np.arange(len(block))[:, None]  # so that one count serves all resamples of the block
            counts = np.bincount(picks.ravel(), minlength=picks.size).reshape(picks.shape)
        else:  # many prompts: the counts of one resample stay in the cache
            for pick in picks:
                pick[:] = np.bincount(pick, minlength=n_prompts)
            counts = picks
        block[:] = counts @ columns / n_prompts
    return means


def per_prompt(ids: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Means over each prompt's rows: ids (R,), columns (R, K) -> (P, K), prompts in the order of their ids."""
    numbers = number_in_order(ids)
    return means_by_number(np.array([numbers[id] for id in ids]), columns.T, len(numbers))


def number_in_order(*ids: Iterable[str]) -> dict[str, int]:
    """Ids, each named once, with their numbers from 0 in their order. (np.unique compares all rows: ten times as long.)"""
    return {id: number for number, id in enumerate(sorted(set().union(*ids)))}


def means_by_number(index: np.ndarray, columns: Iterable[np.ndarray], n_prompts: int) -> np.ndarray:
    """Means over the rows of each number: index (R,) under P = n_prompts, K columns (R,) -> (P, K); NaN without rows."""
    sums = np.stack([np.bincount(index, column, n_prompts) for column in columns], 1)
    with np.errstate(invalid="ignore"):
        return sums / np.bincount(index, minlength=n_prompts)[:, None]


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


def slope(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Measured per predicted, least squares through the origin: (..., R) -> (...); 1 where the prediction holds."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return mean(predicted * measured) / mean(predicted * predicted)


def residual(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Root mean square of what a prediction leaves over, per root mean square of what was measured: (..., R) -> (...)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(mean((measured - predicted) ** 2) / mean(measured**2))
