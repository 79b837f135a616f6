"""Marks of one row: which source at which step, values by colour, a difference with its interval, shares of a whole.

The rows of a strip are stretched to the width of the page; what is written stands beside them in HTML, unstretched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from codiemb.figures.axes import Axis
from codiemb.figures.bins import Stretches
from codiemb.figures.charts import COLOURS, legend
from codiemb.figures.markup import Markup, element, interval, join, signed

LEVELS = 5


@dataclass(frozen=True)
class Row:
    """A row of a strip: by place a class of figures.css, places without one stay empty."""

    name: str
    note: str
    cells: dict[int, str]


def strip(rows: Sequence[Row], cut: Stretches, label: str) -> Markup:
    """Rows of a cell for each stretch of steps, with the first, the middle and the last step below."""
    lines = []
    for row in rows:
        cells = [element("path", d=path, class_=kind) for kind, path in sorted(_paths(row.cells).items())]
        lines.append(
            element(
                "div",
                element("span", element("bdi", row.name), class_="name"),
                element(
                    "svg", *cells, viewBox=f"0 0 {cut.count} 10", preserveAspectRatio="none", role="img",
                    aria_label=f"{row.name}: {row.note}",
                ),
                element("span", row.note, class_="note"),
                class_="row",
            )
        )  # fmt: skip
    ends = dict.fromkeys([cut.first, cut.steps[len(cut.steps) // 2], cut.last])
    below = element("span", *(element("span", f"step {step:,}") for step in ends), class_="ends")
    return element("div", *lines, below, class_="strip", role="group", aria_label=label)


def _paths(cells: dict[int, str]) -> dict[str, str]:
    """By class a path over its cells; neighbours are joined."""
    runs: dict[str, list[list[int]]] = {}
    for place, kind in sorted(cells.items()):
        known = runs.setdefault(kind, [])
        if known and known[-1][1] == place:
            known[-1][1] = place + 1
        else:
            known.append([place, place + 1])
    return {kind: "".join(f"M{a} 0H{b}V10H{a}Z" for a, b in known) for kind, known in runs.items()}


def level(share: float) -> int:
    """1 to `LEVELS` for a share above 0 up to 1."""
    return min(LEVELS, max(1, round(share * LEVELS)))


def whisker(difference: float, bounds: tuple[float, float] | None, across: Axis, verdict: str) -> Markup:
    """A difference on a common axis: a dot, its interval, the line of no difference."""
    zero, x = f"{across.at(0):.1f}", f"{across.at(difference):.1f}"
    told = f"{signed(difference)} points" + (f", interval {interval(bounds)}" if bounds else "")
    drawn = [element("line", x1=zero, x2=zero, y1=0, y2=20, class_="zero")]
    if bounds:
        low, high = (f"{across.at(bound):.1f}" for bound in bounds)
        drawn.append(element("line", x1=low, x2=high, y1=10, y2=10, class_="whisker"))
    drawn.append(element("circle", cx=x, cy=10, r=4.5, class_="difference"))
    return element(
        "svg", element("title", told), *drawn, viewBox=f"0 0 {across.end + across.start:.0f} 20",
        class_=f"whiskers {verdict}", role="img", aria_label=told,
    )  # fmt: skip


def shares(parts: Sequence[tuple[str, float]], label: str) -> Markup:
    """One bar cut by shares that add up to 1, and what they are."""
    start, bars = 0.0, []
    for place, (name, share) in enumerate(parts):
        told = element("title", f"{name}: {100 * share:.1f} %")
        bars.append(
            element("rect", told, x=f"{100 * start:.2f}", y=0, width=f"{100 * share:.2f}", height=10,
                    class_=f"fill c{place % COLOURS}")
        )  # fmt: skip
        start += share
    names = [(f"{name} {100 * share:.1f} %", place) for place, (name, share) in enumerate(parts)]
    bar = element(
        "svg", *bars, viewBox="0 0 100 10", preserveAspectRatio="none", class_="shares", role="img", aria_label=label
    )
    return join([bar, legend(names, dots=True)])
