"""geometry.svg: a panel for each measure, in it a line for each model over its layers, and a ring for what it gives."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import chain
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
_COLUMNS, _WIDTH, _HEIGHT, _LEFT, _TOP = 5, 230, 170, 52, 34  # of the grid; of a panel and its margins


def figure(content: dict[str, Any]) -> str:
    """The measures in the content of geometry.json as an SVG; CKA with the first model is the last panel."""
    models = content["models"]
    lines = {
        name: [[layer[name] for layer in model["layers"]] for model in models]
        for name in models[0]["layers"][0]
        if name != "layer"
    }
    ends = {name: [model["pooled"].get(name) for model in models] for name in lines}
    if others := content["cka"]["models"]:
        lines["cka"] = [[], *([layer["cka"] for layer in model["layers"]] for model in others)]
        ends["cka"] = [None, *(model["pooled"] for model in others)]
    head = 22 * len(models) + 12
    width, height = _COLUMNS * _WIDTH, head + -(-len(lines) // _COLUMNS) * _HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, model in enumerate(models):
        parts.append(_text(34, 22 * number + 22, model["model"], 13))
        parts.append(f'<rect x="12" y="{22 * number + 12}" width="14" height="10" fill="{_colour(number)}"/>')
    for number, name in enumerate(lines):
        row, column = divmod(number, _COLUMNS)
        parts.append(f'<g transform="translate({column * _WIDTH} {head + row * _HEIGHT})">')
        parts += [*_panel(name, lines[name], ends[name]), "</g>"]
    return "\n".join([*parts, "</svg>\n"])


def _panel(name: str, lines: list[list[float | None]], ends: list[float | None]) -> Iterator[str]:
    """Layers from left to right, each model over the whole width; the ring at the right is the final embedding."""
    values = [value for value in [*chain(*lines), *ends] if value is not None]
    lowest, highest = min(values, default=0.0), max(values, default=1.0)
    right, bottom = _WIDTH - 28, _HEIGHT - 24

    def place(share: float, value: float) -> tuple[float, float]:
        height = (value - lowest) / (highest - lowest) if highest > lowest else 0.5
        return round(_LEFT + share * (right - _LEFT), 1), round(bottom - height * (bottom - _TOP), 1)

    yield _text(_LEFT, 18, name.replace("_", " "), 12)
    yield f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#999"/>'
    yield _text(_LEFT - 5, _TOP + 4, f"{highest:.3g}", 10, "end")
    yield _text(_LEFT - 5, bottom + 4, f"{lowest:.3g}", 10, "end")
    yield _text(_LEFT, bottom + 15, "first layer", 10)
    yield _text(right, bottom + 15, "last", 10, "end")
    for number, (line, end) in enumerate(zip(lines, ends, strict=True)):
        depth = max(len(line) - 1, 1)
        known = [place(layer / depth, value) for layer, value in enumerate(line) if value is not None]
        points = " ".join(f"{x},{y}" for x, y in known)
        yield f'<polyline points="{points}" fill="none" stroke="{_colour(number)}" stroke-width="1.5"/>'
        if end is not None:
            x, y = place(1, end)
            yield f'<circle cx="{x + 12}" cy="{y}" r="4" fill="none" stroke="{_colour(number)}" stroke-width="1.5"/>'


def _text(x: float, y: float, text: str, size: int, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="#222">{escape(text)}</text>'


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
