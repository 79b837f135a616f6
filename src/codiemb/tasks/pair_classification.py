"""Pair classification: two texts and whether they belong together (score 1) or not (0).

CoSENT by default: every pair of class 1 is to score above every pair of class 0, which is all that the task's metric,
average precision, asks for.
"""

from codiemb.section import Weight
from codiemb.tasks.task import PairBatches, PairLosses, Task


class PairClassificationLosses(PairLosses):
    cosent: Weight = 1.0


PAIR_CLASSIFICATION = Task("pairs", ("similarity", "similarity"), PairBatches, PairClassificationLosses)
