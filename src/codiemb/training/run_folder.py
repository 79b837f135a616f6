"""The folder of a run: what may be in it when a run begins, who holds it, and which of its files go."""

from __future__ import annotations

import contextlib
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codiemb.distributed import world_size
from codiemb.errors import CheckpointError, ConfigError
from codiemb.files import held, nearest_folder, require_folder, write_whole
from codiemb.training.checkpoint import WRITING, Checkpoint, checkpoints, clean, half_done, newest_whole
from codiemb.training.facts import changed

FINISHED = ".finished"  # the last to be written
RUN_FILES = (
    FINISHED,
    "config.yaml",
    "plan.json",
    "metrics.jsonl",
    "conflict.jsonl",
    "model",
    "fused",
    "eval",
    "comparison.json",
    "geometry.json",
    "geometry.svg",
    "geometry",
    "pareto.json",
    "pareto.svg",
    "trials.jsonl",
    "moves.json",
    "moves.svg",
    "report.html",
    "environment.json",  # the last to go: where it is, an earlier run was
)


def find_checkpoint(run: Path, resume: bool, overwrite: bool) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to resume from, or None; and what is wrong with those that are passed over."""
    require_folder("output_dir", run)
    if overwrite and resume:
        raise ConfigError(
            "--resume --overwrite", got="both", expected="one of them, because the second removes the run"
        )
    if overwrite:
        return None, []
    finished = (run / FINISHED).exists() or not checkpoints(run)  # without them there is nothing to go on from
    if finished and (run / "model").exists():
        raise ConfigError(
            f"output_dir {run}",
            got="a finished run",
            expected="a new folder",
            fix="change output_dir or add --overwrite",
        )
    if resume:
        if not checkpoints(run) and not (run / "config.yaml").exists():
            raise CheckpointError(
                f"--resume {run}", got="no complete checkpoint", expected="one", fix="start without --resume"
            )
        return newest_whole(run)
    if unfinished := checkpoints(run):
        raise ConfigError(
            f"output_dir {run}",
            got=f"an unfinished run ({unfinished[0].name})",
            expected="a new folder",
            fix="add --resume to go on or --overwrite to start again",
        )
    return None, []


def content(run: Path) -> list[Path]:
    """The model and the checkpoints that are there."""
    return [path for path in (run / "model", *checkpoints(run)) if path.exists()]


def hold(run: Path, stack: contextlib.ExitStack, seen: list[Path]) -> None:
    """Keeps other processes out of the run folder until `stack` is left.

    Raises:
        ConfigError: another process is in it, or was there since the folder was looked at.
    """
    stack.enter_context(held(run, run / WRITING))
    if content(run) != seen:
        raise ConfigError(
            f"output_dir {run}",
            got="a checkpoint or model that another run has written since this one began",
            expected="one run to a folder",
            fix="start again",
        )


def begin(run: Path, overwrite: bool, from_start: bool, files: Mapping[str, str]) -> None:
    """Writes what the run is: by name of a file its content. One that starts from the first step keeps no file of an
    earlier run; what lies in a folder where no run was is left alone."""
    if overwrite:
        for checkpoint in checkpoints(run):
            checkpoint.unlink() if checkpoint.is_symlink() else shutil.rmtree(checkpoint)
    if overwrite or (from_start and (run / "environment.json").exists()):
        for path in (run / name for name in RUN_FILES):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    clean(run)
    if not from_start:
        (run / FINISHED).unlink(missing_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_whole(run / name, content)


def resuming_text(run: Path, checkpoint: Checkpoint | None, environment: dict[str, Any]) -> str:
    if checkpoint is None:
        return f"nothing to resume from: {run} was stopped before its first checkpoint; starting from the beginning"
    text = f"resuming from {checkpoint.path}"
    if checkpoint.world_size != world_size():
        text += f", written by {checkpoint.world_size} process(es): the same plan goes on on {world_size()}"
    if differences := changed(checkpoint.environment, environment):
        text += "; roundings may differ, by " + ", ".join(differences)
    return text


def require_disk(run: Path, needed: int, overwrite: bool) -> None:
    """Refuses a run that has not so many bytes of disk for a checkpoint and the model, once `begin` has removed what
    an earlier one has left."""
    gone = [*half_done(run), *(checkpoints(run) if overwrite else []), *(run / name for name in RUN_FILES if overwrite)]
    free = shutil.disk_usage(nearest_folder(run)).free + sum(map(_bytes, gone))
    if free < needed:
        raise CheckpointError(
            f"output_dir {run}",
            got=f"{free / 1e9:.2f} GB of free disk",
            expected=f"at least {needed / 1e9:.2f} GB for a checkpoint and the model",
            fix="free some disk or choose another output_dir",
        )


def _bytes(path: Path) -> int:
    """What goes with a file or folder; behind a link nothing does."""
    size = 0
    with contextlib.suppress(FileNotFoundError):  # in the folder of a run that still goes on, which is refused later
        for file in [path, *([] if path.is_symlink() else path.rglob("*"))]:
            found = file.lstat()
            size += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return size
