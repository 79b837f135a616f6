"""Every measure equals its definition, written out in NumPy with loops over rows and pairs."""

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine as cosine_distance

from codiemb.evaluation import geometry
from codiemb.evaluation.geometry import (
    alignment,
    hubness,
    iso_score,
    linear_cka,
    mean_cosine,
    sentence_measures,
    singular_values,
    spectral,
    token_measures,
    uniformity,
)


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    """Seven rows at once, so that the matrices here have several blocks and a last one that is not full."""
    monkeypatch.setattr(geometry, "_ROWS_AT_ONCE", 7)


def drawn(rows, dim, seed=0, rank=None):
    """Vectors around a common direction, as encoders give them; of the given rank."""
    random = np.random.default_rng(seed)
    inner = rank or min(rows, dim)
    matrix = random.normal(size=(rows, inner)) @ random.normal(size=(inner, dim))
    matrix += matrix.mean(axis=0) * 3
    return torch.from_numpy(matrix.astype(np.float32))


SHAPES = {
    "more rows": drawn(40, 9),
    "more dimensions": drawn(9, 40),
    "square": drawn(12, 12),
    "rank 3": drawn(20, 8, rank=3),
}


def units(matrix):
    matrix = matrix.double().numpy()
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def naive_spectral(matrix):
    """From the singular values of LAPACK's decomposition, those that the rank leaves out as 0."""
    rank = int(np.linalg.matrix_rank(matrix.numpy()))
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)[:rank]
    shares, energies = values / values.sum(), values**2 / (values**2).sum()
    most = np.log(min(matrix.shape))
    return {
        "rank": rank,
        "effective_rank": np.exp(-sum(share * np.log(share) for share in shares)),
        "svd_entropy": -sum(energy * np.log(energy) for energy in energies) / most if most else 0,
        "condition_number": values[0] / values[-1],
    }


@pytest.mark.parametrize("matrix", SHAPES.values(), ids=SHAPES)
def test_spectra(matrix):
    values = singular_values(matrix)
    np.testing.assert_allclose(
        values, np.linalg.svd(matrix.double().numpy(), compute_uv=False), rtol=0, atol=1e-7 * float(values[0])
    )
    found = spectral(values, torch.tensor(float(len(matrix))), matrix.shape[1])
    for name, expected in naive_spectral(matrix).items():
        assert float(found[name]) == pytest.approx(expected, rel=1e-8), name


def test_spectra_by_hand():
    """diag(3, 4, 0): values 4, 3. Shares 4/7 and 3/7, entropy 0.682908, so 1.979626 directions. Squares 16/25 and 9/25,
    entropy 0.653418 of log 3. Condition 4/3."""
    matrix = torch.diag(torch.tensor([3.0, 4.0, 0.0]))
    found = {name: float(value) for name, value in spectral(singular_values(matrix), torch.tensor(3.0), 3).items()}
    assert found == {
        "rank": 2,
        "effective_rank": pytest.approx(1.979626, abs=1e-6),
        "svd_entropy": pytest.approx(0.653418 / np.log(3), abs=1e-6),
        "condition_number": pytest.approx(4 / 3),
    }


def test_a_direction_that_only_rounding_fills_is_not_counted():
    """float32 holds 24 bits: a value of 1e-7 of the largest is not there, one of 1e-5 is; in 1,000 rows or dimensions,
    of which roundings come together, it is not."""
    for smallest, width, rank in ((1e-7, 3, 2), (1e-5, 3, 3), (1e-5, 1000, 2)):
        matrix = torch.nn.functional.pad(torch.diag(torch.tensor([1.0, 0.5, smallest])), (0, width - 3))
        for turned in (matrix, matrix.mT):
            values = singular_values(turned)
            assert float(spectral(values, torch.tensor(float(len(turned))), turned.shape[1])["rank"]) == rank
            assert np.linalg.matrix_rank(turned.numpy()) == rank


