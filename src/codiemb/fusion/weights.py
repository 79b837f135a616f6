"""How much each checkpoint counts: delta-guided weights, from how far a checkpoint moved from the base.

    delta_k = theta_k - theta_0
    w_k = g(||delta_k||) / sum_j g(||delta_j||)
    theta = theta_0 + scale * sum_k w_k delta_k

CoDiEmb (arXiv 2508.11442) says that weights are computed for each learnable parameter from its deviation from the
initialisation; its formula is not public, and this is our reading. A norm is taken over a whole model, a tensor, a row
of it (one output of a linear layer, one token of an embedding) or a single element.
"""

from __future__ import annotations

import re

import numpy as np
from jaxtyping import Float

from codiemb.config import Norm, Weighting
from codiemb.fusion.numbers import sum_of_squares


def layer_of(name: str) -> str:
    """The layer a tensor belongs to: `layer 3`, or what comes before its own name, such as `embeddings`."""
    number = re.search(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.", name)
    return f"layer {number[1]}" if number else name.rpartition(".")[0].partition(".")[0] or name


def weights_of(
    norms: Float[np.ndarray, "model ..."], weighting: Weighting, temperature: float = 1.0
) -> Float[np.ndarray, "model ..."]:
    """Weights that sum to 1 over the models, at every place.

    Args:
        norms: at least 0.
        weighting: `proportional`, g(x) = x; `inverse`, g(x) = 1 / x; `softmax`, g(x) = exp(x / temperature).
        temperature: of the softmax.

    Where no model moved, all count the same. With `inverse` those that did not move share the whole weight, which is
    the limit. Arithmetic is in the type of the norms, or in double precision where that would not be finite.
    """
    if weighting == "softmax":
        norms = norms.astype(np.float64)
        norms = np.exp((norms - norms.max(axis=0)) / temperature)
    elif weighting == "inverse":
        still = norms == 0
        with np.errstate(divide="ignore"):
            norms = np.where(still.any(axis=0), still, 1 / norms.astype(np.float64))
    with np.errstate(over="ignore"):
        total = norms.sum(axis=0)
    if total.dtype != np.float64 and not np.isfinite(total).all():
        return weights_of(norms.astype(np.float64), "proportional")
    moved = total > 0
    return np.where(moved, norms / np.where(moved, total, 1), 1 / len(norms))


def norm_of_parts(part: Float[np.ndarray, "row width"], norm: Norm, rows: bool) -> Float[np.ndarray, " row"]:
    """What of a norm a tile gives, to be added to that of others: sums of |x| or x^2, by row or in all (one number)."""
    if norm != "l1" and not rows:
        return np.array([sum_of_squares(part)])
    size = np.abs(part) if norm == "l1" else np.square(part)
    return size.sum(axis=1) if rows else size.sum().reshape(1)


def norm_from_sums(parts: np.ndarray, norm: Norm, elements: int) -> np.ndarray:
    """The norm from the sum of all its parts over `elements` numbers."""
    if norm == "l2":
        return np.sqrt(parts)
    return parts / elements if norm == "mean_square" else parts


def of_elements(deltas: Float[np.ndarray, "model row width"], norm: Norm) -> Float[np.ndarray, "model row width"]:
    """The norm of every element by itself."""
    return np.square(deltas, dtype=np.float64) if norm == "mean_square" else np.abs(deltas)
