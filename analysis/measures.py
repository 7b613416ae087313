"""What diagnose.py measures: rates before and after, and what lies between two judges, of all pictures and by category.

Every prompt counts once, whatever the number of its pictures; a rate under a condition is a ratio of two means over prompts.
Intervals are 95 % percentile bootstraps over prompts, those of a difference over the prompts of both sides together. What is
to be estimated is collected first: estimates over equally many prompts share their draws.

Legend: R pictures, P prompts, K columns.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from analysis.comparison import Pictures
from common import stats

BINS = 10  # of P(yes), equally wide, for the calibration error


# ---------------------------------------------------------------------------------------------------------------------
# Estimates


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


def make_estimate(found: stats.Interval | None, n_prompts: int, n_pictures: int) -> Estimate:
    """A number of stats.py as it is written into the file."""
    value, low, high = (round(number, 6) for number in found) if found else (None, None, None)
    return Estimate(value, low, high, n_prompts, n_pictures)


class Task(NamedTuple):
    """Estimates to be made: statistics of the means over prompts of columns (P, K), each over so many pictures.

    They become a dictionary with the statistics' names; one that is called "" becomes the Estimate itself.
    """

    columns: np.ndarray
    statistics: Mapping[str, stats.Statistic]
    n_pictures: tuple[int, ...]


def make_estimates(found: dict[str, Any]) -> dict[str, Any]:
    """Tasks, however nested in dictionaries, replaced by their Estimates, all made together."""
    tasks = list(walk_tasks(found))
    made = iter(stats.bootstraps_of_means([(task.columns, tuple(task.statistics.values())) for task in tasks]))

    def replaced(value: Any) -> Any:
        if isinstance(value, Task):
            numbers = zip(value.statistics, next(made), value.n_pictures, strict=True)
            named = {name: make_estimate(number, len(value.columns), n_pictures) for name, number, n_pictures in numbers}
            return named.get("", named)
        return {key: replaced(one) for key, one in value.items()} if isinstance(value, dict) else value

    return replaced(found)


def walk_tasks(found: Any) -> Iterator[Task]:
    """The tasks in nested dictionaries, in order."""
    if isinstance(found, Task):
        yield found
    elif isinstance(found, dict):
        for value in found.values():
            yield from walk_tasks(value)


class Prompts:
    """The prompts of two sides' pictures, numbered in the order of their ids, and in groups."""

    def __init__(self, before: Pictures, after: Pictures) -> None:
        sides = (before, after)
        numbers = stats.number_in_order(*(side.id for side in sides))
        self.count = len(numbers)
        self.index = [np.array([numbers[id] for id in side.id], np.int64) for side in sides]  # (R,) each
        self._names = sorted({*before.category})
        known = {name: number for number, name in enumerate(self._names)}
        self._category = np.full(self.count, len(known))  # (P,); last what `before` does not have
        for side, index in zip(sides[::-1], self.index[::-1], strict=True):
            self._category[index] = [known.get(name, len(known)) for name in side.category]

    def groups(self, make: Callable[[np.ndarray], Any]) -> dict[str, Any]:
        """`make` of the numbers of all prompts, and of those of each category of `before`."""
        order = np.argsort(self._category, kind="stable")
        ends = np.searchsorted(self._category[order], np.arange(len(self._names)), "right").tolist()
        slices = zip(self._names, [0, *ends], ends, strict=False)
        return {
            "all": make(np.arange(self.count)),
            "categories": {name: make(order[start:end]) for name, start, end in slices},
        }


# ---------------------------------------------------------------------------------------------------------------------
# Rates, before and after


