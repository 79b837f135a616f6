"""The model card: what the model is for, its scores before and after, its data and every setting."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from codiemb.batching.plan_report import PlanReport
from codiemb.config import Config, Source, dump_config
from codiemb.evaluation.metrics import HEADLINE
from codiemb.files import write_whole
from codiemb.report.facts import Comparison, Difference
from codiemb.report.scores import of_same

Results = dict[str, dict[str, float]]
_TESTED = "Intervals and verdicts are of paired tests on each query or pair, corrected for the number of tests."
_UNTESTED = "The differences are not tested."


def write_card(
    folder: Path,
    config: Config,
    report: PlanReport,
    base: Results,
    trained: Results,
    suite: Sequence[Source],
    comparison: Comparison | None = None,
) -> None:
    """Writes `README.md` into a model folder, in the form the Hugging Face hub reads.

    Args:
        comparison: of the base with `model`, for the intervals and marks of what it tested.
    """
    compared = comparison.of("model") if comparison else None
    lines = {(line.name, line.metric): line for line in compared.data_sets} if compared else {}
    rows = _scores(base, trained, suite, lines)
    rows += _means(base, trained, suite, {line.task: line for line in compared.means} if compared else {})
    scores = [row for row, _ in rows]
    head = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "base_model": config.model.base,
        "tags": ["sentence-transformers", "feature-extraction", "codiemb"],
    }
    data = [
        f"| {name} | {facts['task']} | {facts['rows']} | {facts['rows_used']} | "
        f"{facts['batches']} | {facts['passes']:.2f} |"
        for name, facts in report.content["sources"].items()
    ]
    text = f"""---
{json.dumps(head, indent=2)}
---

# {Path(config.output_dir).name}

A text-embedding model for retrieval and for semantic similarity, trained jointly by CoDiEmb from {config.model.base}.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
queries = model.encode_query(["..."])
documents = model.encode_document(["..."])
pairs = model.encode(["...", "..."], prompt_name="similarity")
```

## Scores

In points of 0 to 100, on the untouched base and on this model, with the prompts and lengths saved here.

| data set | task | metric | before | after | difference | interval | |
|---|---|---|---:|---:|---:|---|---|
{chr(10).join(scores) or "| no suite was configured | | | | | | | |"}

{_TESTED if any(tested for _, tested in rows) else _UNTESTED}

## Training data

| source | task | rows | rows used | batches an epoch | passes |
|---|---|---:|---:|---:|---:|
{chr(10).join(data)}

## Settings

```yaml
{dump_config(config).rstrip()}
```
"""
    write_whole(folder / "README.md", text)


def _scores(
    base: Results, trained: Results, suite: Sequence[Source], lines: dict[tuple[str, str], Difference]
) -> list[tuple[str, bool]]:
    """A row for each data set and metric, and whether it was tested."""
    tasks = {source.name: source.task for source in suite}
    return [
        _row(name, tasks[name], metric, base[name][metric], value, lines.get((name, metric)))
        for name, metrics in trained.items()
        for metric, value in metrics.items()
    ]


def _means(
    base: Results, trained: Results, suite: Sequence[Source], lines: dict[str, Difference]
) -> list[tuple[str, bool]]:
    """A row for each task over its data sets, and for all of them where there are several tasks."""
    values: dict[str, list[tuple[float, float]]] = {}
    for source in suite:
        metric = HEADLINE[source.task]
        values.setdefault(source.task, []).append((base[source.name][metric], trained[source.name][metric]))
    if len(values) > 1:
        values["all"] = [pair for found in values.values() for pair in found]
    rows = []
    for task, found in values.items():
        before, after = (mean(side) for side in zip(*found, strict=True))
        rows.append(_row("**mean**", task, HEADLINE.get(task, ""), before, after, lines.get(task)))
    return rows


def _row(name: str, task: str, metric: str, before: float, after: float, line: Difference | None) -> tuple[str, bool]:
    """With the interval and the verdict, if they are of these scores."""
    tested = of_same(line, before, after)
    cells = f"| {name} | {task} | {metric} | {100 * before:.2f} | {100 * after:.2f} | {100 * (after - before):+.2f} |"
    return cells + _tested(tested), tested is not None


def _tested(line: Difference | None) -> str:
    """The last two cells of a row."""
    if line is None:
        return " | |"
    bounds = f"[{100 * line.interval[0]:+.2f}, {100 * line.interval[1]:+.2f}]" if line.interval else ""
    return f" {bounds} | {line.verdict} |"
