"""Pearson, RankKL, PRO and MidNCE against their definitions, spelled out with NumPy, SciPy and loops."""

import math

import pytest
import torch
from scipy.stats import pearsonr, rankdata
from torch.utils._python_dispatch import TorchDispatchMode

from codiemb.losses import below
from codiemb.losses.retrieval import info_nce
from codiemb.losses.similarity import mid_nce, pearson, pro, rank_kl

LABELS = {
    "graded": [0.0, 0.2, 0.2, 0.4, 0.6, 0.6, 1.0, 1.0, 0.8],
    "distinct": [0.05, 0.9, 0.35, 0.8, 0.1, 0.55, 0.7, 0.25, 1.0],
    "binary": [0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0],
    "all but one equal": [0.5, 0.5, 0.5, 0.5, 1.0, 0.5, 0.5, 0.5, 0.5],
}
ON_COSINES = {"pearson": pearson, "rank_kl": rank_kl, "pro": pro}


def cosines(n=9, dtype=torch.float64, seed=0):
    random = torch.Generator().manual_seed(seed)
    return (torch.rand(n, generator=random, dtype=torch.float64) * 1.6 - 0.8).to(dtype).requires_grad_()


def vectors(n, dtype=torch.float64, seed=1):
    random = torch.Generator().manual_seed(seed)
    sides = torch.randn(2, n, 6, generator=random, dtype=torch.float64)
    return [side.to(dtype).requires_grad_() for side in torch.nn.functional.normalize(sides, dim=-1)]


def labels(kind):
    return torch.tensor(LABELS[kind], dtype=torch.float64)


def naive_rank_kl(predicted, target, t):
    n = len(predicted)
    gain = [(n - 1 - (rank - 1)) / (n - 1) for rank in rankdata(-target.numpy(), method="average")]
    p_total = sum(math.exp(g / t) for g in gain)
    q_total = sum(torch.exp(c / t) for c in predicted)
    total = torch.zeros((), dtype=torch.float64)
    for g, c in zip(gain, predicted, strict=True):
        p, q = math.exp(g / t) / p_total, torch.exp(c / t) / q_total
        total = total + p * torch.log(p / q)
    return total


def naive_pro(predicted, target, t):
    terms = []
    for c_k, y_k in zip(predicted, target, strict=True):
        below = [(c_j, y_k - y_j) for c_j, y_j in zip(predicted, target, strict=True) if y_j < y_k]
        if below:
            own = torch.exp(max(w for _, w in below) * c_k / t)
            terms.append(-torch.log(own / (own + sum(torch.exp(w * c_j / t) for c_j, w in below))))
    return sum(terms) / len(terms)


def assert_same_with_gradient(found, expected, predicted):
    found_gradient, expected_gradient = (torch.autograd.grad(loss, predicted)[0] for loss in (found, expected))
    assert expected_gradient.abs().max() > 1e-4, "the test would compare zeros"
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_gradient, expected_gradient)


def test_pearson_by_hand():
    """(1, 2, 3) and (1, 3, 2) less their means: (-1, 0, 1) and (-1, 1, 0); r = 1 / sqrt(2 * 2) = 1/2; loss 1/2."""
    assert pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0])).item() == pytest.approx(0.5)


def test_rank_kl_by_hand():
    """Equal cosines, labels (1, 0), t = 1: gains (1, 0), so P = (e, 1) / (e + 1) = (.731059, .268941), Q = (.5, .5).

    KL = .731059 ln 1.462117 + .268941 ln .537883 = .277719 - .166774 = 0.110944; over n = 2: 0.055472
    """
    predicted, target = torch.zeros(2), torch.tensor([1.0, 0.0])
    divergence = rank_kl(predicted, target, temperature=1.0, reduction="sum")
    assert divergence.item() == pytest.approx(0.110944, abs=1e-6)
    assert rank_kl(predicted, target, temperature=1.0).item() == pytest.approx(0.055472, abs=1e-6)


def test_pro_by_hand():
    """Labels (0, .5, 1), cosines (.2, .4, .6), t = 1.

    k = 1: w = .5, own .5 * .4 = .2, against .5 * .2 = .1:                   ln(1 + e^-.1)  = 0.644397
    k = 2: w = 1, own .6, against 1 * .2 = .2 and .5 * .4 = .2:              ln(1 + 2e^-.4) = 0.850425
    k = 0 has nobody below it; mean 0.747411
    """
    loss = pro(torch.tensor([0.2, 0.4, 0.6]), torch.tensor([0.0, 0.5, 1.0]), temperature=1.0)
    assert loss.item() == pytest.approx(0.747411, abs=1e-6)


