"""Axes: where a value stands in a figure, and which values are named along it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """Maps values from `low` to `high` onto places from `start` to `end`.

    Attributes:
        log: by orders of magnitude; `low` is above 0 then.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        if self.log and self.high / self.low >= 50:
            orders = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            return [10.0**order for order in orders][:: max(1, len(orders) // 5)]
        return ticks(self.low, self.high)


def ticks(low: float, high: float) -> list[float]:
    """About five round values from `low` to `high`: steps of 1, 2 or 5 times a power of ten."""
    step = _step(high - low)
    return [
        round(place * step, 12) for place in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def _step(width: float) -> float:
    rough = width / 5
    order = 10.0 ** math.floor(math.log10(rough))
    return next(factor * order for factor in (1, 2, 5, 10) if factor * order >= rough * 0.999)


def axis(values: Iterable[float], start: float, end: float, *, zero: bool = False, log: bool = False) -> Axis:
    """An axis that holds all values, from round value to round value.

    Args:
        values: finite, at least one.
        zero: hold 0 too.
        log: by orders of magnitude, if all are above 0 and the largest is 50 times the smallest.
    """
    values = list(values)
    low, high = min(values), max(values)
    if log and low > 0 and high / low >= 50:
        return Axis(10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high)), start, end, log=True)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value: room around it
        room = abs(high) / 10 or 1.0
        low, high = (low if zero and low == 0 else low - room), high + room
    step = _step(high - low)
    return Axis(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, start, end)


def steps_axis(first: int, last: int, start: float, end: float) -> Axis:
    """An axis of steps, which ends where they end."""
    return Axis(first, max(last, first + 1), start, end)


def label(value: float) -> str:
    """A value beside its tick."""
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        order = math.floor(math.log10(size) + 1e-9)
        if size >= 1e9 or size < 1e-3:
            return f"{value / 10.0**order:g}e{order}".replace("-", "−")
        return f"{value / 1e6:g}M".replace("-", "−")
    return (f"{value / 1000:g}k" if size >= 10_000 else f"{value:g}").replace("-", "−")
