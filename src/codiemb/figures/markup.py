"""HTML and SVG by elements. What is not `Markup` is text, and is escaped: no text of a data set can become markup.

The page is well-formed XML too, so that a test can read all of it strictly.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

# What XML has no place for, and the marks that turn the direction of the text after them.
_UNSHOWN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff\u202a-\u202e\u2066-\u2069]"
)
_VOID = {"meta", "br"}
_DRAWN = {"line", "rect", "circle", "path", "polyline"}


class Markup(str):
    """HTML that stands as it is."""


def clean(text: str) -> str:
    """The text with a replacement character for everything that cannot be shown."""
    return _UNSHOWN.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def escape(text: Any) -> Markup:
    """Text as it stands between tags and in attributes."""
    return text if isinstance(text, Markup) else Markup(html.escape(clean(str(text))))


def join(parts: Iterable[Any]) -> Markup:
    return Markup("".join(escape(part) for part in parts if part is not None))


def element(tag: str, *children: Any, **attributes: Any) -> Markup:
    """An element; attributes that are None are left out. `class_` is `class`, `text_anchor` is `text-anchor`."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(clean(str(value)))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if tag in _VOID or (not children and tag in _DRAWN):
        return Markup(f"<{tag}{given}/>")
    return Markup(f"<{tag}{given}>{join(children)}</{tag}>")


def name(text: Any) -> Markup:
    """A name inside a sentence, whatever the direction of its script."""
    return element("bdi", text)


def fold(summary: Any, *children: Any) -> Markup:
    return element("details", element("summary", summary), *children)


def section(anchor: str, title: str, about: str, *children: Any) -> Markup:
    return element(
        "section", element("h2", title), element("p", about, class_="about") if about else None, *children, id=anchor
    )


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]], label: str, first_is_head: bool = True) -> Markup:
    """A table that scrolls by itself where the page is narrow. Numbers stand to the right, None is a dash."""
    rows = [list(row) for row in rows]
    right = [all(_is_number(row[place]) for row in rows) for place in range(len(header))]

    def cell(tag: str, value: Any, place: int, **attributes: Any) -> Markup:
        shown = value if isinstance(value, Markup) else number(value) if isinstance(value, int | float) else value
        return element(tag, "–" if shown is None else shown, class_="n" if right[place] else None, **attributes)

    head = element("tr", *(cell("th", title, place, scope="col") for place, title in enumerate(header)))
    body = [
        element("tr", *(
            cell("th", value, place, scope="row") if first_is_head and place == 0 else cell("td", value, place)
            for place, value in enumerate(row)
        ))
        for row in rows
    ]  # fmt: skip
    return element(
        "div",
        element("table", element("thead", head), element("tbody", *body)),
        class_="scroll", tabindex="0", role="region", aria_label=label,
    )  # fmt: skip


class Number(Markup):
    """A number that is formatted already."""


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float | Number)


def number(value: float | None, digits: int = 4) -> Number:
    """To so many significant digits, with a true minus."""
    if value is None:
        return Number("–")
    if isinstance(value, int):
        return Number(f"{value:,}".replace("-", "−"))
    text = f"{value:,.0f}" if 10 ** (digits - 1) <= abs(value) < 1e9 else f"{value:.{digits}g}"
    return Number(text.replace("-", "−"))


def points(value: float | None) -> Number:
    """A fraction in points of 0 to 100."""
    return Number("–" if value is None else f"{100 * value:.2f}".replace("-", "−"))


def signed(value: float | None) -> Number:
    """A difference of fractions in points."""
    return Number("–" if value is None else f"{100 * value:+.2f}".replace("-", "−"))


def interval(bounds: tuple[float, float] | None) -> Number:
    return Number("–" if bounds is None else f"[{signed(bounds[0])}, {signed(bounds[1])}]")


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
