"""Reranking: each query's own list of documents, put in order by cosine; trec_eval's measures of that order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from codiemb.data.beir import MOST_GAIN, Qrels
from codiemb.data.store import load_records
from codiemb.distributed import rank
from codiemb.errors import DataError
from codiemb.evaluation.retrieval import items_of, score
from codiemb.evaluation.scores import Encoder, Evaluation, Scores, digest, embed_all, texts_of
from codiemb.suites.suite import DataSet

METRICS = ("map", "mrr_at_10", "ndcg_at_10")


@dataclass(frozen=True)
class Lists:
    """Queries by id, and the documents of each with their gains; documents by id."""

    queries: dict[str, str]
    instructions: list[str | None]
    documents: dict[str, str]
    qrels: Qrels
    left_out: dict[str, int]

    def digest(self) -> str:
        return digest([self.queries, self.instructions, self.documents, self.qrels, self.left_out])


def load(source: DataSet) -> Lists:
    """
    Raises:
        DataError: as the readers; or no query that has both a relevant document and another.
    """
    records = load_records(source, keep_duplicates=True)
    lists = Lists({}, [], {}, {}, dict(records.dropped))
    one_kind = 0
    for place, row in enumerate(records.table):
        gains = _gains(row)
        if not 0 < sum(gain > 0 for gain in gains.values()) < len(gains):
            one_kind += 1  # every order of it is as good
            continue
        lists.queries[f"q{place}"] = row["query"]
        lists.instructions.append(row["instruction"])
        lists.qrels[f"q{place}"] = gains
        for side in ("positive", "negative"):
            ids = map(str, row[f"{side}_ids"])
            lists.documents.update(zip(ids, row[f"{side}s"], strict=True))
    if one_kind:
        lists.left_out["only relevant documents, or none"] = one_kind
    if not lists.queries:
        raise DataError(
            f"source {source.name!r}, {source.path}",
            got=f"no list of {one_kind} with a relevant document and another",
            expected="positives and negatives",
        )
    return lists


def _gains(row: dict) -> dict[str, float]:
    """Graded where both sides have scores and all are whole numbers, else 1 for positives and 0 for negatives."""
    positives = row["positive_scores"]
    negatives = row["negative_scores"] or [0.0] * len(row["negatives"])
    if not positives or any(abs(gain) > MOST_GAIN or gain != int(gain) for gain in (*positives, *negatives)):
        positives, negatives = [1.0] * len(row["positives"]), [0.0] * len(row["negatives"])
    ids = map(str, (*row["positive_ids"], *row["negative_ids"]))
    return dict(zip(ids, (*positives, *negatives), strict=True))


def evaluate(encoder: Encoder, source: DataSet, lists: Lists, bf16: bool = False) -> Scores | None:
    """Every list that has a relevant document and another; None but on the first rank."""
    texts = [
        *texts_of(encoder, list(lists.queries.values()), "query", lists.instructions),
        *texts_of(encoder, list(lists.documents.values()), "document"),
    ]
    embeddings = embed_all(encoder, source.name, texts, bf16).cpu()
    if rank() > 0:
        return None
    queries, documents = embeddings[: len(lists.queries)], embeddings[len(lists.queries) :]
    place = {document: number for number, document in enumerate(lists.documents)}
    run = {}
    for row, (key, gains) in enumerate(lists.qrels.items()):
        cosines = documents[[place[document] for document in gains]] @ queries[row]
        run[key] = dict(zip(gains, cosines.tolist(), strict=True))
    by_query = score(run, lists.qrels)
    items = items_of(run, by_query, METRICS, lists.queries, lists.qrels, lists.documents)
    facts = {"documents": len(lists.documents), "left_out": lists.left_out}
    return Scores({metric: float(np.mean(items[metric])) for metric in METRICS}, len(run), items, facts)


RERANKING = Evaluation(load, evaluate)
