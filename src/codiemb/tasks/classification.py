"""Classification and clustering by label: texts of one label are each other's positives, all others negatives.

A text with the label of the query is never its negative, whoever listed it: here equal labels are equal ids. The
higher temperature suits labels, which draw whole groups together rather than a question and its answer.
"""

from typing import Annotated

from pydantic import Field

from codiemb.section import Positive, Temperature
from codiemb.tasks.task import ListBatches, ListLosses, Task


class LabelBatches(ListBatches):
    positives: Positive = 1
    negatives: Annotated[int, Field(ge=0)] = 1


class LabelLosses(ListLosses):
    temperature: Temperature = 0.05


CLASSIFICATION = Task("lists", ("similarity", "similarity"), LabelBatches, LabelLosses, labelled=True)
CLUSTERING = CLASSIFICATION
