"""The paper's survey of one model: what it rejects of its own pictures, and whose fault that is, by level of difficulty.

A level is a set of tasks, and a task is a category of prompts, called as GenEval, T2I-CompBench and Science-T2I publish it
(arXiv 2507.16663, Fig. 1), in any case. The shapes world has levels of its own.

Rates are of pictures, those of a level over all pictures of its tasks, with Wilson's interval, as the paper's of one picture a
prompt; where prompts have several, which are alike, it is rather too narrow.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from analysis.measures import Estimate, make_estimate
from common import stats
from common.command import printable

Levels = dict[str, tuple[str, ...]]  # level -> its tasks, the easiest first

SURVEY: Levels = {
    "easy": ("single_object", "two_object", "color_attr"),  # GenEval
    "medium": ("texture", "spatial", "complex"),  # T2I-CompBench
    "hard": ("physics", "chemistry", "biology"),  # Science-T2I
}
SHAPES: Levels = {
    "one object": ("single",),
    "two objects": ("color",),
    "counting and relations": ("shape", "spatial", "numeracy"),
}
SHAPES_FILE = {"color", "shape", "spatial", "numeracy"}  # where all of these are, and no others but "single"
NAMES = {"nonunified": "nonunified", "weak_generation": "weak generation"}  # rate -> its heading


def find_levels(categories: Iterable[str]) -> Levels:
    """Each level's tasks: the survey's, or the shapes world's, whose "spatial" is another task than T2I-CompBench's."""
    names = {name.casefold() for name in categories}
    known = {task for tasks in SHAPES.values() for task in tasks}
    return SHAPES if SHAPES_FILE <= names <= known else SURVEY


class Survey(NamedTuple):
    """Rates by level and by task, of what is there of each, in the order of difficulty; and what has no level."""

    levels: dict[str, dict[str, Estimate]]
    tasks: dict[str, dict[str, dict[str, Estimate]]]  # level -> category, as the file spells it -> rates
    without_level: dict[str, int]  # category -> pictures

    def as_json(self) -> dict[str, Any]:
        """The levels, each with its tasks, nested; Estimates are left as they are."""
        levels = {name: rates | {"tasks": self.tasks[name]} for name, rates in self.levels.items()}
        return {"levels": levels, "without_level": self.without_level}


def make_survey(id: np.ndarray, category: np.ndarray, accepted: np.ndarray, label: np.ndarray) -> Survey:
    """The survey of one model's own pictures; all arrays (R,).

    id: of the prompt. accepted: by the model that drew. label: 1 the independent judge says right, 0 wrong, NaN nothing.
    """
    names, index = np.unique(category.astype(str), return_inverse=True)

    def rates_of(which: np.ndarray) -> dict[str, Estimate]:
        return rates(id[which], accepted[which], label[which])

    levels: dict[str, dict[str, Estimate]] = {}
    tasks: dict[str, dict[str, dict[str, Estimate]]] = {}
    found: set[str] = set()
    for level, wanted in find_levels(names.tolist()).items():
        places = [i for task in wanted for i, name in enumerate(names.tolist()) if name.casefold() == task]
        if places:
            levels[level] = rates_of(np.isin(index, places))
            tasks[level] = {str(names[i]): rates_of(index == i) for i in places}
            found |= tasks[level].keys()
    rest = {str(name): int((index == i).sum()) for i, name in enumerate(names) if str(name) not in found}
    return Survey(levels, tasks, rest)


def rates(id: np.ndarray, accepted: np.ndarray, label: np.ndarray) -> dict[str, Estimate]:
    """The rates of pictures, arrays as of `make_survey`; without labels only the first is there.

    weak_generation: of the pictures that the model rejects, the share that the independent judge rejects too. The rest of them
    is misunderstanding: they are right. judge_accuracy: of all verdicts, the share that is right.
    """
    known = ~np.isnan(label)
    measured = {"nonunified": (~accepted, np.ones(len(known), bool))}
    if known.any():
        measured |= {
            "weak_generation": (label == 0, known & ~accepted),
            "drawing_accuracy": (label == 1, known),
            "judge_accuracy": (accepted == label, known),
        }
    found = {}
    for name, (values, condition) in measured.items():
        interval = stats.wilson(int((values & condition).sum()), int(condition.sum()))
        found[name] = make_estimate(interval, len(set(id[condition])), int(condition.sum()))
    return found


def successes(rate: Estimate) -> int:
    """How many pictures a rate counts."""
    return round((rate.value or 0) * rate.n_pictures)


def survey_rows(survey: Survey) -> Iterator[list[str]]:
    """A line a level and, under it, a line a task: its name, and a cell for each rate of NAMES."""
    for level, of_level in survey.levels.items():
        yield [level, *(cell(of_level.get(name)) for name in NAMES)]
        for task, of_task in survey.tasks[level].items():
            yield [f"  {task}", *(cell(of_task.get(name)) for name in NAMES)]


def cell(rate: Estimate | None) -> str:
    """A rate with its count and interval, 0.433 (130/300), 0.378 .. 0.490; "-" if it is not known."""
    if rate is None or rate.value is None:
        return "-"
    return f"{rate.value:.3f} ({successes(rate)}/{rate.n_pictures}), {rate.low:.3f} .. {rate.high:.3f}"


def print_survey(title: str, survey: Survey) -> None:
    """The levels as an aligned table, and what has no level."""
    lines = [[title, *(f"{name}, 95 % interval" for name in NAMES.values())], *survey_rows(survey)]
    lines = [[printable(name), *cells] for name, *cells in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print()
    for name, *cells in lines:
        print("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]))
    if survey.without_level:
        listed = ", ".join(f"{printable(name)} ({count} pictures)" for name, count in survey.without_level.items())
        print(f"no level: {listed}")
