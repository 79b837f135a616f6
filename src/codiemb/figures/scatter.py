"""Points in a plane, with their names beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from codiemb.figures.axes import axis
from codiemb.figures.charts import BOTTOM, LEFT, RIGHT, TOP, WIDTH, figure, plot
from codiemb.figures.markup import Markup, element, number, table


@dataclass(frozen=True)
class Point:
    """A mark of a scatter. `kind` is a class of figures.css; `named` points bear their name in the figure."""

    name: str
    x: float
    y: float
    kind: str
    named: bool = False


def scatter(
    title: Any, dots: Sequence[Point], x_label: str, y_label: str, *, about: Any = "", front: Sequence[int] = ()
) -> Markup:
    """Points with their data. `front`: see `scatter_plot`."""
    rows = [[dot.name, number(dot.x), number(dot.y)] for dot in dots]
    return figure(
        title, about, scatter_plot(title, dots, x_label, y_label, front),
        data=table(["model", x_label, y_label], rows, f"Data of {title}"),
    )  # fmt: skip


def scatter_plot(title: Any, dots: Sequence[Point], x_label: str, y_label: str, front: Sequence[int] = ()) -> Markup:
    """Points, and a line through those at the places `front`."""
    across, up = axis([dot.x for dot in dots], LEFT, RIGHT), axis([dot.y for dot in dots], BOTTOM, TOP)
    drawn = []
    if front:
        path = " ".join(f"{across.at(dots[n].x):.1f},{up.at(dots[n].y):.1f}" for n in front)
        drawn.append(element("polyline", points=path, class_="line front"))
    at = [(across.at(dot.x), up.at(dot.y)) for dot in dots]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in at]
    for dot, (x, y) in zip(dots, at, strict=True):
        told = element("title", f"{dot.name}: {x_label} {dot.x:.2f}, {y_label} {dot.y:.2f}")
        drawn.append(element("circle", told, cx=f"{x:.1f}", cy=f"{y:.1f}", r=5, class_=f"dot {dot.kind}"))
        if dot.named:
            drawn.append(_name(dot.name, x, y, taken))
    return plot(title, across, up, x_label, y_label, *drawn)


def _name(text: str, x: float, y: float, taken: list[tuple[float, float, float, float]]) -> Markup:
    """A name beside its point, on the first side where it covers nothing; `taken` are boxes, and its own is added."""
    width = 7.0 * min(len(text), 24)
    sides = (
        ("start", x + 9, y + 4, x + 9), ("end", x - 9, y + 4, x - 9 - width),
        ("middle", x, y - 10, x - width / 2), ("middle", x, y + 20, x - width / 2),
    )  # fmt: skip
    boxes = [(left, below - 11, left + width, below + 3) for _, _, below, left in sides]
    free = [
        place
        for place, (a, b, c, d) in enumerate(boxes)
        if a >= LEFT and c <= WIDTH and b >= 0 and all(c < e or g < a or d < f or h < b for e, f, g, h in taken)
    ]
    place = free[0] if free else 0
    taken.append(boxes[place])
    anchor, at, below, _ = sides[place]
    return element("text", text, x=f"{at:.1f}", y=f"{below:.1f}", class_="named", text_anchor=anchor)
