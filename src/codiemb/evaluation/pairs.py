"""Pairs of texts with a label: read, and put to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from codiemb.data.store import Records, load_records
from codiemb.evaluation.scores import Encoder, digest, embed_all, texts_of
from codiemb.suites.suite import DataSet


@dataclass(frozen=True)
class Pairs:
    """Every pair of a file, as it stands; labels from 0 to 1."""

    first: list[str]
    second: list[str]
    instructions: Sequence[str | None]
    labels: np.ndarray
    records: Records

    def digest(self) -> str:
        return digest([self.records.digest(), self.records.dropped])


def load(source: DataSet) -> Pairs:
    """
    Raises:
        DataError: as the readers.
    """
    records = load_records(source, keep_duplicates=True)
    columns = records.table[:]
    labels = np.array([scores[0] for scores in columns["positive_scores"]])
    second = [positives[0] for positives in columns["positives"]]
    return Pairs(columns["query"], second, columns["instruction"], labels, records)


def embed(
    encoder: Encoder, source: DataSet, pairs: Pairs, bf16: bool, normalize: bool
) -> tuple[Float[Tensor, "pair dim"], Float[Tensor, "pair dim"]]:
    """Embeddings of both sides, on every rank."""
    sides = [
        text
        for side in (pairs.first, pairs.second)
        for text in texts_of(encoder, side, "similarity", pairs.instructions)
    ]
    embeddings = embed_all(encoder, source.name, sides, bf16, normalize)
    return embeddings[: len(pairs.first)], embeddings[len(pairs.first) :]
