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
from codiemb.files import write_whole

COUNTS = ("rows", "tokens", "padded_tokens")  # over all ranks


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
        self.mark = self.tokens = self.seconds = 0.0

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
            "counts": total(counts, objectives[0]["loss"].device),
            "candidates_per_query": contrastive[0] if contrastive else None,
        }
        self.by_task = {batch["task"]: objective["loss"] for batch, objective in zip(batches, objectives, strict=True)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mark = time.perf_counter()
        if not state.is_world_process_zero:
            return
        kept = []
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = lines[: state.global_step]  # a line a step; what comes after is done again
        write_whole(self.path, "".join(line + "\n" for line in kept))
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", desc="train", file=sys.stderr)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.learning_rate = kwargs["optimizer"].param_groups[0]["lr"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        line = {
            "step": state.global_step,
            **self.current,
            "seconds": now - self.mark,
            "peak_memory_bytes": peak_memory_bytes(),
            "learning_rate": self.learning_rate,
        }
        self.seconds += line["seconds"]
        self.waiting.append(line)
        if self.bar is not None:
            self.bar.update(1)
        if state.global_step % args.logging_steps == 0:
            self.write()
        self.mark = now  # writing waits for the device, and that wait is a step's time

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restart_clock()

    def restart_clock(self) -> None:
        """What was done since the last step (a checkpoint, an evaluation) is not the next step's time."""
        self.mark = time.perf_counter()

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
                    counts = dict(zip(COUNTS, waiting["counts"].tolist(), strict=True))
                    self.tokens += counts["tokens"]
                    line = {name: _number(value) for name, value in waiting.items() if name != "counts"} | counts
                    if math.isnan(line["candidates_per_query"] or 0):  # no query of the batch has a positive
                        line["candidates_per_query"] = None
                    file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.shown |= {task: float(loss) for task, loss in self.by_task.items()}
            losses = {f"loss {task}": f"{loss:.3f}" for task, loss in sorted(self.shown.items())}
            self.bar.set_postfix({**losses, "tokens/s": f"{self.tokens / max(self.seconds, 1e-9):.0f}"})
        self.waiting.clear()


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
