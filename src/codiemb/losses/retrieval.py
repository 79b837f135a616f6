r"""Losses for retrieval: multi-positive InfoNCE (CoDiEmb, arXiv 2508.11442; van den Oord et al., 2018), and triplets.

Query i has positives P_i; s(i, d) is the dot product of normalised embeddings, t the temperature. Each positive is one
term, and the query's other positives are not in its denominator:

    L = mean_i mean_{p in P_i}  -log( e^{s(i,p)/t} / ( e^{s(i,p)/t} + sum_{d in C(i,p)} e^{s(i,d)/t} ) )

C(i, p), `all`: every document that is not relevant to i. `same_slot`: of the positives of other queries only those in
p's slot, and every hard negative. A document is relevant to i if its id is the id of one of i's positives, or is known
to be relevant from elsewhere (`relevant`). Counts are ragged: whatever is not there is not in the sum.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from codiemb.losses.graded import check_temperature
from codiemb.losses.tiles import Contrast, blocks, contrast, products, upcast


class Groups(NamedTuple):
    """Which group each query and each document belongs to."""

    queries: Int[Tensor, " query"]
    documents: Int[Tensor, " document"]


def info_nce(
    queries: Float[Tensor, "query dim"],
    documents: Float[Tensor, "document dim"],
    *,
    owner: Int[Tensor, " document"],
    positive: Bool[Tensor, " document"],
    document_ids: Int[Tensor, " document"] | None = None,
    slot: Int[Tensor, " document"] | None = None,
    relevant: Int[Tensor, "pair 2"] | None = None,
    groups: Groups | None = None,
    temperature: float = 0.02,
    candidates: Literal["all", "same_slot"] = "all",
    hardness: float = 0.0,
    false_negative_margin: float | None = None,
    symmetric: bool = False,
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
        groups: where given, only documents of the query's own group are its candidates.
        temperature: above 0.
        candidates: which documents stand in the denominator, see the head of this module.
        hardness: weighs a candidate by e^(hardness * s), without gradient, so that those close to the query count for
            more (hardness weighting of LLaVE, Lan et al., 2025); 0 or above.
        false_negative_margin: leaves out candidates that score above the term's positive minus this margin: they are
            likely unlabelled positives (as `absolute_margin` of sentence-transformers' mining, in the batch).
        symmetric: also let each positive tell its query from the other queries given, and average both directions;
            a query to which the document is relevant is left out.
        chunk_size: hold at most this many columns of scores at once, and compute them again in the backward pass; the
            value and the gradients are the same (`codiemb.losses.tiles`).

    Returns:
        A scalar, float32 (float64 for float64 inputs). A query without positives counts for nothing; with no positive
        at all the loss is 0, connected to the graph.

    Raises:
        ValueError: `same_slot` without slots, `relevant` without ids, a number out of range, or another shape.
    """
    _check(documents, owner=owner, positive=positive, document_ids=document_ids, slot=slot)
    check_temperature(temperature)
    if hardness < 0:
        raise ValueError(f"hardness: got {hardness}, expected 0 or above")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, expected at least 1, or None")
    if candidates not in ("all", "same_slot"):
        raise ValueError(f"candidates: got {candidates!r}, expected 'all' or 'same_slot'")
    if candidates == "same_slot" and slot is None:
        raise ValueError("slot: got none, expected one for each document because candidates='same_slot'")
    if relevant is not None and document_ids is None:
        raise ValueError("document_ids: got none, expected one for each document because `relevant` names ids")

    term = _terms(owner, positive)
    if not len(term):
        return (upcast(queries).sum() + upcast(documents).sum()) * 0
    row = owner[term]
    ids = torch.arange(len(documents), device=owner.device) if document_ids is None else document_ids
    known = _known(row, ids[term], relevant)
    asking = _asking(row)

    # The denominator's sum depends on the query alone, unless slots or a margin tell its positives apart.
    once = candidates == "all" and false_negative_margin is None
    anchors = queries[asking] if once else queries[row]
    anchor = row - asking.start if once else torch.arange(len(term), device=row.device)

    def candidate(columns: slice) -> Tensor:
        excluded = _relevance(known, asking, ids[columns]) | _strangers(groups, asking, columns)
        if not once:
            excluded = excluded[row - asking.start]
        if candidates == "same_slot":
            assert slot is not None
            excluded |= positive[columns] & (slot[columns] != slot[term][:, None])
        return ~excluded

    ceiling = None
    if false_negative_margin is not None:
        own = (upcast(anchors.detach()) * upcast(documents.detach()[term])).sum(dim=-1)
        ceiling = own - false_negative_margin
    terms = Contrast(candidate, temperature, hardness, ceiling)
    target, others = contrast(anchors, documents, anchor, term, terms, chunk_size)
    losses = torch.logaddexp(target, others[anchor]) - target

    if symmetric:
        back = Contrast(
            lambda rows: ~(_relevance(known, rows, ids[term]) | _strangers(groups, rows, term)).T,
            temperature,
            hardness,
            ceiling,
        )
        place = torch.arange(len(term), device=row.device)
        target, others = contrast(documents[term], queries, place, row, back, chunk_size)
        losses = (losses + torch.logaddexp(target, others) - target) / 2
    return _mean_over_queries(losses, row, len(queries))


