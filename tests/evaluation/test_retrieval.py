"""trec_eval's measures and the search, against their definitions."""

import math

import numpy as np
import pytest
import torch

from codiemb.evaluation.retrieval import METRICS, score, search


def naive(run, gains):
    """trec_eval: by score descending, equal scores by document id descending; relevant from gain 1 on."""
    ranking = sorted(run, key=lambda document: (run[document], document), reverse=True)
    relevant = [document for document, gain in gains.items() if gain >= 1]
    hits = [place for place, document in enumerate(ranking, start=1) if document in relevant]

    def dcg(values):
        return sum(gain / math.log2(place + 1) for place, gain in enumerate(values[:10], start=1))

    ideal = dcg(sorted((gain for gain in gains.values() if gain > 0), reverse=True))
    return {
        "ndcg_at_10": dcg([max(gains.get(document, 0), 0) for document in ranking]) / ideal if ideal else 0,
        "mrr_at_10": 1 / hits[0] if hits and hits[0] <= 10 else 0,
        "map": sum(number / place for number, place in enumerate(hits, start=1)) / max(len(relevant), 1),
        "recall_at_100": sum(place <= 100 for place in hits) / max(len(relevant), 1),
    }


def random_collection(seed):
    """12 queries over 150 documents; scores on a coarse grid, so most are tied; gains 0..3."""
    random = np.random.default_rng(seed)
    documents = [f"d{number}" for number in range(150)]
    run = {f"q{q}": {d: float(random.integers(0, 12)) / 8 for d in documents[: 60 + 8 * q]} for q in range(12)}
    qrels = {}
    for q in range(12):
        judged = random.choice(documents, size=2 + q, replace=False)
        qrels[f"q{q}"] = {str(d): float(random.integers(0, 4)) for d in judged} | {"not retrieved": 1.0}
    return run, qrels


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_measures_equal_their_definitions_with_ties_and_graded_gains(seed):
    run, qrels = random_collection(seed)
    found = score(run, qrels)
    assert set(found) == set(run)
    for query, values in found.items():
        assert values == pytest.approx(naive(run[query], qrels[query]), abs=1e-9), query
    spread = [{round(values[metric], 6) for values in found.values()} for metric in METRICS]
    assert min(len(values) for values in spread) > 1, "the measures must vary to be tested"


def test_measures_by_hand():
    """Ranking b, a, d, c with gains a 2, c 1 (b and d none).

    DCG = 2 / log2 3 + 1 / log2 5 = 1.261860 + 0.430677 = 1.692536; ideal = 2 + 1 / log2 3 = 2.630930; nDCG 0.643322
    first relevant at 2: MRR 0.5; AP = (1/2 + 2/4) / 2 = 0.5; recall 1
    """
    found = score({"q": {"a": 0.8, "b": 0.9, "c": 0.1, "d": 0.5}}, {"q": {"a": 2.0, "c": 1.0}})["q"]
    assert found == pytest.approx({"ndcg_at_10": 0.643322, "mrr_at_10": 0.5, "map": 0.5, "recall_at_100": 1}, abs=1e-6)


@pytest.mark.parametrize(("relevant", "place"), [("9", 1), ("10", 2), ("0", 3)])
def test_equal_scores_are_ordered_by_document_id_descending(relevant, place):
    """As text: "9" comes before "10"."""
    found = score({"q": {"0": 0.5, "9": 0.5, "10": 0.5}}, {"q": {relevant: 1.0}})["q"]
    assert found["mrr_at_10"] == pytest.approx(1 / place)


@pytest.mark.parametrize(("place", "expected"), [(1, 1.0), (10, 0.1), (11, 0.0)])
def test_mrr_looks_at_the_first_ten(place, expected):
    run = {"q": {f"d{number}": 1 - number / 100 for number in range(1, 31)}}
    assert score(run, {"q": {f"d{place}": 1.0}})["q"]["mrr_at_10"] == pytest.approx(expected)


@pytest.mark.parametrize(("place", "expected"), [(100, 1.0), (101, 0.0)])
def test_recall_looks_at_the_first_hundred(place, expected):
    run = {"q": {f"d{number}": 1 - number / 1000 for number in range(1, 121)}}
    assert score(run, {"q": {f"d{place}": 1.0}})["q"]["recall_at_100"] == expected


def test_nothing_found_scores_zero():
    found = score({"q": {"a": 0.3, "b": 0.2}}, {"q": {"c": 1.0}})["q"]
    assert found == dict.fromkeys(METRICS, 0.0)


@pytest.mark.parametrize("block", [1, 3, 256])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_search_equals_a_full_sort(k, block):
    random = torch.Generator().manual_seed(0)
    queries, documents = torch.randn(7, 6, generator=random), torch.randn(40, 6, generator=random)
    scores, places = search(queries, documents, torch.arange(len(documents)), k, block)
    expected = (queries.numpy()[:, None] * documents.numpy()).sum(axis=2)
    order = np.argsort(-expected, axis=1)[:, :k]
    np.testing.assert_array_equal(places, order)
    np.testing.assert_allclose(scores, np.take_along_axis(expected, order, axis=1), rtol=1e-5, atol=1e-6)


def test_search_for_more_than_there_is_gives_all():
    scores, places = search(torch.eye(2), torch.eye(2), torch.arange(2), 1000)
    assert scores.tolist() == [[1, 0], [1, 0]]
    assert places.tolist() == [[0, 1], [1, 0]]
