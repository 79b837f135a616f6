"""Is the difference of two models more than chance? Paired tests and intervals, as functions of arrays.

Models are compared on the same items: queries, or pairs of texts. A mean over queries (nDCG) is a mean of what each
query contributes. Spearman's correlation is one to first order: `spearman_contributions` says what each pair adds. So
one test serves both, and effect sizes have one unit.

- The test (`random_signs`, `p_value`): if the models do not differ, an item's difference could as well have the other
  sign. Signs are drawn at random many times; p is how often the mean is then as far from 0 as it really is
  (Fisher 1935; for retrieval Smucker et al. 2007; for NLP Dror et al. 2018).
- The interval (`percentile_interval`): items are drawn with replacement, the same ones for all models, and the metric
  is computed anew each time; quantiles of the differences (Efron 1979). Correcting them for bias and skewness (BCa)
  covers Spearman's differences worse: 87 % instead of 93 % for 50 pairs.
- `holm`: p-values of several tests, such that the chance of even one false finding stays below the level (Holm 1979).

SciPy has tests and intervals of this kind for one data set. Here what was drawn is kept, [model, resample], because a
mean over data sets is tested by the means of what was drawn on each; and ranks are not sorted anew in every resample,
which takes SciPy's `bootstrap` minutes for Spearman.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

BLOCK = 1 << 18  # numbers drawn at a time: few enough to stay in the processor's cache


@dataclass(frozen=True)
class Paired:
    """One evaluation of each of two models.

    Attributes:
        reference: its score.
        model: its score.
        count: of the items.
        signs: differences with signs drawn at random.
        drawn: differences on items drawn with replacement.
    """

    reference: float
    model: float
    count: int
    signs: Float[np.ndarray, " resample"]
    drawn: Float[np.ndarray, " resample"]

    spreads = (None, None)  # of seeds

    @classmethod
    def mean_of(cls, data_sets: Sequence[Paired]) -> Paired:
        """The mean over data sets: what was drawn was drawn within each of them."""
        return cls(
            float(np.mean([one.reference for one in data_sets])),
            float(np.mean([one.model for one in data_sets])),
            sum(one.count for one in data_sets),
            np.mean([one.signs for one in data_sets], axis=0),
            np.mean([one.drawn for one in data_sets], axis=0),
        )

    def test(self, confidence: float) -> tuple[float, tuple[float, float]]:
        """P-value of the difference, and its interval."""
        difference = self.model - self.reference
        return p_value(difference, self.signs), percentile_interval(self.drawn, self.count, confidence)


def random_signs(
    contributions: Float[np.ndarray, "model item"], resamples: int, random: np.random.Generator
) -> Float[np.ndarray, "model resample"]:
    """Means over items whose signs are drawn at random, the same signs for all models."""
    count = contributions.shape[1]
    means = []
    for size in _blocks(resamples, count):
        bits = np.unpackbits(random.integers(0, 256, (size, -(-count // 8)), dtype=np.uint8), axis=1, count=count)
        means.append((1.0 - 2.0 * bits) @ contributions.T / count)
    return np.concatenate(means).T


def p_value(difference: float, drawn: Float[np.ndarray, " resample"]) -> float:
    """How often a difference at least as large, of either sign, was drawn; what was observed counts as one draw."""
    as_far = np.abs(drawn) >= abs(difference) * (1 - 1e-9) - 1e-12  # equal but for rounding
    return float((1 + as_far.sum()) / (1 + len(drawn)))


def bootstrap_means(
    values: Float[np.ndarray, "model item"], resamples: int, random: np.random.Generator
) -> Float[np.ndarray, "model resample"]:
    """Means over items drawn with replacement, the same items for all models."""
    count = values.shape[1]
    return np.concatenate([counts @ values.T / count for counts in _drawn(count, resamples, random)]).T


def bootstrap_spearman(
    predicted: Float[np.ndarray, "model item"],
    labels: Float[np.ndarray, " item"],
    resamples: int,
    random: np.random.Generator,
) -> Float[np.ndarray, "model resample"]:
    """Spearman's correlations over pairs drawn with replacement, the same pairs for all models; 0 where undefined."""
    rows, target = [_Groups(row) for row in predicted], _Groups(labels)
    found = []
    for counts in _drawn(len(labels), resamples, random):
        ranks = target.ranks(counts)
        weighted = counts * ranks
        scale = np.einsum("bi,bi->b", weighted, ranks)
        found.append(np.stack([_correlation(row.ranks(counts), counts, weighted, scale) for row in rows]))
    return np.concatenate(found, axis=1).astype(float)