def test_mid_nce_by_hand():
    """Only pair 0 reaches the threshold: own 1, against the other right text .6, t = 1: ln(1 + e^-.4) = 0.513015."""
    left, right = torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    loss = mid_nce(left, right, torch.tensor([1.0, 0.9]), temperature=1.0)
    assert loss.item() == pytest.approx(0.513015, abs=1e-6)


@pytest.mark.parametrize("kind", LABELS)
def test_pearson_equals_scipy(kind):
    predicted, target = cosines(), labels(kind)
    assert pearson(predicted, target).item() == pytest.approx(1 - pearsonr(predicted.detach(), target).statistic)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("t", [0.05, 0.5])
def test_rank_kl_equals_the_definition_in_both_reductions(kind, t):
    predicted, target = cosines(), labels(kind)
    expected = naive_rank_kl(predicted, target, t)
    assert_same_with_gradient(rank_kl(predicted, target, temperature=t, reduction="sum"), expected, predicted)
    expected = naive_rank_kl(predicted, target, t) / 9
    assert_same_with_gradient(rank_kl(predicted, target, temperature=t), expected, predicted)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("t", [0.05, 0.5])
def test_pro_equals_the_definition(kind, t):
    predicted, target = cosines(), labels(kind)
    expected = naive_pro(predicted, target, t)
    assert_same_with_gradient(pro(predicted, target, temperature=t), expected, predicted)


def many_labels(distinct, n=40):
    """Labels in no order, the highest twice: with 40, all others differ."""
    random = torch.Generator().manual_seed(3)
    inner = torch.randint(1, distinct - 1, (n - 3,), generator=random) if distinct < n else torch.arange(1, n - 2)
    whole = torch.cat([torch.tensor([0, distinct - 1, distinct - 1]), inner])
    return (whole.double() / (distinct - 1))[torch.randperm(n, generator=random)]


@pytest.mark.parametrize("distinct", [3, 7, 40])
@pytest.mark.parametrize("tile", [1, 80, 130, 2**18])
def test_pro_is_the_same_whatever_the_tile(monkeypatch, tile, distinct):
    """One level at a time; two; three, of which the last tile has fewer where all differ; all levels at once."""
    monkeypatch.setattr(below, "TILE", tile)
    predicted, target = cosines(40), many_labels(distinct)
    expected = naive_pro(predicted, target, 0.05)
    assert_same_with_gradient(pro(predicted, target), expected, predicted)


@pytest.mark.parametrize("distinct", [3, 7, 40])
@pytest.mark.parametrize("tile", [1, 80])
def test_gradients_of_pro_in_tiles_by_finite_differences(monkeypatch, tile, distinct):
    monkeypatch.setattr(below, "TILE", tile)
    assert torch.autograd.gradcheck(lambda predicted: pro(predicted, many_labels(distinct)), [cosines(40)])


def test_pro_in_tiles_of_bf16_is_computed_in_float32(monkeypatch):
    monkeypatch.setattr(below, "TILE", 80)
    half, target = cosines(40, torch.bfloat16), many_labels(40)
    single = half.detach().float().requires_grad_()
    found, expected = pro(half, target), pro(single, target)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(value, at)[0].float() for value, at in ((found, half), (expected, single))]
    assert gradients[0].isfinite().all()
    assert gradients[1].abs().max() > 1e-4
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Records the number of entries of the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, torch.Tensor):
                self.entries = max(self.entries, result.numel())
        return results


@pytest.mark.parametrize("tile", [100, 4000])
def test_pro_makes_no_tensor_larger_than_a_tile(monkeypatch, tile):
    """A table of 600 continuous labels x 600 pairs has 360,000 entries; a tile is never smaller than one level."""
    monkeypatch.setattr(below, "TILE", tile)
    predicted, target = cosines(600), torch.rand(600, dtype=torch.float64)
    with LargestTensor() as largest:
        pro(predicted, target).backward()
    assert predicted.grad.abs().max() > 1e-4
    assert 600 <= largest.entries <= max(tile, 600)


def test_mid_nce_equals_the_definition():
    """Pairs 0, 2, 3 count; pairs 2 and 4 have the same right text, which is no negative of pair 2."""
    (left, right), target = vectors(5), torch.tensor([1.0, 0.5, 0.8, 1.0, 0.2])
    right_ids = torch.tensor([1, 2, 3, 4, 3])
    terms = []
    for i in (0, 2, 3):
        own = torch.exp(left[i] @ right[i] / 0.1)
        total = own + sum(torch.exp(left[i] @ right[j] / 0.1) for j in range(5) if right_ids[j] != right_ids[i])
        terms.append(-torch.log(own / total))
    expected = sum(terms) / 3
    found = mid_nce(left, right, target, right_ids=right_ids, threshold=0.8, temperature=0.1)
    for side in (left, right):
        gradients = [torch.autograd.grad(loss, side, retain_graph=True)[0] for loss in (found, expected)]
        assert gradients[1].abs().max() > 1e-3
        torch.testing.assert_close(*gradients)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("loss", ON_COSINES.values(), ids=ON_COSINES)
