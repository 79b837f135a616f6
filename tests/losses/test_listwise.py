"""The pairwise and listwise losses against their definitions, spelled out with loops, and against other libraries."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from scipy.stats import rankdata, spearmanr
from sentence_transformers.sentence_transformer.losses import AnglELoss, CoSENTLoss, CosineSimilarityLoss

from codiemb.losses.listwise import (
    angle,
    cosent,
    cosine_mse,
    lambda_rank,
    list_mle,
    list_net,
    rank_net,
    soft_spearman,
)
from codiemb.losses.similarity import pro, rank_kl

LABELS = {
    "graded": [0.0, 0.2, 0.2, 0.4, 0.6, 0.6, 1.0, 1.0, 0.8],
    "distinct": [0.05, 0.9, 0.35, 0.8, 0.1, 0.55, 0.7, 0.25, 1.0],
    "binary": [0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0],
    "all but one equal": [0.5, 0.5, 0.5, 0.5, 1.0, 0.5, 0.5, 0.5, 0.5],
}


def cosines(n=9, dtype=torch.float64, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [(torch.rand(n, generator=random, dtype=torch.float64) * 1.6 - 0.8).to(dtype).requires_grad_()]


def vectors(n=9, dtype=torch.float64, seed=1):
    random = torch.Generator().manual_seed(seed)
    return [side.to(dtype).requires_grad_() for side in torch.randn(2, n, 6, generator=random, dtype=torch.float64)]


def labels(kind):
    return torch.tensor(LABELS[kind], dtype=torch.float64)


def ordered(y):
    """All (i, j) with y_i > y_j."""
    return [(i, j) for i in range(len(y)) for j in range(len(y)) if y[i] > y[j]]


def naive_cosent(c, y, t):
    return torch.log(1 + sum(torch.exp((c[j] - c[i]) / t) for i, j in ordered(y)))


def naive_angle(left, right, y, t):
    """With complex numbers, as in the paper; the library has it as the sum of a cosine and a sine."""
    similarities = []
    for x, z in zip(left, right, strict=True):
        (a, b), (c, d) = x.chunk(2), z.chunk(2)
        product = torch.complex(a, b) * torch.complex(c, d).conj()
        similarities.append(abs(product.real.sum() + product.imag.sum()) / (x.norm() * z.norm()))
    return naive_cosent(similarities, y, t)


def naive_list_net(c, y, t):
    p_total, q_total = sum(math.exp(label / t) for label in y), sum(torch.exp(cosine / t) for cosine in c)
    return -sum(math.exp(y[j] / t) / p_total * torch.log(torch.exp(c[j] / t) / q_total) for j in range(len(y)))


def naive_list_mle(c, y, t):
    total = 0
    for k in range(len(y)):
        left = sum(torch.exp(c[j] / t) for j in range(len(y)) if y[j] <= y[k])
        total = total - torch.log(torch.exp(c[k] / t) / left) / len(y)
    return total


def naive_rank_net(c, y, t):
    return sum(torch.log(1 + torch.exp((c[j] - c[i]) / t)) for i, j in ordered(y)) / len(ordered(y))


def naive_lambda_rank(c, y, t):
    """nDCG is computed as a whole, before and after i and j exchange their ranks."""
    rank = rankdata(-c.detach().numpy()) - 1

    def dcg(labels, rank):
        return sum((2**label - 1) / math.log2(2 + place) for label, place in zip(labels.tolist(), rank, strict=True))

    total = 0
    for i, j in ordered(y):
        exchanged = rank.copy()
        exchanged[[i, j]] = rank[[j, i]]
        weight = abs(dcg(y, exchanged) - dcg(y, rank)) / dcg(y.sort(descending=True).values, range(len(y)))
        total = total + weight * torch.log(1 + torch.exp((c[j] - c[i]) / t))
    return total


def naive_soft_spearman(c, y, t):
    soft = [0.5 + sum(1 / (1 + torch.exp((c[i] - c[j]) / t)) for j in range(len(c))) for i in range(len(c))]
    return 1 - torch.corrcoef(torch.stack([torch.stack(soft), torch.from_numpy(rankdata(-y.numpy()))]))[0, 1]


def naive_cosine_mse(c, y):
    return sum((c[i] - y[i]) ** 2 for i in range(len(y))) / len(y)


@dataclass(frozen=True)
class Case:
    """A loss, its definition, what it takes before the labels, and what ought to leave it as it is."""

    loss: Callable
    naive: Callable
    inputs: Callable = cosines
    has_temperature: bool = True
    only_order_counts: bool = True  # of the labels
    only_differences_count: bool = True  # of the inputs
    shape_error: str = "predicted and target"


CASES = {
    "cosent": Case(cosent, naive_cosent),
    "angle": Case(angle, naive_angle, vectors, only_differences_count=False, shape_error="left and right"),
    "list_net": Case(list_net, naive_list_net, only_order_counts=False),
    "list_mle": Case(list_mle, naive_list_mle),
    "rank_net": Case(rank_net, naive_rank_net),
    "lambda_rank": Case(lambda_rank, naive_lambda_rank, only_order_counts=False),
    "soft_spearman": Case(soft_spearman, naive_soft_spearman),
    "cosine_mse": Case(
        cosine_mse, naive_cosine_mse, has_temperature=False, only_order_counts=False, only_differences_count=False
    ),
}
every_loss = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_temperature = pytest.mark.parametrize(
    "case", [case for case in CASES.values() if case.has_temperature], ids=lambda case: case.loss.__name__
)
every_kind = pytest.mark.parametrize("kind", LABELS)


def losses_named(*names):
    return pytest.mark.parametrize("case", [CASES[name] for name in names], ids=names)


def assert_same_with_gradients(found, expected, inputs, **tolerance):
    gradients, expected_gradients = (torch.autograd.grad(loss, inputs) for loss in (found, expected))
    torch.testing.assert_close(found, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert expected_gradient.abs().max() > 1e-4, "the test would compare zeros"
        torch.testing.assert_close(gradient, expected_gradient, **tolerance)


def assert_zero_connected_to_the_graph(value, inputs):
    assert value == 0
    for gradient, of in zip(torch.autograd.grad(value, inputs), inputs, strict=True):
        assert torch.equal(gradient, torch.zeros_like(of))


def test_cosent_by_hand():
    """Cosines (.2, .1, .4), labels (0, .5, 1), t = 1: c_j - c_i of the ordered pairs are .1, -.2 and -.3.

    ln(1 + e^.1 + e^-.2 + e^-.3) = ln(1 + 1.105171 + .818731 + .740818) = ln 3.664720 = 1.298752
    """
    loss = cosent(torch.tensor([0.2, 0.1, 0.4]), torch.tensor([0.0, 0.5, 1.0]), temperature=1.0)
    assert loss.item() == pytest.approx(1.298752, abs=1e-6)


def test_angle_by_hand():
    """Embeddings of one complex number. Pair 0: 1 and 1, product 1, similarity 1.

    Pair 1: 1 and .6 + .8i; 1 * (.6 - .8i), real and imaginary part add to -.2, similarity .2.
    Labels (1, 0), t = 1: ln(1 + e^(.2 - 1)) = ln 1.449329 = 0.371101
    """
    left, right = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    loss = angle(left, right, torch.tensor([1.0, 0.0]), temperature=1.0)
    assert loss.item() == pytest.approx(0.371101, abs=1e-6)


def test_list_net_by_hand():
    """Cosines (ln 3, 0), labels (1, 0), t = 1: Q = (.75, .25), P = (e, 1) / (e + 1) = (.731059, .268941).

    -.731059 ln .75 - .268941 ln .25 = .210314 + .372831 = 0.583145
    At t_y = 1 / ln 2 instead, P = (2, 1) / 3: (2 ln(4/3) + ln 4) / 3 = 0.653886
    """
    predicted, target = torch.tensor([math.log(3), 0.0]), torch.tensor([1.0, 0.0])
    assert list_net(predicted, target, temperature=1.0).item() == pytest.approx(0.583145, abs=1e-6)
    other = list_net(predicted, target, temperature=1.0, target_temperature=1 / math.log(2))
    assert other.item() == pytest.approx(0.653886, abs=1e-6)


def test_list_mle_by_hand():
    """e^c = (2, 1, 3), t = 1.

    Labels (1, .5, 0): 2 of 6, then 1 of 4, then 3 of 3:              (ln 3 + ln 4) / 3 = 0.828302
    Labels (1, .5, .5): 2 of 6, then 1 of 4 and 3 of 4: (ln 3 + ln 4 + ln(4/3)) / 3 = ln 16 / 3 = 0.924196
    """
    predicted = torch.tensor([2.0, 1.0, 3.0]).log()
    distinct, tied = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([1.0, 0.5, 0.5])
    assert list_mle(predicted, distinct, temperature=1.0).item() == pytest.approx(0.828302, abs=1e-6)
    assert list_mle(predicted, tied, temperature=1.0).item() == pytest.approx(0.924196, abs=1e-6)


def test_rank_net_by_hand():
    """Cosines (ln 3, 0, ln 3), labels (1, .5, 0), t = 1: (ln(1 + 1/3) + ln(1 + 1) + ln(1 + 3)) / 3 = 0.789041.

    With labels (1, 0, 0) the last two are not compared: (ln(4/3) + ln 2) / 2 = 0.490415
    """
    predicted = torch.tensor([3.0, 1.0, 3.0]).log()
    distinct, tied = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    assert rank_net(predicted, distinct, temperature=1.0).item() == pytest.approx(0.789041, abs=1e-6)
    assert rank_net(predicted, tied, temperature=1.0).item() == pytest.approx(0.490415, abs=1e-6)


def test_lambda_rank_by_hand():
    """Labels (0, 1), cosines (ln 3, 0), t = 1: gains 0 and 1, best DCG 1; the 1 stands at rank 1, DCG 1 / log2 3.

    Exchanging them wins 1 - .630930 = .369070, times ln(1 + 3) = 1.386294: 0.511640
    """
    loss = lambda_rank(torch.tensor([math.log(3), 0.0]), torch.tensor([0.0, 1.0]), temperature=1.0)
    assert loss.item() == pytest.approx(0.511640, abs=1e-6)


def test_soft_spearman_by_hand():
    """Cosines (ln 3, 0, -ln 3), t = 1: sigmoid(ln 3) = 3/4, sigmoid(2 ln 3) = 9/10.

    Soft ranks 1/2 + (1/2 + 1/4 + 1/10, 3/4 + 1/2 + 1/4, 9/10 + 3/4 + 1/2) = (1.35, 2, 2.65), centred (-.65, 0, .65).
    Labels (1, 0, .5) have ranks (1, 3, 2), centred (-1, 1, 0): r = .65 / sqrt(2 * .65^2 * 2) = 1/2; loss 1/2
    """
    predicted = torch.tensor([math.log(3), 0.0, -math.log(3)])
    loss = soft_spearman(predicted, torch.tensor([1.0, 0.0, 0.5]), temperature=1.0)
    assert loss.item() == pytest.approx(0.5, abs=1e-6)


def test_cosine_mse_by_hand():
    """Cosines (.2, .4), labels (0, 1): (.04 + .36) / 2 = .2."""
    assert cosine_mse(torch.tensor([0.2, 0.4]), torch.tensor([0.0, 1.0])).item() == pytest.approx(0.2)


@every_temperature
@every_kind
@pytest.mark.parametrize("t", [0.05, 0.5])
def test_every_loss_equals_its_definition(case, kind, t):
    inputs, target = case.inputs(), labels(kind)
    assert_same_with_gradients(case.loss(*inputs, target, temperature=t), case.naive(*inputs, target, t), inputs)


@every_kind
def test_cosine_mse_equals_its_definition(kind):
    inputs, target = cosines(), labels(kind)
    assert_same_with_gradients(cosine_mse(*inputs, target), naive_cosine_mse(*inputs, target), inputs)


@every_temperature
@every_kind
def test_every_loss_equals_its_definition_with_equal_cosines(case, kind):
    """Nine pairs of five cosines, or of five pairs of vectors."""
    places = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 0])
    inputs, target = [values.detach()[places].requires_grad_() for values in case.inputs()], labels(kind)
    found, expected = case.loss(*inputs, target, temperature=0.3), case.naive(*inputs, target, 0.3)
    assert_same_with_gradients(found, expected, inputs)


@every_temperature
def test_the_default_temperature_is_a_twentieth(case):
    inputs, target = case.inputs(), labels("graded")
    assert case.loss(*inputs, target) == case.loss(*inputs, target, temperature=0.05)


@every_loss
@every_kind
def test_gradients_by_finite_differences(case, kind):
    assert torch.autograd.gradcheck(lambda *inputs: case.loss(*inputs, labels(kind)), case.inputs())


@pytest.mark.parametrize("t", [0.05, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cosent_equals_sentence_transformers(t, dtype):
    """300 pairs of six labels, on embeddings, so that ours gets the cosines that theirs computes."""
    sides = vectors(300, dtype)
    target = (torch.rand(300, generator=torch.Generator().manual_seed(3)) * 5).round() / 5
    theirs = CoSENTLoss(None, scale=1 / t)
    expected = theirs.compute_loss_from_embeddings(sides, target)
    found = cosent(theirs.similarity_fct(*sides), target, temperature=t)
    assert_same_with_gradients(found, expected, sides, rtol=1e-4, atol=1e-4)  # gradients reach 2 to 22


def test_angle_equals_sentence_transformers():
    sides, target = vectors(), labels("graded")
    assert_same_with_gradients(
        angle(*sides, target), AnglELoss(None).compute_loss_from_embeddings(sides, target), sides
    )


def test_cosine_mse_equals_sentence_transformers():
    sides, target = vectors(dtype=torch.float32), labels("graded").float()
    found = cosine_mse(torch.cosine_similarity(*sides), target)
    expected = CosineSimilarityLoss(None).compute_loss_from_embeddings(sides, target)
    assert_same_with_gradients(found, expected, sides)


@every_kind
def test_rank_kl_is_list_net_with_targets_from_ranks_less_their_entropy(kind):
    """So its gradient is ListNet's: the entropy of P depends on the labels alone."""
    inputs, target = cosines(), labels(kind)
    gain = torch.from_numpy((9 - rankdata(-target.numpy())) / 8)
    p = torch.softmax(gain / 0.05, dim=0)
    entropy = torch.special.entr(p).sum()
    expected = list_net(*inputs, gain) - entropy
    assert_same_with_gradients(rank_kl(*inputs, target, reduction="sum"), expected, inputs)


