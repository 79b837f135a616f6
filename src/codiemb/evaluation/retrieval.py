"""Retrieval: exact search in blocks over all ranks, and trec_eval's measures through pytrec_eval."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytrec_eval
import torch
from jaxtyping import Float, Int
from torch import Tensor

from codiemb.config import Source
from codiemb.data.beir import MOST_GAIN, Qrels, present, read_corpus, read_qrels, read_queries
from codiemb.data.readers import beir_files, beir_qrels, is_beir
from codiemb.data.store import load_records
from codiemb.distributed import joined, rank
from codiemb.encoder.engine import encode_on_all_ranks, encode_share
from codiemb.evaluation.scores import Encoder, Evaluation, Scores, digest, progress, texts_of
from codiemb.suites.suite import DataSet

RETRIEVED = 1000  # documents kept of each ranking, as trec_eval and mteb do
QUERIES_AT_ONCE = 2048  # whose rankings are held
MOST_SCORES = 2**26  # of queries and documents, held at once
METRICS = ("ndcg_at_10", "mrr_at_10", "map", "recall_at_100")
SHOWN = 5  # documents of each ranking that are kept with the scores
SHOWN_CHARACTERS = 300
Run = dict[str, dict[str, float]]  # scores by query and document


@dataclass(frozen=True)
class Collection:
    """What a retrieval data set is evaluated on; texts by id."""

    documents: dict[str, str]
    queries: dict[str, str]
    instructions: dict[str, str]
    qrels: Qrels
    left_out: dict[str, int]

    def digest(self) -> str:
        return digest([self.documents, self.queries, self.instructions, self.qrels, self.left_out])


def load_collection(source: Source) -> Collection:
    """A BEIR folder, or records of any other format, whose corpus is then every text they list.

    Raises:
        DataError: as the readers; or nothing relevant is left.
    """
    if is_beir(Path(source.path)):
        corpus, queries_file = beir_files(Path(source.path))
        file = beir_qrels(source)
        qrels = read_qrels(file)
        documents: dict[str, str] = {}
        again = 0
        for key, text in read_corpus(corpus):
            again += key in documents
            documents[key] = text
        rows = [row for row in read_queries(queries_file) if row[0] in qrels]
        qrels, absent = present(qrels, {key for key, _, _ in rows}, set(documents), f"file {file}")
        qrels = {query: gains for query, gains in qrels.items() if any(gain > 0 for gain in gains.values())}
        queries = {key: text for key, text, _ in rows if key in qrels}
        instructions = {key: instruction for key, _, instruction in rows if key in qrels and instruction}
        left_out = dict(absent) | ({"document whose id stands on a later line again": again} if again else {})
        return Collection(documents, queries, instructions, qrels, left_out)
    records = load_records(source)
    documents, queries, instructions, qrels = {}, {}, {}, {}
    for place, row in enumerate(records.table):
        key = f"q{place}"
        queries[key] = row["query"]
        if row["instruction"]:
            instructions[key] = row["instruction"]
        graded = row["positive_scores"] and all(
            1 <= gain <= MOST_GAIN and gain == int(gain) for gain in row["positive_scores"]
        )
        gains = row["positive_scores"] if graded else [1.0] * len(row["positives"])  # else they are a teacher's scores
        qrels[key] = {str(number): gain for number, gain in zip(row["positive_ids"], gains, strict=True)}
        for number, text in zip(
            row["positive_ids"] + row["negative_ids"], row["positives"] + row["negatives"], strict=True
        ):
            documents[str(number)] = text
    return Collection(documents, queries, instructions, qrels, records.dropped)


def evaluate(encoder: Encoder, source: DataSet, collection: Collection, bf16: bool = False) -> Scores | None:
    """Every judged query of the split against the whole corpus, by exact search; None but on the first rank."""
    keys, documents = list(collection.queries), list(collection.documents)
    instructions = [collection.instructions.get(key) for key in keys]
    queries = texts_of(encoder, list(collection.queries.values()), "query", instructions)
    texts = texts_of(encoder, list(collection.documents.values()), "document")
    with progress(source.name, {*queries, *texts}) as bar:
        query_embeddings = encode_on_all_ranks(encoder, queries, bf16=bf16, progress=bar)
        document_embeddings, shares = encode_share(encoder, texts, bf16=bf16, progress=bar)
    numbers = torch.tensor(shares[rank()], dtype=torch.int64, device=document_embeddings.device)
    items: dict[str, list[Any]] = {}
    block = max(1, min(256, MOST_SCORES // max(map(len, shares))))
    for start in range(0, len(keys), QUERIES_AT_ONCE):
        part = slice(start, start + QUERIES_AT_ONCE)
        found, places = search(query_embeddings[part], document_embeddings, numbers, RETRIEVED, block)
        if rank() > 0:
            continue
        run = {
            key: {documents[place]: float(value) for place, value in zip(places[row], found[row], strict=True)}
            for row, key in enumerate(keys[part])
        }
        by_query = score(run, {key: collection.qrels[key] for key in run})
        queries_of_part = {key: collection.queries[key] for key in run}
        of_part = items_of(run, by_query, METRICS, queries_of_part, collection.qrels, collection.documents)
        for column, values in of_part.items():
            items.setdefault(column, []).extend(values)
    if rank() > 0:
        return None
    facts = {"documents": len(documents), "left_out": collection.left_out}
    return Scores({metric: float(np.mean(items[metric])) for metric in METRICS}, len(keys), items, facts)


def items_of(
    run: Run,
    by_query: dict[str, dict[str, float]],
    metrics: tuple[str, ...],
    queries: dict[str, str],
    qrels: Qrels,
    documents: dict[str, str],
) -> dict[str, list[Any]]:
    """Columns by query: its text, its metrics, and its first documents with score, gain and the head of their text."""
    keys = list(queries)
    return {
        "query_id": keys,
        "query": list(queries.values()),
        **{metric: [by_query[key][metric] for key in keys] for metric in metrics},
        "retrieved": [
            [
                {
                    "id": document,
                    "score": value,
                    "gain": float(qrels[key].get(document, 0)),
                    "text": documents[document][:SHOWN_CHARACTERS],
                }
                for document, value in first(run[key])
            ]
            for key in keys
        ],
    }


def first(found: dict[str, float]) -> list[tuple[str, float]]:
    """The best documents with their scores; equal scores by document id descending, as trec_eval does."""
    return heapq.nlargest(SHOWN, found.items(), key=lambda one: (one[1], one[0]))


def search(
    queries: Float[Tensor, "query dim"],
    documents: Float[Tensor, "document dim"],
    numbers: Int[Tensor, " document"],
    k: int,
    block: int = 256,
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` documents of highest dot product for each query: scores and numbers, [query, k], best first.

    Each rank brings all queries and its own documents, none included; the best of each are then put together, so that
    no rank holds the whole corpus and what is exchanged does not grow with it.

    Args:
        numbers: the number of each document in the whole corpus.
        block: queries whose scores are held at once, on all ranks as many.
    """
    scores, found = [], []
    for part in queries.split(block):
        own = (part @ documents.T).float().topk(min(k, len(documents)), dim=1)
        all_scores, all_numbers = _side_by_side(own.values), _side_by_side(numbers[own.indices])
        best = all_scores.topk(min(k, all_scores.shape[1]), dim=1)
        scores.append(best.values.cpu().numpy())
        found.append(all_numbers.gather(1, best.indices).cpu().numpy())
    return np.concatenate(scores), np.concatenate(found)


def _side_by_side(lists: Tensor) -> Tensor:
    """[query, entry] of all ranks, the entries of one rank after those of another."""
    return joined(lists.T.contiguous())[0].T


def score(run: Run, qrels: Qrels) -> dict[str, dict[str, float]]:
    """Measures by query id, as fractions.

    Gains are graded (nDCG with gain as given); a document counts as relevant for MRR, MAP and recall from gain 1 on.
    Equal scores are ordered by document id, as trec_eval does; MRR@10 looks at the first ten in that order.
    """
    whole = {query: {doc: int(gain) for doc, gain in gains.items()} for query, gains in qrels.items()}
    measured = pytrec_eval.RelevanceEvaluator(whole, {"ndcg_cut.10", "map", "recall.100", "recip_rank"}).evaluate(run)
    return {
        query: {
            "ndcg_at_10": values["ndcg_cut_10"],
            "mrr_at_10": values["recip_rank"] if values["recip_rank"] >= 0.1 - 1e-9 else 0.0,
            "map": values["map"],
            "recall_at_100": values["recall_100"],
        }
        for query, values in measured.items()
    }


RETRIEVAL = Evaluation(load_collection, evaluate)
