"""Many steps in few numbers: the median and a band for each stretch of steps."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

MOST = 80  # stretches of a line
LOW, HIGH = 0.1, 0.9  # quantiles of the band


@dataclass(frozen=True)
class Stretches:
    """Steps in stretches of equal count, one step each if they are few.

    Attributes:
        steps: those that were told of, each once, in order.
        count: how many stretches.
    """

    steps: list[int]
    count: int

    @property
    def first(self) -> int:
        return self.steps[0]

    @property
    def last(self) -> int:
        return self.steps[-1]

    def of(self, step: int) -> int:
        """The place of the stretch that a step is in."""
        return bisect_left(self.steps, step) * self.count // len(self.steps)

    def bounds(self, place: int) -> tuple[int, int]:
        """First and last step of a stretch."""
        start, end = (-(-at * len(self.steps) // self.count) for at in (place, place + 1))
        return self.steps[start], self.steps[end - 1]

    def middle(self, place: int) -> float:
        """The step in the middle of a stretch."""
        low, high = self.bounds(place)
        return (low + high) / 2

    def name(self, place: int) -> str:
        low, high = self.bounds(place)
        return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def drawable(value: float | None) -> bool:
    """Whether a figure can hold a value: not NaN, and no larger or smaller than its axes can be computed for."""
    return value is not None and (value == 0 or 1e-300 <= abs(value) <= 1e300)


def stretches(steps: Iterable[int], most: int = MOST) -> Stretches:
    known = sorted({*steps})
    return Stretches(known, min(most, len(known)))


@dataclass(frozen=True)
class Band:
    """Median and quantiles by place of a stretch; places without a value to draw are absent."""

    median: dict[int, float]
    low: dict[int, float]
    high: dict[int, float]


def band(steps: Sequence[int], values: Sequence[float | None], cut: Stretches) -> Band:
    """Values of steps, each stretch in three numbers. What cannot be drawn is left out."""
    found: dict[int, list[float]] = {}
    for step, value in zip(steps, values, strict=True):
        if value is not None and drawable(value):
            found.setdefault(cut.of(step), []).append(value)
    three = {place: np.quantile(found[place], [LOW, 0.5, HIGH]).tolist() for place in sorted(found)}
    low, median, high = ({place: numbers[which] for place, numbers in three.items()} for which in range(3))
    return Band(median, low, high)