def test_list_net_is_least_where_cosines_and_labels_differ_by_a_constant():
    target = labels("graded")
    predicted = (target - 0.3).requires_grad_()
    entropy = torch.special.entr(torch.softmax(target / 0.05, dim=0)).sum()
    value = list_net(predicted, target)
    torch.testing.assert_close(value, entropy)
    assert torch.autograd.grad(value, predicted)[0].abs().max() < 1e-10


@every_kind
@pytest.mark.parametrize(("step", "distinct"), [(1e-9, 9), (0.5, 4)])
def test_soft_spearman_becomes_spearman_as_the_temperature_falls(kind, step, distinct):
    predicted, target = (cosines()[0].detach() / step).round() * step, labels(kind)
    assert len(predicted.unique()) == distinct
    expected = 1 - spearmanr(predicted, target).statistic
    assert abs(soft_spearman(predicted, target, temperature=0.5).item() - expected) > 1e-3
    assert soft_spearman(predicted, target, temperature=1e-4).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("spread", [0.1, 0.2, 0.3])
@pytest.mark.parametrize(
    ("t", "furthest", "least", "most"), [(0.05, 0.02, 0.95, 1.0), (0.005, 0.01, 0.5, 0.8)], ids=["default", "a tenth"]
)
def test_soft_spearman_is_close_to_spearman_and_steady_at_its_default(spread, t, furthest, least, most):
    """The reasons for the default, as the docstring gives them: a lower temperature is closer, but its gradient turns.

    Means of 20 draws of 32 pairs: distance from 1 - Spearman, and the cosine of the gradients before and after jitter.
    """
    distances, turns = [], []
    for seed in range(20):
        noise = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        target, predicted = noise[0], (0.5 + spread * (0.75 * noise[0] + 0.66 * noise[1])).requires_grad_()
        value = soft_spearman(predicted, target, temperature=t)
        jittered = soft_spearman(predicted + 0.02 * noise[2], target, temperature=t)
        gradients = [torch.autograd.grad(loss, predicted)[0] for loss in (value, jittered)]
        distances.append(abs(value.item() - 1 + spearmanr(predicted.detach(), target).statistic))
        turns.append(torch.cosine_similarity(*gradients, dim=0).item())
    assert sum(distances) / 20 < furthest
    assert least < sum(turns) / 20 < most


