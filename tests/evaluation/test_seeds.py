"""Differences that should hold for other seeds: the variances by hand, and their size on simulated models."""

import numpy as np
import pytest
from scipy import stats

from codiemb.evaluation.seeds import Crossed, crossed


def scores(random, seeds, items, spread):
    """[seed, item]: each seed shifts all items, and each item of each seed has noise of its own."""
    return spread * random.normal(size=(seeds, 1)) + random.normal(size=(seeds, items))


def test_without_seeds_it_is_the_paired_t_test():
    random = np.random.default_rng(0)
    reference, model = random.normal(size=(2, 30))
    p, interval = crossed(reference[None], model[None]).test(0.95)
    expected = stats.ttest_rel(model, reference)
    assert p == pytest.approx(expected.pvalue)
    assert interval == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_with_very_different_seeds_it_is_welchs_t_test_of_their_means():
    """Here items say nothing: 3 and 4 seeds are a sample of 3 and 4, however many queries there are."""
    random = np.random.default_rng(1)
    reference, model = scores(random, 3, 500, 50.0), scores(random, 4, 500, 20.0)
    p, interval = crossed(reference, model).test(0.95)
    expected = stats.ttest_ind(model.mean(axis=1), reference.mean(axis=1), equal_var=False)
    assert p == pytest.approx(expected.pvalue, rel=1e-2)
    assert interval == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-2)


def test_variances_by_hand():
    """Reference 0, 0 in its one seed; model seeds (1, 2) and (3, 6).

    Item means of the difference are 2 and 4: variance 2, over 2 items 1. Seeds have 1.5 and 4.5: mean 3.
    Less its item's and seed's means plus 3, each cell is +-0.5: the squares sum to 1, one degree of freedom,
    over 4 cells 0.25.
    """
    found = crossed(np.zeros((1, 2)), np.array([[1.0, 2.0], [3.0, 6.0]]))
    assert (found.reference, found.model) == (0, 3)
    assert found.items.variance == 1
    assert found.rest == 0.25
    assert found.spreads == (None, pytest.approx(np.sqrt(4.5)))


def test_a_mean_over_data_sets_keeps_the_seeds_apart():
    """A seed that is good on one data set and bad on the other is neither in the mean."""
    one = crossed(np.zeros((1, 2)), np.array([[1.0, 2.0], [3.0, 6.0]]))
    other = crossed(np.zeros((1, 2)), np.array([[3.0, 6.0], [1.0, 2.0]]))
    mean = Crossed.mean_of([one, other])
    assert mean.model == 3
    assert mean.spreads == (None, 0)
    assert mean.items.variance == 2 / 4
    assert mean.rest == 2 * 0.25 / 4


def test_equal_evaluations_do_not_differ():
    same = np.ones((2, 5))
    assert crossed(same, same).test(0.95) == (1.0, (0.0, 0.0))


@pytest.mark.parametrize(
    ("seeds", "spread"), [((3, 3), 0.2), ((3, 3), 0.0), ((5, 5), 0.2), ((1, 2), 0.5), ((1, 3), 0.3)]
)
def test_size_on_seeds_of_the_same_training(seeds, spread):
    """2,000 draws reject at most 5 % and three standard errors; the bound is on the safe side, but not far.

    A test over items alone finds a difference in most pairs of seeds; Satterthwaite's rejects 7 % of the last case.
    """
    random = np.random.default_rng(2)
    rejected = 0
    for _ in range(2000):
        hard = random.normal(size=100)
        # One evaluation is taken as it is, as of an untrained base: no spread of seeds.
        reference, model = (hard + scores(random, count, 100, spread * (count > 1)) for count in seeds)
        rejected += crossed(reference, model).test(0.95)[0] <= 0.05
    assert 0.01 < rejected / 2000 < 0.065