def triplet(
    queries: Float[Tensor, "query dim"],
    documents: Float[Tensor, "document dim"],
    *,
    owner: Int[Tensor, " document"],
    positive: Bool[Tensor, " document"],
    document_ids: Int[Tensor, " document"] | None = None,
    relevant: Int[Tensor, "pair 2"] | None = None,
    groups: Groups | None = None,
    margin: float = 0.2,
) -> Float[Tensor, ""]:
    """How far the hardest candidate comes within the margin of each positive, on average; in [0, 2 + margin].

    For each positive p of query i: max(0, margin - s(i,p) + max_{d in C(i,p)} s(i,d)), with the candidates `all` of
    `info_nce` (the triplet loss of FaceNet, Schroff et al., 2015, with the hardest negative of the batch as in VSE++,
    Faghri et al., 2018). Arguments as there.

    Args:
        margin: 0 or above, in units of the cosine.

    Returns:
        A scalar; a term without candidates is 0, and so is, connected to the graph, a batch without positives.

    Raises:
        ValueError: `relevant` without ids, a negative margin, or another shape.
    """
    _check(documents, owner=owner, positive=positive, document_ids=document_ids)
    if margin < 0:
        raise ValueError(f"margin: got {margin}, expected 0 or above")
    if relevant is not None and document_ids is None:
        raise ValueError("document_ids: got none, expected one for each document because `relevant` names ids")
    queries, documents = upcast(queries), upcast(documents)
    term = _terms(owner, positive)
    if not len(term):
        return (queries.sum() + documents.sum()) * 0
    row = owner[term]
    ids = torch.arange(len(documents), device=owner.device) if document_ids is None else document_ids
    everyone, everything = slice(0, len(queries)), slice(0, len(documents))
    excluded = _relevance(_known(row, ids[term], relevant), everyone, ids) | _strangers(groups, everyone, everything)
    scores = products(queries, documents)
    hardest = scores.masked_fill(excluded, -torch.inf).amax(dim=1)
    losses = torch.relu(margin - scores[row, term] + hardest[row])
    return _mean_over_queries(losses, row, len(queries))


def list_softmax(
    queries: Float[Tensor, "query dim"],
    documents: Float[Tensor, "document dim"],
    *,
    owner: Int[Tensor, " document"],
    scores: Float[Tensor, " document"],
    temperature: float = 0.05,
) -> Float[Tensor, ""]:
    """Cross-entropy of each query's own list against its graded scores; at least 0.

    For query i with the documents d that it listed, and scores y: -sum_d (y_d / sum y) log softmax_d(s(i, d) / t)
    (ListNet's top-one cross-entropy, Cao et al., 2007, with targets in proportion to the gain as in Bruch et al., 2019,
    who show that it bounds nDCG). Documents of other queries do not count.

    Args:
        queries: normalised embeddings.
        documents: normalised embeddings.
        owner: the query row that listed the document, -1 if a query of another rank did.
        scores: graded relevance, 0 or above.
        temperature: above 0.

    Returns:
        A scalar, the mean over queries with a score above 0; 0, connected to the graph, without any.

    Raises:
        ValueError: a temperature not above 0, or another shape.
    """
    _check(documents, owner=owner, scores=scores)
    check_temperature(temperature)
    queries, documents = upcast(queries), upcast(documents)
    own = owner == torch.arange(len(queries), device=owner.device)[:, None]
    gain = torch.where(own, scores.to(queries.dtype), 0)
    mass = gain.sum(dim=1, keepdim=True)
    logits = (products(queries, documents) / temperature).masked_fill(~own, torch.finfo(queries.dtype).min)
    log_share = torch.where(own, logits.log_softmax(dim=1), 0)
    losses = -(gain * log_share).sum(dim=1) / torch.where(mass > 0, mass, 1).squeeze(1)
    return losses.sum() / (mass > 0).sum().clamp(min=1)