def _correlation(ranks: np.ndarray, counts: np.ndarray, weighted: np.ndarray, scale: np.ndarray) -> np.ndarray:
    own = np.einsum("bi,bi,bi->b", counts, ranks, ranks)
    product = np.einsum("bi,bi->b", weighted, ranks)
    return np.divide(product, np.sqrt(own * scale), out=np.zeros_like(product), where=own * scale > 0)


class _Groups:
    """Items of equal value, from the smallest value up: ranks of any resample without sorting again."""

    def __init__(self, values: Float[np.ndarray, " item"]) -> None:
        distinct, self.of = np.unique(values, return_inverse=True)
        self.order = np.argsort(values, kind="stable")
        self.starts = np.searchsorted(values[self.order], distinct)

    def ranks(self, counts: Float[np.ndarray, "resample item"]) -> Float[np.ndarray, "resample item"]:
        """Average ranks among the drawn items, over their number; from -1/2 to 1/2, with mean 0."""
        totals = counts.take(self.order, axis=1)
        if len(self.starts) < len(self.order):
            totals = np.add.reduceat(totals, self.starts, axis=1)
        up_to = totals.cumsum(axis=1)
        middle = (up_to - (totals + up_to[:, -1:]) / 2) / len(self.order)
        return middle.take(self.of, axis=1)

    def above(self, values: Float[np.ndarray, " item"]) -> Float[np.ndarray, " item"]:
        """By item the sum of `values` over the items above it, and half of it over its equals."""
        totals = np.add.reduceat(values[self.order], self.starts)
        return (totals.sum() - totals.cumsum() + totals / 2)[self.of]


def spearman_contributions(
    predicted: Float[np.ndarray, " item"], labels: Float[np.ndarray, " item"]
) -> Float[np.ndarray, " item"]:
    """What each pair contributes to Spearman's correlation; the mean is the correlation itself, 0 where undefined.

    The infinitesimal jackknife (Jaeckel 1972; Efron 1982, chapter 6): the derivative of the correlation by the weight
    of the pair, ranks included, with average ranks for ties. The standard deviation over the root of their number is
    the correlation's standard error.
    """
    count, sides = len(labels), (_Groups(predicted), _Groups(labels))
    x, y = (side.ranks(np.ones((1, count)))[0] for side in sides)
    product, x_square, y_square = (x * y).mean(), (x * x).mean(), (y * y).mean()
    if not x_square or not y_square:
        return np.zeros(count)
    by_product = x * y + (sides[0].above(y) + sides[1].above(x)) / count
    by_x = x * x + 2 * sides[0].above(x) / count
    by_y = y * y + 2 * sides[1].above(y) / count
    scale = np.sqrt(x_square * y_square)
    derivative = by_product / scale - product / scale / 2 * (by_x / x_square + by_y / y_square)
    return product / scale + derivative - derivative.mean()


def percentile_interval(drawn: Float[np.ndarray, " resample"], count: int, confidence: float) -> tuple[float, float]:
    """The bootstrap's interval: quantiles of what was drawn, a little further out for `count` items than for many.

    Draws spread too little by the root of (n - 1) / n, and few items tell their own spread badly, so the quantiles are
    those of Student's t (Hesterberg 2015, "expanded percentile").
    """
    tail = stats.norm.sf((count / (count - 1)) ** 0.5 * stats.t.isf((1 - confidence) / 2, count - 1))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def effect_size(differences: Float[np.ndarray, " item"]) -> float | None:
    """The mean over the standard deviation (Cohen's d_z); None where no item differs from another."""
    spread = float(differences.std(ddof=1))
    return float(differences.mean()) / spread if spread > 1e-12 else None


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values after Holm's correction for their number, in the order given."""
    order, corrected, largest = np.argsort(p_values, kind="stable"), [1.0] * len(p_values), 0.0
    for done, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - done) * p_values[place]))
        corrected[place] = largest
    return corrected


def _drawn(count: int, resamples: int, random: np.random.Generator) -> Iterator[Float[np.ndarray, "resample item"]]:
    """How often each item was drawn, `count` draws with replacement a resample, in blocks."""
    for size in _blocks(resamples, count):
        places = random.integers(0, count, (size, count)) + count * np.arange(size)[:, None]
        yield np.bincount(places.ravel(), minlength=count * size).reshape(size, count).astype(np.float32)


def _blocks(resamples: int, count: int) -> Iterator[int]:
    most = max(1, BLOCK // count)
    for done in range(0, resamples, most):
        yield min(most, resamples - done)
