"""Similarity: two texts and how alike they are; the order-aware losses of CoDiEmb (the STS objective)."""

from codiemb.section import Weight
from codiemb.tasks.task import PairBatches, PairLosses, Task


class SimilarityLosses(PairLosses):
    pearson: Weight = 2.0
    rank_kl: Weight = 5.0
    pro: Weight = 0.5
    mid_nce: Weight = 1.0


SIMILARITY = Task("pairs", ("similarity", "similarity"), PairBatches, SimilarityLosses)