def test_tokens_of_each_text_alone_whatever_stands_behind_its_mask():
    """Texts of 5, 1, 12 and 2 tokens padded to 12, on either side; also more tokens than dimensions (12 > 6)."""
    lengths, dim = [5, 1, 12, 2], 6
    texts = [drawn(length, dim, seed=length) for length in lengths]
    states, mask = torch.full((4, 12, dim), 7.0), torch.zeros(4, 12, dtype=torch.bool)
    for row, text in enumerate(texts):
        place = slice(len(text)) if row % 2 else slice(12 - len(text), 12)
        states[row, place], mask[row, place] = text, True
    found = token_measures(states, mask)
    assert bool(torch.isnan(found["cosine"][1]))
    for row, text in enumerate(texts):
        if len(text) > 1:
            pairs = [1 - cosine_distance(*pair) for pair in combinations(text.double().numpy(), 2)]
            assert float(found["cosine"][row]) == pytest.approx(np.mean(pairs), abs=1e-12)
        for name, expected in naive_spectral(text).items():
            assert float(found[name][row]) == pytest.approx(expected, rel=1e-8), (name, row)


@pytest.mark.parametrize("matrix", SHAPES.values(), ids=SHAPES)
def test_cosine_uniformity_and_alignment(matrix):
    pairs = list(combinations(units(matrix), 2))
    assert mean_cosine(matrix) == pytest.approx(np.mean([u @ v for u, v in pairs]), abs=1e-12)
    mean = np.mean([np.exp(-2 * ((u - v) ** 2).sum()) for u, v in pairs])
    assert uniformity(matrix) == pytest.approx(np.log(mean), abs=1e-6)
    left, right = matrix[0::2], matrix[1::2]
    expected = np.mean([((u - v) ** 2).sum() for u, v in zip(units(left), units(right), strict=False)])
    assert alignment(left[: len(right)], right) == pytest.approx(expected, abs=1e-12)


def test_uniformity_by_hand():
    """Four corners of a square: distances squared 2, 2, 4 from each, so log((2 e^-4 + e^-8) / 3)."""
    square = torch.tensor([[1.0, 0], [0, 2], [-3, 0], [0, -4]])
    assert uniformity(square) == pytest.approx(np.log((2 * np.exp(-4) + np.exp(-8)) / 3), abs=1e-6)
    assert mean_cosine(square) == pytest.approx(-1 / 3)


@pytest.mark.parametrize("matrix", SHAPES.values(), ids=SHAPES)
def test_iso_score_in_the_steps_of_the_paper(matrix):
    """Definition 3.1: PCA, the diagonal of the covariance, its length brought to that of (1, ..., 1), the distance from
    there, the defect, the dimensions in use, and their share."""
    centred = matrix.double().numpy() - matrix.double().numpy().mean(axis=0)
    n = matrix.shape[1]
    axes = np.linalg.svd(centred, full_matrices=True)[2]
    variances = np.diag(np.cov((centred @ axes.T).T))
    normalised = np.sqrt(n) * variances / np.linalg.norm(variances)
    defect = np.linalg.norm(normalised - 1) / np.sqrt(2 * (n - np.sqrt(n)))
    in_use = (n - defect**2 * (n - np.sqrt(n))) ** 2 / n**2
    assert iso_score(matrix) == pytest.approx((n * in_use - 1) / (n - 1), abs=1e-10)


def test_iso_score_of_a_line_of_a_ball_and_of_a_point():
    assert iso_score(torch.outer(torch.arange(5.0), torch.tensor([1.0, 2, 3]))) == pytest.approx(0, abs=1e-12)
    assert iso_score(torch.cat([torch.eye(3), -torch.eye(3)])) == pytest.approx(1)
    assert iso_score(torch.ones(4, 3)) == 0


