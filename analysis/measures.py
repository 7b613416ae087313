"""What diagnose.py measures: of a model's own pictures, of one fixed set before and after, and between two judges.

Every prompt counts once, whatever the number of its pictures; a rate under a condition is a ratio of two means over prompts.
Intervals are 95 % percentile bootstraps over prompts, those of a difference over the prompts of both sides together.

Legend: R pictures, P prompts, K columns.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from common import stats

BINS = 10  # of P(yes), equally wide, for the calibration error


class Pictures(NamedTuple):
    """Pictures as one judge sees them; all arrays (R,)."""

    id: np.ndarray  # of the prompt
    category: np.ndarray
    p_yes: np.ndarray
    p_yes_foil: np.ndarray
    coverage: np.ndarray
    label: np.ndarray  # 1: the independent judge says right, 0: wrong, NaN: it has not said
    threshold: float

    def take(self, which: np.ndarray) -> "Pictures":
        """Some of the pictures: `which` is places or a mask."""
        columns = {name: column[which] for name, column in self._asdict().items() if name != "threshold"}
        return Pictures(**columns, threshold=self.threshold)

    @property
    def accepted(self) -> np.ndarray:
        return self.p_yes > self.threshold


class Estimate(NamedTuple):
    """A number with its 95 % interval, None where there is nothing to measure.

    n_pictures: how many it is a rate of; for a difference, on the side that has fewer.
    """

    value: float | None
    low: float | None
    high: float | None
    n_prompts: int
    n_pictures: int

    @property
    def interval(self) -> stats.Interval | None:
        """value, low and high, or None."""
        if self.value is None or self.low is None or self.high is None:
            return None
        return self.value, self.low, self.high


def estimate(found: stats.Interval | None, n_prompts: int, n_pictures: int) -> Estimate:
    """A number of stats.py as it is written into the file."""
    value, low, high = (round(number, 6) for number in found) if found else (None, None, None)
    return Estimate(value, low, high, n_prompts, n_pictures)


def over_prompts(statistic: Callable[[np.ndarray], np.ndarray], columns: np.ndarray, n_pictures: int) -> Estimate:
    """`statistic` of the means over prompts of columns (P, K)."""
    return estimate(stats.bootstrap_of_means(statistic, columns), len(columns), n_pictures)


# ---------------------------------------------------------------------------------------------------------------------
# Rates, before and after


class Measure(NamedTuple):
    """A rate of pictures: `values` (R,) or (R, K) over those that are `given` (R,); `labelled`: of labelled ones only."""

    values: Callable[[Pictures], np.ndarray]
    given: Callable[[Pictures], np.ndarray] = lambda x: np.ones(len(x.id), bool)
    labelled: bool = False
    statistic: Callable[[np.ndarray], np.ndarray] = stats.ratio

    def __call__(self, before: Pictures, after: Pictures) -> dict[str, Estimate]:
        """before, after and difference, over the prompts that both have; one side alone where the other has no label."""
        sides = {"before": before, "after": after}
        if self.labelled:
            sides = {name: side.take(~np.isnan(side.label)) for name, side in sides.items()}
        ids = [set(side.id) for side in sides.values() if len(side.id)]
        shared = set.intersection(*ids) if ids else set()
        tables, found = [], {}
        for name, side in sides.items():
            side = side.take(np.array([id in shared for id in side.id], bool))
            if not len(side.id):
                continue
            given = self.given(side)
            values = self.values(side).reshape(len(side.id), -1) * given[:, None]  # (R, K)
            tables.append(stats.per_prompt(side.id, np.column_stack([values, given])))  # (P, K + 1)
            found[name] = over_prompts(self.statistic, tables[-1], int(given.sum()))
        if len(tables) == 2:
            fewer = min(side.n_pictures for side in found.values())
            found["difference"] = over_prompts(self.change, np.hstack(tables), fewer)
        return found

    def change(self, means: np.ndarray) -> np.ndarray:
        """(..., 2 (K + 1)) -> (...): the statistic of the second half minus that of the first."""
        first, second = np.split(means, 2, axis=-1)
        return self.statistic(second) - self.statistic(first)


# Of each model's own pictures, judged by itself.
DRAWN = {
    "nonunified": Measure(lambda x: ~x.accepted),
    "foil_yes_rate": Measure(lambda x: x.p_yes_foil > x.threshold),
    "separation": Measure(lambda x: x.p_yes - x.p_yes_foil),
    "coverage": Measure(lambda x: x.coverage),
    "drawing_accuracy": Measure(lambda x: x.label, labelled=True),
    "weak_generation": Measure(lambda x: x.label == 0, lambda x: ~x.accepted, labelled=True),
}
# Of the pictures of --before, as the judge before and the judge after see them.
JUDGED = {
    "yes_rate": Measure(lambda x: x.accepted),
    "foil_yes_rate": DRAWN["foil_yes_rate"],
    "separation": DRAWN["separation"],
    "coverage": DRAWN["coverage"],
    "judge_accuracy": Measure(lambda x: x.accepted == x.label, labelled=True),
    "false_positive_rate": Measure(lambda x: x.accepted, lambda x: x.label == 0, labelled=True),
    "false_negative_rate": Measure(lambda x: ~x.accepted, lambda x: x.label == 1, labelled=True),
    "separation_if_right": Measure(lambda x: x.p_yes - x.p_yes_foil, lambda x: x.label == 1, labelled=True),
    "calibration_error": Measure(
        lambda x: stats.calibration_gaps(x.p_yes, x.label, BINS), labelled=True, statistic=stats.summed_gaps
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# Between two judges of the same pictures


def average(ids: np.ndarray, values: np.ndarray) -> Estimate:
    """The mean over prompts of pictures' values (R,)."""
    return over_prompts(stats.mean_itself, stats.per_prompt(ids, values[:, None]), len(ids))


