"""From the plan's steps to tokens: reads a rank's rows, draws positives and negatives, tokenises.

The draw depends on (seed, source, pass, row) only, so it is the same on any number of ranks. Nothing is drawn twice
and nothing is made up: a query with fewer positives or negatives than asked for brings what it has.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import signal
import time
import zlib
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from codiemb.batching.plan import Batch, Plan, Step, slice_of
from codiemb.data.store import Records
from codiemb.encoder.model import instructed, max_length, prompt
from codiemb.encoder.tokens import Text, tokenize
from codiemb.tasks import TASKS

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StepLoader(DataLoader):
    """A rank's tokenised batches, step by step; `len()` is exact."""

    def __init__(self, plan: Plan, reader: StepReader, workers: int = 0) -> None:
        if workers:
            # A step has more tensors than a shell allows files.
            torch.multiprocessing.set_sharing_strategy("file_system")
            atexit.register(_end_workers)
        super().__init__(
            reader,
            batch_sampler=_StepSampler(plan),
            collate_fn=_only,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_leave_signals_to_the_run,
            generator=torch.Generator(),  # else each new iterator draws from the generator of dropout
            pin_memory=torch.cuda.is_available(),
        )

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def _leave_signals_to_the_run(worker: int) -> None:
    """torchrun and terminals signal all processes of a group; a worker that died of it would end the step in hand."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Inside, SIGTERM and SIGINT wait, for a process that is started here too: a new worker would end of one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_workers() -> None:
    """Else a process that ends while they are there waits for ever: multiprocessing asks them by SIGTERM."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise that a worker was killed
    for child in torch.multiprocessing.active_children():
        if child.daemon:
            child.kill()


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
    """A step of the plan -> its batches, and the tokens of all of their texts as one set, for one rank.

    Args:
        micro_batch_tokens: tokens of a micro-batch at most, padding included; None as `tokenize` chooses.
        packed: micro-batches without padding, see `codiemb.encoder.gpu`.
    """

    def __init__(
        self,
        plan: Plan,
        records: dict[str, Records],
        encoder: SentenceTransformer,
        rank: int,
        world: int,
        micro_batch_tokens: int | None = None,
        packed: bool = False,
    ) -> None:
        self.plan = plan
        self.records = records
        # A tokenizer of its own, because batches are made in a thread beside training and evaluation; no weights.
        self.encoder = copy.deepcopy(
            encoder,
            {
                id(weight): torch.nn.Parameter(torch.empty(0, device=weight.device), requires_grad=False)
                for weight in encoder.state_dict(keep_vars=True).values()
            },
        )
        self.rank = rank
        self.world = world
        self.micro_batch_tokens = micro_batch_tokens
        self.packed = packed

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, step: Step) -> dict[str, Any]:
        """`batches`, whose `place` says where their texts stand among the outputs of the `micro_batches`; `tokens` and
        `padded_tokens` of them, and `seconds` that it took to make all this."""
        began = time.perf_counter()
        texts, batches = zip(*(self.batch(batch) for batch in step.batches), strict=True)
        # A rank without rows still runs one text of the step, so that it joins every exchange of gradients.
        tokens = tokenize(self.encoder, list(chain(*texts)) or self._spare(step), self.micro_batch_tokens, self.packed)
        places = tokens.place[: sum(map(len, texts))].split([len(listed) for listed in texts])
        return {
            "batches": [{**batch, "place": place} for batch, place in zip(batches, places, strict=True)],
            "micro_batches": tokens.micro_batches,
            "tokens": tokens.real,
            "padded_tokens": tokens.padded,
            "seconds": time.perf_counter() - began,
        }

    def batch(self, batch: Batch) -> tuple[list[Text], dict[str, Any]]:
        """The texts of this rank's rows of a batch, and what its objective needs beside their embeddings."""
        source = self.records[batch.source]
        numbers = slice_of(np.arange(len(batch.rows)), self.rank, self.world)
        places = batch.rows[numbers]
        shape = TASKS[source.source.task].shape
        texts, tensors = self._lists(source, batch, places) if shape == "lists" else self._pairs(source, places)
        first_row = int(numbers[0]) if len(numbers) else len(batch.rows)
        facts = {"source": batch.source, "task": source.source.task, "rows": len(places), "first_row": first_row}
        return texts, {**facts, **tensors}

    def _spare(self, step: Step) -> list[Text]:
        source = self.records[step.batches[0].source]
        return [self._text(source, source.rows(step.batches[0].rows[:1])[0], 0)]

    def _lists(self, source: Records, batch: Batch, places: np.ndarray) -> tuple[list[Text], dict[str, Tensor]]:
        """Texts: all queries, then all documents."""
        settings = getattr(self.plan.settings, source.source.task)
        rows = source.rows(places)
        documents: list[Text] = []
        listed: list[tuple[int, bool, int, int, float]] = []  # owner, positive, slot, id, score
        relevant: list[tuple[int, int]] = []
        for owner, (row, place) in enumerate(zip(rows, places, strict=True)):
            random = np.random.default_rng(
                [self.plan.seed, zlib.crc32(batch.source.encode()), batch.pass_number, int(place)]
            )
            if row["label_id"] is None:
                positives = _drawn(row, "positive", settings.positives, 1.0, random)
                negatives = _drawn(row, "negative", settings.negatives, 0.0, random)
                # A document that repeats the query's own text is no negative of it either.
                relevant += [(owner, number) for number in (row["query_id"], *row["positive_ids"])]
            else:
                same, other = source.by_label(int(place), settings.positives, settings.negatives, random)
                positives = [(drawn["query"], drawn["label_id"], 1.0) for drawn in source.rows(same)]
                others = (drawn for drawn in source.rows(other) if drawn["query_id"] != row["query_id"])
                negatives = [(drawn["query"], drawn["label_id"], 0.0) for drawn in others]
                relevant.append((owner, row["label_id"]))
            for slot, (text, number, score) in enumerate(positives + negatives):
                is_positive = slot < len(positives)
                documents.append(self._text(source, row, 1, text))
                listed.append((owner, is_positive, slot if is_positive else -1, number, score))
        queries = [self._text(source, row, 0) for row in rows]
        owners, positive, slots, ids, scores = zip(*listed, strict=True) if listed else ((), (), (), (), ())
        return queries + documents, {
            "owner": torch.tensor(owners, dtype=torch.int64),
            "positive": torch.tensor(positive, dtype=torch.bool),
            "slot": torch.tensor(slots, dtype=torch.int64),
            "document_ids": torch.tensor(ids, dtype=torch.int64),
            "scores": torch.tensor(scores, dtype=torch.float32),
            "relevant": torch.tensor(relevant, dtype=torch.int64).reshape(-1, 2),
        }

    def _pairs(self, source: Records, places: np.ndarray) -> tuple[list[Text], dict[str, Tensor]]:
        """Texts: all left ones, then all right ones."""
        rows = source.rows(places)
        left = [self._text(source, row, 0) for row in rows]
        right = [self._text(source, row, 1, row["positives"][0]) for row in rows]
        return left + right, {
            "target": torch.tensor([row["positive_scores"][0] for row in rows], dtype=torch.float32),
            "left_ids": torch.tensor([row["query_id"] for row in rows], dtype=torch.int64),
            "right_ids": torch.tensor([row["positive_ids"][0] for row in rows], dtype=torch.int64),
        }

    def _text(self, source: Records, row: dict[str, Any], side: int, text: str | None = None) -> Text:
        """The query of a row (side 0), or another text of it (side 1); a document takes no instruction."""
        role = TASKS[source.source.task].roles[side]
        instruction = None if role == "document" else row["instruction"]
        before = instructed(instruction) if instruction else prompt(self.encoder, role)
        return Text(row["query"] if text is None else text, before, max_length(self.encoder, role))


def _drawn(
    row: dict[str, Any], kind: str, wanted: int, score: float, random: np.random.Generator
) -> list[tuple[str, int, float]]:
    """(text, id, score) of the texts drawn from a row's positives or negatives; `score` where the row has none."""
    texts, ids = row[f"{kind}s"], row[f"{kind}_ids"]
    scores = row[f"{kind}_scores"] or [score] * len(texts)
    return [(texts[place], ids[place], scores[place]) for place in _draw(len(texts), wanted, random)]


def _draw(available: int, wanted: int, random: np.random.Generator) -> list[int]:
    if available <= wanted:
        return list(range(available))
    return random.choice(available, size=wanted, replace=False).tolist()


def _only(items: list[Any]) -> Any:
    return items[0]