@every_loss
def test_no_pairs_give_zero_connected_to_the_graph(case):
    inputs = case.inputs(0, torch.float32)
    assert_zero_connected_to_the_graph(case.loss(*inputs, torch.ones(0)), inputs)


@every_temperature
def test_one_pair_gives_zero_connected_to_the_graph(case):
    inputs = case.inputs(1, torch.float32)
    assert_zero_connected_to_the_graph(case.loss(*inputs, torch.ones(1)), inputs)


@losses_named("cosent", "angle", "rank_net", "lambda_rank", "soft_spearman")
@pytest.mark.parametrize("constant", [0.0, 0.1, 1.0])
def test_equal_labels_give_zero_connected_to_the_graph(case, constant):
    inputs = case.inputs(7, torch.float32)
    assert_zero_connected_to_the_graph(case.loss(*inputs, torch.full((7,), constant)), inputs)


@losses_named("list_net", "list_mle")
def test_equal_labels_ask_the_listwise_losses_for_equal_cosines(case):
    """Both are then logsumexp(c/t) - mean(c/t), which is least, ln 7, for equal cosines."""
    inputs, target = cosines(7), torch.full((7,), 0.4)
    scaled = inputs[0] / 0.5
    assert_same_with_gradients(case.loss(*inputs, target, temperature=0.5), scaled.logsumexp(0) - scaled.mean(), inputs)
    assert case.loss(torch.full((7,), 0.3), target).item() == pytest.approx(math.log(7))


