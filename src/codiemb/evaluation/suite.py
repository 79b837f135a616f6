"""A suite of data sets, evaluated in turn; `<dataset>.json` and its per-item scores are written for each.

Under torchrun every rank calls in, with the same arguments: texts are encoded and corpora searched on all of them. The
first rank computes the metrics and writes; all return them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from sentence_transformers import SentenceTransformer

from codiemb.config import ROLES, Source
from codiemb.distributed import from_first, on_first, rank
from codiemb.encoder.model import open_model
from codiemb.evaluation import cache
from codiemb.evaluation.classification import CLASSIFICATION
from codiemb.evaluation.clustering import CLUSTERING
from codiemb.evaluation.metrics import HEADLINE
from codiemb.evaluation.mteb_tasks import MTEB, require_data
from codiemb.evaluation.pair_classification import PAIR_CLASSIFICATION
from codiemb.evaluation.reranking import RERANKING
from codiemb.evaluation.retrieval import RETRIEVAL
from codiemb.evaluation.scores import Encoder, Evaluation, role_of
from codiemb.evaluation.similarity import SIMILARITY
from codiemb.suites.suite import DataSet
from codiemb.tasks import TASKS
from codiemb.versions import versions

logger = logging.getLogger(__name__)

EVALUATIONS: dict[str, Evaluation] = {
    "retrieval": RETRIEVAL,
    "similarity": SIMILARITY,
    "pair_classification": PAIR_CLASSIFICATION,
    "classification": CLASSIFICATION,
    "clustering": CLUSTERING,
    "reranking": RERANKING,
}
Results = dict[str, dict[str, float]]


def evaluate_suite(
    encoder: Encoder,
    suite: Sequence[Source],
    out: Path | None,
    *,
    bf16: bool = False,
    until: Callable[[], bool] = lambda: False,
) -> Results:
    """Metrics by data set; writes `<out>/<dataset>.json` and `<out>/<dataset>.items.parquet`.

    What was scored before, with equal model, data and settings, is taken from `codiemb.evaluation.cache`.

    Args:
        encoder: its prompts and lengths are used as they are.
        suite: the data sets, from `load_suite`.
        out: folder, made if missing; None: nothing is written.
        bf16: encode in bf16.
        until: asked before each data set, on all ranks; the rest is left out when it says true.

    Raises:
        DataError: a data set cannot be read.
        EvaluationError: the encoder gives no embeddings, or damaged ones.
    """
    hashed = on_first(lambda: cache.model_hash(encoder))
    results = {}
    for source in map(_data_set, suite):
        if until():
            break
        data = evaluation_of(source).load(source)
        settings = _settings(encoder, source, hashed, data.digest(), bf16)
        key = cache.key_of(settings) if hashed else None
        result = cache.find(key) if key and rank() == 0 else None
        known = from_first(result is not None)
        if not known:
            result = _score(encoder, source, data, settings, key)
        results[source.name] = from_first(result[0]["metrics"] if result else {})
        if result is not None:
            content, items = result
            note = "as scored before" if known else f"{content['seconds']:.0f} s"
            headline = HEADLINE[source.task]
            points = 100 * content["metrics"][headline]
            logger.info(f"{source.name:<20} {headline} {points:6.2f}   n {content['n']}, {note}")
            if out is not None:
                names = {"dataset": source.name, "task": source.task, "split": source.split}
                whole = {**names, **content, "items": f"{source.name}.items.parquet"}
                cache.write(out / source.name, whole, items, ".items.parquet")
    return results


def evaluation_of(source: DataSet) -> Evaluation:
    return MTEB if source.mteb else EVALUATIONS[source.task]


def require_readable(suite: Sequence[Source]) -> dict[str, str]:
    """Reads every data set once, so that a faulty one is told before anything is encoded or written.

    Returns:
        The digest of each by name; none of mteb's tasks.

    Raises:
        DataError: as the readers.
        EvaluationError: data of mteb's tasks are missing.
    """
    sources = [_data_set(source) for source in suite]
    own = [source for source in sources if not source.mteb]
    digests = {source.name: evaluation_of(source).load(source).digest() for source in own}
    require_data([source for source in sources if source.mteb])
    return digests


def average(results: Results, suite: Sequence[Source]) -> dict[str, float]:
    """Mean headline metric of each task over its data sets."""
    means = {}
    for task, headline in HEADLINE.items():
        values = [results[source.name][headline] for source in suite if source.task == task]
        if values:
            means[task] = float(np.mean(values))
    return means


def scores_of(folder: Path, suite: Sequence[Source]) -> dict[str, float]:
    """By task the mean headline metric of the model in a folder.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    return average(evaluate_suite(open_model(str(folder), dtype=torch.float32), suite, None), suite)


def _data_set(source: Source) -> DataSet:
    return source if isinstance(source, DataSet) else DataSet(**source.model_dump())


def _settings(encoder: Encoder, source: DataSet, model: str | None, data: str, bf16: bool) -> dict[str, Any]:
    """All that a result depends on."""
    roles = {role: role_of(encoder, role) for role in ROLES if role in TASKS[source.task].roles}
    return {
        "prompt": {role: before for role, (before, _) in roles.items()},
        "max_length": {role: length for role, (_, length) in roles.items()},
        "bf16": bf16,
        "device": encoder.device.type if isinstance(encoder, SentenceTransformer) else None,
        "versions": versions(),
        "task": source.task,
        "samples_per_label": source.samples_per_label,
        "model_hash": model,
        "data_hash": data,
    }


def _score(
    encoder: Encoder, source: DataSet, data: Any, settings: dict[str, Any], key: str | None
) -> tuple[dict[str, Any], pa.Table] | None:
    """The content of a data set's file, less its names, and the items; on the first rank, where the cache gets them."""
    started = time.perf_counter()
    scores = evaluation_of(source).evaluate(encoder, source, data, settings["bf16"])
    if scores is None:
        return None
    content = {
        "metrics": scores.metrics,
        "n": scores.n,
        **scores.facts,
        **{name: value for name, value in settings.items() if name not in ("task", "samples_per_label")},
        "seconds": round(time.perf_counter() - started, 2),
    }
    items = pa.table(scores.items)
    if key:
        cache.keep(key, content, items)
    return content, items
