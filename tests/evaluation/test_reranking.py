"""Lists of documents and their gains."""

import json

import numpy as np
import pytest

from codiemb.errors import DataError
from codiemb.evaluation.reranking import evaluate, load
from codiemb.suites.suite import DataSet


def source(folder, *rows):
    (folder / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSet(name="lists", task="reranking", path=str(folder / "lists.jsonl"))


def gains_of(lists):
    return [{lists.documents[key]: gain for key, gain in gains.items()} for gains in lists.qrels.values()]


def test_gains_are_graded_where_they_are_whole_numbers(tmp_path):
    lists = load(
        source(
            tmp_path,
            {"query": "a", "positives": ["p", "r"], "negatives": ["n"], "positive_scores": [2, 1]},
            {"query": "b", "positives": ["p"], "negatives": ["n"], "positive_scores": [0.7], "negative_scores": [0.2]},
            {"query": "c", "positives": ["p"], "negatives": ["n", "m"], "negative_scores": [7, 0]},
            {"query": "d", "positives": ["p"], "negatives": ["n"], "positive_scores": [1e300]},
        )
    )
    binary = {"p": 1, "n": 0}
    assert gains_of(lists) == [{"p": 2, "r": 1, "n": 0}, binary, {**binary, "m": 0}, binary]


def test_a_list_of_one_kind_is_left_out_and_counted(tmp_path):
    """Every order of it scores 1, so it would only lift the mean."""
    lists = load(
        source(tmp_path, {"query": "a", "positives": ["p"]}, {"query": "b", "positives": ["p"], "negatives": ["n"]})
    )
    assert list(lists.queries.values()) == ["b"]
    assert lists.left_out == {"only relevant documents, or none": 1}
    with pytest.raises(DataError, match="no list of 1 with a relevant document and another"):
        load(source(tmp_path, {"query": "a", "positives": ["p"]}))


class Angles:
    """The text `30` is the vector of 30 degrees."""

    def encode(self, texts):
        angles = np.radians([float(text) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def test_by_hand(tmp_path):
    """Order of the first list: 1 (no), 5 (yes), 9 (no), 20 (yes): AP (1/2 + 2/4) / 2, MRR 1/2; the other is perfect."""
    data = source(
        tmp_path,
        {"query": "0", "positives": ["5", "20"], "negatives": ["9", "1"]},
        {"query": "10", "positives": ["11"], "negatives": ["90"]},
    )
    scores = evaluate(Angles(), data, load(data))
    assert scores.metrics["map"] == pytest.approx((0.5 + 1) / 2)
    assert scores.metrics["mrr_at_10"] == pytest.approx((0.5 + 1) / 2)
    first = scores.items["retrieved"][0]
    assert [(hit["text"], hit["gain"]) for hit in first] == [("1", 0), ("5", 1), ("9", 0), ("20", 1)]
    assert first[1]["score"] == pytest.approx(np.cos(np.radians(5)))