@losses_named("lambda_rank", "soft_spearman")
@pytest.mark.parametrize("constant", [0.0, 0.1, 0.9999])
def test_equal_cosines_give_losses_of_their_ranks_zero_connected_to_the_graph(case, constant):
    predicted = torch.full((7,), constant, requires_grad=True)
    assert_zero_connected_to_the_graph(case.loss(predicted, torch.linspace(0, 1, 7)), [predicted])


@losses_named("cosent", "list_net", "list_mle", "rank_net", "cosine_mse")
def test_equal_cosines_are_pulled_up_where_the_label_is_high(case):
    predicted = torch.full((7,), 0.1, requires_grad=True)
    gradient = torch.autograd.grad(case.loss(predicted, torch.linspace(0, 1, 7)), predicted)[0]
    assert gradient.isfinite().all()
    assert gradient[-1] < -1e-3
    assert gradient[0] > 1e-3


def test_equal_cosines_by_hand():
    """Seven distinct labels make 21 ordered pairs, each with e^0 in CoSENT and ln 2 in RankNet."""
    predicted, target = torch.full((7,), 0.1), torch.linspace(0, 1, 7)
    assert cosent(predicted, target).item() == pytest.approx(math.log(22))
    assert rank_net(predicted, target).item() == pytest.approx(math.log(2))
    # drawn with equal chances among 7, 6, ... 1 left
    assert list_mle(predicted, target).item() == pytest.approx(math.log(math.factorial(7)) / 7)


