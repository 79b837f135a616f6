r"""Multi-positive InfoNCE for retrieval (CoDiEmb, arXiv 2508.11442; InfoNCE: van den Oord et al., 2018).

Query i has positives P_i; s(i, d) is the dot product of normalised embeddings, t the temperature. Each positive is one
term, and the query's other positives are not in its denominator:

    L = mean_i mean_{p in P_i}  -log( e^{s(i,p)/t} / ( e^{s(i,p)/t} + sum_{d in C(i,p)} e^{s(i,d)/t} ) )

C(i, p), `all`: every document that is not relevant to i. `same_slot`: of the positives of other queries only those in
p's slot, and every hard negative. A document is relevant to i if its id is the id of one of i's positives, or is known
to be relevant from elsewhere (`relevant`). Counts are ragged: whatever is not there is not in the sum.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def info_nce(
    queries: Float[Tensor, "query dim"],
    documents: Float[Tensor, "document dim"],
    *,
    owner: Int[Tensor, " document"],
    positive: Bool[Tensor, " document"],
    document_ids: Int[Tensor, " document"] | None = None,
    slot: Int[Tensor, " document"] | None = None,
    relevant: Int[Tensor, "pair 2"] | None = None,
    temperature: float = 0.02,
    candidates: Literal["all", "same_slot"] = "all",
    chunk_size: int | None = None,
) -> Float[Tensor, ""]:
    """Mean over queries of the mean over their positives of the cross-entropy against the candidates; at least 0.

    Args:
        queries: normalised embeddings.
        documents: normalised embeddings of everything listed by any query; a document listed twice stands twice.
        owner: the query row that listed the document, -1 if a query of another rank did.
        positive: whether the document was listed as a positive (else as a hard negative).
        document_ids: equal ids mean equal texts; without them no two documents are taken for equal.
        slot: place among its query's positives, -1 for negatives; needed for `same_slot`.
        relevant: further known pairs (query row, document id), such as positives that were not drawn into the batch.
        temperature: above 0.
        candidates: which documents stand in the denominator, see the head of this module.
        chunk_size: hold at most this many columns of logits at once, and compute them again in the backward pass;
            the value and the gradients are the same.

    Returns:
        A scalar, float32 (float64 for float64 inputs). A query without positives counts for nothing; with no positive
        at all the loss is 0, connected to the graph.

    Raises:
        ValueError: `same_slot` without slots, `relevant` without ids, a temperature not above 0, or another shape.
    """
    if temperature <= 0:
        raise ValueError(f"temperature: got {temperature}, expected a number above 0")
    for name, value in (("owner", owner), ("positive", positive), ("document_ids", document_ids), ("slot", slot)):
        if value is not None and value.shape != documents.shape[:1]:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {tuple(documents.shape[:1])}")
    if candidates == "same_slot" and slot is None:
        raise ValueError("slot: got none, expected one for each document because candidates='same_slot'")
    if relevant is not None and document_ids is None:
        raise ValueError("document_ids: got none, expected one for each document because `relevant` names ids")
    queries, documents = _upcast(queries), _upcast(documents)

    term = (positive & (owner >= 0)).nonzero().flatten()  # one term for each positive of a query here
    row = owner[term]
    if not len(term):
        return (queries.sum() + documents.sum()) * 0
    target = (queries[row] * documents[term]).sum(dim=-1) / temperature
    is_relevant = _relevance(len(queries), owner, positive, document_ids, relevant)

    # The denominator's sum depends on the query alone (`all`), or on query and slot (`same_slot`): one row for each.
    if candidates == "all":
        anchors, candidate = queries, ~is_relevant
    else:
        assert slot is not None
        anchors, candidate = queries[row], ~is_relevant[row] & (~positive | (slot == slot[term][:, None]))
    if chunk_size is None:
        others = _log_sum(anchors, documents, candidate, temperature)
    else:
        others = anchors.new_full((len(anchors),), -torch.inf)
        for columns in torch.arange(len(documents), device=documents.device).split(chunk_size):
            part = checkpoint(
                _log_sum, anchors, documents[columns], candidate[:, columns], temperature, use_reentrant=False
            )
            others = torch.logaddexp(others, part)
    if candidates == "all":
        others = others[row]

    losses = torch.logaddexp(target, others) - target
    terms_of_query = torch.bincount(row, minlength=len(queries))
    return (losses / terms_of_query[row]).sum() / (terms_of_query > 0).sum()


def count_candidates(
    queries: int,
    *,
    owner: Int[Tensor, " document"],
    positive: Bool[Tensor, " document"],
    document_ids: Int[Tensor, " document"] | None = None,
    slot: Int[Tensor, " document"] | None = None,
    relevant: Int[Tensor, "pair 2"] | None = None,
    candidates: Literal["all", "same_slot"] = "all",
) -> Float[Tensor, ""]:
    """Documents in the denominator of a term, its positive aside, on average over the terms."""
    term = (positive & (owner >= 0)).nonzero().flatten()
    candidate = ~_relevance(queries, owner, positive, document_ids, relevant)[owner[term]]
    if candidates == "same_slot" and slot is not None:
        candidate &= ~positive | (slot == slot[term][:, None])
    return candidate.sum(dim=1).float().mean()


def _relevance(
    queries: int, owner: Tensor, positive: Tensor, document_ids: Tensor | None, relevant: Tensor | None
) -> Bool[Tensor, "query document"]:
    """Which documents may not stand in the denominator of which query."""
    mine = positive & (owner == torch.arange(queries, device=owner.device)[:, None])
    if document_ids is None:
        return mine
    listed = mine.nonzero()
    pairs = torch.stack([listed[:, 0], document_ids[listed[:, 1]]], dim=1)
    if relevant is not None:
        pairs = torch.cat([pairs, relevant])
    same_text = pairs[:, 1, None] == document_ids  # [pair, document]
    return torch.zeros_like(mine, dtype=torch.int32).index_add_(0, pairs[:, 0], same_text.int()) > 0


def _log_sum(anchors: Tensor, documents: Tensor, candidate: Tensor, temperature: float) -> Float[Tensor, " anchor"]:
    """log sum over the candidates of e^{s/t}; -inf, without gradient, for a row that has none."""
    none = ~candidate.any(dim=1)
    logits = (anchors @ documents.T / temperature).masked_fill(~candidate, -torch.inf)
    return logits.masked_fill(none[:, None], 0).logsumexp(dim=1).masked_fill(none, -torch.inf)


def _upcast(embeddings: Tensor) -> Tensor:
    return embeddings if embeddings.dtype == torch.float64 else embeddings.float()