def test_gradients_by_finite_differences(loss, kind):
    assert torch.autograd.gradcheck(lambda predicted: loss(predicted, labels(kind)), [cosines()])


def test_mid_nce_gradients_by_finite_differences():
    target, ids = torch.tensor([1.0, 1.0, 0.4, 1.0]), torch.tensor([1, 2, 3, 2])
    assert torch.autograd.gradcheck(
        lambda left, right: mid_nce(left, right, target, right_ids=ids, temperature=0.5), vectors(4)
    )


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("loss", ON_COSINES.values(), ids=ON_COSINES)
def test_one_pair_or_none_gives_zero_connected_to_the_graph(loss, n):
    predicted = torch.full((n,), 0.3, requires_grad=True)
    value = loss(predicted, torch.ones(n))
    assert value == 0
    assert torch.equal(torch.autograd.grad(value, predicted)[0], torch.zeros(n))


@pytest.mark.parametrize("constant", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("loss", [pearson, pro])
def test_equal_labels_give_zero_connected_to_the_graph(loss, constant):
    """n = 7 and 0.1: the float32 mean of seven 0.1 is not 0.1, so a plain comparison with 0 would miss it."""
    predicted = cosines(7, torch.float32)
    value = loss(predicted, torch.full((7,), constant))
    assert value == 0
    assert torch.equal(torch.autograd.grad(value, predicted)[0], torch.zeros(7))


def test_equal_labels_ask_rank_kl_for_equal_cosines():
    """P is uniform: KL = -ln 7 - mean(c / t) + logsumexp(c / t), and 0 for equal cosines."""
    predicted = cosines(7)
    value = rank_kl(predicted, torch.full((7,), 0.4), temperature=0.5, reduction="sum")
    scaled = predicted.detach() / 0.5
    assert value.item() == pytest.approx((scaled.logsumexp(0) - scaled.mean() - math.log(7)).item())
    assert rank_kl(torch.full((7,), 0.3), torch.full((7,), 0.4)).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("constant", [0.0, 0.1, 0.9999])
def test_equal_predictions_give_pearson_zero_connected_to_the_graph(constant):
    predicted = torch.full((7,), constant, requires_grad=True)
    value = pearson(predicted, torch.linspace(0, 1, 7))
    assert value == 0
    assert torch.equal(torch.autograd.grad(value, predicted)[0], torch.zeros(7))


@pytest.mark.parametrize("loss", [rank_kl, pro])
def test_equal_predictions_pull_high_labels_up(loss):
    predicted = torch.full((7,), 0.1, requires_grad=True)
    gradient = torch.autograd.grad(loss(predicted, torch.linspace(0, 1, 7)), predicted)[0]
    assert gradient.isfinite().all()
    assert gradient[-1] < -1e-3
    assert gradient[0] > 1e-3


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("loss", ON_COSINES.values(), ids=ON_COSINES)
def test_bf16_is_computed_in_float32(loss, kind):
    half, target = cosines(9, torch.bfloat16), labels(kind).float()
    single = half.detach().float().requires_grad_()
    found, expected = loss(half, target), loss(single, target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(value, at)[0].float() for value, at in ((found, half), (expected, single))]
    assert gradients[1].abs().max() > 1e-4
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-6)  # rounded to bf16 on its way out


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("loss", ON_COSINES.values(), ids=ON_COSINES)
def test_float32_and_float64_agree(loss, kind):
    single = loss(cosines(dtype=torch.float32), labels(kind).float())
    double = loss(cosines(), labels(kind))
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert single.item() == pytest.approx(double.item(), rel=1e-5, abs=1e-6)


def test_pearson_does_not_change_under_affine_maps():
    predicted, target = cosines(), labels("graded")
    value = pearson(predicted, target)
    torch.testing.assert_close(pearson(3 * predicted - 7, target), value)
    torch.testing.assert_close(pearson(predicted, 5 * target + 2), value)
    torch.testing.assert_close(pearson(-predicted, target), 2 - value)


