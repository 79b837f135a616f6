"""Scores: the headline, the table by data set, how they came to be, and how they went during training."""

from __future__ import annotations

import re

from codiemb.figures.axes import Axis
from codiemb.figures.charts import Line, line_chart
from codiemb.figures.markup import (
    Markup,
    Number,
    element,
    fold,
    interval,
    join,
    name,
    number,
    plural,
    points,
    section,
    signed,
    table,
)
from codiemb.figures.strips import whisker
from codiemb.report.facts import Evaluation
from codiemb.report.run_folder import Run
from codiemb.report.scores import (
    UNTESTED,
    VERDICTS,
    Score,
    across,
    colour,
    in_all,
    in_both,
    kind,
    left_out,
    means,
    metric_name,
    scores,
    task_means,
)


def mark(verdict: str) -> Markup:
    """The verdict as a sign and a word, so that nothing hangs on its colour."""
    kind, sign = VERDICTS.get(verdict, ("untested", "–"))
    shown = element("span", sign, class_="sign", aria_hidden="true")
    return element("span", shown, verdict if verdict in VERDICTS else UNTESTED, class_=f"verdict {kind}")


def headline_section(run: Run) -> Markup | None:
    """Tiles: what the training did to each task, and to their mean."""
    found = scores(run)
    if not found:
        return None
    averaged = means(run, found)
    axis = across(averaged)
    return element("div", *(_tile(score, axis) for score in averaged), class_="tiles")


def _tile(score: Score, axis: Axis) -> Markup:
    what = "mean of all" if score.task == "all" else score.task.replace("_", " ")
    about = " · ".join(part for part in (metric_name(score.metric), plural(score.n or 0, "data set")) if part)
    bounds = interval(score.interval) if score.interval else ""
    return element(
        "div",
        element("h3", what, element("small", about)),
        element("p", element("b", points(score.after)), element("span", "from ", points(score.before)), class_="score"),
        element("p", element("strong", signed(score.difference)), " ", bounds, class_="change"),
        whisker(score.difference, score.interval, axis, kind(score.verdict)),
        mark(score.verdict),
        class_=f"tile {kind(score.verdict)}",
    )


def results_section(run: Run) -> Markup | None:
    """The table by data set, all metrics, and how it was scored."""
    found = scores(run)
    if not found:
        return _one_model(run)
    listed = [*found, *means(run, found)]
    axis = across(listed)
    tested = any(score.tested for score in listed)
    with_p = any(score.tested and score.tested.p_holm is not None for score in listed)
    header = ["data set", "metric", "before", "after", "difference", "", *["interval"] * tested, "mark"]
    header += [*["p"] * with_p, "n", "task"]
    rows = []
    for place, score in enumerate(listed):
        is_mean, task = place >= len(found), score.task.replace("_", " ")
        title = "mean of all" if score.task == "all" else f"mean {task}" if is_mean else name(score.name)
        rows.append(
            [
                element("strong", title) if is_mean else title,
                metric_name(score.metric),
                points(score.before),
                points(score.after),
                signed(score.difference),
                whisker(score.difference, score.interval, axis, kind(score.verdict)),
                *[interval(score.interval)] * tested,
                mark(score.verdict),
                *[_p(score)] * with_p,
                None if is_mean else score.n,
                "" if is_mean else task,
            ]
        )
    return section(
        "results",
        "Results by data set",
        _how(run, tested),
        table(header, rows, "Results by data set"),
        fold("All metrics", _all_metrics(run)),
        fold("How it was scored", _scored(run.evaluations["model"])),
    )


def _p(score: Score) -> Number | None:
    value = score.tested.p_holm if score.tested else None
    return None if value is None else Number("< 0.001") if value < 0.001 else Number(f"{value:.3f}")


def _how(run: Run, tested: bool) -> str:
    told = ["In points of 0 to 100, the untouched base against the trained model."]
    sides = [{*run.evaluations[model]} for model in ("base", "model")]
    if alone := sorted(sides[0] ^ sides[1]):
        told.append(f"Scored on one side only, and left out: {', '.join(alone)}.")
    if not tested:
        return " ".join([*told, "The differences are not tested: without comparison.json they may be chance."])
    settings = run.comparison.settings if run.comparison else {}
    if isinstance(confidence := settings.get("confidence"), float):
        told.append(f"Intervals of {100 * confidence:g} %; p is corrected for the number of tests (Holm).")
    if test := settings.get("test"):
        told.append(f"Test: {test}.")
    return " ".join([*told, "▲ better, ▼ worse, ≈ no difference shown."])


def _all_metrics(run: Run) -> Markup:
    rows = [
        [name(one.dataset), metric_name(metric), points(value), points(other.metrics.get(metric))]
        for one, other in in_both(run)
        for metric, value in one.metrics.items()
    ]
    return table(["data set", "metric", "before", "after"], rows, "All metrics")


def _scored(evaluations: dict[str, Evaluation]) -> Markup:
    rows = [
        [
            name(data_set), found.n,
            join(_said(role, text) for role, text in found.prompt.items()),
            ", ".join(f"{role} {length}" for role, length in found.max_length.items()),
            None if found.seconds is None else number(found.seconds, 3),
        ]
        for data_set, found in evaluations.items()
    ]  # fmt: skip
    return table(["data set", "n", "prompt", "longest text, tokens", "seconds"], rows, "How it was scored")


def _said(role: str, text: str | None) -> Markup:
    return element("div", f"{role}: ", name(repr(text)) if text else "none")


def _one_model(run: Run) -> Markup | None:
    """Scores of a run that has been scored once only."""
    model = next((model for model in ("model", "base") if model in run.evaluations), None)
    if model is None:
        return None
    rows = [
        [name(data_set), found.task.replace("_", " "), metric_name(metric), found.n, points(value)]
        for data_set, found in run.evaluations[model].items()
        for metric, value in found.metrics.items()
    ]
    return section(
        "results", "Results by data set",
        f"In points of 0 to 100, of {model!r} alone: the run has not been scored before and after.",
        table(["data set", "task", "metric", "n", "score"], rows, "Results by data set"),
    )  # fmt: skip


def during_section(run: Run) -> Markup | None:
    """Mean headline of each task by step, where the suite was scored during training."""
    steps = {model: re.fullmatch(r"step-([0-9]{1,18})", model) for model in run.evaluations}
    at = {int(found[1]): model for model, found in steps.items() if found}
    if not at:
        return None
    if "base" in run.evaluations:
        at[0] = "base"
    if "model" in run.evaluations and run.steps:
        at[run.steps[-1].step] = "model"
    lines: dict[str, list[tuple[float, float]]] = {}
    kept, others = in_all(run, [*at.values()])
    for step, model in sorted(at.items()):
        for task, value in task_means(kept[model]).items():
            if task != "all":
                lines.setdefault(task, []).append((step, 100 * value))
    charts = [
        line_chart(task.replace("_", " "), [Line(task, found, colour(task))], "step", "mean, points", steps=True)
        for task, found in lines.items()
    ]
    return section(
        "during",
        "Scores during training",
        " ".join(["Mean of the data sets of a task.", *([left_out(others, "at every step")] if others else [])]),
        element("div", *charts, class_="figures"),
    )
