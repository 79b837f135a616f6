"""Figures over the steps of a training, however many there are: `MOST` points a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from codiemb.figures.bins import Stretches, band, stretches
from codiemb.figures.charts import Line, line_chart
from codiemb.figures.markup import Markup
from codiemb.report.facts import Conflict, Step

Told = TypeVar("Told", Step, Conflict)


def cut_of(lines: Sequence[Told]) -> Stretches:
    return stretches(line.step for line in lines)


def series(
    label: str, lines: Sequence[Told], value: Callable[[Told], float | None], cut: Stretches, colour: int = 0
) -> Line:
    """A value of each step as a line, with a band where a point stands for several steps."""
    found = band([line.step for line in lines], [value(line) for line in lines], cut)
    return Line(
        label,
        [(cut.middle(place), median) for place, median in found.median.items()],
        colour,
        [(cut.middle(place), found.low[place], found.high[place]) for place in found.median],
    )


def chart(
    title: str, lines: Sequence[Line], cut: Stretches, y_label: str, *, zero: bool = False, log: bool = False
) -> Markup | None:
    """A figure over steps; None if there is nothing to draw."""
    names = {cut.middle(place): f"step {cut.name(place)}" for place in range(cut.count)}
    return line_chart(title, lines, "step", y_label, zero=zero, log=log, steps=True, x_name=names.__getitem__)


def of_a_point(cut: Stretches) -> str:
    """What a point of a figure stands for, in words; nothing where it is one step."""
    each = len(cut.steps) / cut.count
    return f"A point is the median of about {each:,.0f} steps, the band holds 80 % of them." if each > 1 else ""
