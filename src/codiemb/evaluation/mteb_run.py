"""A task of mteb, run by mteb with our encoder: its prompts, lengths and micro-batches.

mteb runs on the first rank, which hands the texts of each call to the others; all encode their share.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import mteb
import numpy as np
import torch
from mteb.models.model_meta import ModelMeta
from mteb.models.search_wrappers import SearchEncoderWrapper

from codiemb.distributed import from_first, rank
from codiemb.evaluation import reranking, retrieval
from codiemb.evaluation.mteb_tasks import MtebTask, open_task
from codiemb.evaluation.scores import Encoder, Scores, embed_all, texts_of
from codiemb.section import Role
from codiemb.suites.suite import DataSet

_NAMES = {  # our metric: mteb's, by task
    "retrieval": {
        "ndcg_at_10": "ndcg_at_10",
        "mrr_at_10": "mrr_at_10",
        "map": "map_at_1000",
        "recall_at_100": "recall_at_100",
    },
    "similarity": {"spearman": "cosine_spearman", "pearson": "cosine_pearson"},
    "pair_classification": {
        name: name for name in ("max_ap", "max_accuracy", "max_f1", "cosine_ap", "cosine_accuracy", "cosine_f1")
    },
    "classification": {"accuracy": "accuracy", "f1": "f1"},
    "clustering": {"v_measure": "v_measure"},
    "reranking": {"map": "map_at_1000", "mrr_at_10": "mrr_at_10", "ndcg_at_10": "ndcg_at_10"},
}
_BATCH = 1024  # texts that mteb hands over at once; the encoder cuts its own micro-batches


class MtebModel:
    """The encoder as mteb wants it: texts in, embeddings out, the role from what mteb says of the texts."""

    def __init__(self, encoder: Encoder, name: str, bf16: bool) -> None:
        self.encoder, self.name, self.bf16 = encoder, name, bf16
        self.mteb_model_meta = ModelMeta.create_empty()

    def encode(self, inputs: Any, *, prompt_type: Any = None, **_: Any) -> np.ndarray:
        role: Role = prompt_type.value if prompt_type is not None else "similarity"
        texts = [text for batch in inputs for text in batch["text"]]
        return self.embed(*from_first((texts, role))).cpu().numpy()

    def embed(self, texts: list[str], role: Role) -> torch.Tensor:
        return embed_all(self.encoder, self.name, texts_of(self.encoder, texts, role), self.bf16, normalize=False)

    def help_first(self) -> None:
        """On another rank: encodes its share of all that the first is asked for."""
        while (call := from_first(None)) is not None:
            self.embed(*call)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        return _normal(embeddings1) @ _normal(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        return (_normal(embeddings1) * _normal(embeddings2)).sum(dim=-1)


class MtebSearch(SearchEncoderWrapper):
    """mteb's own search; what it finds is kept for the scores of single queries."""

    def __init__(self, model: MtebModel) -> None:
        super().__init__(model)
        self.found: dict[tuple[str, str], retrieval.Run] = {}

    def search(self, *args: Any, hf_split: str, hf_subset: str, **settings: Any) -> Any:
        run = super().search(*args, hf_split=hf_split, hf_subset=hf_subset, **settings)
        self.found[hf_subset, hf_split] = run  # mteb takes a query's own document out of it, where a task says so
        return run


