"""Reranking: a query and a list of documents with graded relevance; softmax cross-entropy over each list."""

from typing import Annotated, Literal

from pydantic import Field

from codiemb.section import Positive, Temperature
from codiemb.tasks.task import ListBatches, ListLosses, Task


class RerankingBatches(ListBatches):
    positives: Positive = 4
    negatives: Annotated[int, Field(ge=0)] = 8


class RerankingLosses(ListLosses):
    type: Literal["info_nce", "triplet", "list_softmax"] = "list_softmax"
    temperature: Temperature = 0.05


RERANKING = Task("lists", ("query", "document"), RerankingBatches, RerankingLosses)
