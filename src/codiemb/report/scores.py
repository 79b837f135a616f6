"""Scores before and after, by data set and in the mean, with what a comparison says of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from codiemb.figures.axes import Axis
from codiemb.report.facts import Difference, Evaluation
from codiemb.report.run_folder import Run
from codiemb.tasks import TASKS
from codiemb.tasks.task import same_score

METRICS = {
    "ndcg_at_10": "nDCG@10", "mrr_at_10": "MRR@10", "map": "MAP", "recall_at_100": "recall@100",
    "spearman": "Spearman", "pearson": "Pearson",
}  # fmt: skip
VERDICTS = {"better": ("better", "▲"), "worse": ("worse", "▼"), "no difference shown": ("same", "≈")}
UNTESTED = "not tested"


@dataclass(frozen=True)
class Score:
    """A data set or a mean, before and after. `tested` is its line of the comparison, if there is one."""

    name: str
    task: str
    metric: str
    n: int | None
    before: float
    after: float
    tested: Difference | None = None

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def interval(self) -> tuple[float, float] | None:
        return self.tested.interval if self.tested else None

    @property
    def verdict(self) -> str:
        return self.tested.verdict if self.tested else UNTESTED


def scores(run: Run) -> list[Score]:
    """By data set the headline metric before and after training, for the data sets that both were scored on."""
    compared = run.comparison.of("model") if run.comparison else None
    tested = {line.name: line for line in compared.data_sets} if compared else {}
    found = []
    for one, other in in_both(run):
        shared = [metric for metric in one.metrics if metric in other.metrics]
        line = tested.get(one.dataset)
        metric = line.metric if line and line.metric in shared else shared[0]
        both = one.metrics[metric], other.metrics[metric]
        of_metric = line if line and line.metric == metric else None
        found.append(Score(one.dataset, one.task, metric, one.n, *both, of_metric))
    return found


def in_both(run: Run) -> list[tuple[Evaluation, Evaluation]]:
    """Data sets that were scored before and after training by a common metric."""
    of_before, of_after = run.evaluations.get("base", {}), run.evaluations.get("model", {})
    pairs = [(one, of_after[data_set]) for data_set, one in of_before.items() if data_set in of_after]
    return [(one, other) for one, other in pairs if one.metrics.keys() & other.metrics.keys()]


def means(run: Run, found: Sequence[Score]) -> list[Score]:
    """Of each task over its data sets, and over all data sets if there are several tasks."""
    compared = run.comparison.of("model") if run.comparison else None
    tested = {line.task: line for line in compared.means} if compared else {}
    by_task: dict[str, list[Score]] = {}
    for score in found:
        by_task.setdefault(score.task, []).append(score)
    if len(by_task) > 1:
        by_task["all"] = [*found]
    averaged = []
    for task, listed in by_task.items():
        metric = listed[0].metric if len({score.metric for score in listed}) == 1 else ""
        both = mean(score.before for score in listed), mean(score.after for score in listed)
        averaged.append(Score(task, task, metric, len(listed), *both, of_same(tested.get(task), *both)))
    return averaged


def of_same(line: Difference | None, before: float, after: float) -> Difference | None:
    """What was tested, if it is the mean of the same data sets."""
    known = line is not None and same_score(line.reference, before) and same_score(line.model, after)
    return line if known else None


def in_all(run: Run, models: Sequence[str]) -> tuple[dict[str, list[Evaluation]], list[str]]:
    """By model the data sets that every one of them was scored on by its headline, and the names of the others."""
    found = [run.evaluations.get(model, {}) for model in models]
    known = dict.fromkeys(name for of_model in found for name, one in of_model.items() if one.metrics)
    shared = [name for name in known if len({headline(one[name]) if name in one else "" for one in found}) == 1]
    kept = {model: [of_model[name] for name in shared] for model, of_model in zip(models, found, strict=True)}
    return kept, [name for name in known if name not in shared]


def left_out(names: Sequence[str], what: str) -> str:
    """A sentence on data sets that no mean holds."""
    return f"Not scored {what}, and left out: {', '.join(names)}." if names else ""


def task_means(evaluations: Iterable[Evaluation]) -> dict[str, float]:
    """Mean headline of each task over its data sets, and of `all` over all of them."""
    found: dict[str, list[float]] = {}
    for one in evaluations:
        if one.metrics:
            for task in (one.task, "all"):
                found.setdefault(task, []).append(one.metrics[headline(one)])
    return {task: mean(values) for task, values in found.items()}


def headline(evaluation: Evaluation) -> str:
    return next(iter(evaluation.metrics), "")


def metric_name(metric: str) -> str:
    return METRICS.get(metric, metric)


def kind(verdict: str) -> str:
    return VERDICTS.get(verdict, ("untested", ""))[0]


def across(found: Iterable[Score]) -> Axis:
    """The axis that all differences of a table share; it holds 0."""
    ends = [0.0]
    for score in found:
        ends += [score.difference, *(score.interval or ())]
    room = max(max(ends) - min(ends), 1e-3) * 0.04
    return Axis(min(ends) - room, max(ends) + room, 6, 154)


def colour(task: str) -> int:
    """One colour to a task, everywhere."""
    return [*TASKS].index(task) if task in TASKS else len(TASKS)
