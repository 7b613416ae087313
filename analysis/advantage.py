"""How much more often right a round's data are than what stands against them, from labels of a part of the pictures.

What is accepted, and what make_pairs.py would take, is known of every picture; only what is right must be learnt from labels.
So the pictures fall into cells: categories times strata, which are taken, accepted or rejected. A cell's share of right ones
comes from its labels, and each cell counts with all of its pictures: which were labelled may depend on the cell, as long as it
does not on the picture. Used by forecast.py.

Legend: R pictures, C categories, S strata, D draws, P prompts.
"""

from typing import NamedTuple

import numpy as np

from analysis.comparison import Scored
from common.stats import resampled_means

STRATA = {"sft": ("accepted", "taken", "rejected"), "dpo": ("accepted", "chosen", "rejected", "pair's rejected")}


# ---------------------------------------------------------------------------------------------------------------------
# Which pictures become data


class Taken(NamedTuple):
    """What make_pairs.py takes; all (R,), bool. chosen and rejected: of its pairs."""

    accepted: np.ndarray
    sft: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    def strata(self, method: str) -> np.ndarray:
        """The number of each picture's stratum in STRATA, (R,)."""
        if method == "sft":
            return np.where(self.accepted, self.sft.astype(int), 2)
        return np.where(self.accepted, self.chosen.astype(int), 2 + self.rejected)


def take(scored: Scored, threshold: float, per_prompt: int, pairs_per_prompt: int, margin: float = 0.0) -> Taken:
    """The pictures that make_pairs.py takes, by its rules: best first, ties to the lower candidate number."""
    pictures = scored.pictures
    prompt = np.unique(pictures.id.astype(str), return_inverse=True)[1]
    accepted = pictures.p_yes > threshold

    def place(which: np.ndarray, score: np.ndarray) -> np.ndarray:
        """From 0, the place of each of these pictures among those of its prompt, lowest score first; R for others."""
        order = np.lexsort((scored.columns["candidate"], score, prompt))
        order = order[which[order]]
        found = np.full(len(prompt), len(prompt))
        found[order] = np.arange(len(order)) - np.searchsorted(prompt[order], prompt[order])
        return found

    best, worst = place(accepted, -pictures.p_yes), place(~accepted, pictures.p_yes)
    n_accepted, n_rejected = (np.bincount(prompt, side, prompt.max() + 1)[prompt] for side in (accepted, ~accepted))
    pairs = np.minimum(np.minimum(n_accepted, n_rejected), pairs_per_prompt)
    sides = (np.flatnonzero(best < pairs), np.flatnonzero(worst < pairs))  # then the k-th best beside the k-th worst:
    chosen, rejected = (at[np.lexsort((rank[at], prompt[at]))] for at, rank in zip(sides, (best, worst), strict=True))
    apart = pictures.p_yes[chosen] - pictures.p_yes[rejected] > margin - 1e-9
    paired = [np.isin(np.arange(len(prompt)), side[apart]) for side in (chosen, rejected)]
    return Taken(accepted, best < (per_prompt or len(prompt)), *paired)


# ---------------------------------------------------------------------------------------------------------------------
# What is right of them


class Cells(NamedTuple):
    """Counts (C, S) of pictures, of labelled and of right ones; what labels are worth (S,); the counts, resampled (D, C, S).

    design: how many labels of a stratum are worth one of a prompt of its own (Kish's design effect, 1965), at least 1.
    resampled, labels: pictures, and labelled and right ones (2, D, C, S), of prompts drawn with replacement.
    """

    pictures: np.ndarray
    labelled: np.ndarray
    right: np.ndarray
    design: np.ndarray
    resampled: np.ndarray
    labels: np.ndarray

    def of(self, category: int | None) -> "Cells":
        """One category's, or all."""
        some = slice(None) if category is None else slice(category, category + 1)
        pictures, labelled, right = (part[some] for part in (self.pictures, self.labelled, self.right))
        return Cells(pictures, labelled, right, self.design, self.resampled[:, some], self.labels[:, :, some])

    def shares(self) -> np.ndarray:
        """The share of right ones, (C, S): of a cell without labels that of its stratum, NaN where it has none either."""
        with np.errstate(invalid="ignore"):
            return np.where(self.labelled > 0, self.right / self.labelled, (self.right.sum(0) / self.labelled.sum(0))[None])

    def draws(self, seed: int = 0) -> np.ndarray:
        """The share of right ones as the labels leave it open, (D, C, S): Beta posteriors, in the order of the bootstrap's.

        The prior of a stratum is Jeffreys's, half a right picture and half a wrong one, split among its cells by their size.
        Accepted and rejected pictures of one prompt are right together, which Beta draws of a cell each do not know. So each
        cell's are ranked as its share ranks among resampled prompts (Iman and Conover 1982): their rank correlations are those.
        """
        prior = np.maximum(0.5 * self.pictures / np.maximum(self.pictures.sum(0), 1), 1e-9)
        right, wrong = (count / self.design + prior for count in (self.right, self.labelled - self.right))
        generator = np.random.default_rng(seed)
        shares = np.sort(generator.beta(right, wrong, size=self.resampled.shape), axis=0)
        bootstrapped = (self.labels[1] + prior) / (self.labels[0] + 2 * prior)
        ties = 1e-9 * generator.random(bootstrapped.shape)
        return np.take_along_axis(shares, (bootstrapped + ties).argsort(0).argsort(0), axis=0)