def count_candidates(
    queries: int,
    *,
    owner: Int[Tensor, " document"],
    positive: Bool[Tensor, " document"],
    document_ids: Int[Tensor, " document"] | None = None,
    slot: Int[Tensor, " document"] | None = None,
    relevant: Int[Tensor, "pair 2"] | None = None,
    groups: Groups | None = None,
    candidates: Literal["all", "same_slot"] = "all",
    chunk_size: int | None = None,
) -> Float[Tensor, ""]:
    """Documents in the denominator of a term, its positive aside; mean over queries of the mean over their terms."""
    term = _terms(owner, positive)
    row = owner[term]
    ids = torch.arange(len(owner), device=owner.device) if document_ids is None else document_ids
    known = _known(row, ids[term], relevant)
    count = torch.zeros(len(term), device=owner.device)
    asking = _asking(row)
    for columns in blocks(len(owner), chunk_size):
        excluded = _relevance(known, asking, ids[columns]) | _strangers(groups, asking, columns)
        excluded = excluded[row - asking.start]
        if candidates == "same_slot" and slot is not None:
            excluded |= positive[columns] & (slot[columns] != slot[term][:, None])
        count += (~excluded).sum(dim=1)
    return _mean_over_queries(count, row, queries)


def count_queries(
    queries: int, *, owner: Int[Tensor, " document"], positive: Bool[Tensor, " document"]
) -> Int[Tensor, ""]:
    """Queries with a positive, over which the losses above take their mean."""
    listed = torch.zeros(queries + 1, dtype=torch.bool, device=owner.device)
    listed[torch.where(positive & (owner >= 0), owner, queries)] = True
    return listed[:queries].sum()


def _terms(owner: Tensor, positive: Tensor) -> Int[Tensor, " term"]:
    """The documents that are a positive of a query given: one term each."""
    return (positive & (owner >= 0)).nonzero().flatten()


def _asking(row: Int[Tensor, " term"]) -> slice:
    """The queries that have terms, and those between them: of the queries of all ranks, this rank's."""
    return slice(int(row.min()), int(row.max()) + 1) if len(row) else slice(0, 0)


def _known(row: Tensor, ids: Tensor, relevant: Tensor | None) -> Int[Tensor, "pair 2"]:
    """(query row, document id) of everything known to be relevant."""
    listed = torch.stack([row, ids], dim=1)
    return listed if relevant is None else torch.cat([listed, relevant])


def _relevance(
    known: Int[Tensor, "pair 2"], rows: slice, ids: Int[Tensor, " document"]
) -> Bool[Tensor, "query document"]:
    """Which documents may not stand in the denominator of which query, for the queries in `rows`."""
    ids = ids.contiguous()
    ordered = ids.sort().values
    place = torch.searchsorted(ordered, known[:, 1].contiguous()).clamp(max=len(ids) - 1)
    inside = (ordered[place] == known[:, 1]) & (known[:, 0] >= rows.start) & (known[:, 0] < rows.stop)
    count = rows.stop - rows.start
    table = torch.zeros(count + 1, len(ids), dtype=torch.bool, device=ids.device)  # the last row takes what is outside
    table[torch.where(inside, known[:, 0] - rows.start, count), place] = True
    return table[:count, torch.searchsorted(ordered, ids)]


def _strangers(groups: Groups | None, rows: slice, columns: slice | Tensor) -> Bool[Tensor, "query document"] | bool:
    """Which documents belong to another group than the query."""
    return False if groups is None else groups.queries[rows, None] != groups.documents[columns]


def _mean_over_queries(losses: Tensor, row: Tensor, queries: int) -> Float[Tensor, ""]:
    terms_of_query = losses.new_zeros(queries).index_add_(0, row, torch.ones_like(losses))
    return (losses / terms_of_query[row]).sum() / (terms_of_query > 0).sum().clamp(min=1)


def _check(documents: Tensor, **listed: Tensor | None) -> None:
    for name, value in listed.items():
        if value is not None and value.shape != documents.shape[:1]:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {tuple(documents.shape[:1])}")