@pytest.mark.parametrize("neighbours", [1, 3, 10])
def test_hubness_with_a_sort_of_all_rows(neighbours):
    matrix = drawn(40, 9)
    unit, counts = units(matrix), np.zeros(40)
    for row, u in enumerate(unit):
        others = sorted((other for other in range(40) if other != row), key=lambda other: -(u @ unit[other]))
        counts[others[:neighbours]] += 1
    spread = counts - counts.mean()
    assert hubness(matrix, neighbours) == pytest.approx(np.mean(spread**3) / np.mean(spread**2) ** 1.5, abs=1e-9)


def test_a_hub_and_none():
    """Twelve directions and their mean: with one neighbour each, all choose the mean. On a circle none is chosen more
    often, nor with no more than ten others."""
    star = torch.cat([torch.eye(12), torch.ones(1, 12)])
    assert hubness(star, 1) > 3
    angles = torch.arange(12.0) * 2 * np.pi / 12
    assert hubness(torch.stack([angles.cos(), angles.sin()], dim=1), 2) == 0
    assert hubness(drawn(11, 4)) == 0


@pytest.mark.parametrize("width", [9, 15])
def test_cka_with_gram_matrices_and_the_centring_matrix(width):
    """tr(K H L H) / sqrt(tr(K H K H) tr(L H L H)), the definition by HSIC."""
    one, other = drawn(40, 9), drawn(40, width, seed=1) + torch.nn.functional.pad(drawn(40, 9), (0, width - 9))
    centring = np.eye(40) - 1 / 40
    grams = [centring @ m @ m.T @ centring for m in (one.double().numpy(), other.double().numpy())]
    cross, *own = (np.trace(a @ b) for a, b in ((grams[0], grams[1]), (grams[0], grams[0]), (grams[1], grams[1])))
    assert 0.05 < cross / np.sqrt(np.prod(own)) < 0.95, "neither the same nor nothing in common"
    assert linear_cka(one, other) == pytest.approx(cross / np.sqrt(np.prod(own)), abs=1e-12)


def test_cka_does_not_see_rotation_scale_or_shift_and_sees_a_column_that_grows():
    matrix = drawn(40, 9)
    rotation = torch.linalg.qr(drawn(9, 9, seed=2)).Q
    assert linear_cka(matrix, 3 * matrix @ rotation + 5) == pytest.approx(1, abs=1e-6)
    assert linear_cka(matrix, matrix * torch.tensor([30.0] + 8 * [1.0])) < 0.95


def test_equal_rows_are_told_from_rows_that_differ_by_rounding():
    """As CLS pooling has them in layer 0. Ties between all rows would make a hub of the first, and the quotients of two
    roundings would be anything."""
    row = drawn(1, 9)
    equal = (row * (1 + 1e-7 * drawn(40, 1))).contiguous()
    assert len(equal.unique(dim=0)) > 1
    assert np.isnan(linear_cka(equal, drawn(40, 9)))
    assert np.isnan(linear_cka(drawn(40, 9), equal))
    found = sentence_measures(equal)
    assert found["rank"] == found["condition_number"] == 1
    assert found["hubness"] == found["iso_score"] == found["svd_entropy"] == 0
    assert found["uniformity"] == pytest.approx(0, abs=1e-5)
    assert iso_score(row * (1 + 1e-4 * drawn(40, 9))) > 0.1


def test_all_measures_of_sentences_together():
    matrix, pairs = drawn(40, 9), torch.tensor([[0, 3], [5, 2]])
    found = sentence_measures(matrix, pairs)
    assert found == {
        **{name: pytest.approx(value, rel=1e-8) for name, value in naive_spectral(matrix).items()},
        "cosine": mean_cosine(matrix),
        "uniformity": uniformity(matrix),
        "iso_score": iso_score(matrix),
        "hubness": hubness(matrix),
        "alignment": alignment(matrix[[0, 5]], matrix[[3, 2]]),
    }
    assert "alignment" not in sentence_measures(matrix)
