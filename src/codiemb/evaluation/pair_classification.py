"""Pair classification: how well a threshold on the likeness of two texts parts the pairs of class 1 from the rest.

As mteb does: four ways to compare two embeddings, and for each the average precision and the best that a threshold
reaches; a threshold cannot part pairs of equal score.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from sklearn.metrics import average_precision_score
from sklearn.metrics.pairwise import (
    paired_cosine_distances,
    paired_euclidean_distances,
    paired_manhattan_distances,
)

from codiemb.distributed import rank
from codiemb.errors import DataError
from codiemb.evaluation.pairs import Pairs, embed
from codiemb.evaluation.pairs import load as load_pairs
from codiemb.evaluation.scores import Encoder, Evaluation, Scores
from codiemb.suites.suite import DataSet

METRICS = ("max_ap", "max_accuracy", "max_f1", "cosine_ap", "cosine_accuracy", "cosine_f1")


def load(source: DataSet) -> Pairs:
    """
    Raises:
        DataError: as the readers; or a label that is neither 0 nor 1, or no pair of one of the classes.
    """
    pairs = load_pairs(source)
    for place in np.flatnonzero((pairs.labels != 0) & (pairs.labels != 1))[:1]:
        raise DataError(
            f"source {source.name!r}, {source.path}, pair {place + 1}",
            got=f"the label {pairs.labels[place]:g} of 0 to 1",
            expected="0 or 1, because the task is pair_classification",
            fix="set `score_range` to the labels of the two classes",
        )
    if pairs.labels.min() == pairs.labels.max():
        raise DataError(
            f"source {source.name!r}, {source.path}",
            got=f"pairs of class {pairs.labels[0]:g} only",
            expected="pairs of both classes",
        )
    return pairs


def evaluate(encoder: Encoder, source: DataSet, pairs: Pairs, bf16: bool = False) -> Scores | None:
    """Every pair of the file, as it stands; None but on the first rank."""
    first, second = embed(encoder, source, pairs, bf16, normalize=False)
    if rank() > 0:
        return None
    likeness = compare(first.cpu().numpy(), second.cpu().numpy())
    items = {
        "pair": list(range(len(pairs.labels))),
        "text1": pairs.first,
        "text2": pairs.second,
        "cosine": likeness["cosine"].tolist(),
        "label": pairs.labels.astype(int).tolist(),
    }
    metrics = score(likeness, pairs.labels.astype(int))
    return Scores(metrics, len(pairs.labels), items, {"left_out": pairs.records.dropped})


def compare(first: Float[np.ndarray, "pair dim"], second: Float[np.ndarray, "pair dim"]) -> dict[str, np.ndarray]:
    """Likeness of the two texts of each pair, [pair], by name; higher is more alike."""
    return {
        "cosine": 1 - paired_cosine_distances(first, second),
        "manhattan": -paired_manhattan_distances(first, second),
        "euclidean": -paired_euclidean_distances(first, second),
        "dot": np.einsum("pd,pd->p", first, second),
    }


def score(likeness: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """Measures of the cosine, and the best of all ways to compare (`max_`), as fractions.

    Args:
        likeness: [pair] by name, `cosine` among them.
        labels: [pair], 0 or 1.
    """
    by_name = {name: _measures(values, labels) for name, values in likeness.items()}
    best = {f"max_{metric}": max(measures[metric] for measures in by_name.values()) for metric in by_name["cosine"]}
    return best | {f"cosine_{metric}": value for metric, value in by_name["cosine"].items()}


def _measures(values: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Average precision, and the accuracy and F1 of the best threshold, which leaves at least one pair below it."""
    order = np.argsort(-values, kind="stable")
    hits = np.cumsum(labels[order])[:-1]
    above = np.arange(1, len(labels))
    cuts = np.diff(values[order]) != 0
    positive, negative = labels.sum(), len(labels) - labels.sum()
    accuracy = (hits + negative - (above - hits)) / len(labels)
    f1 = 2 * hits / (above + positive)  # the harmonic mean of hits / above and hits / positive
    return {
        "ap": float(average_precision_score(labels, values)),
        "accuracy": float(accuracy[cuts].max(initial=0)),
        "f1": float(f1[cuts].max(initial=0)),
    }


PAIR_CLASSIFICATION = Evaluation(load, evaluate)
