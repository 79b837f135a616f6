"""The log-sum-exp over the pairs below each label level, a tile at a time: memory is linear in the number of pairs.

PRO needs, for each distinct label v, the log of the sum of e^{(v - y_j) c_j / t} over the pairs j with y_j < v. One
table of levels x pairs is up to the square of the batch, and autograd would keep several of them. Here the pairs are
sorted by label, so the pairs below a level are the first few, and a tile takes a few levels at once. The backward pass
computes each tile again: its softmax is e^{logit - sum}, and the sums are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 2**18  # entries [level, pair] held at once; the fastest of 2^12 to 2^22 for 4,096 continuous labels


def log_sum_below(
    scores: Float[Tensor, " pair"], labels: Float[Tensor, " pair"], levels: Float[Tensor, " level"]
) -> Float[Tensor, " level"]:
    """For each level the log of the sum over labels below it of e^{(level - label) score}.

    Args:
        scores: cosines over temperature, in the order of the labels.
        labels: ascending.
        levels: ascending, each above the lowest label.

    Returns:
        One sum for each level, with the gradient to `scores` alone, and no second derivative.
    """
    return _LogSumBelow.apply(scores, labels, levels)


class _LogSumBelow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, labels: Tensor, levels: Tensor) -> Tensor:
        sums = torch.cat([logits.logsumexp(dim=1) for _, _, logits in _tiles(scores, labels, levels)])
        ctx.save_for_backward(scores, labels, levels, sums)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        scores, labels, levels, sums = ctx.saved_tensors
        result = torch.zeros_like(scores)
        for rows, distance, logits in _tiles(scores, labels, levels):
            softmax = logits.sub_(sums[rows, None]).exp_()
            result[: distance.shape[1]] += softmax.mul_(distance).mul_(gradient[rows, None]).sum(dim=0)
        return result, None, None


def _tiles(scores: Tensor, labels: Tensor, levels: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of levels, the distances [level, pair] to the pairs below the last of them, and the logits."""
    height = max(1, TILE // len(labels))
    below = torch.searchsorted(labels, levels).tolist()  # how many pairs are below each level
    for start in range(0, len(levels), height):
        rows = slice(start, min(start + height, len(levels)))
        width = below[rows.stop - 1]
        distance = levels[rows, None] - labels[:width]
        yield rows, distance, (distance * scores[:width]).masked_fill_(distance <= 0, -torch.inf)
