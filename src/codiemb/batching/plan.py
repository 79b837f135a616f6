"""The plan: a pure function of (seed, epoch, source lengths, settings) that gives the global batches of every step.

Each source is an endless stream of *passes*; a pass is a fresh shuffle of its rows, cut into batches, so it holds each
row exactly once (the last batch of a pass may be smaller; it is kept unless `drop_last`). A schedule says how many
batches each source gives to an epoch, and in which order. An epoch reads every source through at least once; where a
schedule gives a source more than one pass, its stream simply goes on, also from one epoch to the next.

    schedule      batches of a source per epoch               order
    proportional  one pass                                    all sources dealt evenly
    balanced      tasks in equal number, the smaller cycles   tasks take turns, sources dealt evenly inside
    round_robin   as many as the largest source               sources take turns
    temperature   proportional to batches ** (1 / T)          dealt evenly
    weights       proportional to the given weights           dealt evenly
    staged        one pass in each stage it is named in       stage after stage, dealt evenly inside
    paired        as balanced                                 each step holds one batch of each task

Every batch holds one source. The world size does not enter: a rank takes its slice of each batch (`slice_of`).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from codiemb.config import Batching
from codiemb.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """Rows of one source, over all ranks.

    Attributes:
        source: name of the source.
        rows: places in the source, int64 [row].
        pass_number: which pass of the source they belong to, from 0.
    """

    source: str
    rows: np.ndarray
    pass_number: int


@dataclass(frozen=True)
class Step:
    """What one optimizer step holds: one batch, or (`paired`) one of each task."""

    batches: tuple[Batch, ...]


class Plan:
    """The steps of every epoch.

    Args:
        lengths: rows by source name, in the order of the config.
        tasks: task by source name.
        settings: the `batching` section.
        seed: seed of every shuffle.
        batch_sizes: rows of a batch by source name; else each source has the batch size of its task.

    Raises:
        ConfigError: `drop_last` leaves a source without a batch.
    """

    def __init__(
        self,
        lengths: dict[str, int],
        tasks: dict[str, str],
        settings: Batching,
        seed: int,
        batch_sizes: dict[str, int] | None = None,
    ) -> None:
        self.lengths = lengths
        self.tasks = tasks
        self.settings = settings
        self.seed = seed
        self.names = list(lengths)
        self.batch_sizes = batch_sizes or {name: getattr(settings, tasks[name]).batch_size for name in self.names}
        self.batches_per_pass = {}
        for name, rows in lengths.items():
            size = self.batch_sizes[name]
            self.batches_per_pass[name] = rows // size if settings.drop_last else -(-rows // size)
            if not self.batches_per_pass[name]:
                raise ConfigError(
                    f"source {name!r}",
                    got=f"{rows} rows",
                    expected=f"at least batch_size = {size} rows with batching.drop_last",
                    fix="lower batch_size or set drop_last to false",
                )

    @cached_property
    def batches_per_epoch(self) -> dict[str, int]:
        """How many batches each source gives to an epoch."""
        passes = self.batches_per_pass
        match self.settings.schedule:
            case "proportional":
                return dict(passes)
            case "balanced" | "paired":
                groups = [{name: passes[name] for name in group} for group in self._by_task.values()]
                most = max(sum(group.values()) for group in groups)
                counts = {name: count for group in groups for name, count in _apportion(most, group).items()}
                return {name: counts[name] for name in self.names}
            case "round_robin":
                return dict.fromkeys(self.names, max(passes.values()))
            case "temperature":
                return self._at_least_one_pass(
                    {name: count ** (1 / self.settings.temperature) for name, count in passes.items()}
                )
            case "weights":
                return self._at_least_one_pass({name: self.settings.weights[name] for name in self.names})
            case "staged":
                return {name: passes[name] * sum(name in stage for stage in self._stages) for name in self.names}
        raise AssertionError(self.settings.schedule)

    def __len__(self) -> int:
        """Steps of an epoch."""
        counts = self.batches_per_epoch
        if self.settings.schedule == "paired":
            return max(sum(counts[name] for name in group) for group in self._by_task.values())
        return sum(counts.values())

    def order(self, epoch: int) -> list[tuple[str, ...]]:
        """The sources of each step of an epoch."""
        counts = self.batches_per_epoch
        random = np.random.default_rng([self.seed, epoch, _ORDER])
        match self.settings.schedule:
            case "balanced" | "paired":
                turns = list(
                    zip(
                        *(_deal({name: counts[name] for name in group}, random) for group in self._by_task.values()),
                        strict=True,
                    )
                )
                return turns if self.settings.schedule == "paired" else [(name,) for turn in turns for name in turn]
            case "round_robin":
                return [(name,) for _ in range(max(counts.values())) for name in self.names]
            case "staged":
                return [
                    (name,)
                    for stage in self._stages
                    for name in _deal({name: self.batches_per_pass[name] for name in stage}, random)
                ]
        return [(name,) for name in _deal(counts, random)]

    def steps(self, epoch: int) -> Iterator[Step]:
        """The steps of an epoch; exactly `len(self)` of them."""
        taken = {name: epoch * count for name, count in self.batches_per_epoch.items()}
        shuffles: dict[str, tuple[int, np.ndarray]] = {}
        for names in self.order(epoch):
            batches = []
            for name in names:
                pass_number, place = divmod(taken[name], self.batches_per_pass[name])
                taken[name] += 1
                if name not in shuffles or shuffles[name][0] != pass_number:
                    shuffles[name] = pass_number, self._shuffle(name, pass_number)
                batches.append(Batch(name, shuffles[name][1][self._cut(name, place)], pass_number))
            yield Step(tuple(batches))

    def rows_per_pass(self, name: str) -> int:
        """Rows of a source that a pass delivers; all of them, unless `drop_last`."""
        return min(self.lengths[name], self.batches_per_pass[name] * self.batch_sizes[name])

    def longest_run(self) -> int:
        """The most consecutive steps of one source, in the first epoch."""
        longest = run = 0
        before: tuple[str, ...] = ()
        for names in self.order(0):
            run = run + 1 if names == before else 1
            longest, before = max(longest, run), names
        return longest

    @cached_property
    def _by_task(self) -> dict[str, list[str]]:
        return {
            task: [name for name in self.names if self.tasks[name] == task] for task in sorted({*self.tasks.values()})
        }

    @cached_property
    def _stages(self) -> list[list[str]]:
        stages = (
            [name for name in self.names if name in stage or self.tasks[name] in stage]
            for stage in self.settings.stages
        )
        return [stage for stage in stages if stage]

    def _cut(self, name: str, place: int) -> slice:
        """The part of a pass that batch number `place` holds."""
        size, rows = self.batch_sizes[name], self.rows_per_pass(name)
        start, stop = place * size, min((place + 1) * size, rows)
        if rows % size == 1 and rows > size > 2:  # a row alone has nothing to be compared with: it gets a companion
            start -= place == self.batches_per_pass[name] - 1
            stop -= place == self.batches_per_pass[name] - 2
        return slice(start, stop)

    def _at_least_one_pass(self, shares: dict[str, float]) -> dict[str, int]:
        scale = max(self.batches_per_pass[name] / share for name, share in shares.items())
        return {name: max(self.batches_per_pass[name], round(scale * share)) for name, share in shares.items()}

    def _shuffle(self, name: str, pass_number: int) -> np.ndarray:
        random = np.random.default_rng([self.seed, zlib.crc32(name.encode()), pass_number])
        return random.permutation(self.lengths[name])


def slice_of(rows: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The rows of a global batch that a rank takes: contiguous, disjoint, together all of them; may be empty."""
    return np.array_split(rows, world_size)[rank]


_ORDER = 0x0DE4  # keeps the order's random stream apart from the shuffles'


def _deal(counts: dict[str, int], random: np.random.Generator) -> list[str]:
    """A sequence with `counts[name]` of each name, each spread evenly: one at random in each of its equal parts."""
    names = [name for name, count in counts.items() for _ in range(count)]
    places = [(np.arange(count) + random.random(count)) / count for count in counts.values()]
    return [names[place] for place in np.argsort(np.concatenate(places), kind="stable")]


def _apportion(total: int, parts: dict[str, int]) -> dict[str, int]:
    """`total` in proportion to `parts`, in whole numbers by largest remainder; no part shrinks if total >= sum."""
    whole = sum(parts.values())
    counts = {name: total * part // whole for name, part in parts.items()}
    by_remainder = sorted(parts, key=lambda name: -(total * parts[name] % whole))
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts
