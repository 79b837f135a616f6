r"""Order-aware losses for graded pairs (CoDiEmb, arXiv 2508.11442, the STS objective).

For n pairs with predicted cosine c and label y in [0, 1]:

- Pearson: 1 - corr(c, y).
- RankKL: KL(P || Q) of P = softmax(g / t) and Q = softmax(c / t), where g = (n - 1 - r) / (n - 1) and r is the average
  rank of y, 0 for the largest. This is ListNet's top-one cross-entropy (Cao et al., 2007) with targets from ranks.
- PRO (preference ranking optimisation, after Song et al., 2023, as Peng et al. and CoDiEmb use it for graded pairs):
  each pair k is set against all pairs with a lower label, weighted by the distance of the labels.
- MidNCE: InfoNCE on the pooled middle layer over the pairs with a high label.

All work on the device and in float32 at least.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from codiemb.losses.below import log_sum_below
from codiemb.losses.graded import average_rank, check_temperature, checked
from codiemb.losses.retrieval import info_nce


def pearson(predicted: Float[Tensor, " pair"], target: Float[Tensor, " pair"]) -> Float[Tensor, ""]:
    """1 - Pearson correlation, in [0, 2]; 0, connected to the graph, when either side has no variance.

    Args:
        predicted: cosines.
        target: labels, any scale.

    Raises:
        ValueError: another shape.
    """
    predicted, target = checked(predicted, target)
    left, right = _centred(predicted), _centred(target)
    flat = _is_flat(left, predicted) | _is_flat(right, target)
    norms = torch.where(flat, 1, left.square().sum() * right.square().sum())
    correlation = (left * right).sum() / norms.sqrt()
    return torch.where(flat, 0 * predicted.sum(), 1 - correlation)


def rank_kl(
    predicted: Float[Tensor, " pair"],
    target: Float[Tensor, " pair"],
    *,
    temperature: float = 0.05,
    reduction: Literal["batchmean", "sum"] = "batchmean",
) -> Float[Tensor, ""]:
    """KL divergence from the softmax of the labels' ranks to the softmax of the cosines; at least 0.

    Args:
        predicted: cosines.
        target: labels; only their order counts, ties share their average rank.
        temperature: above 0, for both softmaxes.
        reduction: `sum` is the divergence itself; `batchmean` divides it by the number of pairs, as the reference does.

    Returns:
        A scalar; 0 for one pair or none.

    Raises:
        ValueError: another shape, a temperature or reduction that is none.
    """
    predicted, target = checked(predicted, target)
    check_temperature(temperature)
    if reduction not in ("batchmean", "sum"):
        raise ValueError(f"reduction: got {reduction!r}, expected 'batchmean' or 'sum'")
    n = len(predicted)
    if n < 2:
        return 0 * predicted.sum()
    gain = (n - 1 - average_rank(target)) / (n - 1)
    log_p = torch.log_softmax(gain.to(predicted.dtype) / temperature, dim=0)
    log_q = torch.log_softmax(predicted / temperature, dim=0)
    divergence = (log_p.exp() * (log_p - log_q)).sum()
    return divergence / n if reduction == "batchmean" else divergence


def pro(
    predicted: Float[Tensor, " pair"], target: Float[Tensor, " pair"], *, temperature: float = 0.05
) -> Float[Tensor, ""]:
    r"""Each pair against all pairs with a lower label; at least 0.

    For each k with at least one j such that y_j < y_k, w_kj = y_k - y_j and w_k = max_j w_kj, the term is
    `-log( e^{w_k c_k/t} / ( e^{w_k c_k/t} + sum_{j: y_j < y_k} e^{w_kj c_j/t} ) )`; the loss is their mean. The sum
    over j depends on the label y_k alone, so it is taken once for each distinct label: n x distinct, not n x n, in
    memory that is linear in n (`losses/below.py`).

    Args:
        predicted: cosines.
        target: labels on the 0..1 scale; their distances are the weights.
        temperature: above 0.

    Returns:
        A scalar; 0, connected to the graph, when all labels are equal.

    Raises:
        ValueError: another shape, or a temperature that is not above 0.
    """
    predicted, target = checked(predicted, target)
    check_temperature(temperature)
    labels, order = target.sort()
    scores = predicted[order] / temperature
    levels, level = labels.unique_consecutive(return_inverse=True)  # ascending; level: [pair]
    if len(levels) < 2:
        return 0 * predicted.sum()
    above_lowest = level > 0  # nobody is below the lowest level
    own = ((labels - levels[0]) * scores)[above_lowest]
    others = log_sum_below(scores, labels, levels[1:])[level[above_lowest] - 1]
    return (torch.logaddexp(own, others) - own).mean()


def mid_nce(
    left: Float[Tensor, "pair hidden"],
    right: Float[Tensor, "pair hidden"],
    target: Float[Tensor, " pair"],
    *,
    left_ids: Int[Tensor, " pair"] | None = None,
    right_ids: Int[Tensor, " pair"] | None = None,
    threshold: float = 1.0,
    temperature: float = 0.02,
) -> Float[Tensor, ""]:
    """InfoNCE over the pairs whose label reaches the threshold; the other right-hand texts are the negatives.

    CoDiEmb takes it of the middle layer; it knows no layer, so the pair loss `info_nce` is the same of embeddings.

    Args:
        left: pooled states of the left texts, normalised.
        right: the same of the right texts.
        target: labels on the 0..1 scale.
        left_ids: equal ids mean equal texts; a text is no negative of itself, whichever side it stands on.
        right_ids: the same of the right texts, which are no negatives of each other's pair.
        threshold: lowest label of a pair that counts as a positive.
        temperature: above 0.

    Returns:
        A scalar, at least 0; 0, connected to the graph, when no label reaches the threshold.

    Raises:
        ValueError: another shape, or a temperature that is not above 0.
    """
    pairs = torch.arange(len(left), device=left.device)
    return info_nce(
        left,
        right,
        owner=pairs,
        positive=target >= threshold,
        document_ids=right_ids,
        relevant=torch.stack([pairs, left_ids], dim=1) if left_ids is not None and right_ids is not None else None,
        temperature=temperature,
    )


def _centred(values: Tensor) -> Tensor:
    return values - values.mean() if len(values) else values


def _is_flat(centred: Tensor, values: Tensor) -> Tensor:
    """Whether what centring left is rounding only."""
    if not len(values):
        return torch.ones((), dtype=torch.bool, device=values.device)
    rounding = 4 * torch.finfo(values.dtype).eps * values.abs().max()
    return centred.abs().max() <= rounding
