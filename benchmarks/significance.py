"""Do the tests of `codiemb compare` hold what they promise? Size, power and coverage on data whose truth is known.

    OMP_NUM_THREADS=1 python benchmarks/significance.py [--draws 2000] [--resamples 999] [--only WORDS]

Each draws two models many times and compares them as the command does, by default on all cores:

    rejected    in percent of the draws, at the level 5 %: the size where the true difference is 0, else the power
    theory      the power of a normal test with the true standard error, in percent
    covered     in percent of the draws: the 95 % interval holds the true difference

nDCG is that of one relevant document whose rank depends on the query and the model; Spearman that of a noisy view of
the truth, with labels in steps as in STS-B. `unequal` models are equally good but in other places: what one gets right
the other does not, so they cannot be exchanged for each other. True differences and standard errors come from 400,000
items.

Cases of seeds are trainings of several seeds each; beside our test, a bootstrap that draws seeds and items, and the
paired test of items alone. `holm`: how often any of five true null hypotheses out of eight is rejected, with and
without the correction. `seconds`: of one data set with two models and 10,000 resamples.

Prints one JSON line for each case.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from machine import commit, machine
from scipy import optimize, stats

from codiemb.evaluation import significance
from codiemb.evaluation.seeds import crossed
from codiemb.versions import versions

LEVEL, MANY = 0.05, 400_000
Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray | None]]  # [model, item], and labels


def search(
    random: np.random.Generator, count: int, gain: float = 0.0, noise: tuple[float, float] = (0.8, 0.8)
) -> tuple[np.ndarray, None]:
    """nDCG@10 of two models, [model, item]; the second ranks its document higher by `gain`, in logarithms."""
    hard = 1 + 1.2 * random.normal(size=count)
    depth = hard + np.array(noise)[:, None] * random.normal(size=(2, count)) - np.array([[0.0], [gain]])
    rank = 1 + np.floor(np.expm1(np.maximum(depth, 0)))
    return np.where(rank <= 10, 1 / np.log2(1 + rank), 0.0), None


def unequal_search() -> Draw:
    """The second model errs more, and gains what it takes to be as good in the mean."""
    noise = (0.3, 1.6)

    def difference(gain: float) -> float:
        values, _ = search(np.random.default_rng(4), MANY, gain, noise)
        return float(values[1].mean() - values[0].mean())

    return partial(search, gain=optimize.brentq(difference, -1, 1, xtol=1e-4), noise=noise)


def pairs(
    random: np.random.Generator, count: int, noise: tuple[float, float] = (0.4, 0.4), unequal: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of two models, [model, item], and labels; `unequal`: one errs on similar pairs, the other on others."""
    truth = random.normal(size=count)
    labels = np.clip(np.round((2.5 + 1.8 * truth) * 5) / 5, 0, 5)
    errors = np.array(noise)[:, None] * random.normal(size=(2, count))
    if unequal:
        errors *= np.exp(np.array([[0.8], [-0.8]]) * truth)
    return truth + 0.5 * random.normal(size=count) * (not unequal) + errors, labels


