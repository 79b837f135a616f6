"""From the plan's steps to tokens: reads a rank's rows, draws positives and negatives, tokenises.

The draw depends on (seed, source, pass, row) only, so it is the same on any number of ranks. Nothing is drawn twice
and nothing is made up: a query with fewer positives or negatives than asked for brings what it has.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader, Dataset

from codiemb.batching.plan import Batch, Plan, Step, slice_of
from codiemb.config import Role
from codiemb.data.store import Records
from codiemb.encoder.engine import Text, tokenize
from codiemb.encoder.model import instructed, max_length, prompt

TokenBatch = dict[str, Any]


class StepLoader(DataLoader):
    """A rank's tokenised batches, step by step; `len()` is exact."""

    def __init__(self, plan: Plan, reader: StepReader, workers: int = 0) -> None:
        if workers:
            torch.multiprocessing.set_sharing_strategy(
                "file_system"
            )  # a step has more tensors than a shell allows files
        super().__init__(
            reader,
            batch_sampler=_StepSampler(plan),
            collate_fn=_only,
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class _StepSampler:
    """Yields the steps of an epoch, each in a list of one, so that accelerate can skip them when a run resumes."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[Step]]:
        return ([step] for step in self.plan.steps(self.epoch))

    def __len__(self) -> int:
        return len(self.plan)


class StepReader(Dataset):
    """A step of the plan -> `{"batches": [token batch, ...]}` for one rank."""

    def __init__(
        self, plan: Plan, records: dict[str, Records], encoder: SentenceTransformer, rank: int, world: int
    ) -> None:
        self.plan = plan
        self.records = records
        self.encoder = encoder
        self.rank = rank
        self.world = world

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, step: Step) -> dict[str, list[TokenBatch]]:
        return {"batches": [self.batch(batch) for batch in step.batches]}

    def batch(self, batch: Batch) -> TokenBatch:
        """The tokens of this rank's rows of a batch, with the tensors its objective needs."""
        source = self.records[batch.source]
        places = slice_of(batch.rows, self.rank, self.world)
        if source.source.task == "similarity":
            texts, tensors = self._pairs(source.rows(places))
        else:
            texts, tensors = self._queries(source.rows(places), batch, places)
        # A rank without rows still runs one text of the batch, so that it joins every exchange of gradients.
        spare = texts or [self._text(source.rows(batch.rows[:1])[0]["query"], "query", None)]
        tokens = tokenize(self.encoder, spare)
        return {
            "source": batch.source,
            "task": source.source.task,
            "rows": len(places),
            "tokens": tokens.real,
            "padded_tokens": tokens.padded,
            "micro_batches": tokens.micro_batches,
            "place": tokens.place[: len(texts)],
            **tensors,
        }

    def _queries(self, rows: list[dict[str, Any]], batch: Batch, places: np.ndarray) -> tuple[list[Text], TokenBatch]:
        """Texts: all queries, then all documents."""
        settings = self.plan.settings.retrieval
        documents: list[Text] = []
        listed: list[tuple[int, bool, int, int]] = []  # owner, positive, slot, id
        relevant: list[tuple[int, int]] = []
        for owner, (row, place) in enumerate(zip(rows, places, strict=True)):
            random = np.random.default_rng(
                [self.plan.seed, zlib.crc32(batch.source.encode()), batch.pass_number, int(place)]
            )
            positives = _draw(len(row["positives"]), settings.positives, random)
            negatives = _draw(len(row["negatives"]), settings.negatives, random)
            for slot, drawn in enumerate(positives):
                documents.append(self._text(row["positives"][drawn], "document", None))
                listed.append((owner, True, slot, row["positive_ids"][drawn]))
            for drawn in negatives:
                documents.append(self._text(row["negatives"][drawn], "document", None))
                listed.append((owner, False, -1, row["negative_ids"][drawn]))
            # A document that repeats the query's own text is no negative of it either.
            relevant += [(owner, number) for number in (row["query_id"], *row["positive_ids"])]
        queries = [self._text(row["query"], "query", row["instruction"]) for row in rows]
        owners, positive, slots, ids = zip(*listed, strict=True) if listed else ((), (), (), ())
        return queries + documents, {
            "owner": torch.tensor(owners, dtype=torch.int64),
            "positive": torch.tensor(positive, dtype=torch.bool),
            "slot": torch.tensor(slots, dtype=torch.int64),
            "document_ids": torch.tensor(ids, dtype=torch.int64),
            "relevant": torch.tensor(relevant, dtype=torch.int64).reshape(-1, 2),
        }

    def _pairs(self, rows: list[dict[str, Any]]) -> tuple[list[Text], TokenBatch]:
        """Texts: all left ones, then all right ones."""
        left = [self._text(row["query"], "similarity", row["instruction"]) for row in rows]
        right = [self._text(row["positives"][0], "similarity", row["instruction"]) for row in rows]
        return left + right, {
            "target": torch.tensor([row["positive_scores"][0] for row in rows], dtype=torch.float32),
            "left_ids": torch.tensor([row["query_id"] for row in rows], dtype=torch.int64),
            "right_ids": torch.tensor([row["positive_ids"][0] for row in rows], dtype=torch.int64),
        }

    def _text(self, text: str, role: Role, instruction: str | None) -> Text:
        before = instructed(instruction) if instruction else prompt(self.encoder, role)
        return Text(text, before, max_length(self.encoder, role))


def _draw(available: int, wanted: int, random: np.random.Generator) -> list[int]:
    if available <= wanted:
        return list(range(available))
    return random.choice(available, size=wanted, replace=False).tolist()


def _only(items: list[Any]) -> Any:
    return items[0]
