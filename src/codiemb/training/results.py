"""What a run has to show: metrics before and after, whether they differ by more than chance, and the table of both."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codiemb.config import Source
from codiemb.errors import EvaluationError
from codiemb.evaluation.comparison import compare, write_comparison
from codiemb.evaluation.metrics import HEADLINE
from codiemb.evaluation.suite import Results, average
from codiemb.report.page import write_report
from codiemb.tasks.task import same_score

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """Where the model is, and metrics by data set before and after (empty without a suite).

    `fused` holds by method the metrics of what the run's checkpoints were merged into; `comparison` is what
    comparison.json holds.
    """

    model: Path
    base: Results
    trained: Results
    suite: Sequence[Source]
    fused: dict[str, Results]
    comparison: dict[str, Any] | None


def compare_run(run: Path, evaluated: Sequence[str]) -> dict[str, Any] | None:
    """Writes comparison.json, with the first as the reference; None where the evaluations do not allow it."""
    try:
        found = compare({name: [run / "eval" / name] for name in evaluated})
    except EvaluationError as error:
        logger.info(f"no comparison: {error}")
        return None
    write_comparison(run / "comparison.json", found)
    return found


def report_run(run: Path) -> None:
    """Writes report.html; one that cannot be made does not undo a training."""
    try:
        logger.info(f"report {write_report(run)}")
    except Exception as error:
        logger.warning(f"no report: {error}")
        logger.debug("the report ended with", exc_info=True)


def results_table(result: TrainResult) -> str:
    """Before and after by data set, in points of 0 to 100, as Markdown, with what the comparison says of them; a column
    for each merge of checkpoints."""
    models = [result.base, result.trained, *result.fused.values()]
    compared: dict[str, Any] = {}
    if result.comparison:
        against = result.comparison["comparisons"][0]
        compared = {row["name"]: row for row in against["data_sets"]}
        compared |= {f"**mean {row['task']}**": row for row in against["means"]}
    header = ["data set", "metric", "before", "after", "difference"]
    header += (["95 % interval", "verdict"] if compared else []) + list(result.fused)
    lines = [_row(header), "|---|---|---:|---:|---:|" + "---:|---|" * bool(compared) + "---:|" * len(result.fused)]

    def line(name: str, metric: str, values: list[float]) -> str:
        before, after, *merged = (100 * value for value in values)
        cells = [name, metric, f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f}"]
        if compared:
            cells += _tested(compared.get(name), *values[:2])
        return _row([*cells, *(f"{value:.2f}" for value in merged)])

    for source in result.suite:
        metric = HEADLINE[source.task]
        lines.append(line(source.name, metric, [model[source.name][metric] for model in models]))
    means = [average(model, result.suite) for model in models]
    lines += [line(f"**mean {task}**", HEADLINE[task], [mean[task] for mean in means]) for task in means[0]]
    return "\n".join(lines)


def _tested(row: dict[str, Any] | None, before: float, after: float) -> list[str]:
    """Interval and verdict; empty where other scores were compared, as the mean of fewer data sets."""
    if row is None or not same_score(row["reference"], before) or not same_score(row["model"], after):
        return ["", ""]
    low, high = row["interval"]
    return [f"{100 * low:+.2f} to {100 * high:+.2f}", row["verdict"]]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
