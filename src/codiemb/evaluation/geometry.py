"""How an embedding space is filled: pure functions of matrices with one vector a row.

The rows are either the tokens of one text in one layer (over-smoothing: do they all look alike?), or one pooled vector
for each of many texts (anisotropy: do all texts lie in a narrow cone?). Spectra are those of the matrix as it is, not
centred, unless a function says so. They come from the smaller Gram matrix in float64, which gives singular values to
1e-8 of the largest: finer than what float32 states hold, and many times faster than a decomposition of the matrix.
Matrices of many texts are passed over in blocks, so no [text, text] table is ever whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

NEIGHBOURS = 10
_ROWS_AT_ONCE = 1024
SPECTRAL = ("rank", "effective_rank", "svd_entropy", "condition_number")


def singular_values(matrix: Float[Tensor, "*batch row dim"]) -> Float[Tensor, "*batch value"]:
    """The min(row, dim) singular values in descending order, float64."""
    wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    gram = torch.zeros(*wide.shape[:-1], wide.shape[-2], dtype=torch.float64, device=wide.device)
    for columns in wide.split(_ROWS_AT_ONCE, dim=-1):
        part = columns.double()
        gram += part @ part.mT
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(-1)


def spectral(
    values: Float[Tensor, "*batch value"], rows: Float[Tensor, "*batch"], dim: int
) -> dict[str, Float[Tensor, "*batch"]]:
    """What the singular values of matrices of `rows` x `dim` say; values that the rank leaves out count as 0.

    Returns:
        rank: values above max(rows, dim) * 2^-23 of the largest, as `numpy.linalg.matrix_rank` has it for float32.
        effective_rank: exp of the entropy of the values over their sum (Roy and Vetterli, 2007, section 2); from 1 to
            the rank.
        svd_entropy: entropy of their squares over the sum of those, divided by log(min(rows, dim)) (Alter et al.,
            2000); from 0 (all along one direction) to 1 (all directions alike), 0 for a single row.
        condition_number: the largest over the smallest that the rank counts.
    """
    largest = values[..., :1]
    tolerance = torch.clamp(rows, min=dim)[..., None] * torch.finfo(torch.float32).eps
    counted = values > largest * tolerance
    values = torch.where(counted, values, 0)
    smallest = torch.where(counted, values, torch.inf).amin(dim=-1)
    most = torch.log(torch.clamp(rows.double(), max=dim))
    return {
        "rank": counted.sum(dim=-1).double(),
        "effective_rank": _entropy(values).exp(),
        "svd_entropy": torch.where(most > 0, _entropy(values.square()) / most, 0),
        "condition_number": largest[..., 0] / smallest,
    }


def token_measures(
    states: Float[Tensor, "text token dim"], mask: Bool[Tensor, "text token"]
) -> dict[str, Float[Tensor, " text"]]:
    """By measure a value for each text, of the matrix of its tokens (those under the mask), float64.

    `cosine` is the mean over pairs of two different tokens: near 1 where the layer has smoothed them into one (Dong et
    al., 2021; Shi et al., 2022); NaN for a text of one token. The others are those of `spectral`.
    """
    states = states.masked_fill(~mask[..., None], 0)
    count = mask.sum(dim=-1).double()
    found = spectral(singular_values(states), count, states.shape[-1])
    return {"cosine": _mean_cosine(states, count), **found}


def sentence_measures(
    vectors: Float[Tensor, "text dim"], pairs: Int[Tensor, "pair 2"] | None = None
) -> dict[str, float]:
    """By name every measure of the pooled vectors of many texts; `alignment` where `pairs` name rows."""
    values, rows = singular_values(vectors), torch.tensor(float(len(vectors)), dtype=torch.float64)
    spectrum = spectral(values, rows.to(values.device), vectors.shape[1])
    found = {name: float(value) for name, value in spectrum.items()}
    found |= {
        "cosine": mean_cosine(vectors),
        "uniformity": uniformity(vectors),
        "iso_score": iso_score(vectors),
        "hubness": hubness(vectors),
    }
    if pairs is not None:
        found["alignment"] = alignment(vectors[pairs[:, 0]], vectors[pairs[:, 1]])
    return found


def mean_cosine(vectors: Float[Tensor, "row dim"]) -> float:
    """Anisotropy: the mean cosine of two different rows, over all pairs (Ethayarajh, 2019, section 3.2)."""
    return float(_mean_cosine(vectors, torch.tensor(float(len(vectors)), dtype=torch.float64, device=vectors.device)))


def uniformity(vectors: Float[Tensor, "row dim"]) -> float:
    """log of the mean of exp(-2 |u - v|^2) over all pairs of rows, as unit vectors (Wang and Isola, 2020, section 4.1).

    At most 0; the lower, the more evenly they are spread over the sphere.
    """
    total = torch.zeros((), dtype=torch.float64, device=vectors.device)
    for cosines in _cosines(vectors):
        total += cosines.mul_(4).sub_(4).exp_().sum(dtype=torch.float64)  # |u - v|^2 = 2 - 2 cos; a row itself is -inf
    return float(torch.log(total / (len(vectors) * (len(vectors) - 1))))


def alignment(left: Float[Tensor, "pair dim"], right: Float[Tensor, "pair dim"]) -> float:
    """Mean of |u - v|^2 over pairs that belong together, as unit vectors (Wang and Isola, 2020, section 4.1)."""
    return float((_unit(left.double()) - _unit(right.double())).square().sum(dim=-1).mean())


def iso_score(vectors: Float[Tensor, "row dim"]) -> float:
    """How evenly the variance fills the dimensions (Rudman et al., 2022, definition 3.1): 0 for one, 1 for all alike.

    With the eigenvalues l of the covariance, the steps of the paper come down to ((sum l)^2 / sum l^2 - 1) / (dim - 1),
    and both sums can be read from the covariance itself. 0 where all rows are equal.
    """
    if not _differ(vectors):
        return 0.0
    covariance = _cross(vectors, vectors)
    participating = covariance.trace().square() / covariance.square().sum()
    return float((participating - 1) / (vectors.shape[1] - 1))


def hubness(vectors: Float[Tensor, "row dim"], neighbours: int = NEIGHBOURS) -> float:
    """Skewness of how often a row is among the nearest rows of the others, by cosine (Radovanović et al., 2010).

    Above 0 where few texts are everybody's neighbours; 0 where all are chosen equally often, as they are with no more
    than `neighbours` others, and where all rows are equal.
    """
    if not _differ(vectors):
        return 0.0
    taken = min(neighbours, len(vectors) - 1)
    chosen = torch.cat([cosines.topk(taken).indices.flatten() for cosines in _cosines(vectors)])
    occurrences = torch.bincount(chosen, minlength=len(vectors)).cpu().numpy()
    return float(stats.skew(occurrences)) if np.ptp(occurrences) else 0.0


def linear_cka(one: Float[Tensor, "row dim"], other: Float[Tensor, "row width"]) -> float:
    """Likeness of two representations of the same rows, from 0 to 1 (Kornblith et al., 2019, section 3.3).

    |Y^T X|^2 / (|X^T X| |Y^T Y|) with centred columns and Frobenius norms: rotations and a common scale do not count.
    NaN where the rows of either are all equal.
    """
    if not (_differ(one) and _differ(other)):
        return float("nan")
    return float(_cross(other, one).square().sum() / (_cross(one, one).norm() * _cross(other, other).norm()))


def _differ(vectors: Float[Tensor, "row dim"]) -> bool:
    """Whether rows differ by more than roundings do: pooled by their first token, the embeddings of all texts are
    equal."""
    rounding = 8 * torch.finfo(torch.float32).eps
    return float(vectors.var(dim=0, correction=0).sum()) > rounding**2 * float(vectors.square().mean(dim=0).sum())


def _cross(one: Tensor, other: Tensor) -> Float[Tensor, "dim width"]:
    """X^T Y with centred columns, float64."""
    means = [matrix.mean(dim=0, dtype=torch.float64) for matrix in (one, other)]
    total = torch.zeros(one.shape[1], other.shape[1], dtype=torch.float64, device=one.device)
    for x, y in zip(one.split(_ROWS_AT_ONCE), other.split(_ROWS_AT_ONCE), strict=True):
        total += (x - means[0]).mT @ (y - means[1])
    return total


def _cosines(vectors: Tensor) -> Iterator[Float[Tensor, "block row"]]:
    """Cosines of some rows with all, block by block; that of a row with itself is -inf."""
    unit = _unit(vectors)
    for start in range(0, len(unit), _ROWS_AT_ONCE):
        cosines = unit[start : start + _ROWS_AT_ONCE] @ unit.mT
        cosines.diagonal(start).fill_(-torch.inf)
        yield cosines


def _mean_cosine(vectors: Float[Tensor, "*batch row dim"], count: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """From the sum of all unit vectors: its square holds every pair twice, and each row with itself."""
    unit = _unit(vectors.double())
    pairs = unit.sum(dim=-2).square().sum(dim=-1) - unit.square().sum(dim=(-2, -1))
    return torch.where(count > 1, pairs / (count * (count - 1)), torch.nan)


def _entropy(weights: Float[Tensor, "*batch value"]) -> Float[Tensor, "*batch"]:
    return torch.special.entr(weights / weights.sum(dim=-1, keepdim=True)).sum(dim=-1)


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)