def test_angle_of_equal_vectors():
    """Every similarity is 1, as if all cosines were equal; the gradients along the angle are not zero."""
    left = torch.randn(1, 6, generator=torch.Generator().manual_seed(4)).repeat(7, 1).requires_grad_()
    right = left.detach().clone().requires_grad_()
    value = angle(left, right, torch.linspace(0, 1, 7))
    assert value.item() == pytest.approx(math.log(22), rel=1e-5)
    gradients = torch.autograd.grad(value, [left, right])
    assert all(gradient.isfinite().all() and gradient[0].abs().max() > 1e-3 for gradient in gradients)


def test_angle_of_zero_vectors():
    """Pair 0 has a zero vector, pair 1 two: similarity 0 and no gradient; pair 2 of one vector has 1.

    Labels (0, .5, 1), t = 1: ln(1 + e^(0 - 0) + 2 e^(0 - 1)) = ln 2.735759 = 1.006408
    """
    left = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 0.0]], requires_grad=True)
    right = torch.tensor([[1.0, 2.0], [0.0, 0.0], [5.0, 0.0]], requires_grad=True)
    value = angle(left, right, torch.tensor([0.0, 0.5, 1.0]), temperature=1.0)
    assert value.item() == pytest.approx(1.006408, abs=1e-6)
    for gradient in torch.autograd.grad(value, [left, right]):
        assert not gradient[:2].any()
        assert gradient[2].isfinite().all()
        assert gradient[2].any()


def test_angle_of_an_odd_number_of_dimensions_is_padded():
    (left, right), target = vectors(), labels("graded")
    padded = [torch.nn.functional.pad(side[:, :5], (0, 1)) for side in (left, right)]
    assert angle(left[:, :5], right[:, :5], target) == angle(*padded, target)


