"""Retrieval: a query, documents that answer it, and hard negatives; InfoNCE (the IR objective of CoDiEmb)."""

from codiemb.tasks.task import ListBatches, ListLosses, Task

RETRIEVAL = Task("lists", ("query", "document"), ListBatches, ListLosses)
