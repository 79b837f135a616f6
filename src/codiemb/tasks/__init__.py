"""The tasks a source may have: one small file each, and one line in this table."""

from codiemb.tasks.classification import CLASSIFICATION, CLUSTERING
from codiemb.tasks.pair_classification import PAIR_CLASSIFICATION
from codiemb.tasks.reranking import RERANKING
from codiemb.tasks.retrieval import RETRIEVAL
from codiemb.tasks.similarity import SIMILARITY
from codiemb.tasks.task import Task

__all__ = ["TASKS", "Task"]

TASKS: dict[str, Task] = {
    "retrieval": RETRIEVAL,
    "similarity": SIMILARITY,
    "pair_classification": PAIR_CLASSIFICATION,
    "classification": CLASSIFICATION,
    "clustering": CLUSTERING,
    "reranking": RERANKING,
}
