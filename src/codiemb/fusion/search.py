"""Which fusion is best: tried on a dev suite, every trial recorded. What scores a model is handed in.

A score is the mean of the tasks' means (retrieval nDCG@10, similarity Spearman), each over its data sets.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from codiemb.errors import ConfigError
from codiemb.fusion.fuse import Fused, fuse

logger = logging.getLogger(__name__)

Score = Callable[[Path], dict[str, float]]  # a model folder -> by task the mean over its data sets
GRID: tuple[dict[str, Any], ...] = (
    {"method": "uniform"},
    {"method": "uniform", "scale": 0.7},
    {"method": "uniform", "scale": 1.3},
    *({"granularity": granularity} for granularity in ("model", "tensor", "row", "element")),
    {"granularity": "tensor", "weighting": "inverse"},
    {"granularity": "element", "norm": "mean_square"},
)


@dataclass(frozen=True)
class Trial:
    """Settings of `fuse`, or one checkpoint alone, and its scores by task."""

    settings: dict[str, Any]
    scores: dict[str, float]

    @property
    def score(self) -> float:
        return mean(self.scores.values())


class Search:
    """Scores fusions in `out`/trials and keeps a line for each in `out`/trials.jsonl."""

    def __init__(self, checkpoints: Sequence[Path], base: Path, out: Path, score: Score) -> None:
        self.checkpoints, self.base, self.out, self.score = list(checkpoints), base, out, score
        self.trials: list[Trial] = []

    def alone(self) -> list[Trial]:
        """Each checkpoint by itself."""
        return [self._record({"checkpoint": str(folder)}, folder) for folder in self.checkpoints]

    def try_fusion(self, checkpoints: Sequence[Path], **settings: Any) -> Trial:
        folder = self.out / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        fuse(checkpoints, self.base, folder, **settings)
        names = (
            {} if len(checkpoints) == len(self.checkpoints) else {"checkpoints": [str(path) for path in checkpoints]}
        )
        trial = self._record({**names, **settings}, folder)
        shutil.rmtree(folder)
        return trial

    def grid(self, settings: Sequence[dict[str, Any]] = GRID) -> Trial:
        """The best of some settings."""
        return max([self.try_fusion(self.checkpoints, **chosen) for chosen in settings], key=lambda trial: trial.score)

    def greedy(self) -> Trial:
        """Greedy soup (Wortsman et al., 2022): from the best checkpoint on, each next one stays if the score rises."""
        alone = sorted(zip(self.alone(), self.checkpoints, strict=True), key=lambda pair: -pair[0].score)
        best, kept = alone[0][0], [alone[0][1]]
        for _, folder in alone[1:]:
            trial = self.try_fusion([*kept, folder], method="uniform")
            if trial.score > best.score:
                best, kept = trial, [*kept, folder]
        return Trial({"method": "uniform", "checkpoints": [str(folder) for folder in kept]}, best.scores)

    def _record(self, settings: dict[str, Any], folder: Path) -> Trial:
        trial = Trial(settings, self.score(folder))
        self.trials.append(trial)
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "trials.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**asdict(trial), "score": trial.score}) + "\n")
        logger.info(f"trial {len(self.trials)}: {trial.score:.4f} {trial.scores} {settings}")
        return trial


def front(points: Sequence[Sequence[float]]) -> list[int]:
    """Places of the points that no other is as good as in both and better in one, by the first value."""
    return sorted(
        (
            place
            for place, (x, y) in enumerate(points)
            if not any(a >= x and b >= y and (a > x or b > y) for a, b in points)
        ),
        key=lambda place: points[place][0],
    )


def knee(points: Sequence[Sequence[float]]) -> int:
    """The point of a front that is farthest above the line between its ends, each axis scaled to that line."""
    if not points:
        raise ConfigError("pareto", got="no points", expected="at least one")
    (x_0, y_0), (x_1, y_1) = points[0], points[-1]
    width, height = (x_1 - x_0) or 1.0, (y_0 - y_1) or 1.0
    return max(
        range(len(points)), key=lambda place: (points[place][0] - x_0) / width + (points[place][1] - y_1) / height
    )


def pareto(one: Path, other: Path, base: Path, out: Path, score: Score, steps: int = 11) -> dict[str, Any]:
    """Models on the way from one expert to another, with the scores of each, the front and its knee.

    Writes `pareto.json` into `out`.
    """
    search = Search([one, other], base, out, score)
    trials = []
    for step in range(steps):
        share = step / (steps - 1)
        trials.append(search.try_fusion([one, other], method="weighted", weights=[1 - share, share]))
    tasks = list(trials[0].scores)
    if len(tasks) != 2:
        raise ConfigError("suite", got=f"data sets of {', '.join(tasks)}", expected="retrieval and similarity")
    points = [[trial.scores[task] for task in tasks] for trial in trials]
    best = front(points)
    content = {
        "tasks": tasks,
        "points": [{**asdict(trial), "share": step / (steps - 1)} for step, trial in enumerate(trials)],
        "front": best,
        "knee": best[knee([points[place] for place in best])],
    }
    (out / "pareto.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content


def fuse_best(search: Search, best: Trial, out: Path) -> Fused:
    """The model of a trial, with all trials in its `fusion.json`."""
    settings = dict(best.settings)
    checkpoints = [Path(path) for path in settings.pop("checkpoints", search.checkpoints)]
    fused = fuse(checkpoints, search.base, out, **settings)
    facts = {**fused.facts, "scores": best.scores, "trials": [asdict(trial) for trial in search.trials]}
    (out / "fusion.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return Fused(out, facts)
