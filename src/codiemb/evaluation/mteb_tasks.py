"""Tasks of mteb by name: what they are to us, and whether their data are at hand. mteb is imported on first use."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from codiemb.errors import ConfigError, EvaluationError
from codiemb.evaluation.scores import Encoder, Evaluation, Scores
from codiemb.settings_file import nearest
from codiemb.suites.suite import DataSet

TYPES = {
    "Retrieval": "retrieval",
    "STS": "similarity",
    "PairClassification": "pair_classification",
    "Classification": "classification",
    "Clustering": "clustering",
    "Reranking": "reranking",
}


@dataclass(frozen=True)
class MtebTask:
    """A task of mteb. Its data are those of a revision, so their content is not read to tell whether they changed."""

    name: str
    path: str
    revision: str
    splits: list[str]
    subsets: list[str]
    version: str

    def digest(self) -> str:
        return json.dumps(asdict(self))


@contextlib.contextmanager
def seeds_kept() -> Iterator[None]:
    """Inside, mteb sets the seeds of the whole process, as it does; a training around it goes on with its own."""
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


@seeds_kept()
def task_of(name: str, subsets: list[str] | None, where: str) -> str:
    """The task, in our words, of a task of mteb.

    Raises:
        ConfigError: mteb is not installed, has no such task, or one of a type that we have no word for.
    """
    kind = _get(name, subsets, where).metadata.type
    if kind not in TYPES:
        raise ConfigError(
            f"{where}, mteb: {name}", got=f"a task of type {kind}", expected=f"one of type {', '.join(TYPES)}"
        )
    return TYPES[kind]


@seeds_kept()
def load(source: DataSet) -> MtebTask:
    from importlib.metadata import version

    task = open_task(source)
    data = task.metadata.dataset
    splits, subsets = list(task.eval_splits), list(task.hf_subsets)
    return MtebTask(task.metadata.name, data["path"], data["revision"], splits, subsets, version("mteb"))


@seeds_kept()
def evaluate(encoder: Encoder, source: DataSet, data: MtebTask, bf16: bool = False) -> Scores | None:
    """What mteb finds, under our names; None but on the first rank."""
    from codiemb.evaluation.mteb_run import run

    return run(encoder, source, data, bf16)


def open_task(source: DataSet) -> Any:
    """mteb's object, without its data.

    Raises:
        ConfigError: no such subset.
    """
    assert source.mteb is not None
    return _get(source.mteb, source.subsets, f"data set {source.name!r}")


def _get(name: str, subsets: list[str] | None, where: str) -> Any:
    try:
        import mteb
    except ImportError:
        raise ConfigError(
            f"{where}, mteb: {name}",
            got="no package mteb",
            expected="the extra mteb",
            fix="pip install 'codiemb[mteb]'",
        ) from None
    from mteb.get_tasks import get_tasks

    try:
        task = mteb.get_task(name)
    except KeyError:
        known = {task.metadata.name for task in get_tasks(exclude_superseded=False)}
        raise ConfigError(
            f"{where}, mteb: {name}", got="an unknown task", expected=f"a task of mteb{nearest(name, known)}"
        ) from None
    if unknown := sorted(set(subsets or ()) - set(task.hf_subsets)):
        raise ConfigError(
            f"{where}, subsets", got=repr(unknown[0]), expected=f"one of {', '.join(map(str, task.hf_subsets))}"
        )
    return mteb.get_task(name, hf_subsets=subsets) if subsets else task


@seeds_kept()
def require_data(sources: Sequence[DataSet]) -> None:
    """Loads the data of every task once, from the Hugging Face cache or hub, and lets go of them again.

    Raises:
        EvaluationError: naming every data set that is missing.
    """
    missing, reason = [], ""
    with contextlib.ExitStack() as stack:
        for source in sources:
            task = open_task(source)
            try:
                task.load_data()
                task.unload_data()
            except Exception as error:  # the hub, its cache and the tasks' own loaders raise many kinds
                missing.append(f"{task.metadata.name} ({task.metadata.dataset['path']})")
                reason = reason or (str(error).strip().splitlines() or [type(error).__name__])[0]
                if isinstance(error, ConnectionError):
                    stack.enter_context(_cache_only())
    if missing:
        raise EvaluationError(
            f"data of {', '.join(missing)}",
            got=f"nothing in the Hugging Face cache, and none from the hub ({reason[:200]})",
            expected="the data of every mteb task",
            fix="run it once where the hub can be reached, then copy its cache (HF_HOME) here",
        )


@contextlib.contextmanager
def _cache_only() -> Iterator[None]:
    """Inside, nothing is asked of the hub: to wait for it anew for every data set takes half a minute each."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


MTEB = Evaluation(load, evaluate)
