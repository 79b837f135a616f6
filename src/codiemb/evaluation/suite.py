"""A suite of data sets, evaluated in turn; `<dataset>.json` and its per-item scores are written for each.

Under torchrun every rank calls in, with the same arguments: texts are encoded and corpora searched on all of them. The
first rank computes the metrics and writes; all return them.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from codiemb.config import ROLES, Source
from codiemb.data.store import load_records
from codiemb.distributed import from_first, rank, world_size
from codiemb.encoder.engine import encode_on_all_ranks, encode_share
from codiemb.encoder.model import instructed, max_length, open_model, prompt
from codiemb.encoder.tokens import Text
from codiemb.evaluation import retrieval, similarity
from codiemb.files import write_whole
from codiemb.versions import versions

logger = logging.getLogger(__name__)

HEADLINE = {"retrieval": "ndcg_at_10", "similarity": "spearman"}


@dataclass(frozen=True)
class Scores:
    """Scores of one data set: means (fractions) by metric, and by item in `items` (columns of equal length)."""

    metrics: dict[str, float]
    n: int
    items: dict[str, list[Any]]
    facts: dict[str, Any]


def evaluate_suite(
    encoder: SentenceTransformer, suite: list[Source], out: Path, *, bf16: bool = False
) -> dict[str, dict[str, float]]:
    """Metrics by data set; writes `<out>/<dataset>.json` and `<out>/<dataset>.items.parquet`.

    Args:
        encoder: any SentenceTransformer; its prompts and lengths are used as they are.
        suite: the data sets, from `load_suite`.
        out: folder, made if missing.
        bf16: encode in bf16.

    Raises:
        DataError: a data set cannot be read.
    """
    results = {}
    for source in suite:
        started = time.perf_counter()
        scores = EVALUATORS[source.task](encoder, source, bf16)
        if scores is not None:
            headline = HEADLINE[source.task]
            seconds = time.perf_counter() - started
            logger.info(
                f"{source.name:<20} {headline} {100 * scores.metrics[headline]:6.2f}   n {scores.n}, {seconds:.0f} s"
            )
            _write(encoder, source, scores, out, seconds, bf16)
        results[source.name] = from_first(scores.metrics if scores is not None else {})
    return results


def require_readable(suite: list[Source]) -> None:
    """Reads every data set once, so that a faulty one is told before anything is encoded or written.

    Raises:
        DataError: as the readers.
    """
    for source in suite:
        if source.task == "retrieval":
            retrieval.load_collection(source)
        else:
            load_records(source, keep_duplicates=True)


def evaluate_retrieval(encoder: SentenceTransformer, source: Source, bf16: bool = False) -> Scores | None:
    """Every judged query of the split against the whole corpus, by exact search; None but on the first rank."""
    collection = retrieval.load_collection(source)
    keys, documents = list(collection.queries), list(collection.documents)
    queries = [
        Text(
            collection.queries[key],
            instructed(collection.instructions[key]) if key in collection.instructions else prompt(encoder, "query"),
            max_length(encoder, "query"),
        )
        for key in keys
    ]
    document_texts = [
        Text(text, prompt(encoder, "document"), max_length(encoder, "document"))
        for text in collection.documents.values()
    ]
    with _progress(source.name, {*queries, *document_texts}) as bar:
        query_embeddings = encode_on_all_ranks(encoder, queries, bf16=bf16, progress=bar)
        document_embeddings, shares = encode_share(encoder, document_texts, bf16=bf16, progress=bar)
    numbers = torch.tensor(shares[rank()], dtype=torch.int64, device=document_embeddings.device)
    found, places = retrieval.search(query_embeddings, document_embeddings, numbers, retrieval.RETRIEVED)
    if rank() > 0:
        return None
    run = {
        key: {documents[place]: float(value) for place, value in zip(places[row], found[row], strict=True)}
        for row, key in enumerate(keys)
    }
    by_query = retrieval.score(run, collection.qrels)
    items: dict[str, list[Any]] = {"query_id": keys}
    items |= {metric: [by_query[key][metric] for key in keys] for metric in retrieval.METRICS}
    metrics = {metric: float(np.mean(items[metric])) for metric in retrieval.METRICS}
    return Scores(metrics, len(keys), items, {"documents": len(documents), "left_out": collection.left_out})


def evaluate_similarity(encoder: SentenceTransformer, source: Source, bf16: bool = False) -> Scores | None:
    """Every pair of the file, as it stands; None but on the first rank."""
    records = load_records(source, keep_duplicates=True)
    columns = records.table[:]
    sides = []
    for texts in (columns["query"], [positives[0] for positives in columns["positives"]]):
        for text, instruction in zip(texts, columns["instruction"], strict=True):
            before = instructed(instruction) if instruction else prompt(encoder, "similarity")
            sides.append(Text(text, before, max_length(encoder, "similarity")))
    with _progress(source.name, set(sides)) as bar:
        embeddings = encode_on_all_ranks(encoder, sides, bf16=bf16, progress=bar)
    if rank() > 0:
        return None
    half = len(records)
    cosines = (embeddings[:half] * embeddings[half:]).sum(dim=1).cpu().numpy().astype(float)
    labels = np.array([scores[0] for scores in columns["positive_scores"]])
    items = {"pair": list(range(half)), "cosine": cosines.tolist(), "label": labels.tolist()}
    return Scores(similarity.score(cosines, labels), half, items, {"left_out": records.dropped})


EVALUATORS: dict[str, Callable[[SentenceTransformer, Source, bool], Scores | None]] = {
    "retrieval": evaluate_retrieval,
    "similarity": evaluate_similarity,
}


def average(results: dict[str, dict[str, float]], suite: list[Source]) -> dict[str, float]:
    """Mean headline metric of each task over its data sets."""
    means = {}
    for task, headline in HEADLINE.items():
        values = [results[source.name][headline] for source in suite if source.task == task]
        if values:
            means[task] = float(np.mean(values))
    return means


def scores_of(folder: Path, suite: list[Source]) -> dict[str, float]:
    """By task the mean headline metric of the model in a folder.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    with tempfile.TemporaryDirectory() as out:
        return average(evaluate_suite(open_model(str(folder), dtype=torch.float32), suite, Path(out)), suite)


def _progress(name: str, texts: set[Text]) -> tqdm:
    """Of the first rank's share."""
    own = -(-len(texts) // world_size())
    return tqdm(total=own, desc=f"encode {name}", unit="text", leave=False, disable=rank() > 0)


def _write(encoder: SentenceTransformer, source: Source, scores: Scores, out: Path, seconds: float, bf16: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    roles = ("query", "document") if source.task == "retrieval" else ("similarity",)
    content = {
        "dataset": source.name,
        "task": source.task,
        "split": source.split,
        "metrics": scores.metrics,
        "n": scores.n,
        **scores.facts,
        "items": f"{source.name}.items.parquet",
        "prompt": {role: prompt(encoder, role) for role in ROLES if role in roles},
        "max_length": {role: max_length(encoder, role) for role in ROLES if role in roles},
        "bf16": bf16,
        "seconds": round(seconds, 2),
        "versions": versions(),
    }
    items, result = out / content["items"], out / f"{source.name}.json"
    pq.write_table(pa.table(scores.items), f"{items}.partial")
    os.replace(f"{items}.partial", items)
    write_whole(result, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
