"""Similarity: rank and linear correlation of cosines with labels, by SciPy."""

from __future__ import annotations

import numpy as np
from scipy import stats

from codiemb.distributed import rank
from codiemb.evaluation.pairs import Pairs, embed, load
from codiemb.evaluation.scores import Encoder, Evaluation, Scores
from codiemb.suites.suite import DataSet

METRICS = ("spearman", "pearson")


def evaluate(encoder: Encoder, source: DataSet, pairs: Pairs, bf16: bool = False) -> Scores | None:
    """Every pair of the file, as it stands; None but on the first rank."""
    first, second = embed(encoder, source, pairs, bf16, normalize=True)
    if rank() > 0:
        return None
    cosines = (first * second).sum(dim=1).cpu().numpy().astype(float)
    items = {
        "pair": list(range(len(cosines))),
        "text1": pairs.first,
        "text2": pairs.second,
        "cosine": cosines.tolist(),
        "label": pairs.labels.tolist(),
    }
    return Scores(score(cosines, pairs.labels), len(cosines), items, {"left_out": pairs.records.dropped})


def score(cosines: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Correlations in [-1, 1]; 0 when either side is constant.

    Args:
        cosines: [pair].
        labels: [pair].
    """
    if len(labels) < 2 or np.ptp(cosines) == 0 or np.ptp(labels) == 0:
        return {"spearman": 0.0, "pearson": 0.0}
    return {
        "spearman": float(stats.spearmanr(cosines, labels).statistic),
        "pearson": float(stats.pearsonr(cosines, labels).statistic),
    }


SIMILARITY = Evaluation(load, evaluate)
