"""A figure in a file of its own: plots in a grid under one legend, with their colours written into it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codiemb.figures.charts import COLOURS, HEIGHT, WIDTH
from codiemb.figures.markup import Markup, element

STYLE = Path(__file__).with_name("figures.css")
_GAP = 24


def picture(
    plots: Sequence[tuple[Any, Markup]], names: Sequence[str] = (), columns: int = 4, height: int = HEIGHT
) -> str:
    """Plots with their titles as an SVG file, light on any background.

    Args:
        plots: title and `<svg>` of each.
        names: of the series, in the order of their colours.
        height: of the highest plot.
    """
    columns = min(columns, len(plots))
    head, across, down = 22 * len(names) + _GAP, WIDTH + _GAP, height + 2 * _GAP
    wide, high = _GAP + columns * across, head + -(-len(plots) // columns) * down
    parts = [
        _at(
            _GAP, _GAP + 22 * place,
            element("line", x1=0, x2=28, y1=-4, y2=-4, class_=f"line c{place % COLOURS} d{place % COLOURS}"),
            element("text", name, x=36, class_="named"),
        )
        for place, name in enumerate(names)
    ]  # fmt: skip
    for place, (title, plot) in enumerate(plots):
        row, column = divmod(place, columns)
        name = element("text", title, y=12, class_="title")
        parts.append(_at(_GAP + column * across, head + row * down, name, _at(0, 22, plot)))
    return element(
        "svg", element("style", Markup(_light(STYLE.read_text(encoding="utf-8")))),
        element("rect", width=wide, height=high, class_="paper"), *parts, width=wide, height=high,
        viewBox=f"0 0 {wide} {high}", font_family="sans-serif", xmlns="http://www.w3.org/2000/svg",
    ) + "\n"  # fmt: skip


def _at(x: float, y: float, *drawn: Markup) -> Markup:
    return element("g", *drawn, transform=f"translate({x} {y})")


def _light(style: str) -> str:
    """The rules with the colours themselves in place of their names: not every viewer of SVG knows names."""
    names, rules = style.split("}", 1)
    colours = dict(re.findall(r"(--[\w-]+): ([^;]+);", names))
    return re.sub(r"var\((--[\w-]+)\)", lambda found: colours[found[1]], rules)