def run(encoder: Encoder, source: DataSet, data: MtebTask, bf16: bool) -> Scores | None:
    """The task's scores: means over its splits and subsets; None but on the first rank."""
    model: Any = MtebModel(encoder, source.name, bf16)
    if rank() > 0:
        model.help_first()
        return None
    task = open_task(source)
    task.load_data()
    searched = source.task in ("retrieval", "reranking")
    encoding: Any = {"batch_size": _BATCH, "show_progress_bar": False}
    model = MtebSearch(model) if searched else model
    with tempfile.TemporaryDirectory() as folder:
        result = mteb.evaluate(
            model,
            task,
            cache=None,
            co2_tracker=False,
            show_progress_bar=False,
            encode_kwargs=encoding,
            prediction_folder=None if searched else folder,
        )
        from_first(None)
        by_part = [scores for split in result.task_results[0].scores.values() for scores in split]
        if searched:
            items = _queries(task, model.found, retrieval.METRICS if source.task == "retrieval" else reranking.METRICS)
        elif source.task in ("similarity", "pair_classification"):
            file = Path(folder) / task.prediction_file_name
            items = _pairs(task, json.loads(file.read_text(encoding="utf-8")))
        else:
            items = _experiments(by_part)
    n = len(items["query_id"]) if searched else sum(len(part) for _, _, part in _parts(task))
    metrics = {
        ours: float(np.mean([scores[theirs] for scores in by_part])) for ours, theirs in _NAMES[source.task].items()
    }
    return Scores(metrics, n, items, {"mteb": asdict(data)})


def _parts(task: Any) -> Iterator[tuple[str, str, Any]]:
    """(subset, split, data) of all that was evaluated."""
    for subset in task.hf_subsets:
        by_split = task.dataset.get(subset, task.dataset)
        for split in task.eval_splits:
            part = by_split[split]
            # Older data sets of pairs are one row of long lists.
            yield subset, split, datasets.Dataset.from_dict(part[0]) if len(part) == 1 else part


def _queries(task: Any, found: dict[tuple[str, str], retrieval.Run], metrics: tuple[str, ...]) -> dict[str, list[Any]]:
    """As the items of our own retrieval; query ids bear subset and split where there are several."""
    columns: dict[str, list[Any]] = {}
    for (subset, split), run in found.items():
        part = task.dataset[subset][split]
        qrels = {key: part["relevant_docs"][key] for key in run}
        texts = dict(zip(part["queries"]["id"], part["queries"]["text"], strict=True))
        shown = {document for hits in run.values() for document, _ in retrieval.first(hits)}
        documents = {
            row["id"]: f"{row.get('title') or ''} {row['text']}".strip() for row in part["corpus"] if row["id"] in shown
        }
        queries = {key: texts[key] for key in run}
        items = retrieval.items_of(run, retrieval.score(run, qrels), metrics, queries, qrels, documents)
        if len(found) > 1:
            items["query_id"] = [f"{subset}/{split}/{key}" for key in items["query_id"]]
        for name, values in items.items():
            columns.setdefault(name, []).extend(values)
    return columns


def _pairs(task: Any, predicted: dict[str, Any]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {"text1": [], "text2": [], "cosine": [], "label": []}
    for subset, split, part in _parts(task):
        if task.metadata.type == "STS":
            names = (*task.column_names, "score")
        else:
            names = (task.input1_column_name, task.input2_column_name, task.label_column_name)
        for column, name in zip(("text1", "text2", "label"), names, strict=True):
            columns[column] += list(part[name])
        columns["cosine"] += predicted[subset][split]["cosine_scores"]
    columns["label"] = [float(label) for label in columns["label"]]
    return {"pair": list(range(len(columns["cosine"]))), **columns}


def _experiments(by_part: list[Any]) -> dict[str, list[Any]]:
    """Classification and clustering: a row for each experiment of each part."""
    rows: dict[str, list[Any]] = {}
    for scores in by_part:
        if "scores_per_experiment" in scores:
            for one in scores["scores_per_experiment"]:
                rows.setdefault("accuracy", []).append(one["accuracy"])
        else:
            found = scores["v_measures"]  # a list, or by level of the labels
            levels = found.values() if isinstance(found, dict) else [found]
            rows.setdefault("v_measure", []).extend(value for level in levels for value in level)
    return {"experiment": list(range(len(next(iter(rows.values()))))), **rows}


def _normal(embeddings: Any) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.as_tensor(embeddings).float(), dim=-1)
