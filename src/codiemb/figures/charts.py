"""Lines, bars and histograms as SVG; on a page each has its data as a table behind a fold.

Colours, widths and fonts are classes of `figures.css`, so that one figure serves the light page, the dark one and
paper. A series is told by its dashes as well as by its colour.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from codiemb.figures.axes import Axis, axis, label, steps_axis
from codiemb.figures.markup import Markup, Number, element, escape, fold, number, table

WIDTH, HEIGHT = 420, 236
LEFT, RIGHT, TOP, BOTTOM = 44, 408, 26, 196
COLOURS = 7  # in figures.css
BANDS = 2  # of more lines the bands hide each other; their table has them


@dataclass(frozen=True)
class Line:
    """A series of (x, y), with a band of (x, low, high) if there is a spread, and a ring at the right for an `end`."""

    name: str
    points: list[tuple[float, float]]
    colour: int = 0
    band: list[tuple[float, float, float]] = field(default_factory=list)
    end: float | None = None

    @property
    def spread(self) -> bool:
        return any(low != high for _, low, high in self.band)


def figure(title: Any, about: Any, *content: Any, data: Markup | None = None, wide: bool = False) -> Markup:
    """A figure with its caption, and its data folded away."""
    caption = element("figcaption", element("strong", title), Markup(" ") if about else None, about or None)
    return element(
        "figure", caption, *content, fold("Data", data) if data is not None else None, class_="wide" if wide else None
    )


def legend(names: Sequence[tuple[str, int]], dots: bool = False) -> Markup:
    """Names of series with their colours, and dashes if they are lines."""
    items = []
    for place, (name, colour) in enumerate(names):
        style = f"c{colour % COLOURS}"
        swatch = (
            element("rect", x=2, y=1, width=14, height=8, rx=2, class_=f"fill {style}")
            if dots
            else element("line", x1=0, y1=5, x2=22, y2=5, class_=f"line {style} d{place % COLOURS}")
        )
        items.append(
            element("li", element("svg", swatch, viewBox="0 0 22 10", aria_hidden="true"), element("bdi", name))
        )
    return element("ul", *items, class_="legend")


def line_chart(title: Any, lines: Sequence[Line], x_label: str, y_label: str, **how: Any) -> Markup | None:
    """Lines over a common x with a legend and their data; None if there is nothing to draw. `how`: see `line_plot`."""
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    return figure(
        title,
        "",
        legend([(line.name, line.colour) for line in lines]) if len(lines) > 1 else None,
        line_plot(title, lines, x_label, y_label, **how),
        data=_data(lines, x_label, how.get("x_name", label), str(title)),
    )


def line_plot(
    title: Any,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    zero: bool = False,
    log: bool = False,
    steps: bool = False,
    x_name: Callable[[float], str] = label,
) -> Markup:
    """Lines over a common x. Dashes go by the place of a line, also where one before it has no points.

    Args:
        zero: the y axis holds 0.
        log: the y axis goes by orders of magnitude, if the values do.
        steps: the x axis ends with the values rather than at round ones.
        x_name: names an x in tooltips and in the table.
    """
    places = _places(lines)
    bands = [line for line in lines if line.spread] if len(lines) <= BANDS else []
    ys = [y for line in lines for _, y in line.points] + [line.end for line in lines if line.end is not None]
    ys += [y for line in bands for _, low, high in line.band for y in (low, high)]
    across = steps_axis(int(places[0]), math.ceil(places[-1]), LEFT, RIGHT) if steps else axis(places, LEFT, RIGHT)
    up = axis(ys, BOTTOM, TOP, zero=zero, log=log)
    drawn = [_band(line, across, up) for line in bands]
    for place, line in enumerate(lines):
        if not line.points:
            continue
        style, at = f"c{line.colour % COLOURS}", [(across.at(x), up.at(y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        drawn.append(element("polyline", points=path, class_=f"line {style} d{place % COLOURS}"))
        if len(at) <= 20:
            drawn += [element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.6, class_=f"fill {style}") for x, y in at]
        if line.end is not None:
            drawn.append(element("circle", cx=RIGHT + 7, cy=f"{up.at(line.end):.1f}", r=4, class_=f"line {style}"))
    drawn.append(_hover(lines, places, across, x_name))
    return plot(title, across, up, x_label, y_label, *drawn)


def bars(rows: Sequence[tuple[str, float]], x_label: str) -> Markup:
    """A bar for each name, from 0 to its value; those below 0 have the colour of what is against. 24 high each."""
    left, below, step = 130, 24 * len(rows) + 8, 24
    across = axis([value for _, value in rows], left, RIGHT - 50, zero=True)
    drawn = [element("line", x1=f"{across.at(0):.1f}", x2=f"{across.at(0):.1f}", y1=2, y2=below, class_="zero")]
    for place, (name, value) in enumerate(rows):
        start, width = across.at(min(value, 0)), abs(across.at(value) - across.at(0))
        kind = "against" if value < 0 else "with"
        drawn += [
            element("text", name, x=left - 8, y=step * place + 18, text_anchor="end", class_="named"),
            element(
                "rect", x=f"{start:.1f}", y=step * place + 6, width=f"{width:.1f}", height=16, class_=f"fill {kind}"
            ),
            element("text", number(value, 3), x=RIGHT, y=step * place + 18, text_anchor="end"),
        ]
    drawn.append(element("text", x_label, x=RIGHT, y=below + 16, text_anchor="end", class_="unit"))
    return _frame(x_label, WIDTH, below + 22, *drawn)


def histogram(
    title: Any,
    edges: Sequence[float],
    counts: Sequence[int],
    x_label: str,
    y_label: str,
    *,
    about: Any = "",
    colour: int = 0,
    mark: tuple[float, str] | None = None,
    open_end: bool = False,
) -> Markup:
    """Bars of counts between edges.

    Args:
        mark: a value with a word, drawn as an upright line.
        open_end: the last bar holds everything above its lower edge.
    """
    across = Axis(edges[0], edges[-1], LEFT, RIGHT)
    up = axis(counts, BOTTOM, TOP, zero=True)
    bars, rows = [], []
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        last = open_end and high == edges[-1]
        named = f"{label(low)} and more" if last else f"{label(low)} to {label(high)}"
        left, right, y = across.at(low), across.at(high), up.at(count)
        bars.append(
            element(
                "rect",
                element("title", f"{named}: {count:,}"),
                x=f"{left + 0.5:.1f}",
                y=f"{y:.1f}",
                width=f"{max(right - left - 1, 0.5):.1f}",
                height=f"{BOTTOM - y:.1f}",
                class_=f"fill c{colour % COLOURS}",
            )
        )
        rows.append([named, count])
    drawn = [*bars]
    if mark and edges[0] <= mark[0] <= edges[-1]:
        x, to_left = across.at(mark[0]), across.at(mark[0]) > (LEFT + RIGHT) / 2
        drawn.append(element("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=TOP - 4, y2=BOTTOM, class_="mark"))
        drawn.append(
            element("text", mark[1], x=f"{x + (-5 if to_left else 5):.1f}", y=TOP + 6, class_="marked",
                    text_anchor="end" if to_left else "start")
        )  # fmt: skip
    return figure(
        title,
        about,
        plot(title, across, up, x_label, y_label, *drawn),
        data=table([x_label, y_label], rows, f"Data of {title}", first_is_head=False),
    )


def plot(title: Any, across: Axis, up: Axis, x_label: str, y_label: str, *drawn: Any) -> Markup:
    """The frame of a figure: grid, ticks, labels."""
    frame, name = [], f"{title}: {y_label} by {x_label}"
    for value in up.ticks():
        y = f"{up.at(value):.1f}"
        frame.append(element("line", x1=LEFT, x2=RIGHT, y1=y, y2=y, class_="zero" if value == 0 else "grid"))
        frame.append(element("text", label(value), x=LEFT - 6, y=f"{up.at(value) + 4:.1f}", text_anchor="end"))
    for value in across.ticks():
        x = f"{across.at(value):.1f}"
        frame.append(element("line", x1=x, x2=x, y1=BOTTOM, y2=BOTTOM + 4, class_="tick"))
        frame.append(element("text", label(value), x=x, y=BOTTOM + 17, text_anchor="middle"))
    frame.append(element("line", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM, class_="axis"))
    if y_label != title:
        frame.append(element("text", y_label, x=0, y=11, class_="unit"))
    frame.append(element("text", x_label, x=RIGHT, y=HEIGHT - 4, text_anchor="end", class_="unit"))
    return _frame(name, WIDTH, HEIGHT, *frame, *drawn)


def _frame(name: str, width: int, height: int, *drawn: Any) -> Markup:
    return element(
        "svg", *drawn, width=width, height=height, viewBox=f"0 0 {width} {height}", role="img", aria_label=name,
        class_="plot",
    )  # fmt: skip


def _places(lines: Sequence[Line]) -> list[float]:
    return sorted({x for line in lines for x, _ in line.points})


def _band(line: Line, across: Axis, up: Axis) -> Markup:
    there = [f"{across.at(x):.1f},{up.at(high):.1f}" for x, _, high in line.band]
    back = [f"{across.at(x):.1f},{up.at(low):.1f}" for x, low, _ in reversed(line.band)]
    return element("path", d="M" + " L".join(there + back) + " Z", class_=f"band c{line.colour % COLOURS}")


def _hover(lines: Sequence[Line], places: Sequence[float], across: Axis, x_name: Callable[[float], str]) -> Markup:
    """Upright stripes that tell the values under the pointer."""
    at = [across.at(x) for x in places]
    edges = [at[0], *((one + other) / 2 for one, other in itertools.pairwise(at)), at[-1]]
    edges[0], edges[-1] = max(edges[0] - 4, LEFT), min(edges[-1] + 4, RIGHT)
    values = [dict(line.points) for line in lines]
    stripes = []
    for place, x in enumerate(places):
        told = [f"{line.name} {number(found[x])}" for line, found in zip(lines, values, strict=True) if x in found]
        stripes.append(
            element("rect", element("title", "\n".join([x_name(x), *told])), x=f"{edges[place]:.1f}", y=TOP,
                    width=f"{max(edges[place + 1] - edges[place], 0.1):.1f}", height=BOTTOM - TOP)
        )  # fmt: skip
    return element("g", *stripes, class_="hover")


def _data(lines: Sequence[Line], x_label: str, x_name: Callable[[float], str], title: str) -> Markup:
    header, columns = [x_label], []
    for line in lines:
        header.append(line.name)
        columns.append(dict(line.points))
        if line.spread:
            header += [f"{line.name}, 10 %", "90 %"]
            columns += [{x: low for x, low, _ in line.band}, {x: high for x, _, high in line.band}]
    rows = [
        [Number(escape(x_name(x))), *(number(column[x]) if x in column else None for column in columns)]
        for x in _places(lines)
    ]
    return table(header, rows, f"Data of {title}", first_is_head=False)
