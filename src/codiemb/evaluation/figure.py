"""geometry.svg: a plot for each measure, in it a line for each model over its layers, and a ring for what it gives."""

from __future__ import annotations

from typing import Any

from codiemb.figures.charts import Line, line_plot
from codiemb.figures.picture import picture


def figure(content: dict[str, Any]) -> str:
    """The measures in the content of geometry.json as an SVG; CKA with the first model is the last plot."""
    models, likeness = content["models"], content["cka"]["models"]
    plots = {
        name: [_line(place, model, name, model["pooled"].get(name)) for place, model in enumerate(models)]
        for name in models[0]["layers"][0]
        if name != "layer"
    }
    plots["cka"] = [Line("", []), *(_line(place, one, "cka", one["pooled"]) for place, one in enumerate(likeness, 1))]
    drawn = [
        (name.replace("_", " "), line_plot(name, lines, "layer", ""))
        for name, lines in plots.items()
        if any(line.points for line in lines)
    ]
    return picture(drawn, [model["model"] for model in models])


def _line(place: int, model: dict[str, Any], measure: str, end: float | None) -> Line:
    points = [(layer["layer"], layer[measure]) for layer in model["layers"] if layer[measure] is not None]
    return Line(model["model"], points, place, end=end)
