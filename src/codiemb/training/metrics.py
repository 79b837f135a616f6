"""metrics.jsonl: a line a step; and the progress bar.

Losses stay on the device until a group of lines is written (every `logging_steps` steps, and before a checkpoint), so
that no step waits for the device.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback

from codiemb.distributed import total
from codiemb.errors import CheckpointError
from codiemb.files import write_whole
from codiemb.training.clock import PHASES, Clock, seconds_by_phase

COUNTS = ("rows", "tokens", "padded_tokens")  # over all ranks
_ADDED = ("tokens", "padded_tokens", "seconds", "seconds/tokenizer", *(f"seconds/{phase}" for phase in PHASES))


class MetricsLog(TrainerCallback):
    """Writes what each step did, and shows it.

    Args:
        path: the file, appended to. When a run resumes, lines after its checkpoint are taken out first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[dict[str, Any]] = []
        self.current: dict[str, Any] = {}
        self.bar: tqdm | None = None
        self.shown: dict[str, float] = {}
        self.by_task: dict[str, Tensor] = {}
        self.learning_rate = 0.0
        self.clock = Clock()
        self.mark = 0.0
        self.sums: Counter[str] = Counter()

    def observe(self, inputs: dict[str, Any], objectives: list[dict[str, Any]]) -> None:
        """Takes what a step was given and computed; called inside it."""
        batches = inputs["batches"]
        counts = [sum(batch["rows"] for batch in batches), inputs["tokens"], inputs["padded_tokens"]]
        shared = Counter(name for objective in objectives for name in objective["parts"])
        parts = {
            f"loss/{name}" if shared[name] == 1 else f"loss/{batch['task']}/{name}": value
            for batch, objective in zip(batches, objectives, strict=True)
            for name, value in objective["parts"].items()
        }
        contrastive = [objective["candidates"] for objective in objectives if objective["candidates"] is not None]
        self.current = {
            "source": "+".join(batch["source"] for batch in batches),
            "task": "+".join(batch["task"] for batch in batches),
            "loss": torch.stack([objective["loss"] for objective in objectives]).sum(),
            **parts,
            "counts": total(counts),
            "candidates_per_query": contrastive[0] if contrastive else None,
            "seconds/tokenizer": inputs["seconds"],
        }
        self.by_task = {batch["task"]: objective["loss"] for batch, objective in zip(batches, objectives, strict=True)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restart_clock()
        if not state.is_world_process_zero:
            return
        write_whole(self.path, "".join(line + "\n" for line in written_until(self.path, state.global_step)))
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", desc="train", file=sys.stderr)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.learning_rate = kwargs["optimizer"].param_groups[0]["lr"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.mark("optimizer")
        now = time.perf_counter()
        line = {
            "step": state.global_step,
            **self.current,
            "seconds": now - self.mark,
            "phases": self.clock.take(),
            "peak_memory_bytes": peak_memory_bytes(),
            "learning_rate": self.learning_rate,
        }
        self.waiting.append(line)
        if self.bar is not None:
            self.bar.update(1)
        self.mark = now  # writing waits for the device, and that wait is a step's time
        if state.global_step % args.logging_steps == 0:
            self.write()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restart_clock()

    def restart_clock(self) -> None:
        """What was done since the last step (a checkpoint, an evaluation) is not the next step's time."""
        self.mark = time.perf_counter()
        self.clock.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.write()

    def close(self) -> None:
        """Ends the bar's line, so that what is said next has a line of its own."""
        if self.bar is not None:
            self.bar.close()

    def write(self) -> None:
        """Writes the lines that wait."""
        if self.bar is not None and self.waiting:
            with self.path.open("a", encoding="utf-8") as file:
                for waiting in self.waiting:
                    line = _line(waiting)
                    self.sums.update({name: line[name] or 0 for name in _ADDED}, steps=1)
                    file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.shown |= {task: float(loss) for task, loss in self.by_task.items()}
            losses = {f"loss {task}": f"{loss:.3f}" for task, loss in sorted(self.shown.items())}
            self.bar.set_postfix({**losses, "tokens/s": f"{self._speed():.0f}"})
        self.waiting.clear()

    def _speed(self) -> float:
        """Tokens a second, without padding, over all ranks."""
        return self.sums["tokens"] / max(self.sums["seconds"], 1e-9)

    def summary(self) -> str:
        """What the steps of this process took, for the end of a run."""
        sums, seconds = self.sums, max(self.sums["seconds"], 1e-9)
        steps = max(sums["steps"], 1)
        shares = {phase: 100 * sums[f"seconds/{phase}"] / seconds for phase in (*PHASES, "tokenizer")}
        width = max(map(len, shares))
        return "\n".join(
            [
                f"{sums['steps']} steps, {seconds / steps:.3g} s each; {sums['tokens']:,} tokens and "
                f"{sums['padded_tokens'] - sums['tokens']:,} of padding, {self._speed():,.0f} tokens/s; "
                f"peak memory {peak_memory_bytes() / 1e9:.2f} GB",
                *(f"  {phase:{width}}  {share:5.1f} % of the time" for phase, share in shares.items()),
                "  (the tokenizer runs beside the steps: they wait for it under data)",
            ]
        )


def written_until(path: Path, step: int) -> list[str]:
    """The lines of a file of steps up to one; none without the file. A last line without its end was being written when
    its process died, and is left out.

    Raises:
        CheckpointError: a line is damaged.
    """
    kept: list[str] = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"file {path}, line {number}",
                got=f"{type(error).__name__} ({error})",
                expected='a JSON object with "step"',
                fix="remove the line, or the file",
            ) from None
    return kept


def _line(waiting: dict[str, Any]) -> dict[str, Any]:
    """What is written of a step; reads from the device what is there."""
    counts = dict(zip(COUNTS, waiting["counts"].tolist(), strict=True))
    phases = {f"seconds/{phase}": seconds for phase, seconds in seconds_by_phase(waiting["phases"]).items()}
    line = {name: _number(value) for name, value in waiting.items() if name not in ("counts", "phases")}
    if math.isnan(line["candidates_per_query"] or 0):  # no query of the batch has a positive
        line["candidates_per_query"] = None
    return line | phases | counts


def peak_memory_bytes() -> int:
    """Most memory held so far: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, Tensor) else value