@every_loss
@every_kind
def test_bf16_is_computed_in_float32(case, kind):
    halves, target = case.inputs(9, torch.bfloat16), labels(kind).float()
    singles = [half.detach().float().requires_grad_() for half in halves]
    found, expected = case.loss(*halves, target), case.loss(*singles, target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    for half, single in zip(torch.autograd.grad(found, halves), torch.autograd.grad(expected, singles), strict=True):
        assert single.abs().max() > 1e-4
        torch.testing.assert_close(half.float(), single, rtol=1e-2, atol=1e-6)  # rounded to bf16 on its way out


@every_loss
@every_kind
def test_float32_and_float64_agree(case, kind):
    single = case.loss(*case.inputs(dtype=torch.float32), labels(kind).float())
    double = case.loss(*case.inputs(), labels(kind))
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert single.item() == pytest.approx(double.item(), rel=1e-5, abs=1e-6)


@losses_named("cosent", "list_net", "list_mle", "rank_net", "lambda_rank", "soft_spearman")
def test_cosines_at_the_ends_and_a_low_temperature_stay_finite(case):
    """Differences of 2 at t = 0.005 are exponents of 400; e^400 is no float32, nor e^-400."""
    predicted = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.99], requires_grad=True)
    value = case.loss(predicted, torch.tensor([0.0, 1.0, 0.2, 0.9, 0.5]), temperature=0.005)
    assert value.isfinite()
    assert value > 1
    assert torch.autograd.grad(value, predicted)[0].isfinite().all()


@every_loss
def test_a_column_of_a_matrix_will_do(case):
    """Its elements are not side by side in memory, and a warning, which some operations give then, is an error here."""
    inputs, target = case.inputs(), labels("graded")
    columns = [torch.stack([values, values], dim=-1)[..., 0] for values in (*inputs, target)]
    assert not any(column.is_contiguous() for column in columns)
    torch.testing.assert_close(case.loss(*columns), case.loss(*inputs, target))


@every_loss
def test_nothing_waits_for_the_device(case):
    """Tensors on the meta device have no values: a shape or a branch that depends on one raises."""
    inputs = [values.detach().to("meta").requires_grad_() for values in case.inputs()]
    torch.autograd.grad(case.loss(*inputs, labels("graded").to("meta")), inputs)


def test_the_test_above_can_fail():
    """PRO asks how many distinct labels there are."""
    with pytest.raises(NotImplementedError, match="Meta"):
        pro(*(values.detach().to("meta") for values in (*cosines(), labels("graded"))))


@every_loss
@every_kind
def test_order_of_pairs_does_not_matter(case, kind):
    inputs, target = case.inputs(), labels(kind)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    found = case.loss(*(values[order] for values in inputs), target[order])
    assert_same_with_gradients(found, case.loss(*inputs, target), inputs)


@every_loss
def test_whether_only_differences_of_cosines_count(case):
    inputs, target = case.inputs(), labels("graded")
    shifted = case.loss(*(values + 0.2 for values in inputs), target)
    assert torch.allclose(shifted, case.loss(*inputs, target)) is case.only_differences_count


@every_loss
@pytest.mark.parametrize("kind", ["graded", "distinct"])
def test_whether_only_the_order_of_labels_counts(case, kind):
    inputs, target = case.inputs(), labels(kind)
    value = case.loss(*inputs, target)
    for increasing in (torch.exp, lambda y: 5 * y + 2, lambda y: y**3 / 2):
        assert torch.allclose(case.loss(*inputs, increasing(target)), value) is case.only_order_counts
    assert not torch.allclose(case.loss(*inputs, -target), value)


def test_angle_does_not_see_the_length_of_embeddings():
    (left, right), target = vectors(), labels("graded")
    torch.testing.assert_close(angle(3 * left, 0.2 * right, target), angle(left, right, target))


@every_loss
@pytest.mark.parametrize("shapes", [((3,), (4,)), ((3,), (3, 1)), ((3, 1), (3, 1, 1)), ((), ())], ids=str)
def test_other_shapes_are_refused(case, shapes):
    sides = [torch.zeros(shapes[0])]
    if case.loss is angle:
        sides.append(torch.zeros(shapes[1]))
    with pytest.raises(ValueError, match=rf"^{case.shape_error}: got shapes"):
        case.loss(*sides, torch.zeros(shapes[1]))


def test_another_number_of_labels_is_refused_by_angle():
    with pytest.raises(ValueError, match=r"^predicted and target: got shapes \(9,\) and \(4,\)"):
        angle(*vectors(), torch.ones(4))


@every_temperature
@pytest.mark.parametrize("temperature", [0.0, -0.05])
def test_a_temperature_not_above_zero_is_refused(case, temperature):
    with pytest.raises(ValueError, match=r"^temperature: got"):
        case.loss(*case.inputs(), labels("graded"), temperature=temperature)


@pytest.mark.parametrize("temperature", [0.0, -0.05])
def test_a_temperature_of_the_labels_not_above_zero_is_refused(temperature):
    with pytest.raises(ValueError, match=r"^target_temperature: got"):
        list_net(*cosines(), labels("graded"), target_temperature=temperature)
