r"""The part of a contrastive loss that is large: scores of every anchor against every document, never held whole.

A contrastive loss needs two things of the [anchor, document] scores s: the score of each term's own document, and for
each anchor the log-sum-exp over its candidates. `contrast` gives both. Held whole, 1,024 x 65,536 scores are 256 MiB,
and autograd keeps several such tables. With `chunk_size` the scores are made in blocks of that many columns, the
log-sum-exp is carried from block to block, and the backward pass makes each block again:

    forward    others_i = log sum_d e^{z_id}                      block after block
    backward   G_id = g_i e^{z_id - others_i} / t                 the block's share of the softmax
               d anchors += G documents,  d documents = G^T anchors

One more product of the two matrices pays for it; the saved traffic of large tables pays most of that back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Contrast:
    """How scores become logits, and which of them count.

    Attributes:
        candidate: from a range of columns to bool [anchor, column].
        temperature: what scores are divided by.
        hardness: log weight of a candidate per unit of its score, without gradient.
        ceiling: [anchor], candidates that score higher are left out; None for no such limit.
    """

    candidate: Callable[[slice], Bool[Tensor, "anchor column"]]
    temperature: float
    hardness: float = 0.0
    ceiling: Float[Tensor, " anchor"] | None = None

    def logits(self, scores: Float[Tensor, "anchor column"], columns: slice) -> Float[Tensor, "anchor column"]:
        """Logits of a block, -inf where there is no candidate."""
        candidate = self.candidate(columns)
        if self.ceiling is not None:
            candidate = candidate & (scores <= self.ceiling[:, None])
        logits = scores / self.temperature
        if self.hardness:
            logits = logits + self.hardness * scores.detach()
        return logits.masked_fill_(~candidate, -torch.inf)


def contrast(
    anchors: Float[Tensor, "anchor dim"],
    documents: Float[Tensor, "document dim"],
    row: Int[Tensor, " term"],
    own: Int[Tensor, " term"],
    terms: Contrast,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, " term"], Float[Tensor, " anchor"]]:
    """Logit of each term's own document, and log-sum-exp over each anchor's candidates; float32 at least.

    Args:
        anchors: embeddings.
        documents: embeddings.
        row: which anchor a term belongs to.
        own: which document is the term's own.
        terms: temperature and candidates.
        chunk_size: columns of scores held at once; None for all, with ordinary autograd.

    Returns:
        `[term]`, and `[anchor]` with -inf, and no gradient, for an anchor without candidates.
    """
    if chunk_size is not None:
        return _Tiled.apply(anchors, documents, row, own, terms, chunk_size)
    anchors, documents = upcast(anchors), upcast(documents)
    target = (anchors[row] * documents[own]).sum(dim=-1) / terms.temperature
    return target, _log_sum_exp(terms.logits(products(anchors, documents), slice(0, len(documents))))


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, documents: Tensor, row: Tensor, own: Tensor, terms: Contrast, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        wide = upcast(anchors)
        target = (wide[row] * upcast(documents[own])).sum(dim=-1) / terms.temperature
        others = wide.new_full((len(wide),), -torch.inf)
        for columns in blocks(len(documents), chunk_size):
            logits = terms.logits(products(wide, documents[columns]), columns)
            others = torch.logaddexp(others, _log_sum_exp(logits))
        ctx.save_for_backward(anchors, documents, row, own, others)
        ctx.terms, ctx.chunk_size = terms, chunk_size
        return target, others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_target: Tensor, to_others: Tensor) -> tuple[Tensor | None, ...]:
        anchors, documents, row, own, others = ctx.saved_tensors
        terms, wide = ctx.terms, upcast(anchors)
        of_anchors, of_documents = torch.zeros_like(wide), torch.empty_like(documents)
        factor = (to_others / terms.temperature)[:, None]
        others = others.masked_fill(others == -torch.inf, 0)[:, None]  # its logits are all -inf: no share, no gradient
        for columns in blocks(len(documents), ctx.chunk_size):
            block = upcast(documents[columns])
            share = terms.logits(products(wide, block), columns).sub_(others).exp_().mul_(factor)
            of_anchors.addmm_(share, block)
            of_documents[columns] = products(share.T, wide.T)
        pull = (to_target / terms.temperature)[:, None]
        of_anchors.index_add_(0, row, pull * upcast(documents[own]))
        of_documents.index_add_(0, own, (pull * wide[row]).to(documents.dtype))
        return of_anchors.to(anchors.dtype), of_documents, None, None, None, None


def upcast(embeddings: Tensor) -> Tensor:
    """Float32 at least: products and sums of half-precision embeddings are not rounded to half precision."""
    return embeddings if embeddings.dtype == torch.float64 else embeddings.float()


def products(left: Float[Tensor, "row dim"], right: Float[Tensor, "column dim"]) -> Float[Tensor, "row column"]:
    """Dot products, float32 at least, under autocast too."""
    with torch.autocast(left.device.type, enabled=False):
        return upcast(left) @ upcast(right).T


def blocks(documents: int, chunk_size: int | None) -> list[slice]:
    """Ranges of at most `chunk_size` columns; one of all of them for None."""
    chunk_size = chunk_size or max(documents, 1)
    return [slice(start, min(start + chunk_size, documents)) for start in range(0, documents, chunk_size)]


def _log_sum_exp(logits: Float[Tensor, "anchor column"]) -> Float[Tensor, " anchor"]:
    """-inf, without gradient, for a row that holds nothing but -inf."""
    none = (logits == -torch.inf).all(dim=1)
    return logits.masked_fill(none[:, None], 0).logsumexp(dim=1).masked_fill(none, -torch.inf)
