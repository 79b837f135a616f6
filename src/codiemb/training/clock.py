"""Where the seconds of a step go, without making anything wait.

On a GPU the host runs ahead of the device, so there the marks are events in its stream, and are read when the metrics
are written. On processors the time of exchanges with other ranks is taken out of the phase they are part of.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch

from codiemb.distributed import exchange_seconds

PHASES = ("data", "forward", "loss", "backward", "optimizer", "communication")
Mark = tuple[str, Any, float]


class Clock:
    """Marks of one step after the other."""

    def __init__(self) -> None:
        self.marks: list[Mark] = []
        self.start()

    def start(self) -> None:
        """What has passed until now belongs to no phase."""
        self.marks = [("", _now(), exchange_seconds())]

    def mark(self, phase: str) -> None:
        """What has passed since the last mark belongs to `phase`."""
        self.marks.append((phase, _now(), exchange_seconds()))

    def take(self) -> list[Mark]:
        """The marks of the step that ends now."""
        marks, self.marks = self.marks, self.marks[-1:]
        return marks


def seconds_by_phase(marks: list[Mark]) -> dict[str, float | None]:
    """Seconds of each phase; communication None on a GPU, where it runs beside the rest."""
    seconds: dict[str, float | None] = dict.fromkeys(PHASES, 0.0)
    on_gpu = isinstance(marks[0][1], torch.cuda.Event)
    if on_gpu:
        marks[-1][1].synchronize()
    exchanged = 0.0
    for (_, before, exchanged_before), (phase, now, exchanged_now) in pairwise(marks):
        passed = before.elapsed_time(now) / 1000 if on_gpu else now - before - (exchanged_now - exchanged_before)
        seconds[phase] = (seconds[phase] or 0.0) + passed
        exchanged += exchanged_now - exchanged_before
    seconds["communication"] = None if on_gpu else exchanged
    return seconds


def _now() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