def test_pearson_sees_small_differences_of_large_cosines():
    """Cosines of an untrained encoder lie close together; they are not taken for constant."""
    target = torch.tensor([0.0, 0.5, 1.0])
    assert pearson(torch.tensor([0.99, 0.9901, 0.9902]), target).item() == pytest.approx(0, abs=1e-3)
    assert pearson(torch.tensor([0.9902, 0.9901, 0.99]), target).item() == pytest.approx(2, abs=1e-3)


@pytest.mark.parametrize("kind", LABELS)
def test_rank_kl_depends_on_the_order_of_labels_only(kind):
    predicted, target = cosines(), labels(kind)
    value = rank_kl(predicted, target)
    for increasing in (torch.exp, lambda y: 5 * y + 2, lambda y: y**3):
        assert rank_kl(predicted, increasing(target)) == value
    assert rank_kl(predicted, -target) != value


@pytest.mark.parametrize("loss", ON_COSINES.values(), ids=ON_COSINES)
def test_order_of_pairs_does_not_matter(loss):
    predicted, target = cosines(), labels("graded")
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    assert_same_with_gradient(loss(predicted[order], target[order]), loss(predicted, target), predicted)


def test_order_of_pairs_does_not_matter_to_mid_nce():
    (left, right), target = vectors(5), torch.tensor([1.0, 0.5, 1.0, 1.0, 0.2])
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(mid_nce(left[order], right[order], target[order]), mid_nce(left, right, target))


def test_mid_nce_threshold_is_reached_by_equality():
    (left, right), ids = vectors(3), torch.arange(3)
    two = info_nce(left, right, owner=ids, positive=torch.tensor([True, False, True]))
    torch.testing.assert_close(mid_nce(left, right, torch.tensor([0.6, 0.59, 1.0]), threshold=0.6), two)


@pytest.mark.parametrize("target", [[0.9, 0.2, 0.5], [0.0, 0.0, 0.0]])
def test_mid_nce_without_a_high_label_gives_zero_connected_to_the_graph(target):
    left, right = vectors(3)
    value = mid_nce(left, right, torch.tensor(target))
    assert value == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(value, [left, right]))


def test_mid_nce_of_one_pair_is_zero():
    left, right = vectors(1)
    value = mid_nce(left, right, torch.ones(1))
    assert value == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(value, [left, right]))


def test_mid_nce_in_bf16_is_computed_in_float32():
    half = vectors(6, torch.bfloat16)
    value = mid_nce(*half, torch.ones(6))
    torch.testing.assert_close(value, mid_nce(*(side.detach().float() for side in half), torch.ones(6)))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in torch.autograd.grad(value, half))


@pytest.mark.parametrize("loss", ON_COSINES.values(), ids=ON_COSINES)
def test_a_column_of_a_matrix_will_do(loss):
    predicted, target = cosines(), labels("graded")
    columns = torch.stack([predicted, target], dim=1)
    torch.testing.assert_close(loss(columns[:, 0], columns[:, 1]), loss(predicted, target))


@pytest.mark.parametrize("loss", ON_COSINES.values(), ids=ON_COSINES)
@pytest.mark.parametrize("shapes", [((3,), (4,)), ((3,), (3, 1)), ((3, 1), (3, 1)), ((), ())], ids=str)
def test_other_shapes_are_refused(loss, shapes):
    with pytest.raises(ValueError, match=r"^predicted and target: got shapes"):
        loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_other_shapes_are_refused_by_mid_nce():
    left, right = vectors(3)
    with pytest.raises(ValueError, match=r"^positive: got shape \(4,\), expected \(3,\)"):
        mid_nce(left, right, torch.ones(4))
    with pytest.raises(ValueError, match=r"^owner: got shape \(3,\), expected \(2,\)"):
        mid_nce(left, right[:2], torch.ones(2))


@pytest.mark.parametrize("loss", [rank_kl, pro])
@pytest.mark.parametrize("temperature", [0.0, -0.05])
def test_a_temperature_not_above_zero_is_refused(loss, temperature):
    with pytest.raises(ValueError, match=r"^temperature: got"):
        loss(cosines(), labels("graded"), temperature=temperature)


def test_mid_nce_does_not_push_a_text_away_from_itself():
    """Pairs (a, b) and (b, a): with ids nothing is left to compare with, so the loss is 0; without, a meets a."""
    a, b = torch.eye(2)
    left, right, target = torch.stack([a, b]), torch.stack([b, a]), torch.ones(2)
    ids = {"left_ids": torch.tensor([1, 2]), "right_ids": torch.tensor([2, 1])}
    assert mid_nce(left, right, target, **ids).item() == 0
    # s(a, b) = 0 against s(a, a) = 1 at temperature 0.02: log(1 + e^50) = 50
    assert mid_nce(left, right, target).item() == pytest.approx(50)
