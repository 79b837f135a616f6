"""What a batch of each task is trained on: one table from task to objective, weights by part.

An objective takes the embeddings of a whole batch and returns its parts by name, unweighted, and their weighted sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from codiemb.losses.retrieval import count_candidates, info_nce
from codiemb.losses.similarity import mid_nce, pearson, pro, rank_kl


@dataclass(frozen=True)
class RetrievalEmbeddings:
    """A retrieval batch; fields as in `info_nce`, embeddings not yet normalised."""

    queries: Float[Tensor, "query dim"]
    documents: Float[Tensor, "document dim"]
    owner: Int[Tensor, " document"]
    positive: Bool[Tensor, " document"]
    slot: Int[Tensor, " document"]
    document_ids: Int[Tensor, " document"]
    relevant: Int[Tensor, "pair 2"]


@dataclass(frozen=True)
class SimilarityEmbeddings:
    """A batch of graded pairs, embeddings not yet normalised; the middle layer only where it is asked for."""

    left: Float[Tensor, "pair dim"]
    right: Float[Tensor, "pair dim"]
    target: Float[Tensor, " pair"]
    left_ids: Int[Tensor, " pair"]
    right_ids: Int[Tensor, " pair"]
    left_middle: Float[Tensor, "pair hidden"] | None = None
    right_middle: Float[Tensor, "pair hidden"] | None = None


@dataclass(frozen=True)
class Objective:
    """The loss of a batch, its parts, and what it was computed over.

    Attributes:
        loss: weighted sum of the parts.
        parts: unweighted, by name.
        candidates: documents in the denominator of a contrastive term, on average; None without one.
    """

    loss: Float[Tensor, ""]
    parts: dict[str, Float[Tensor, ""]]
    candidates: Float[Tensor, ""] | None = None


def retrieval(batch: RetrievalEmbeddings, settings: Mapping[str, Any]) -> Objective:
    """InfoNCE; settings: weight, temperature, candidates."""
    listed: dict[str, Any] = {
        "owner": batch.owner,
        "positive": batch.positive,
        "slot": batch.slot,
        "document_ids": batch.document_ids,
        "relevant": batch.relevant,
        "candidates": settings["candidates"],
    }
    loss = info_nce(_unit(batch.queries), _unit(batch.documents), temperature=settings["temperature"], **listed)
    return Objective(settings["weight"] * loss, {"info_nce": loss}, count_candidates(len(batch.queries), **listed))


def similarity(batch: SimilarityEmbeddings, settings: Mapping[str, Any]) -> Objective:
    """Pearson, RankKL, PRO and MidNCE; a part of weight 0 is not computed."""
    cosine = (_unit(batch.left) * _unit(batch.right)).sum(dim=-1)
    t = settings["temperature"]
    compute: dict[str, Callable[[], Tensor]] = {
        "pearson": lambda: pearson(cosine, batch.target),
        "rank_kl": lambda: rank_kl(cosine, batch.target, temperature=t, reduction=settings["reduction"]),
        "pro": lambda: pro(cosine, batch.target, temperature=t),
        "mid_nce": lambda: _mid_nce(batch, settings),
    }
    parts = {name: part() for name, part in compute.items() if settings[name]}
    total = torch.stack([settings[name] * value for name, value in parts.items()]).sum()
    return Objective(settings["weight"] * total, parts)


OBJECTIVES: dict[str, Callable[[Any, Mapping[str, Any]], Objective]] = {
    "retrieval": retrieval,
    "similarity": similarity,
}


def _mid_nce(batch: SimilarityEmbeddings, settings: Mapping[str, Any]) -> Tensor:
    assert batch.left_middle is not None
    assert batch.right_middle is not None
    return mid_nce(
        _unit(batch.left_middle),
        _unit(batch.right_middle),
        batch.target,
        left_ids=batch.left_ids,
        right_ids=batch.right_ids,
        threshold=settings["mid_nce_threshold"],
        temperature=settings["mid_nce_temperature"],
    )


def _unit(embeddings: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embeddings, dim=-1)
