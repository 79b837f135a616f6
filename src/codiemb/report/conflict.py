"""Whether the gradients of the tasks pull the same way: over all weights, by layer, over the training."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from codiemb.figures.bins import band, stretches
from codiemb.figures.charts import figure
from codiemb.figures.markup import Markup, element, number, section, table
from codiemb.figures.strips import LEVELS, Row, strip
from codiemb.report.facts import Conflict
from codiemb.report.over_steps import chart, cut_of, series
from codiemb.report.run_folder import Run
from codiemb.report.scores import colour

COLUMNS = 120


def conflict_section(run: Run) -> Markup | None:
    """Cosine between the gradients of the tasks, over all weights and by layer; their lengths."""
    found = run.conflict
    if not found:
        return None
    cut = cut_of(found)
    overall = series("all weights", found, lambda line: line.cosine.get("all"), cut)
    tasks = list(dict.fromkeys(task for one in found for task in one.gradient_norm))
    norms = [series(task.replace("_", " "), found, _length(task), cut, colour(task)) for task in tasks]
    charts = [
        chart("Cosine of the gradients", [overall], cut, "cosine", zero=True),
        chart("Length of the gradients", norms, cut, "l2 norm", log=True),
    ]
    places = sorted({place for one in found for place in one.cosine}, key=_order)
    by_layer = [place for place in places if place != "all"]
    return section(
        "conflict",
        "Do the tasks pull against each other?",
        "Cosine between the gradients of the tasks on the same weights: 1 the same way, 0 at right angles, −1 against.",
        element("div", *charts, class_="figures"),
        _by_layer(run, by_layer) if by_layer else None,
    )


def _length(task: str) -> Callable[[Conflict], float | None]:
    return lambda line: line.gradient_norm.get(task)


def _by_layer(run: Run, by_layer: list[str]) -> Markup:
    """Cosines by layer and step, as colours."""
    steps = [line.step for line in run.conflict]
    cut = stretches(steps, COLUMNS)
    medians = {place: band(steps, [line.cosine.get(place) for line in run.conflict], cut).median for place in by_layer}
    most = max((abs(value) for found in medians.values() for value in found.values()), default=0.0) or 1.0
    rows = [
        Row(place, _spread(found.values()), {at: _tint(value / most) for at, value in found.items()})
        for place, found in medians.items()
    ]
    places = sorted({at for found in medians.values() for at in found})
    values = [[f"step {cut.name(at)}", *(number(medians[place].get(at), 3) for place in by_layer)] for at in places]
    return figure(
        "Cosine by layer",
        f"blue: the same way; orange: against; the strongest colour is {most:.2f}",
        strip(rows, cut, "Cosine of the gradients by layer and step"),
        data=table(["step", *by_layer], values, "Cosine by layer", first_is_head=False),
        wide=True,
    )


def _tint(share: float) -> str:
    steps = round(abs(share) * LEVELS)
    return "fill none" if not steps else f"fill {'with' if share > 0 else 'against'} o{steps}"


def _spread(found: Iterable[float]) -> str:
    values = [*found]
    return f"{min(values):.2f} to {max(values):.2f}".replace("-", "−") if values else ""


def _order(place: str) -> tuple[int, int, str]:
    number_in = re.search(r"\d+", place)
    return (0, 0, place) if place == "all" else (2, int(number_in[0]), place) if number_in else (1, 0, place)