def contributions(values: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    """[model, item], as `codiemb compare` takes them."""
    if labels is None:
        return values
    return np.stack([significance.spearman_contributions(row, labels) for row in values])


def compared(
    values: np.ndarray, labels: np.ndarray | None, resamples: int, random: np.random.Generator
) -> significance.Paired:
    each = contributions(values, labels)
    difference = each[1] - each[0]
    if labels is None:
        drawn = significance.bootstrap_means(values, resamples, random)
    else:
        drawn = significance.bootstrap_spearman(values, labels, resamples, random)
    signs = significance.random_signs(difference[None], resamples, random)[0]
    return significance.Paired(each[0].mean(), each[1].mean(), len(difference), signs, drawn[1] - drawn[0])


def one_evaluation_each(sources: list[Draw], count: int, differ: bool, draws: int, resamples: int) -> dict[str, Any]:
    """Of the mean over `sources`, `count` items each."""
    random = np.random.default_rng(0)
    truths, errors = [], []
    for source in sources:
        each = contributions(*source(random, MANY))
        truths.append(each[1].mean() - each[0].mean())
        errors.append((each[1] - each[0]).std() / count**0.5)
    truth, error = float(np.mean(truths)) if differ else 0.0, float(np.sqrt(np.sum(np.square(errors)))) / len(sources)
    rejected = covered = 0
    for _ in range(draws):
        parts = [compared(*source(random, count), resamples, random) for source in sources]
        p, (low, high) = significance.Paired.mean_of(parts).test(1 - LEVEL)
        rejected, covered = rejected + (p <= LEVEL), covered + (low <= truth <= high)
    theory = sum(stats.norm.sf(stats.norm.ppf(1 - LEVEL / 2) + sign * truth / error) for sign in (-1, 1))
    return {
        "items": count,
        "difference": round(truth, 4),
        "rejected": round(100 * rejected / draws, 2),
        "theory": round(100 * theory, 2),
        "covered": round(100 * covered / draws, 2),
    }


def seeds(
    numbers: tuple[int, int], spread: float, gain: float, draws: int, resamples: int, items: int = 100
) -> dict[str, Any]:
    """Scores are query + seed + seed by query, and a model's own part of each query; [seed, item]."""
    random, count = np.random.default_rng(1), {"ours": 0, "bootstrap of seeds and items": 0, "items alone": 0}
    covered = dict.fromkeys(count, 0)
    for _ in range(draws):
        reference, model = (
            0.1 * random.normal(size=items)
            + spread * random.normal(size=(number, 1)) * (number > 1)
            + 0.1 * random.normal(size=(number, items))
            for number in numbers
        )
        model = model + gain
        results = {
            "ours": crossed(reference, model).test(1 - LEVEL),
            "bootstrap of seeds and items": two_levels(reference, model, resamples, random),
            "items alone": _t_test(model.mean(axis=0) - reference.mean(axis=0)),
        }
        for name, (p, (low, high)) in results.items():
            count[name] += p <= LEVEL
            covered[name] += low <= gain <= high
    return {
        "seeds": list(numbers),
        "items": items,
        "spread_of_seeds": spread,
        "difference": gain,
        "rejected": {name: round(100 * value / draws, 2) for name, value in count.items()},
        "covered": {name: round(100 * value / draws, 2) for name, value in covered.items()},
    }


def two_levels(
    reference: np.ndarray, model: np.ndarray, resamples: int, random: np.random.Generator
) -> tuple[float, tuple[float, float]]:
    """Seeds of each model and items, each drawn with replacement; p from the share of differences beyond 0."""
    count = reference.shape[1]
    places = random.integers(0, count, (resamples, count)) + count * np.arange(resamples)[:, None]
    weights = np.bincount(places.ravel(), minlength=resamples * count).reshape(resamples, count) / count
    means = []
    for scores in (reference, model):
        drawn = random.integers(0, len(scores), (resamples, len(scores)))
        means.append(np.take_along_axis(weights @ scores.T, drawn, axis=1).mean(axis=1))
    differences = means[1] - means[0]
    beyond = min((differences <= 0).mean(), (differences >= 0).mean())
    low, high = np.quantile(differences, [LEVEL / 2, 1 - LEVEL / 2])
    return float(2 * beyond), (float(low), float(high))


def _t_test(differences: np.ndarray) -> tuple[float, tuple[float, float]]:
    found = stats.ttest_1samp(differences, 0)
    low, high = found.confidence_interval(1 - LEVEL)
    return float(found.pvalue), (float(low), float(high))


def holm(draws: int) -> dict[str, Any]:
    """Eight data sets with correlated models: on five no difference, on three one of three standard errors."""
    random = np.random.default_rng(2)
    effects = np.array([0.0] * 5 + [3.0] * 3)
    z = effects + 0.7 * random.normal(size=(draws, 8)) + 0.51**0.5 * random.normal(size=(draws, 1))
    p_values = 2 * stats.norm.sf(np.abs(z))
    corrected = np.array([significance.holm(list(row)) for row in p_values])
    return {
        "any false finding, uncorrected": round(100 * float((p_values[:, :5] <= LEVEL).any(axis=1).mean()), 2),
        "any false finding, corrected": round(100 * float((corrected[:, :5] <= LEVEL).any(axis=1).mean()), 2),
        "found of the three": round(100 * float((corrected[:, 5:] <= LEVEL).mean()), 2),
    }


def seconds() -> dict[str, Any]:
    """Of one data set, two models, 10,000 resamples."""
    random = np.random.default_rng(3)
    found = {}
    for items in (1000, 5000):
        for name, source in (("nDCG", search), ("Spearman", pairs)):
            values, labels = source(random, items)
            began = time.perf_counter()
            compared(values, labels, 10_000, random).test(0.95)
            found[f"{name}, {items} items"] = round(time.perf_counter() - began, 2)
    return {"seconds_of_a_data_set": found}


def single() -> dict[str, tuple[list[Draw], int, bool]]:
    """Sources, items of each, and whether the models differ."""
    unequal_pairs = partial(pairs, noise=(0.6, 0.6), unequal=True)
    better_search, worse_pairs = partial(search, gain=0.15), partial(pairs, noise=(0.4, 0.52))
    return {
        "nDCG, no difference": ([search], 100, False),
        "nDCG, no difference, unequal": ([unequal_search()], 200, False),
        "nDCG, difference": ([better_search], 400, True),
        "Spearman, no difference": ([pairs], 200, False),
        "Spearman, no difference, unequal": ([unequal_pairs], 200, False),
        "Spearman, no difference, more pairs": ([pairs], 400, False),
        "Spearman, difference": ([worse_pairs], 300, True),
        "mean of both, no difference": ([search, pairs], 100, False),
        "mean of both, difference": ([better_search, partial(pairs, noise=(0.4, 0.35))], 200, True),
        "nDCG, few queries": ([search], 50, False),
        "Spearman, few pairs, unequal": ([unequal_pairs], 50, False),
    }


SEEDS = {  # seeds of either model, their spread, difference
    "seeds, none differ": ((3, 3), 0.0, 0.0),
    "seeds, no difference": ((3, 3), 0.01, 0.0),
    "seeds, no difference, wide": ((3, 3), 0.03, 0.0),
    "seeds, no difference, five": ((5, 5), 0.01, 0.0),
    "seeds, no difference, untrained reference": ((1, 3), 0.03, 0.0),
    "seeds, difference": ((3, 3), 0.01, 0.04),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=999)
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose name begins so")
    arguments = parser.parse_args()
    draws, resamples = arguments.draws, arguments.resamples
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        name: partial(one_evaluation_each, *case, draws, resamples) for name, case in single().items()
    }
    cases |= {name: partial(seeds, *case, draws, resamples) for name, case in SEEDS.items()}
    cases |= {"holm": partial(holm, draws), "seconds": seconds}
    chosen = {name: case for name, case in cases.items() if name.startswith(arguments.only)}
    facts = {"machine": machine(), "versions": versions(), "commit": commit()}
    with ProcessPoolExecutor() as pool:
        for name, found in zip(chosen, pool.map(timed, chosen.values()), strict=True):
            line = {"benchmark": "significance", "case": name, "draws": draws, "resamples": resamples, **found}
            print(json.dumps({**line, **facts}), flush=True)


def timed(case: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    began = time.perf_counter()
    return {**case(), "seconds": round(time.perf_counter() - began, 1)}


if __name__ == "__main__":
    main()
