"""The space of the embeddings: the states of each layer, and the pooled sentences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codiemb.figures.bins import drawable
from codiemb.figures.charts import Line, line_chart
from codiemb.figures.markup import Markup, element, number, plural, section, table
from codiemb.report.run_folder import Run


def geometry_section(run: Run) -> Markup | None:
    """Each metric by layer, a line a model; the pooled sentences as a table."""
    if not run.geometry or not run.geometry.models:
        return None
    models, cka = run.geometry.models, run.geometry.cka
    names = short([model.model for model in models])
    metrics = list(dict.fromkeys(key for model in models for layer in model.layers for key in layer if key != "layer"))
    charts = [
        _by_layer(
            metric,
            metric,
            [(name, place, models[place].layers, models[place].pooled.get(metric)) for place, name in enumerate(names)],
        )
        for metric in metrics
    ]
    if cka.models:
        places = {model.model: place for place, model in enumerate(models)}
        shown = {model: names[place] for model, place in places.items()}
        title = f"likeness to {shown.get(cka.reference, cka.reference)} (CKA)"
        listed = [
            (shown.get(one.model, one.model), places.get(one.model, 0), one.layers, one.pooled) for one in cka.models
        ]
        charts.append(_by_layer(title, "cka", listed))
    pooled = list(dict.fromkeys(key for model in models for key in model.pooled))
    rows = [[words(metric), *(_shown(model.pooled.get(metric)) for model in models)] for metric in pooled]
    if cka.models:
        known = {one.model: one.pooled for one in cka.models}
        rows.append([title, *(_shown(known.get(model.model)) for model in models)])
    texts = f", over {plural(run.geometry.texts, 'text')}" if run.geometry.texts else ""
    return section(
        "geometry",
        "Geometry by layer",
        f"How the states of each layer lie in space, and, as a ring at the right, the pooled sentences{texts}.",
        element("div", *charts, class_="figures small"),
        element("h3", "Pooled sentences") if rows else None,
        table(["", *names], rows, "Geometry of the pooled sentences") if rows else None,
    )


def _by_layer(title: str, metric: str, models: Sequence[tuple[str, int, list[dict[str, Any]], Any]]) -> Markup | None:
    lines = []
    for name, colour, layers, pooled in models:
        values = [(_number(layer.get("layer")), _number(layer.get(metric))) for layer in layers]
        lines.append(
            Line(name, [(x, y) for x, y in values if x is not None and y is not None], colour, end=_number(pooled))
        )
    return line_chart(words(title), lines, "layer", words(title), log=True)


def short(names: Sequence[str]) -> list[str]:
    """The last part of each path, where that tells them apart."""
    last = [Path(name).name or name for name in names]
    return last if len({*last}) == len({*names}) else [*names]


def words(metric: str) -> str:
    return metric.replace("_", " ")


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and drawable(value) else None


def _shown(value: Any) -> Any:
    found = _number(value)
    return number(found) if found is not None else None if value is None else str(value)
