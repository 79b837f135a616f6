"""Classification and clustering: what is drawn, fitted and scored."""

from collections import Counter

import numpy as np
import pytest

from codiemb.errors import DataError
from codiemb.evaluation import classification, clustering
from codiemb.evaluation.classification import EXPERIMENTS, classify, draw
from codiemb.suites.suite import DataSet


def test_each_experiment_draws_so_many_of_each_label():
    labels = ["a"] * 30 + ["b"] * 20 + ["c"] * 3
    experiments = draw(labels, 8)
    assert len(experiments) == EXPERIMENTS
    for places in experiments:
        assert Counter(labels[place] for place in places) == {"a": 8, "b": 8, "c": 3}
        assert len(set(places)) == len(places)
    assert len({tuple(sorted(places)) for places in experiments}) == EXPERIMENTS, "all would measure the same"


def test_classification_by_hand():
    """Labels on two sides of a line; of the guesses a a b b, b b b b for a a a b: accuracy 3/4 and 1/4.

    F1: a 2 * 2/5, b 2/3: 0.7333; a 0, b 2/5: 0.2
    """
    train = np.array([[0.0, 1.0], [0.1, 1.0], [1.0, 0.0], [1.0, 0.1]])
    assert classify(train, ["a", "a", "b", "b"], np.array([[0.0, 2.0], [2.0, 0.0]])).tolist() == ["a", "b"]
    guesses = [np.array(list("aabb")), np.array(list("bbbb"))]
    found = classification.score(guesses, np.array(list("aaab")))
    assert found == pytest.approx({"accuracy": 0.5, "f1": (0.8 / 2 + 2 / 3 / 2 + 0.2) / 2})


def test_clusters_of_their_own_score_one_and_noise_scores_little(monkeypatch):
    monkeypatch.setattr(clustering, "DRAWN", 300)
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 120)
    apart = np.eye(3)[labels] + 0.01 * random.normal(size=(120, 3))
    found = clustering.score(apart, labels.astype(str))
    assert found["v_measure"] == pytest.approx([1.0] * clustering.EXPERIMENTS)
    noise = clustering.score(random.normal(size=(120, 3)), labels.astype(str))
    assert 0 < np.mean(noise["v_measure"]) < 0.1
    assert len(set(noise["v_measure"])) > 1, "one draw would be scored ten times"


def write(folder, **splits):
    for split, labels in splits.items():
        rows = "".join(f'{{"query": "text {n}", "label": "{label}"}}\n' for n, label in enumerate(labels))
        (folder / f"{split}.jsonl").write_text(rows)


def test_more_labels_than_are_drawn_are_another_column(tmp_path, monkeypatch):
    monkeypatch.setattr(clustering, "DRAWN", 2)
    write(tmp_path, test="abc")
    with pytest.raises(DataError, match="got 3 labels, expected at most 2"):
        clustering.load_texts(DataSet(name="x", task="clustering", path=str(tmp_path / "test.jsonl")))


def test_training_texts_come_from_the_split_train(tmp_path):
    write(tmp_path, train="abab", test="aab", dev="bbaab")
    data = classification.load(DataSet(name="x", task="classification", path=str(tmp_path), split="test"))
    assert (data.train.labels, data.test.labels) == (list("abab"), list("aab"))
    given = {"train_path": str(tmp_path / "dev.jsonl"), "path": str(tmp_path / "test.jsonl")}
    data = classification.load(DataSet(name="x", task="classification", **given))
    assert (data.train.labels, data.test.labels) == (list("bbaab"), list("aab"))


@pytest.mark.parametrize(
    ("splits", "path", "words"),
    [
        ({"train": "ab", "test": "abc"}, "", "the label 'c', expected labels that the training texts have"),
        ({"train": "aa", "test": "ab"}, "", "2 texts of 1 label"),
        ({"test": "ab"}, "test.jsonl", "train_path: got none"),
        ({"test": "ab"}, "", "train"),
    ],
    ids=["unknown label", "one label", "a file without training texts", "no such split"],
)
def test_what_cannot_be_classified_is_refused(tmp_path, splits, path, words):
    write(tmp_path, **splits)
    split = "test" if not path else None
    with pytest.raises(DataError, match=words):
        classification.load(DataSet(name="x", task="classification", path=str(tmp_path / path), split=split))


def test_rows_without_a_label_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"query": "a", "positives": ["b"]}\n')
    with pytest.raises(DataError, match=r"a.jsonl, line 1, label: got no label"):
        clustering.load(DataSet(name="x", task="clustering", path=str(tmp_path / "a.jsonl")))
