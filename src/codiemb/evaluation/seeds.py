"""Models trained with several seeds: does a difference hold for other seeds as well as for other items?

Items and seeds are both samples, and crossed: every seed is scored on every item. The variance of a difference of
means has a part from the items, one from the seeds of each model, and one from what is left, which the first two both
hold; it is subtracted once (two crossed random factors: Clark 1973). The difference over the root is held against the
mean of two quantiles of Student's t, that of the items and that of the seeds, weighted by their variances (Cochran and
Cox 1950); the seeds of two models have Welch's degrees of freedom.

So the level holds with few seeds as well. Satterthwaite's degrees of freedom for the whole reject up to 12 % of true
null hypotheses with two seeds and 8 % with three; a bootstrap of seeds and items, which resamples three numbers, 10 %
(`benchmarks/significance.py`). The price is power: as the seeds are few, so is what they show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import optimize, special

LEAST = 1e-12  # p-values are no smaller


@dataclass(frozen=True)
class Part:
    """A variance of the difference; `uncertainty` is its square over its degrees of freedom."""

    variance: float
    uncertainty: float

    def quantile(self, level: float) -> float:
        """What Student's t exceeds, on either side, with the probability `level`."""
        return -float(special.stdtrit(self.variance**2 / self.uncertainty, level / 2))


@dataclass(frozen=True)
class Crossed:
    """Two models over seeds and items.

    Attributes:
        reference_seeds: score of each seed, or of the one there is.
        model_seeds: the same of the model.
        items: from the items, with what is left.
        rest: what is left, of both models.
    """

    reference_seeds: Float[np.ndarray, " seed"]
    model_seeds: Float[np.ndarray, " other_seed"]
    items: Part
    rest: float

    @property
    def reference(self) -> float:
        return float(self.reference_seeds.mean())

    @property
    def model(self) -> float:
        return float(self.model_seeds.mean())

    @property
    def spreads(self) -> tuple[float | None, float | None]:
        """Standard deviation over seeds of the reference and of the model; None of a single seed."""
        of_reference, of_model = (
            float(scores.std(ddof=1)) if len(scores) > 1 else None
            for scores in (self.reference_seeds, self.model_seeds)
        )
        return of_reference, of_model

    @classmethod
    def mean_of(cls, data_sets: Sequence[Crossed]) -> Crossed:
        """The mean over data sets: other items on each, the same seeds on all."""
        return cls(
            np.mean([one.reference_seeds for one in data_sets], axis=0),
            np.mean([one.model_seeds for one in data_sets], axis=0),
            _added([one.items for one in data_sets], len(data_sets)),
            sum(one.rest for one in data_sets) / len(data_sets) ** 2,
        )

    def test(self, confidence: float) -> tuple[float, tuple[float, float]]:
        """P-value of the difference, and its interval."""
        seeds = _added([_of_seeds(scores) for scores in (self.reference_seeds, self.model_seeds) if len(scores) > 1])
        both, difference = self.items.variance + seeds.variance, self.model - self.reference
        if both < 1e-24:  # nothing varies: equal evaluations, or a constant difference
            return float(abs(difference) < 1e-12), (difference, difference)
        error = max(both - self.rest, self.items.variance, seeds.variance) ** 0.5

        def quantile(level: float) -> float:
            return sum(p.variance / both * p.quantile(level) for p in (self.items, seeds) if p.variance)

        far = quantile(1 - confidence) * error
        return _level(quantile, abs(difference) / error), (difference - far, difference + far)


def crossed(reference: Float[np.ndarray, "seed item"], model: Float[np.ndarray, "other_seed item"]) -> Crossed:
    """The variances of what the items contribute to the metric; seeds of the two models are independent.

    A model with one seed is taken as it is: its seed adds no variance, and the result holds for this one alone.
    """
    count = reference.shape[1]
    items = float((model.mean(axis=0) - reference.mean(axis=0)).var(ddof=1)) / count
    rest = sum(_rest(scores) for scores in (reference, model) if len(scores) > 1)
    return Crossed(reference.mean(axis=1), model.mean(axis=1), Part(items, items**2 / (count - 1)), rest)


def _level(quantile: Callable[[float], float], ratio: float) -> float:
    """The level at which `ratio` is just exceeded."""
    if quantile(LEAST) < ratio:
        return LEAST
    if quantile(1) >= ratio:  # no difference; or less than the quantile is exact
        return 1.0
    return float(optimize.brentq(lambda level: quantile(level) - ratio, LEAST, 1))


def _of_seeds(scores: Float[np.ndarray, " seed"]) -> Part:
    variance = float(scores.var(ddof=1)) / len(scores)
    return Part(variance, variance**2 / (len(scores) - 1))


def _rest(scores: Float[np.ndarray, "seed item"]) -> float:
    """The variance of what neither a seed's mean nor an item's mean explains."""
    seeds, items = scores.shape
    left = scores - scores.mean(axis=0) - scores.mean(axis=1, keepdims=True) + scores.mean()
    return float((left**2).sum()) / ((seeds - 1) * (items - 1) * seeds * items)


def _added(parts: Sequence[Part], number: int = 1) -> Part:
    """Independent parts of a mean of `number` differences."""
    return Part(sum(p.variance for p in parts) / number**2, sum(p.uncertainty for p in parts) / number**4)
