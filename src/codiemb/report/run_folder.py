"""The files of a run folder that the report tells of, read and checked. All are optional; a damaged one is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from codiemb.errors import CheckpointError, CodiembError, EvaluationError
from codiemb.report.facts import Comparison, Conflict, Evaluation, Fusion, Geometry, Pareto, PlanFacts, Step, Trial
from codiemb.tasks import TASKS
from codiemb.tasks.task import same_score


@dataclass
class Run:
    """A run folder. `unfinished` tells of a last line of metrics.jsonl that was cut while it was written."""

    folder: Path
    config: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    plan: PlanFacts | None = None
    steps: list[Step] = field(default_factory=list)
    unfinished: bool = False
    evaluations: dict[str, dict[str, Evaluation]] = field(default_factory=dict)
    comparison: Comparison | None = None
    geometry: Geometry | None = None
    conflict: list[Conflict] = field(default_factory=list)
    fusions: dict[str, Fusion] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    pareto: Pareto | None = None

    @property
    def name(self) -> str:
        return self.folder.resolve().name


Read = TypeVar("Read", bound=BaseModel)
_FIX = "bring the file back or remove it"


def read_run(folder: Path) -> Run:
    """What there is of a run.

    Raises:
        CheckpointError: no run is there, or a file of it is damaged.
        EvaluationError: scores or comparisons are damaged.
    """
    run = Run(folder)
    run.config = _text(folder / "config.yaml") or ""
    run.environment = _json(folder / "environment.json", dict) or {}
    run.plan = _one(folder / "plan.json", PlanFacts)
    run.steps, run.unfinished = _lines(folder / "metrics.jsonl", Step)
    run.conflict, _ = _lines(folder / "conflict.jsonl", Conflict)
    run.comparison = read_comparison(folder)
    run.geometry = _one(folder / "geometry.json", Geometry) or _one(folder / "geometry" / "geometry.json", Geometry)
    for path in sorted(folder.glob("eval/*/*.json")):
        if (found := _one(path, Evaluation, EvaluationError)) is not None:
            if found.dataset in run.evaluations.setdefault(path.parent.name, {}):
                raise EvaluationError(
                    f"file {path}", got=f"{found.dataset} again", expected="one file a data set", fix="remove one"
                )
            run.evaluations[path.parent.name][found.dataset] = found
    order = [*TASKS]
    for model, found_sets in run.evaluations.items():
        ranked = sorted(
            found_sets.values(),
            key=lambda one: (order.index(one.task) if one.task in order else len(order), one.dataset),
        )
        run.evaluations[model] = {one.dataset: one for one in ranked}
    for path in sorted(folder.glob("fused/**/fusion.json")):
        if path.parent.name.startswith("."):  # it is being written
            continue
        if (fusion := _one(path, Fusion)) is not None:
            run.fusions[path.parent.relative_to(folder / "fused").as_posix()] = fusion
    for path in sorted([*folder.glob("trials.jsonl"), *folder.glob("fused/**/trials.jsonl")]):
        run.trials += _lines(path, Trial)[0]
    for path in sorted([*folder.glob("pareto.json"), *folder.glob("fused/**/pareto.json")])[:1]:
        run.pareto = _one(path, Pareto)
        _require_places(path, run.pareto)
    _require_same_scores(run)
    if not (run.config or run.steps or run.plan or run.evaluations):
        raise CheckpointError(
            f"run folder {folder}",
            got="no config.yaml, plan.json, metrics.jsonl or eval" if folder.is_dir() else "no folder there",
            expected="the output_dir of a training",
            fix="check the path",
        )
    return run


def read_comparison(folder: Path) -> Comparison | None:
    """`comparison.json` of a run, None without one.

    Raises:
        EvaluationError: it is damaged.
    """
    return _one(folder / "comparison.json", Comparison, EvaluationError)


def _text(path: Path, kind: type[CodiembError] = CheckpointError) -> str | None:
    try:
        if not path.exists() and not path.is_symlink():  # a link to nothing is damage
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise kind(f"file {path}", got=error, expected="text in UTF-8", fix=_FIX) from None


def _json(path: Path, shape: type, kind: type[CodiembError] = CheckpointError) -> Any:
    if (text := _text(path, kind)) is None:
        return None
    try:
        value = _loads(text)
    except (ValueError, RecursionError) as error:
        raise kind(f"file {path}", got=error, expected="JSON", fix=_FIX) from None
    if not isinstance(value, shape):
        raise kind(f"file {path}", got=type(value).__name__, expected=shape.__name__, fix=_FIX)
    return value


def _loads(text: str) -> Any:
    """JSON; halves of surrogate pairs, which no file in UTF-8 can hold, are replaced."""
    value = json.loads(text)
    if "\\ud" in text.lower():
        whole = json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        value = json.loads(whole)
    return value


def _one(path: Path, shape: type[Read], kind: type[CodiembError] = CheckpointError) -> Read | None:
    value = _json(path, dict, kind)
    return None if value is None else _checked(value, shape, f"file {path}", kind)


def _checked(value: Any, shape: type[Read], where: str, kind: type[CodiembError] = CheckpointError) -> Read:
    try:
        return shape.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        got = "nothing" if first["type"] == "missing" else repr(first["input"])
        raise kind(f"{where}, {place}", got=got, expected=first["msg"], fix=_FIX) from None


def _lines(path: Path, shape: type[Read]) -> tuple[list[Read], bool]:
    """The objects of a file of JSON lines, and whether its last line is left out because it was never finished."""
    if (text := _text(path)) is None:
        return [], False
    found: list[Read] = []
    lines = text.split("\n")  # not splitlines: a text may hold other line ends
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = _loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                return found, True
            raise CheckpointError(f"file {path}, line {number}", got=error, expected="JSON", fix=_FIX) from None
        found.append(_checked(value, shape, f"file {path}, line {number}"))
    return found, False


def _require_same_scores(run: Run) -> None:
    """Refuses a comparison of other scores than those that lie in eval/."""
    if run.comparison is None:
        return
    for found in run.comparison.comparisons:
        for line in found.data_sets:
            for model, value in ((run.comparison.reference, line.reference), (found.model, line.model)):
                scored = run.evaluations.get(Path(model).name, {}).get(line.name)
                known = scored.metrics.get(line.metric) if scored else None
                if known is not None and not same_score(known, value):
                    raise EvaluationError(
                        f"file {run.folder / 'comparison.json'}, {line.name}",
                        got=f"{line.metric} {value:.6f} of {model}",
                        expected=f"{known:.6f}, as in eval/{Path(model).name}",
                        fix="compare again (codiemb compare), or remove the file",
                    )


def _require_places(path: Path, pareto: Pareto | None) -> None:
    if pareto and not all(0 <= place < len(pareto.points) for place in (*pareto.front, pareto.knee)):
        raise CheckpointError(f"file {path}, front", got="a place that is no point", fix=_FIX)
