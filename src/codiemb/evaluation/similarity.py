"""Similarity: rank and linear correlation of cosines with labels, by SciPy."""

from __future__ import annotations

import numpy as np
from scipy import stats

METRICS = ("spearman", "pearson")


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
