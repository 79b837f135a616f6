"""Thresholds and average precision, against their definitions."""

import numpy as np
import pytest

from codiemb.errors import DataError
from codiemb.evaluation.pair_classification import compare, load, score
from codiemb.suites.suite import DataSet


def naive(values, labels):
    """The best over every threshold between two different values; precision at each hit, equal values at once."""
    levels = sorted(set(values), reverse=True)
    best_accuracy = best_f1 = ap = recall = 0.0
    for level, below in zip(levels, [*levels[1:], None], strict=True):
        above = values >= level
        precision, found = labels[above].mean(), labels[above].sum() / labels.sum()
        ap += (found - recall) * precision
        recall = found
        if below is not None:
            best_accuracy = max(best_accuracy, (above == labels).mean())
            if found:
                best_f1 = max(best_f1, 2 * precision * found / (precision + found))
    return {"ap": ap, "accuracy": best_accuracy, "f1": best_f1}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_measures_equal_their_definitions_with_ties(seed):
    """A threshold between equal values would let the order of the file into the score."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, 200)
    likeness = {name: (random.normal(size=200) + 0.7 * labels).round(1) for name in ("cosine", "dot")}
    found, expected = score(likeness, labels), {name: naive(values, labels) for name, values in likeness.items()}
    assert len(set(likeness["cosine"])) < 100, "without ties the test would be easier"
    for metric in ("ap", "accuracy", "f1"):
        assert found[f"cosine_{metric}"] == pytest.approx(expected["cosine"][metric], abs=1e-9)
        assert found[f"max_{metric}"] == pytest.approx(max(one[metric] for one in expected.values()), abs=1e-9)
    assert found["max_ap"] != found["cosine_ap"] or found["max_f1"] != found["cosine_f1"]


def test_by_hand():
    """Values 4 3 2 1 with classes 1 0 1 0.

    Thresholds after the first, second, third: accuracy 3/4, 2/4, 3/4; F1 2/3, 1/2, 4/5; AP = 1/2 + 1/2 * 2/3 = 5/6
    """
    found = score({"cosine": np.array([4.0, 3.0, 2.0, 1.0])}, np.array([1, 0, 1, 0]))
    assert found["cosine_accuracy"] == 0.75
    assert found["cosine_f1"] == pytest.approx(0.8)
    assert found["cosine_ap"] == pytest.approx(5 / 6)


def test_all_values_equal_have_no_threshold():
    found = score({"cosine": np.zeros(4)}, np.array([1, 0, 1, 0]))
    assert (found["cosine_accuracy"], found["cosine_f1"], found["cosine_ap"]) == (0, 0, 0.5)


def test_likeness_by_hand():
    """(3, 4) and (4, 3): dot 24, lengths 5, differences 1 and 1."""
    found = compare(np.array([[3.0, 4.0]]), np.array([[4.0, 3.0]]))
    expected = {"cosine": 24 / 25, "manhattan": -2, "euclidean": -np.sqrt(2), "dot": 24}
    assert {name: float(value[0]) for name, value in found.items()} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scores", "words"), [([1, 0.5], "the label 0.5"), ([1, 1], "pairs of class 1 only")], ids=["graded", "one class"]
)
def test_other_labels_are_refused(tmp_path, scores, words):
    rows = "".join(f'{{"query": "a", "positives": ["b"], "positive_scores": [{score}]}}\n' for score in scores)
    (tmp_path / "pairs.jsonl").write_text(rows)
    with pytest.raises(DataError, match=words):
        load(DataSet(name="pairs", task="pair_classification", path=str(tmp_path / "pairs.jsonl")))
