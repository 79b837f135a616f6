"""Which fusion is best: tried on a dev suite, every trial recorded. What scores a model is handed in.

The score of a model is the mean over the tasks of the suite of each task's mean (nDCG@10 for retrieval, Spearman for
similarity). Each trial is a line of `trials.jsonl`; the chosen model is in `best`.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import numpy as np
from scipy.special import softmax

from codiemb.errors import ConfigError
from codiemb.figures.front import front, knee, marks
from codiemb.figures.picture import picture
from codiemb.figures.scatter import scatter_plot
from codiemb.files import write_json, write_whole
from codiemb.fusion.alike import opened
from codiemb.fusion.fuse import fuse, layers_of, require_empty
from codiemb.fusion.settings import require_settings

logger = logging.getLogger(__name__)

Score = Callable[[Path], dict[str, float]]  # a model folder -> by task the mean over its data sets
Way = Literal["greedy", "grid", "layers"]
_SCALE_STEP = 0.4  # a step of the search changes the scale by about a fifth
GRID: tuple[dict[str, Any], ...] = (
    {"method": "uniform"},
    {"method": "uniform", "scale": 0.7},
    {"method": "uniform", "scale": 1.3},
    *({"method": "delta", "granularity": granularity} for granularity in ("model", "tensor", "row", "element")),
    {"method": "delta", "weighting": "inverse"},
    {"method": "delta", "granularity": "element", "norm": "mean_square"},
)


@dataclass(frozen=True)
class Trial:
    """Checkpoints and settings of `fuse`, or one checkpoint alone with none; and the scores by task."""

    checkpoints: list[str]
    settings: dict[str, Any]
    scores: dict[str, float]

    @property
    def score(self) -> float:
        """The mean over the tasks; what could not be scored is worse than anything."""
        found = mean(self.scores.values())
        return -math.inf if math.isnan(found) else found

    def told(self) -> str:
        """The settings in a line."""
        settings = {key: "by layer" if isinstance(value, dict) else value for key, value in self.settings.items()}
        return ", ".join(f"{key} {value}" for key, value in settings.items()) or "alone"


class Search:
    """Tries fusions of some checkpoints.

    Args:
        checkpoints: at least two model folders.
        base: the model they were trained from.
        out: a new folder, for trials and the model that is chosen.
        score: what scores a model folder.
        force: as for `fuse`.

    Raises:
        ConfigError: `out` holds files, or there is one checkpoint only.
        CheckpointError: the checkpoints cannot be merged.
    """

    def __init__(self, checkpoints: Sequence[Path], base: Path, out: Path, score: Score, force: bool = False) -> None:
        require_empty(out)
        require_settings(checkpoints)
        with opened(checkpoints, base, force) as (parents, _, _):
            self.layers = layers_of(parents[checkpoints[0]])
        self.checkpoints, self.base, self.out, self.score, self.force = list(checkpoints), base, out, score, force
        self.trials: list[Trial] = []

    def alone(self, checkpoint: Path) -> Trial:
        """Scores one checkpoint, in the number type of the base as all that is written here."""
        return self.fused([checkpoint], {})

    def fused(self, checkpoints: Sequence[Path], settings: dict[str, Any]) -> Trial:
        """Scores a fusion; of one checkpoint, with no settings, itself."""
        folder = self.out / "trial"
        self._write(checkpoints, settings, folder)
        try:
            return self._record(checkpoints, settings, folder)
        finally:
            shutil.rmtree(folder)

    def keep(self, trial: Trial) -> Path:
        """Writes the model of a trial, with its scores and all trials in its `fusion.json`."""
        best = self.out / "best"
        facts = self._write([Path(path) for path in trial.checkpoints], trial.settings, best)
        facts = {**facts, "scores": trial.scores, "trials": [asdict(tried) for tried in self.trials]}
        write_json(best / "fusion.json", facts)
        return best

    def _write(self, checkpoints: Sequence[Path], settings: dict[str, Any], folder: Path) -> dict[str, Any]:
        if len(checkpoints) > 1:
            return fuse(checkpoints, self.base, folder, **settings, force=self.force).facts
        # All weight on one, so that what only training needs stays behind.
        chosen = [*checkpoints, *(other for other in self.checkpoints if other != checkpoints[0])]
        weights = [1.0] + [0.0] * (len(chosen) - 1)
        return fuse(chosen, self.base, folder, method="weighted", weights=weights, force=True).facts

    def _record(self, checkpoints: Sequence[Path], settings: dict[str, Any], folder: Path) -> Trial:
        trial = Trial([str(path) for path in checkpoints], settings, self.score(folder))
        self.trials.append(trial)
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "trials.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**asdict(trial), "score": trial.score}) + "\n")
        what = trial.told() if settings else f"{checkpoints[0]} alone"
        logger.info(f"trial {len(self.trials)}, score {100 * trial.score:.2f}: {what}")
        return trial


def best(search: Search, way: Way | None, settings: dict[str, Any], trials: int = 50) -> str:
    """Tries each checkpoint alone and what `way` says, keeps the best of all; returns a table of the trials.

    Args:
        way: `greedy`: greedy soup; `grid`: `GRID`; `layers`: weights by layer, found by CMA-ES; None: the one fusion
            of `settings`.
        trials: of `layers`, rounded up to whole generations.
    """
    if settings and way:
        raise ConfigError(f"--search {way}", got=", ".join(settings), expected="no settings of a fusion beside it")
    if way == "layers":
        require_cma()
    if trials < 1:
        raise ConfigError("--trials", got=trials, expected="at least 1")
    grid = {"greedy": [], "layers": [], "grid": GRID, None: [{"method": "delta", **settings}]}[way]
    for point in grid:
        require_settings(search.checkpoints, **point)
    alone = [search.alone(checkpoint) for checkpoint in search.checkpoints]
    for point in grid:
        search.fused(search.checkpoints, point)
    if way == "greedy":
        greedy_soup(search, alone)
    elif way == "layers":
        by_layer(search, trials)
    chosen = max(search.trials, key=lambda trial: trial.score)
    return f"{_table(search.trials, chosen)}\n\nmodel {search.keep(chosen)}"


def greedy_soup(search: Search, alone: Sequence[Trial]) -> Trial:
    """From the best checkpoint on, each next one stays in the average if the score rises (Wortsman et al., 2022)."""
    ranked = sorted(alone, key=lambda trial: -trial.score)
    soup = ranked[0]
    for trial in ranked[1:]:
        more = search.fused([Path(path) for path in [*soup.checkpoints, *trial.checkpoints]], {"method": "uniform"})
        soup = max(soup, more, key=lambda tried: tried.score)
    return soup


def by_layer(search: Search, trials: int) -> None:
    """CMA-ES (Hansen, 2016) over the weights of each layer and one scale, from the uniform average on.

    A point of its space holds for each layer the logits of the checkpoints' weights, which are their softmax, and last
    the logarithm of the scale.
    """
    cma = require_cma()
    layers, models = search.layers, len(search.checkpoints)

    def settings(point: Any) -> dict[str, Any]:
        weights = softmax(point[:-1].reshape(len(layers), models), axis=1)
        scale = float(np.exp(_SCALE_STEP * point[-1]))
        return {"method": "weighted", "weights": dict(zip(layers, weights.tolist(), strict=True)), "scale": scale}

    start = np.zeros(len(layers) * models + 1)
    strategy = cma.CMAEvolutionStrategy(start, 0.5, {"seed": 1, "verbose": -9})
    for _ in range(-(-trials // strategy.popsize)):
        points = strategy.ask()
        strategy.tell(points, [-search.fused(search.checkpoints, settings(point)).score for point in points])


def require_cma() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it could not draw plots
            import cma
        return cma
    except ImportError:
        raise ConfigError(
            "--search layers", got="no cma", expected="the extra merge", fix="pip install 'codiemb[merge]'"
        ) from None


def pareto(search: Search, tasks: Sequence[str]) -> str:
    """The way from the first checkpoint to the second in ten equal steps, any further checkpoint as a point beside it.

    Writes `pareto.json` and `pareto.svg` and keeps the knee of the front; returns a table.

    Args:
        tasks: those that the suite has data sets of.

    Raises:
        ConfigError: they are not two.
    """
    if len(tasks) != 2:
        raise ConfigError("--suite", got=f"data sets of {', '.join(tasks)} alone", expected="retrieval and similarity")
    one, other = search.checkpoints[:2]
    shares = [step / 10 for step in range(11)]
    for share in shares:
        search.fused([one, other], {"method": "weighted", "weights": [1 - share, share]})
    for further in search.checkpoints[2:]:
        search.alone(further)
    points = [(trial.scores[tasks[0]], trial.scores[tasks[1]]) for trial in search.trials]
    best_of_all = front(points)
    at_knee = best_of_all[knee([points[place] for place in best_of_all])]
    content = {
        "tasks": tasks,
        "points": [asdict(trial) for trial in search.trials],
        "front": best_of_all,
        "knee": at_knee,
    }
    write_json(search.out / "pareto.json", content)
    title, dots = "Pareto front", marks(points, [_name(trial) for trial in search.trials], best_of_all, at_knee)
    across, up = (f"mean {task}, points" for task in tasks)
    plot = scatter_plot(title, dots, across, up, best_of_all)
    write_whole(search.out / "pareto.svg", picture([(title, plot)]))
    chosen = search.trials[at_knee]
    return f"{_table(search.trials, chosen)}\n\nmodel at the knee {search.keep(chosen)}"


def _table(trials: Sequence[Trial], chosen: Trial) -> str:
    tasks = list(trials[0].scores)
    rows = [f"| checkpoints and settings | {' | '.join(tasks)} | mean |", f"|---|{'---:|' * (len(tasks) + 1)}"]
    for trial in trials:
        scores = " | ".join(f"{100 * value:.2f}" for value in (*trial.scores.values(), trial.score))
        rows.append(f"| {_name(trial)}{' **(chosen)**' * (trial is chosen)} | {scores} |")
    return "\n".join(rows)


def _name(trial: Trial) -> str:
    return f"{', '.join('/'.join(Path(path).parts[-2:]) for path in trial.checkpoints)}: {trial.told()}"
