"""Fused models beside the base and the trained one, and the front between retrieval and similarity."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from codiemb.figures.front import front, marks
from codiemb.figures.markup import Markup, element, fold, interval, name, number, points, section, signed, table
from codiemb.figures.scatter import Point, scatter
from codiemb.report.facts import Fusion, Pareto, Trial
from codiemb.report.results import mark
from codiemb.report.run_folder import Run
from codiemb.report.scores import in_all, left_out, of_same, task_means


def fusion_section(run: Run) -> Markup | None:
    """What was merged, its scores, trials and front; None if nothing was."""
    fused = [model for model in run.fusions if model in run.evaluations]
    trials = run.trials or [one for found in run.fusions.values() for one in found.trials]
    trials = run.pareto.points if run.pareto else trials
    if not run.fusions and not trials:
        return None
    models = [model for model in ("base", "model", *fused) if model in run.evaluations]
    kept, others = in_all(run, models)
    means = {model: task_means(found) for model, found in kept.items()}
    missing = [left_out(others, "on every model")] if fused and others else []
    return section(
        "fusion",
        "Fusion of checkpoints",
        " ".join(["Checkpoints merged into one model, beside the model at the end of the training.", *missing]),
        _scores(run, means) if fused else None,
        element("div", *_figures(run, means if fused else {}, trials), class_="figures"),
        _recipes(run.fusions) if run.fusions else None,
        fold(f"All {len(trials)} trials", _trials(trials)) if trials else None,
    )


def _scores(run: Run, means: dict[str, dict[str, float]]) -> Markup:
    tasks = [task for task in dict.fromkeys(task for found in means.values() for task in found) if task != "all"]
    rows = []
    for model in means:
        name_of = {"base": "base", "model": "trained model"}.get(model, f"fused: {model}")
        row = [name(name_of), *(points(means[model].get(task)) for task in [*tasks, "all"])]
        before, after = means.get("base", {}).get("all"), means[model].get("all")
        if model == "base" or before is None or after is None:
            rows.append([*row, None, None, ""])
            continue
        compared = run.comparison.of(model) if run.comparison else None
        lines = [of_same(line, before, after) for line in compared.means if line.task == "all"] if compared else []
        tested = lines[0] if lines else None
        bounds, verdict = (tested.interval, tested.verdict) if tested else (None, "")
        rows.append([*row, signed(after - before), interval(bounds), mark(verdict)])
    of_tasks = [f"mean {task.replace('_', ' ')}" for task in tasks]
    header = ["model", *of_tasks, "mean of all", "against base", "interval", "mark"]
    return table(header, rows, "Fused models")


def _figures(run: Run, means: dict[str, dict[str, float]], trials: list[Trial]) -> list[Markup]:
    """Retrieval against similarity: the models of the run, and the trials of a search."""
    figures = []
    dots = []
    for model, found in means.items():
        if {"retrieval", "similarity"} <= found.keys():
            kind = model if model in ("base", "model") else "fused"
            dots.append(Point(model, 100 * found["retrieval"], 100 * found["similarity"], kind, True))
    if len(dots) > 1:
        labels = ("mean retrieval, points", "mean similarity, points")
        figures.append(scatter("Models of this run", dots, *labels, about="Up and to the right is better."))
    tasks = run.pareto.tasks if run.pareto else [*trials[0].scores] if trials else []
    if len(tasks) == 2 and all({*tasks} <= one.scores.keys() for one in trials):
        figures.append(_front_figure(trials, tasks, run.pareto))
    return figures


def _front_figure(trials: list[Trial], tasks: list[str], pareto: Pareto | None) -> Markup:
    at = [(one.scores[tasks[0]], one.scores[tasks[1]]) for one in trials]
    best = pareto.front if pareto else front(at)
    dots = marks(at, [what(one) for one in trials], best, pareto.knee if pareto else None)
    title, about = ("Pareto front" if pareto else "Trials"), "The line joins the models that no other beats in both."
    return scatter(title, dots, f"{tasks[0]}, points", f"{tasks[1]}, points", about=about, front=best)


def what(trial: Trial) -> str:
    """Checkpoints and settings in short."""
    names = ", ".join("/".join(Path(path).parts[-2:]) for path in trial.checkpoints)
    settings = ", ".join(f"{key} {_short(value)}" for key, value in trial.settings.items())
    return f"{names}: {settings or 'alone'}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ":".join(_short(one) for one in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _trials(trials: list[Trial]) -> Markup:
    tasks = list(dict.fromkeys(task for one in trials for task in one.scores))
    rows = []
    for one in trials:
        average = mean(one.scores.values()) if one.scores else None
        rows.append([name(what(one)), *(points(one.scores.get(task)) for task in tasks), points(average)])
    return table(["checkpoints and settings", *tasks, "mean"], rows, "Trials")


def _recipes(fusions: dict[str, Fusion]) -> Markup:
    rows = []
    for folder, found in fusions.items():
        parents = [Path(str(parent.get("path", ""))).name for parent in found.parents]
        numbers = [number(found.scale), number(found.delta_length)]
        rows.append([name(folder), found.method, ", ".join(parents), _weights(found.weights), *numbers])
    header = ["folder", "method", "checkpoints", "weights", "scale", "length of the change"]
    return table(header, rows, "Recipes of the fusions")


def _weights(weights: Any) -> str:
    """Weights in a line: those of the whole model, or the mean over tensors."""
    if not isinstance(weights, dict):
        return weights if isinstance(weights, str) else ""
    rows = [row for row in weights.values() if isinstance(row, list) and all(isinstance(one, float) for one in row)]
    if len({len(row) for row in rows}) != 1:
        return ""
    shown = ", ".join(f"{mean(column):.3f}" for column in zip(*rows, strict=True))
    return shown if len(rows) == 1 else f"{shown} (mean over {len(rows)} tensors)"