def drift(first: Pictures, second: Pictures) -> Estimate:
    """How far the judges' P(yes) of a picture lie apart, on average."""
    return average(first.id, np.abs(second.p_yes - first.p_yes))


def shift(first: Pictures, second: Pictures) -> Estimate:
    """How much higher the second judge's P(yes) is, on average."""
    return average(first.id, second.p_yes - first.p_yes)


def agreement(first: Pictures, second: Pictures) -> Estimate:
    """The share of pictures that both judges accept or both reject."""
    return average(first.id, first.accepted == second.accepted)


def chance_corrected(first: Pictures, second: Pictures) -> Estimate:
    """Cohen's kappa of the judges' answers."""
    answers = np.column_stack([first.accepted == second.accepted, first.accepted, second.accepted])
    return over_prompts(stats.kappa, stats.per_prompt(first.id, answers), len(first.id))


def win_rate(first: Pictures, second: Pictures) -> Estimate:
    """Of the labelled pictures on which the judges disagree, the share where the second is right; Wilson interval.

    Counted in pictures: those of one prompt are alike, so the interval is rather too narrow.
    """
    disputed = ~np.isnan(first.label) & (first.accepted != second.accepted)
    wins, count = int((second.accepted == second.label)[disputed].sum()), int(disputed.sum())
    n_prompts = len(set(first.id[disputed]))
    return estimate(stats.wilson(wins, count), n_prompts, count)


# Of the same pictures, between the judge before and the judge after.
BETWEEN = {"drift": drift, "shift": shift, "agreement": agreement, "kappa": chance_corrected, "win_rate": win_rate}


def measure_all(
    measures: Mapping[str, Measure | Callable[[Pictures, Pictures], Estimate]], one: Pictures, other: Pictures
) -> dict[str, dict[str, Any]]:
    """What each of `measures` says of all pictures, and of those of each category of the first."""
    sides = {name: (one.take(one.category == name), other.take(other.category == name)) for name in sorted({*one.category})}
    return {
        name: {"all": measure(one, other), "categories": {category: measure(*some) for category, some in sides.items()}}
        for name, measure in measures.items()
    }
