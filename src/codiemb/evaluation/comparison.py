"""Models side by side, from their evaluations: differences, intervals, tests, and a verdict in words.

The first model is the reference. Each model is one evaluation or several, one a seed. With one evaluation a model, the
items are the sample: signs drawn at random and bootstrap intervals (`significance`). With several of any model, the
seeds are a sample as well (`seeds`).
"""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from codiemb.errors import EvaluationError
from codiemb.evaluation import significance
from codiemb.evaluation.scored import METRICS, Scored, contributions, paired, read_evaluation
from codiemb.evaluation.seeds import Crossed, crossed
from codiemb.evaluation.significance import Paired
from codiemb.files import write_json

Evidence = Paired | Crossed
TESTS = {
    Paired: "paired randomisation of signs; bootstrap intervals (percentile)",
    Crossed: "items and seeds as two crossed random factors, Student's t",
}


@dataclass(frozen=True)
class Row:
    """One model against the reference, on a data set or in the mean of several; scores as fractions.

    Attributes:
        n: queries or pairs.
        p: of this row alone.
        p_holm: corrected for all rows of its kind, of all models.
        effect_size: the difference over the standard deviation of the items' differences (Cohen's d_z); of a mean the
            mean; None where no item differs from another.
        verdict: "better" or "worse" where `p_holm` is below the level, else "no difference shown".
        reference_spread: standard deviation over seeds; None of a single one.
        model_spread: the same of the model.
    """

    name: str
    task: str
    metric: str
    n: int
    reference: float
    model: float
    difference: float
    interval: tuple[float, float]
    p: float
    p_holm: float
    effect_size: float | None
    verdict: str
    reference_spread: float | None
    model_spread: float | None


@dataclass(frozen=True)
class _Finding:
    """What one data set says of one model."""

    data_set: Scored
    evidence: Evidence
    effect_size: float | None