def count_cells(id: np.ndarray, category: np.ndarray, stratum: np.ndarray, label: np.ndarray, shape: tuple[int, int]) -> Cells:
    """Cells of numbered categories and strata; all arrays (R,), label NaN where nobody has said."""
    size, known = shape[0] * shape[1], ~np.isnan(label)
    cell = category * shape[1] + stratum
    prompt = np.unique(id.astype(str), return_inverse=True)[1]
    n_prompts = prompt.max() + 1
    counts = np.stack(
        [np.bincount((prompt * size + cell)[which], minlength=n_prompts * size) for which in (known | True, known, label == 1)]
    ).reshape(3, n_prompts, size)
    pictures, labelled, right = counts.sum(1).reshape(3, *shape).astype(float)
    several = (counts[1] > 0).sum(0)  # (C S,): prompts of which a cell has labels
    with np.errstate(invalid="ignore", divide="ignore"):
        rest = (counts[2] - counts[1] * (right / labelled).ravel()) ** 2 * (several / (several - 1.0))  # of a prompt, by n - 1
        alone = (right * (1 - right / labelled) * (labelled / (labelled - 1))).ravel()
    design = np.ones(shape[1])
    for s in range(shape[1]):
        here = (several > 1) & (np.arange(size) % shape[1] == s)
        if here.any() and alone[here].sum() > 0:
            design[s] = max(1.0, rest[:, here].sum() / alone[here].sum())
        elif (labels := labelled[:, s].sum()) > 0:  # all labels alike, or of one prompt: no word of how alike a prompt's are
            design[s] = labels / several.reshape(shape)[:, s].sum()
    drawn = resampled_means(counts.swapaxes(0, 1).reshape(n_prompts, -1).astype(float)) * n_prompts
    resampled, *labels = drawn.reshape(len(drawn), 3, *shape).swapaxes(0, 1)
    return Cells(pictures, labelled, right, design, resampled, np.stack(labels))


def rates(shares: np.ndarray, pictures: np.ndarray, method: str) -> dict[str, np.ndarray]:
    """a, t, f, p and the data's advantage from shares of right ones of so many pictures, both (..., C, S), each (...).

    NaN where it is undefined. t and f: how often right and wrong pictures are accepted; p: how often accepted ones are right.
    All pictures together; `mean_rates` has the advantage over several categories.
    """
    right = np.where(pictures > 0, pictures * shares, 0).sum(-2)  # (..., S)
    total = pictures.sum(-2)
    with np.errstate(invalid="ignore", divide="ignore"):
        a = right.sum(-1) / total.sum(-1)
        accepted, of = right[..., :2].sum(-1), total[..., :2].sum(-1)
        found = {"a": a, "t": accepted / right.sum(-1), "f": (of - accepted) / (total - right).sum(-1), "p": accepted / of}
        taken = right[..., 1] / total[..., 1]
        if method == "sft":
            return found | {"drawn_right": a, "taken_right": taken, "advantage": taken - a}
        against = right[..., 3] / total[..., 3]
        return found | {"drawn_right": a, "chosen_right": taken, "rejected_right": against, "advantage": taken - against}


def mean_rates(shares: np.ndarray, pictures: np.ndarray, method: str) -> dict[str, np.ndarray]:
    """As `rates`, but what is drawn, taken and set against it as the mean over categories, as the law has them.

    Over pictures, a judge that knows nothing would have an advantage where it accepts more of the easy categories. In the mean
    a category without data neither wins nor loses.
    """
    found = rates(shares, pictures, method)
    parts = [slice(number, number + 1) for number in range(shares.shape[-2])]
    each = [rates(shares[..., part, :], pictures[..., part, :], method) for part in parts]
    for key in found.keys() - {*"atfp"}:
        values = np.stack([one[key] for one in each])
        known = np.isfinite(values)
        count = np.full(known.shape[1:], len(each)) if key == "advantage" else known.sum(0)
        with np.errstate(invalid="ignore"):
            found[key] = np.where(known.any(0), np.where(known, values, 0).sum(0) / count, np.nan)
    return found