class Measure(NamedTuple):
    """A rate of pictures: `values` (R,) or (R, K) over those that meet the `condition` (R,); `labelled`: of labelled ones."""

    values: Callable[[Pictures], np.ndarray]
    condition: Callable[[Pictures], np.ndarray] = lambda x: np.ones(len(x.id), bool)
    labelled: bool = False
    statistic: stats.Statistic = stats.ratio

    def __call__(self, before: Pictures, after: Pictures) -> dict[str, Estimate]:
        """before, after and difference, over the prompts that both have; one side alone where the other has no label."""
        return measure_all({"it": self}, before, after)["it"]["all"]

    def tasks(self, prompts: Prompts, *sides: Pictures) -> dict[str, Any]:
        """The same of all pictures and of each category, still to be estimated."""
        tables, counts = [], []  # (P, K + 1) and (P,) each; NaN and 0 where the side does not have the prompt
        for side, index in zip(sides, prompts.index, strict=True):
            if self.labelled:
                known = ~np.isnan(side.label)
                side, index = side.take(known), index[known]
            counted, values = self.condition(side), self.values(side)
            columns = (column * counted for column in (*np.atleast_2d(values.T), np.ones(len(counted))))  # (R,), K + 1 times
            tables.append(stats.means_by_number(index, columns, prompts.count))
            counts.append(np.bincount(index[counted], minlength=prompts.count))
        alone = ({"before": self.statistic}, {"after": self.statistic})
        both = {"before": self.of_first, "after": self.of_second, "difference": self.difference}

        def task(which: np.ndarray) -> Task | dict[str, Any]:
            parts = [table[which] for table in tables]
            there = [~np.isnan(part[:, -1]) for part in parts]
            for one, other in ((0, 1), (1, 0)):
                if there[one].any() and not there[other].any():
                    return Task(parts[one][there[one]], alone[one], (int(counts[one][which].sum()),))
            shared = there[0] & there[1]
            if not shared.any():
                return {}
            pictures = [int(count[which[shared]].sum()) for count in counts]
            return Task(np.hstack([part[shared] for part in parts]), both, (*pictures, min(pictures)))

        return prompts.groups(task)

    def of_first(self, means: np.ndarray) -> np.ndarray:
        """(..., 2 (K + 1)) -> (...): the statistic of the first half."""
        return self.statistic(means[..., : means.shape[-1] // 2])

    def of_second(self, means: np.ndarray) -> np.ndarray:
        """(..., 2 (K + 1)) -> (...): the statistic of the second half."""
        return self.statistic(means[..., means.shape[-1] // 2 :])

    def difference(self, means: np.ndarray) -> np.ndarray:
        """(..., 2 (K + 1)) -> (...): the statistic of the second half minus that of the first."""
        return self.of_second(means) - self.of_first(means)


# Of each model's own pictures, judged by itself.
OWN_PICTURES = {
    "nonunified": Measure(lambda x: ~x.accepted),
    "foil_yes_rate": Measure(lambda x: x.p_yes_foil > x.threshold),
    "separation": Measure(lambda x: x.p_yes - x.p_yes_foil),
    "coverage": Measure(lambda x: x.coverage),
    "drawing_accuracy": Measure(lambda x: x.label, labelled=True),
    "weak_generation": Measure(lambda x: x.label == 0, lambda x: ~x.accepted, labelled=True),
}
# Of the pictures of --before, as the judge before and the judge after see them.
FIXED_PICTURES = {
    "yes_rate": Measure(lambda x: x.accepted),
    "foil_yes_rate": OWN_PICTURES["foil_yes_rate"],
    "separation": OWN_PICTURES["separation"],
    "coverage": OWN_PICTURES["coverage"],
    "judge_accuracy": Measure(lambda x: x.accepted == x.label, labelled=True),
    "false_positive_rate": Measure(lambda x: x.accepted, lambda x: x.label == 0, labelled=True),
    "false_negative_rate": Measure(lambda x: ~x.accepted, lambda x: x.label == 1, labelled=True),
    "separation_if_right": Measure(lambda x: x.p_yes - x.p_yes_foil, lambda x: x.label == 1, labelled=True),
    "calibration_error": Measure(
        lambda x: stats.calibration_gaps(x.p_yes, x.label, BINS), labelled=True, statistic=stats.summed_gaps
    ),
}


def outranked(x: Pictures, score: np.ndarray) -> np.ndarray:
    """The share of the wrong pictures of its prompt over which each picture's score lies: (R,) -> (R,); a tie is a half.

    NaN where the prompt has no wrong one.
    """
    prompt = np.unique(x.id, return_inverse=True)[1]
    values, rank = np.unique(score, return_inverse=True)
    first = prompt * (len(values) + 1)  # below all pictures of the prompt
    wrong = np.sort((first + 1 + rank)[x.label == 0])
    start, end = (np.searchsorted(wrong, first + more) for more in (0, len(values) + 1))
    below = (np.searchsorted(wrong, first + 1 + rank, side) for side in ("left", "right"))
    with np.errstate(invalid="ignore"):
        return (sum(below) / 2 - start) / (end - start)


def ranking(score: Callable[[Pictures], np.ndarray]) -> Measure:
    """How often a right picture's score lies over that of a wrong one of its prompt, of the prompts that have both: what
    chooses DPO's pairs."""

    def beside_wrong(x: Pictures) -> np.ndarray:
        return (x.label == 1) & ~np.isnan(outranked(x, score(x)))

    return Measure(lambda x: np.nan_to_num(outranked(x, score(x))), beside_wrong, labelled=True)


# The same, where score.py --readouts likelihood has asked: the model as a judge that draws, which says yes where the picture
# is likelier given the prompt than given the foil (Proposition 1's w, of these two prompts).
OWN_LIKELIHOODS = {"likelihood_margin": Measure(lambda x: x.likelihood_margin)}
FIXED_LIKELIHOODS = OWN_LIKELIHOODS | {
    "likelihood_accuracy": Measure(lambda x: (x.likelihood_margin > 0) == x.label, labelled=True),
    "likelihood_false_positive_rate": Measure(lambda x: x.likelihood_margin > 0, lambda x: x.label == 0, labelled=True),
    "likelihood_false_negative_rate": Measure(lambda x: x.likelihood_margin <= 0, lambda x: x.label == 1, labelled=True),
    "ranking_accuracy": ranking(lambda x: x.p_yes),
    "likelihood_ranking_accuracy": ranking(lambda x: x.likelihood_margin),
}


# ---------------------------------------------------------------------------------------------------------------------
# Between two judges of the same pictures


class Between(NamedTuple):
    """A statistic of the means over prompts of `values` (R,) or (R, K) of the same pictures as two judges see them."""

    values: Callable[[Pictures, Pictures], np.ndarray]
    statistic: stats.Statistic = stats.mean_itself

    def __call__(self, first: Pictures, second: Pictures) -> Estimate:
        """The statistic of all pictures."""
        return measure_all({"it": self}, first, second)["it"]["all"]

    def tasks(self, prompts: Prompts, first: Pictures, second: Pictures) -> dict[str, Any]:
        """The same of all pictures and of each category, still to be estimated."""
        values = np.atleast_2d(self.values(first, second).T)  # (K, R)
        table = stats.means_by_number(prompts.index[0], values, prompts.count)  # (P, K)
        counts = np.bincount(prompts.index[0], minlength=prompts.count)
        statistics = {"": self.statistic}
        return prompts.groups(lambda which: Task(table[which], statistics, (int(counts[which].sum()),)))


def win_rate(first: Pictures, second: Pictures) -> Estimate:
    """Of the labelled pictures on which the judges disagree, the share where the second is right; Wilson interval.

    Counted in pictures: those of one prompt are alike, so the interval is rather too narrow.
    """
    disputed = ~np.isnan(first.label) & (first.accepted != second.accepted)
    wins, count = int((second.accepted == second.label)[disputed].sum()), int(disputed.sum())
    n_prompts = len(set(first.id[disputed]))
    return make_estimate(stats.wilson(wins, count), n_prompts, count)


# Of the same pictures, between the judge before and the judge after.
BETWEEN_JUDGES: dict[str, Between | Callable[[Pictures, Pictures], Estimate]] = {
    "drift": Between(lambda x, y: np.abs(y.p_yes - x.p_yes)),  # how far the judges' P(yes) of a picture lie apart
    "shift": Between(lambda x, y: y.p_yes - x.p_yes),  # how much higher the second's is
    "agreement": Between(lambda x, y: x.accepted == y.accepted),  # the share that both accept or both reject
    "kappa": Between(  # the same, corrected for what chance would give
        lambda x, y: np.column_stack([x.accepted == y.accepted, x.accepted, y.accepted]), stats.kappa
    ),
    "win_rate": win_rate,
}


def fell(label: int, accepted_after: bool) -> Callable[[Pictures, Pictures], Estimate]:
    """Of pictures with this label that the first judge accepted, and the second accepts or not, the share whose log p fell.

    log p is that of the picture given its prompt: the paper's Delta G over the training, which its Proposition 1 has below 0
    where a false positive is corrected. Wilson interval, in pictures, as of win_rate.
    """

    def measure(first: Pictures, second: Pictures) -> Estimate:
        which = (first.label == label) & first.accepted & (second.accepted == accepted_after)
        less = int((second.log_likelihood < first.log_likelihood)[which].sum())
        count = int(which.sum())
        return make_estimate(stats.wilson(less, count), len(set(first.id[which])), count)

    return measure


BETWEEN_LIKELIHOODS: dict[str, Between | Callable[[Pictures, Pictures], Estimate]] = {
    "likelihood_shift": Between(lambda x, y: y.log_likelihood - x.log_likelihood),  # Delta G, nats
    "likelihood_fell_if_corrected": fell(0, accepted_after=False),  # false positives that training corrected
    "likelihood_fell_if_not": fell(0, accepted_after=True),  # false positives that stayed
    "likelihood_fell_if_right": fell(1, accepted_after=True),  # true positives that stayed
}


Measures = Mapping[str, Measure | Between | Callable[[Pictures, Pictures], Estimate]]


def measure_all(measures: Measures, one: Pictures, other: Pictures) -> dict[str, dict[str, Any]]:
    """What each of `measures` says of all pictures, and of those of each category of the first."""
    return make_estimates(tasks_of(measures, one, other))


def tasks_of(measures: Measures, one: Pictures, other: Pictures) -> dict[str, dict[str, Any]]:
    """The same, still to be estimated by `make_estimates`."""
    prompts = Prompts(one, other)
    found = {}
    for name, measure in measures.items():
        if isinstance(measure, Measure | Between):
            found[name] = measure.tasks(prompts, one, other)
        else:
            found[name] = by_category(measure, one, other)
    return found


def by_category(measure: Callable[[Pictures, Pictures], Estimate], one: Pictures, other: Pictures) -> dict[str, Any]:
    """A measure of all of the same pictures on two sides, and of those of each category."""
    names, index = np.unique(one.category, return_inverse=True)
    groups = np.split(np.argsort(index, kind="stable"), np.cumsum(np.bincount(index))[:-1])
    some = {name: measure(one.take(which), other.take(which)) for name, which in zip(names.tolist(), groups, strict=True)}
    return {"all": measure(one, other), "categories": some}