def compare(
    models: dict[str, list[Path]], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """The comparison of models with the first of them, in the form of `comparison.json`.

    Data sets that not every evaluation has, with items that make up the score, are left out and named.

    Args:
        models: folders of evaluations by name, one folder a seed.
        confidence: of the intervals; a verdict needs a corrected p-value below 1 minus this.
        resamples: draws of signs, and of items.
        seed: of the draws; those of a data set do not depend on the others.

    Raises:
        EvaluationError: an evaluation is damaged, or the items of two do not match.
    """
    evaluations = {name: [read_evaluation(folder) for folder in folders] for name, folders in models.items()}
    runs = [run for of_model in evaluations.values() for run in of_model]
    shared = [name for name in runs[0] if all(run.get(name) for run in runs)]
    if not shared:
        raise EvaluationError(
            f"evaluations {', '.join(models)}",
            got="no data set that all of them have",
            expected="at least one",
            fix="evaluate them on one suite",
        )
    reference, *others = evaluations
    findings: dict[str, list[_Finding]] = {name: [] for name in others}
    for data_set in shared:
        in_order = iter(paired([scored for run in runs if (scored := run[data_set])]))
        by_model = [[next(in_order) for _ in of_model] for of_model in evaluations.values()]
        random = np.random.default_rng([seed, zlib.crc32(data_set.encode())])
        for name, finding in zip(others, _findings(by_model, resamples, random), strict=True):
            findings[name].append(finding)
    of_data_sets = _corrected(
        [[_row(one.data_set.name, [one], confidence) for one in found] for found in findings.values()], confidence
    )
    of_means = _corrected([_means(found, confidence) for found in findings.values()], confidence)
    complete = [_with_single(rows, means) for rows, means in zip(of_data_sets, of_means, strict=True)]
    kind = type(findings[others[0]][0].evidence)
    return {
        "reference": reference,
        "comparisons": [
            {"model": name, "data_sets": [asdict(row) for row in rows], "means": [asdict(row) for row in means]}
            for name, rows, means in zip(others, of_data_sets, complete, strict=True)
        ],
        "settings": {
            "test": TESTS[kind],
            "confidence": confidence,
            "resamples": resamples if kind is Paired else None,
            "seed": seed if kind is Paired else None,
            "evaluations": {name: [str(folder) for folder in folders] for name, folders in models.items()},
            "left_out": sorted({name for run in runs for name in run} - set(shared)),
        },
    }


def _findings(by_model: list[list[Scored]], resamples: int, random: np.random.Generator) -> list[_Finding]:
    """On one data set, of each model but the first."""
    data_set = by_model[0][0]
    values = [np.stack([contributions(run) for run in runs]) for runs in by_model]
    differences = [of_model.mean(axis=0) - values[0].mean(axis=0) for of_model in values[1:]]
    evidence: list[Evidence]
    if any(len(runs) > 1 for runs in by_model):
        evidence = [crossed(values[0], of_model) for of_model in values[1:]]
    else:
        signs = significance.random_signs(np.stack(differences), resamples, random)
        drawn = _drawn([runs[0] for runs in by_model], resamples, random)
        scores = [float(of_model.mean()) for of_model in values]
        evidence = [
            Paired(scores[0], scores[place], len(data_set.keys), signs[place - 1], drawn[place] - drawn[0])
            for place in range(1, len(by_model))
        ]
    sizes = [significance.effect_size(difference) for difference in differences]
    return [_Finding(data_set, one, size) for one, size in zip(evidence, sizes, strict=True)]


def _drawn(runs: list[Scored], resamples: int, random: np.random.Generator) -> Float[np.ndarray, "model resample"]:
    """Scores on items drawn with replacement."""
    if runs[0].task == "similarity":
        cosines = np.stack([run.values["cosine"] for run in runs])
        return significance.bootstrap_spearman(cosines, runs[0].values["label"], resamples, random)
    return significance.bootstrap_means(np.stack([contributions(run) for run in runs]), resamples, random)


def _means(found: list[_Finding], confidence: float) -> list[Row]:
    """Over the data sets of each task that has several, and over all tasks; each data set counts the same."""
    by_task: dict[str, list[_Finding]] = {}
    for one in found:
        by_task.setdefault(one.data_set.task, []).append(one)
    rows = [_row("mean", of_task, confidence) for of_task in by_task.values() if len(of_task) > 1]
    if len(by_task) > 1:
        rows.append(replace(_row("mean", found, confidence), task="all", metric="mean"))
    return rows


def _with_single(rows: list[Row], means: list[Row]) -> list[Row]:
    """A mean for each task and one for all: what is no mean of several repeats its row, and is no further test."""
    found = {mean.task: mean for mean in means}
    of_tasks = {row.task: found.get(row.task, replace(row, name="mean")) for row in rows}
    return [*of_tasks.values(), found.get("all", replace(next(iter(of_tasks.values())), task="all"))]


def _row(name: str, found: list[_Finding], confidence: float) -> Row:
    """Not yet corrected."""
    evidence = _mean([one.evidence for one in found])
    p, interval = evidence.test(confidence)
    sizes = [one.effect_size for one in found if one.effect_size is not None]
    return Row(
        name=name,
        task=found[0].data_set.task,
        metric=METRICS[found[0].data_set.task],
        n=sum(len(one.data_set.keys) for one in found),
        reference=evidence.reference,
        model=evidence.model,
        difference=evidence.model - evidence.reference,
        interval=interval,
        p=p,
        p_holm=p,
        effect_size=float(np.mean(sizes)) if sizes else None,
        verdict="",
        reference_spread=evidence.spreads[0],
        model_spread=evidence.spreads[1],
    )


def _mean(evidence: list[Evidence]) -> Evidence:
    if drawn := [one for one in evidence if isinstance(one, Paired)]:
        return Paired.mean_of(drawn)
    return Crossed.mean_of([one for one in evidence if isinstance(one, Crossed)])


def _corrected(rows_by_model: list[list[Row]], confidence: float) -> list[list[Row]]:
    """Holm's correction over all rows, and the verdicts."""
    corrected = iter(significance.holm([row.p for rows in rows_by_model for row in rows]))
    return [[_judged(row, next(corrected), 1 - confidence) for row in rows] for rows in rows_by_model]


def _judged(row: Row, p_holm: float, level: float) -> Row:
    verdict = "no difference shown"
    if p_holm < level:
        verdict = "better" if row.difference > 0 else "worse"
    return replace(row, p_holm=p_holm, verdict=verdict)


def write_comparison(file: Path, comparison: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, comparison)
