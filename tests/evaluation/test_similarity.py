"""Correlations by SciPy, and 0 where there is none."""

import numpy as np
import pytest
from scipy import stats

from codiemb.evaluation.similarity import score


def test_by_hand():
    """Ranks (1, 2, 3) and (1, 3, 2): 1 - 6 * (0 + 1 + 1) / (3 * 8) = 0.5.

    Values (1, 2, 6) less 3: (-2, -1, 3); (1, 3, 2) less 2: (-1, 1, 0); r = (2 - 1) / sqrt(14 * 2) = 0.188982
    """
    found = score(np.array([1.0, 2.0, 6.0]), np.array([1.0, 3.0, 2.0]))
    assert found == pytest.approx({"spearman": 0.5, "pearson": 0.188982}, abs=1e-6)


def test_equals_scipy_with_ties():
    random = np.random.default_rng(0)
    labels = random.integers(0, 6, 60) / 5
    cosines = (0.3 * labels + random.normal(size=60)).round(1)
    expected = {
        "spearman": stats.pearsonr(stats.rankdata(cosines), stats.rankdata(labels)).statistic,
        "pearson": stats.pearsonr(cosines, labels).statistic,
    }
    assert abs(expected["spearman"] - expected["pearson"]) > 1e-3
    assert score(cosines, labels) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("cosines", "labels"),
    [([0.5, 0.5, 0.5], [0.0, 0.5, 1.0]), ([0.1, 0.2, 0.3], [1.0, 1.0, 1.0]), ([0.4], [1.0]), ([], [])],
    ids=["equal cosines", "equal labels", "one pair", "no pair"],
)
def test_no_correlation_is_zero(cosines, labels):
    assert score(np.array(cosines), np.array(labels)) == {"spearman": 0.0, "pearson": 0.0}
