"""How much each checkpoint counts: delta-guided weights, from how far a checkpoint moved from the base.

    delta_k = theta_k - theta_0
    w_k = g(||delta_k||) / sum_j g(||delta_j||)
    theta = theta_0 + scale * sum_k w_k delta_k

CoDiEmb (arXiv 2508.11442) says that weights are computed for each learnable parameter from its deviation from the
initialisation; its formula is not public, and this is our reading. A norm is taken over a whole model, a tensor, a row
of it (one output of a linear layer, one token of an embedding) or a single element.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from codiemb.config import Norm, Weighting


def weights_of(
    norms: Float[Tensor, "model ..."], weighting: Weighting, temperature: float = 1.0
) -> Float[Tensor, "model ..."]:
    """Weights that sum to 1 over the models, at every place.

    Args:
        norms: at least 0.
        weighting: `proportional`, g(x) = x; `inverse`, g(x) = 1 / x; `softmax`, g(x) = exp(x / temperature).
        temperature: of the softmax.

    Where no model moved, all count the same. With `inverse` those that did not move share the whole weight, which is
    the limit.
    """
    if weighting == "softmax":
        return torch.softmax(norms / temperature, dim=0)
    if weighting == "inverse":
        still = norms == 0
        norms = torch.where(still.any(dim=0), still.to(norms.dtype), 1 / norms)
    total = norms.sum(dim=0)
    return torch.where(total > 0, norms / total, 1 / len(norms))


def norm_of_parts(part: Float[Tensor, "row width"], norm: Norm, rows: bool) -> Float[Tensor, " row"]:
    """What of a norm a tile gives, to be added to that of others: sums of |x| or x^2, by row or in all (one number)."""
    size = part.abs() if norm == "l1" else part.square()
    return size.sum(dim=1) if rows else size.sum().reshape(1)


def finished(parts: Tensor, norm: Norm, elements: int) -> Tensor:
    """The norm from the sum of all its parts over `elements` numbers."""
    if norm == "l2":
        return parts.sqrt()
    return parts / elements if norm == "mean_square" else parts


def of_elements(deltas: Float[Tensor, "model row width"], norm: Norm) -> Float[Tensor, "model row width"]:
    """The norm of every element by itself."""
    return deltas.square() if norm == "mean_square" else deltas.abs()
