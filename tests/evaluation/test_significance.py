"""Tests and intervals of differences: against SciPy, by hand, and on data whose truth is known."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from codiemb.evaluation import significance
from codiemb.evaluation.significance import Paired, holm, p_value, random_signs
from codiemb.evaluation.similarity import score


def graded_pairs(random, count, models=2, noise=0.8):
    """Cosines of models that are equally good, [model, item], and labels in steps."""
    truth = random.normal(size=count)
    shared = random.normal(size=count) / 2
    cosines = truth + shared + noise * random.normal(size=(models, count))
    return cosines, np.clip(np.round(2 * truth + 2.5), 0, 5)


def test_p_value_equals_scipys_randomisation():
    """A test of other signs (say, unpaired or one-sided) would be taken for this one."""
    random = np.random.default_rng(0)
    differences = random.normal(0.25, 1, size=40).round(1)
    expected = stats.permutation_test(
        (differences,), lambda x, axis: x.mean(axis), permutation_type="samples", n_resamples=20_000, vectorized=True
    ).pvalue
    found = p_value(differences.mean(), random_signs(differences[None], 20_000, random)[0])
    assert 0.02 < expected < 0.3
    assert found == pytest.approx(expected, abs=0.015)


def test_p_value_by_hand():
    """Three items that differ by 1: of 8 ways to set signs, 2 give a mean as far as 1. With ties counted, p = 1/4."""
    drawn = random_signs(np.ones((1, 3)), 40_000, np.random.default_rng(0))[0]
    assert p_value(1.0, drawn) == pytest.approx(0.25, abs=0.01)
    assert p_value(0.0, drawn) == 1
    assert p_value(-1.0, np.array([0.0, 0.5, -1.0, 0.2])) == 2 / 5


def test_models_share_signs_and_draws():
    """Equal models must not differ by what was drawn for them."""
    random = np.random.default_rng(0)
    values = random.normal(size=(1, 30)).repeat(2, axis=0)
    for drawn in (
        random_signs(values, 50, random),
        significance.bootstrap_means(values, 50, random),
        significance.bootstrap_spearman(values, values[0] ** 2, 50, random),
    ):
        assert drawn.shape == (2, 50)
        assert np.array_equal(drawn[0], drawn[1])
        assert np.ptp(drawn[0]) > 0


@pytest.mark.parametrize("count", [9, 80])
def test_drawn_correlations_equal_scipys(count, monkeypatch):
    """Ranks without sorting are easily half a place off where items are tied or drawn twice. In several blocks."""
    monkeypatch.setattr(significance, "BLOCK", 7 * count)
    cosines, labels = graded_pairs(np.random.default_rng(1), count)
    cosines[1] = cosines[1].round(1)
    found = significance.bootstrap_spearman(cosines, labels, 20, np.random.default_rng(2))
    again = np.random.default_rng(2)
    places = np.concatenate([again.integers(0, count, (size, count)) for size in (7, 7, 6)])
    expected = [[score(row[drawn], labels[drawn])["spearman"] for drawn in places] for row in cosines]
    assert found == pytest.approx(np.array(expected), abs=1e-6)


def test_contributions_to_spearman_are_the_jackknifes():
    """Their mean is the correlation, and each is what leaving its pair out says, to first order.

    Most labels are tied, so that the spread of the ranks depends on a pair as well.
    """
    cosines, labels = graded_pairs(np.random.default_rng(3), 400, models=1)
    cosines, labels = cosines[0].round(1), np.where(labels < 4, 0, labels)
    found = significance.spearman_contributions(cosines, labels)
    whole = score(cosines, labels)["spearman"]
    assert found.mean() == pytest.approx(whole, abs=1e-12)
    without = [score(np.delete(cosines, k), np.delete(labels, k))["spearman"] for k in range(400)]
    left_out = 400 * whole - 399 * np.array(without)
    assert found - found.mean() == pytest.approx(left_out - left_out.mean(), abs=0.03)
    assert found.std() > 0.5


@pytest.mark.parametrize("constant", [0, 1])
def test_a_constant_side_contributes_nothing(constant):
    sides = [np.arange(5.0), np.arange(5.0)]
    sides[constant] = np.ones(5)
    assert np.array_equal(significance.spearman_contributions(*sides), np.zeros(5))
    assert not significance.bootstrap_spearman(sides[0][None], sides[1], 9, np.random.default_rng(0)).any()


def test_interval_equals_scipys():
    """For 25 items Student's quantile is 2.064, times the root of 25 / 24: 2.106, which is SciPy's at 96.48 %."""
    random = np.random.default_rng(4)
    values = random.exponential(size=25) - 0.9
    found = stats.bootstrap((values,), np.mean, n_resamples=30_000, method="percentile", rng=1, confidence_level=0.9648)
    drawn = significance.bootstrap_means(values[None], 30_000, random)[0]
    ours = significance.percentile_interval(drawn, 25, 0.95)
    assert ours == pytest.approx(tuple(found.confidence_interval), abs=0.02)
    assert np.quantile(drawn, 0.975) - ours[1] < -0.02, "the expansion must show to be tested"


def test_holm_by_hand():
    """Sorted 0.01, 0.02, 0.03, 0.5: times 4, 3, 2, 1 gives 0.04, 0.06, 0.06 and 0.5, never falling."""
    assert holm([0.5, 0.02, 0.01, 0.03]) == pytest.approx([0.5, 0.06, 0.04, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_effect_size_by_hand():
    """Differences 1, 2, 3: mean 2, standard deviation 1."""
    assert significance.effect_size(np.array([1.0, 2.0, 3.0])) == 2
    assert significance.effect_size(np.ones(3)) is None


def test_a_mean_counts_each_data_set_the_same():
    """Not each item: 200 items with a difference of 0 and 20 with one of 1 have the mean 1/2."""
    random = np.random.default_rng(5)
    parts = []
    for count, shift in ((200, 0.0), (20, 1.0)):
        difference = stats.zscore(random.normal(size=count)) + shift
        signs, drawn = (
            random_signs(difference[None], 999, random),
            significance.bootstrap_means(difference[None], 999, random),
        )
        parts.append(Paired(0.0, shift, count, signs[0], drawn[0]))
    mean = Paired.mean_of(parts)
    assert mean.model - mean.reference == 0.5
    error = np.sqrt(1 / 200 + 1 / 20) / 2
    assert mean.drawn.std() == pytest.approx(error, rel=0.1)
    assert mean.signs.std() == pytest.approx(np.sqrt(1 / 200 + 2 / 20) / 2, rel=0.1), "about 0, not about 1"
    p, (low, high) = mean.test(0.95)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert low < 0.5 < high
    assert p < 0.01


@pytest.mark.parametrize("kind", ["means", "correlations"])
def test_size_and_coverage_on_models_that_do_not_differ(kind):
    """400 draws: 5 % +- 3.3 % are rejected (three standard errors). The full table is benchmarks/significance.py."""
    random, draws, count, rejected, covered = np.random.default_rng(6), 400, 60, 0, 0
    for _ in range(draws):
        if kind == "means":
            values = np.clip(random.normal(size=(2, count)) / 4 + random.normal(size=count), 0, 1)
            drawn = significance.bootstrap_means(values, 299, random)
        else:
            cosines, labels = graded_pairs(random, count)
            values = np.stack([significance.spearman_contributions(row, labels) for row in cosines])
            drawn = significance.bootstrap_spearman(cosines, labels, 299, random)
        difference = values[1] - values[0]
        signs = random_signs(difference[None], 299, random)[0]
        one = Paired(values[0].mean(), values[1].mean(), count, signs, drawn[1] - drawn[0])
        p, (low, high) = one.test(0.95)
        rejected, covered = rejected + (p <= 0.05), covered + (low <= 0 <= high)
    assert 0.017 <= rejected / draws <= 0.083
    assert covered / draws >= 0.91


@pytest.mark.slow
def test_the_benchmark_finds_what_theory_says():
    """All of benchmarks/significance.py with few draws; bounds of four standard errors. It is what the docs show."""
    script = Path(__file__).parents[2] / "benchmarks" / "significance.py"
    command = [sys.executable, str(script), "--draws", "200", "--resamples", "199"]
    shown = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert shown.returncode == 0, shown.stderr
    lines = {line["case"]: line for line in map(json.loads, shown.stdout.splitlines())}
    single = {name: line for name, line in lines.items() if "theory" in line}
    seeds = {name: line for name, line in lines.items() if "spread_of_seeds" in line}
    assert (len(single), len(seeds), len(lines)) == (11, 6, 19)
    for name, line in single.items():
        error = 100 * (line["theory"] / 100 * (1 - line["theory"] / 100) / 200) ** 0.5
        assert line["rejected"] == pytest.approx(line["theory"], abs=4 * error), name
        assert line["covered"] >= 88, name
    for name, line in seeds.items():
        assert line["covered"]["ours"] >= 90, name
    assert lines["holm"]["any false finding, corrected"] < 10 < lines["holm"]["any false finding, uncorrected"]
