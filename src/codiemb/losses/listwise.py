r"""Other losses for graded pairs: the pairwise and listwise family, and the plain regression.

n pairs have predicted cosines c and labels y. The losses differ in what they compare and in what they ask of it:

- Every two pairs with y_i > y_j ought to have c_i > c_j. RankNet takes the mean of the logistic losses of the
  differences, LambdaRank weights each by what exchanging the two does to nDCG, and CoSENT puts all of them into one
  log-sum-exp, in which the worst counts most. AnglE is CoSENT with another similarity than the cosine.
- The n pairs as one list. ListNet compares two softmax distributions, of the labels and of the cosines. ListMLE is the
  likelihood of drawing the pairs in the order of their labels. Soft Spearman correlates ranks, made smooth.
- Each pair by itself: the squared difference of cosine and label.

RankNet, LambdaRank and soft Spearman hold n x n matrices; CoSENT, AnglE and ListMLE sort, in n log n. All work on the
device and in float32 at least, and give 0, connected to the graph, where there is nothing to compare.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from codiemb.losses.graded import average_rank, check_temperature, checked
from codiemb.losses.similarity import pearson


def cosent(
    predicted: Float[Tensor, " pair"], target: Float[Tensor, " pair"], *, temperature: float = 0.05
) -> Float[Tensor, ""]:
    """`log(1 + sum over y_i > y_j of e^{(c_j - c_i)/t})`, at least 0 (Huang et al., 2024, CoSENT).

    Args:
        predicted: cosines.
        target: labels; only their order counts, and equal labels are not compared.
        temperature: above 0; sentence-transformers' `scale` is 1 / temperature.

    Returns:
        A scalar; 0, connected to the graph, when all labels are equal, or with one pair or none.

    Raises:
        ValueError: a temperature not above 0, or another shape.
    """
    # Not sentence-transformers' CoSENTLoss, which is the same sum: it takes embeddings through a module that holds a
    # model, so cosines could only be smuggled in as the "similarity" of themselves. ListMLE needs the sums below too.
    scores, below = _log_sum_of_lower(predicted, target, temperature, equal=False)
    return torch.cat([scores.new_zeros(1), below - scores]).logsumexp(dim=0)  # e^0 is the 1


def angle(
    left: Float[Tensor, "pair dim"],
    right: Float[Tensor, "pair dim"],
    target: Float[Tensor, " pair"],
    *,
    temperature: float = 0.05,
) -> Float[Tensor, ""]:
    """CoSENT over AnglE's angle of complex vectors in place of the cosine; at least 0 (Li & Li, 2024).

    An embedding's first half is the real part of a complex vector, its second half the imaginary part. The similarity
    is `|sum(Re z) + sum(Im z)| / (|left| |right|)` with z = left * conj(right), in [0, sqrt 2]. Its slope does not
    vanish where the two are parallel, as that of the cosine does. Nor is it largest there: a vector has similarity 1
    with itself and with its opposite, and sqrt 2 with itself turned by 45 degrees in each complex plane.

    Args:
        left: embeddings of the left texts, of any length; an odd `dim` is padded with a zero.
        right: the same of the right texts.
        target: labels; only their order counts, and equal labels are not compared.
        temperature: above 0.

    Returns:
        A scalar; 0, connected to the graph, when all labels are equal, or with one pair or none. The similarity of a
        zero vector is 0, and so are its gradients.

    Raises:
        ValueError: a temperature not above 0, or another shape.
    """
    if left.ndim != 2 or left.shape != right.shape:
        raise ValueError(
            f"left and right: got shapes {tuple(left.shape)} and {tuple(right.shape)}, "
            "expected two matrices of one shape"
        )
    from sentence_transformers.util import pairwise_angle_sim  # late: it takes seconds, and the other losses need none

    return cosent(pairwise_angle_sim(left, right), target, temperature=temperature)


def list_net(
    predicted: Float[Tensor, " pair"],
    target: Float[Tensor, " pair"],
    *,
    temperature: float = 0.05,
    target_temperature: float | None = None,
) -> Float[Tensor, ""]:
    """Top-one cross-entropy `-sum_j P_j log Q_j`, P = softmax(y / t_y), Q = softmax(c / t) (Cao et al., 2007).

    It is the sum, as in the paper, and not divided by the number of pairs. It is at least the entropy of P, which has
    no gradient, and equal to it where c / t and y / t_y differ by a constant.

    Args:
        predicted: cosines.
        target: labels on the 0..1 scale; their differences count, so a tie asks for equal cosines.
        temperature: t, above 0.
        target_temperature: t_y, above 0; None takes that of the cosines.

    Returns:
        A scalar; 0, connected to the graph, for one pair or none. With equal labels P is uniform, and the loss draws
        the cosines together.

    Raises:
        ValueError: a temperature not above 0, or another shape.
    """
    predicted, target = checked(predicted, target)
    check_temperature(temperature)
    if target_temperature is None:
        target_temperature = temperature
    check_temperature(target_temperature, "target_temperature")
    p = torch.softmax(target / target_temperature, dim=0)
    return -(p * torch.log_softmax(predicted / temperature, dim=0)).sum()


def list_mle(
    predicted: Float[Tensor, " pair"], target: Float[Tensor, " pair"], *, temperature: float = 0.05
) -> Float[Tensor, ""]:
    """Mean over k of `-log( e^{c_k/t} / sum over y_j <= y_k of e^{c_j/t} )`, at least 0 (Xia et al., 2008, ListMLE).

    This is the Plackett-Luce likelihood of the order of the labels: the pairs are drawn from the highest label down,
    each among those still left. Pairs with equal labels all count as left when one of them is drawn (Breslow, 1974),
    so that the value does not depend on the order in which they stand in the batch. The paper has the sum; the mean
    does not grow with the batch.

    Args:
        predicted: cosines.
        target: labels; only their order counts.
        temperature: above 0.

    Returns:
        A scalar; 0, connected to the graph, for one pair or none. Equal labels draw their cosines together.

    Raises:
        ValueError: a temperature not above 0, or another shape.
    """
    scores, left = _log_sum_of_lower(predicted, target, temperature, equal=True)
    return (left - scores).sum() / max(len(scores), 1)


def rank_net(
    predicted: Float[Tensor, " pair"], target: Float[Tensor, " pair"], *, temperature: float = 0.05
) -> Float[Tensor, ""]:
    """Mean over all y_i > y_j of `log(1 + e^{(c_j - c_i)/t})`, at least 0 (Burges et al., 2005, RankNet).

    Args:
        predicted: cosines.
        target: labels; only their order counts, and equal labels are not compared.
        temperature: above 0.

    Returns:
        A scalar; 0, connected to the graph, when all labels are equal, or with one pair or none.

    Raises:
        ValueError: a temperature not above 0, or another shape.
    """
    predicted, target = checked(predicted, target)
    check_temperature(temperature)
    higher = target[:, None] > target  # [pair, pair]
    return _logistic(predicted / temperature, higher / higher.sum().clamp(min=1))


def lambda_rank(
    predicted: Float[Tensor, " pair"], target: Float[Tensor, " pair"], *, temperature: float = 0.05
) -> Float[Tensor, ""]:
    """Sum over all y_i > y_j of `|delta nDCG_ij| log(1 + e^{(c_j - c_i)/t})`, at least 0 (Burges et al., 2006).

    delta nDCG_ij is what exchanging i and j in the order of the cosines does to nDCG of the whole list, with gain
    `2^y - 1` and discount `1 / log2(2 + rank)`, rank 0 for the largest. It is a weight without gradient. As a loss and
    not only as a gradient, this is LambdaRank in Wang et al. (2018, LambdaLoss), with the natural
    logarithm. The sum is theirs, and grows about as n / log n.

    Args:
        predicted: cosines; equal ones share their average rank, so that exchanging them has weight 0.
        target: labels on the 0..1 scale.
        temperature: above 0.

    Returns:
        A scalar; 0, connected to the graph, when all labels or all cosines are equal, or with one pair or none.

    Raises:
        ValueError: a temperature not above 0, or another shape.
    """
    predicted, target = checked(predicted, target)
    check_temperature(temperature)
    gain = torch.exp2(target) - 1
    places = torch.arange(len(gain), dtype=gain.dtype, device=gain.device)
    ideal = (gain.sort(descending=True).values * _discount(places)).sum()
    gain = gain / torch.where(ideal > 0, ideal, 1)
    discount = _discount(average_rank(predicted.detach()).to(gain.dtype))
    weight = (gain[:, None] - gain).clamp(min=0) * (discount[:, None] - discount).abs()  # [pair, pair]
    return _logistic(predicted / temperature, weight)


def soft_spearman(
    predicted: Float[Tensor, " pair"], target: Float[Tensor, " pair"], *, temperature: float = 0.05
) -> Float[Tensor, ""]:
    """1 - Pearson correlation of the soft ranks of the cosines with the average ranks of the labels, in [0, 2].

    The soft rank is `r_i = 1/2 + sum_j sigmoid((c_j - c_i)/t)`, 1 for the largest (Qin, Liu & Li, 2010; the 1/2
    drops out of the correlation). As t goes to 0 it becomes the rank with ties averaged, and the loss 1 - Spearman; as
    t grows it becomes linear in c, and the loss 1 - the correlation of the cosines with the ranks.

    Args:
        predicted: cosines.
        target: labels; only their order counts, ties share their average rank.
        temperature: above 0. With 32 pairs whose cosines have standard deviation 0.1 to 0.3, 0.05 is within 0.02 of
            1 - Spearman on average, and jitter of 0.02 in the cosines hardly turns the gradient. A tenth of it is
            within 0.01, but there the same jitter turns the gradient by more than 35 degrees.

    Returns:
        A scalar; 0, connected to the graph, when all labels or all cosines are equal, or with one pair or none.

    Raises:
        ValueError: a temperature not above 0, or another shape.
    """
    predicted, target = checked(predicted, target)
    check_temperature(temperature)
    scores = predicted / temperature
    return pearson((scores[:, None] - scores).sigmoid().sum(dim=0), average_rank(target))


def cosine_mse(predicted: Float[Tensor, " pair"], target: Float[Tensor, " pair"]) -> Float[Tensor, ""]:
    """Mean squared difference of cosine and label, at least 0; sentence-transformers' `CosineSimilarityLoss`.

    Args:
        predicted: cosines.
        target: labels on the scale of the cosines, since each cosine is drawn to its label itself.

    Returns:
        A scalar; 0, connected to the graph, without pairs.

    Raises:
        ValueError: another shape.
    """
    predicted, target = checked(predicted, target)
    return functional.mse_loss(predicted, target, reduction="sum") / max(len(predicted), 1)


def _log_sum_of_lower(predicted: Tensor, target: Tensor, temperature: float, *, equal: bool) -> tuple[Tensor, Tensor]:
    """c / t, and for each pair the log of the sum of e^{c/t} over the lower (or equal) labels, both by rising label."""
    predicted, target = checked(predicted, target)
    check_temperature(temperature)
    target, order = target.sort()
    scores = predicted[order] / temperature
    log_sums = torch.cat([scores.new_full((1,), -torch.inf), scores.logcumsumexp(dim=0)])  # of the first 0, 1, ... n
    return scores, log_sums[torch.searchsorted(target, target, right=equal)]


def _logistic(scores: Tensor, weight: Tensor) -> Tensor:
    """Sum over i and j of weight_ij log(1 + e^{s_j - s_i})."""
    return -(weight * functional.logsigmoid(scores[:, None] - scores)).sum()


def _discount(rank: Tensor) -> Tensor:
    return 1 / torch.log2(2 + rank)
