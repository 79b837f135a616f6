"""Batches for `SentenceTransformerTrainer`: rows of one data set on all devices in every step."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import numpy as np
import torch
from accelerate import PartialState
from sentence_transformers.base.sampler import DefaultBatchSampler, MultiDatasetDefaultBatchSampler
from torch.utils.data import BatchSampler, ConcatDataset

from codiemb.batching.plan import Plan, slice_of
from codiemb.config import Batching
from codiemb.distributed import rank, world_size

logger = logging.getLogger(__name__)

Schedule = Literal["proportional", "round_robin", "temperature", "weights"]


class SameDatasetBatchSampler(MultiDatasetDefaultBatchSampler):
    """The same data set on all devices in each step, with a batch size for each data set; `len()` is exact.

    An epoch holds every row exactly once with `proportional`. With the other schedules a data set is an endless stream
    of passes, and gives at least a pass to each epoch; see `codiemb.batching.plan`. A global batch with fewer rows than
    devices (the rest at the end of a pass) repeats rows until each device has one. `counts` says how often, and the log
    says it when training starts.

    `dataloader_drop_last`, which sentence-transformers switches on under torchrun, has no effect here: devices always
    agree on the number of batches.

    Args:
        dataset: the data sets; this and the next three come from the trainer.
        batch_samplers: read for `per_device_train_batch_size` only.
        generator: not used; the batches follow from seed and epoch.
        seed: seed of every shuffle.
        batch_sizes: rows of a step over all devices, by name of data set; without it `per_device_train_batch_size`
            times the devices.
        schedule: how the data sets share the steps of an epoch.
        temperature: of the schedule `temperature`.
        weights: of the schedule `weights`, by name of data set.
        drop_last: leave out the rest of each pass.

    Raises:
        ValueError: a data set without rows, an unknown name, fewer rows in a batch than devices, another schedule, a
            `batch_sampler` that this one would overrule, torchrun without the trainer knowing.
    """

    def __init__(
        self,
        dataset: ConcatDataset,
        batch_samplers: list[BatchSampler],
        generator: torch.Generator | None = None,
        seed: int | None = 0,
        *,
        batch_sizes: Mapping[str, int] | None = None,
        schedule: Schedule = "proportional",
        temperature: float = 2.0,
        weights: Mapping[str, float] | None = None,
        drop_last: bool = False,
    ) -> None:
        super().__init__(dataset, batch_samplers, generator, seed or 0)
        self.batch_size = None  # type: ignore[assignment]  # batches differ in size: accelerate deals them as they are
        self.drop_last = False
        self.world = _processes()
        # Where a run resumes, accelerate tells the epoch to the data set and not to a sampler that it has wrapped.
        dataset.set_epoch = self.set_epoch  # type: ignore[attr-defined]
        lengths = dict(zip(_names(dataset), map(len, dataset.datasets), strict=True))  # type: ignore[arg-type]
        sizes = {name: sampler.batch_size * self.world for name, sampler in zip(lengths, batch_samplers, strict=True)}
        sizes |= batch_sizes or {}
        weights = weights or {}
        if schedule not in get_args(Schedule):
            raise ValueError(f"schedule: got {schedule!r}, expected one of {', '.join(get_args(Schedule))}")
        if unknown := sorted({*sizes, *weights} - {*lengths}):
            raise ValueError(
                f"batch_sizes and weights: got the data set {unknown[0]!r}, expected one of {', '.join(lengths)} "
                "(the names are those of `loss={name: loss}`)"
            )
        if schedule == "weights" and (missing := [name for name in lengths if name not in weights]):
            raise ValueError(f"weights: got none for {missing[0]!r}, expected one for every data set")
        if small := [name for name, size in sizes.items() if size < self.world]:
            raise ValueError(
                f"batch_sizes: got {sizes[small[0]]} for {small[0]!r}, expected at least one row for each of "
                f"{self.world} device(s)"
            )
        if any(type(sampler) is not DefaultBatchSampler for sampler in batch_samplers):
            raise ValueError(
                "batch_sampler: got one of its own, expected the default, because the batches are cut here; InfoNCE "
                "masks equal texts by itself"
            )
        settings = Batching(schedule=schedule, temperature=temperature, weights=dict(weights), drop_last=drop_last)
        self.plan = Plan(lengths, {name: name for name in lengths}, settings, self.seed, sizes)
        starts = np.cumsum([0, *lengths.values()])
        self.start = dict(zip(lengths, starts[:-1].tolist(), strict=True))
        self.counts = self._counts()
        for name, counts in self.counts.items() if rank() == 0 else ():
            logger.info(f"{name}: " + ", ".join(f"{key} {count:,}" for key, count in counts.items()))
            if counts["repeated"]:
                logger.warning(
                    f"{name}: {counts['repeated']} row(s) an epoch are repeated, so that each of {self.world} devices "
                    "has one in the last batch of a pass"
                )

    def __iter__(self) -> Iterator[list[int]]:
        for name, rows in self._global_batches(self.epoch):
            rows = np.resize(rows, max(len(rows), self.world)) + self.start[name]
            for device in range(self.world):  # consecutive batches go to consecutive devices
                yield slice_of(rows, device, self.world).tolist()

    def __len__(self) -> int:
        return len(self.plan) * self.world

    def _global_batches(self, epoch: int) -> Iterator[tuple[str, np.ndarray]]:
        return ((batch.source, batch.rows) for step in self.plan.steps(epoch) for batch in step.batches)

    def _counts(self) -> dict[str, dict[str, int]]:
        """By data set: rows, rows of a batch, batches of an epoch, rows dropped from a pass, rows repeated an epoch."""
        counts = {
            name: {
                "rows": rows,
                "batch size": self.plan.batch_sizes[name],
                "batches": self.plan.batches_per_epoch[name],
                "dropped": rows - self.plan.rows_per_pass(name),
                "repeated": 0,
            }
            for name, rows in self.plan.lengths.items()
        }
        for name, rows in self._global_batches(0):
            counts[name]["repeated"] += max(0, self.world - len(rows))
        return counts


def _processes() -> int:
    """How many processes accelerate deals batches to."""
    dealt, started = PartialState().num_processes, world_size()
    if dealt != started:
        raise ValueError(
            f"torchrun: got {started} processes that would each train a model of their own, expected the trainer to "
            "join them; without GPUs set use_cpu=True in the training arguments"
        )
    return dealt


def _names(dataset: ConcatDataset) -> list[str]:
    """The trainer adds its name to each row of a data set where there is a loss for each; else they are numbered."""
    if empty := [number for number, rows in enumerate(dataset.datasets) if not len(rows)]:  # type: ignore[arg-type]
        raise ValueError(f"train_dataset: got no rows in data set number {empty[0]}, expected at least one in each")
    return [rows[0].get("dataset_name", str(number)) for number, rows in enumerate(dataset.datasets)]
