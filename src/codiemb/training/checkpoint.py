"""Checkpoints that are whole or absent, and which of them a run goes on from.

A checkpoint is written as `.writing/checkpoint-<step>`. Its last file is the manifest: step, number of processes, what
the run was (settings, data, base model, versions), and the size and SHA-256 of every other file. Only then is the
folder brought to the disk and given its name. So a process that dies at any moment leaves the checkpoints it had, and a
file that was cut or changed later is told from its manifest.
"""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codiemb.errors import CheckpointError
from codiemb.files import publish, sha256

MANIFEST = "manifest.json"
WRITING = ".writing"  # what is not finished; of a process that died if nobody writes there
REMOVING = ".removing"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been verified.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        world_size: processes it was written by.
        scheduled: false: written for a signal only. It goes when the next one is there, so that a run that was stopped
            ends with the checkpoints, and the merges of them, of one that was not.
        facts: what the run was, see `codiemb.training.facts`.
        environment: versions, device and what else roundings depend on.
    """

    path: Path
    step: int
    world_size: int
    scheduled: bool
    facts: dict[str, str]
    environment: dict[str, Any]

    def micro_batch_tokens(self, device: str) -> int | None:
        """Tokens of a micro-batch that was trained on the same kind of device, so that roundings stay what they were
        whatever memory is free now."""
        same = str(self.environment.get("device")).partition(":")[0] == device
        return self.environment.get("micro_batch_tokens") if same else None


def seal(folder: Path, **what: Any) -> None:
    """Writes the manifest of a finished folder; `what` are the fields of `Checkpoint` aside from the path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as threads:
        hashes = list(threads.map(sha256, files))
    listed = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": found}
        for path, found in zip(files, hashes, strict=True)
    }
    content = json.dumps({**what, "files": listed}, indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(content + "\n", encoding="utf-8")


def verify(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`; every file is read and compared with the manifest.

    Raises:
        CheckpointError: no manifest, or a file that is missing, cut or changed.
    """
    manifest = folder / MANIFEST
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        files = {folder / name: (facts["bytes"], facts["sha256"]) for name, facts in content["files"].items()}
        environment = {**content["environment"], "versions": dict(content["environment"]["versions"])}
        told = content["step"], content["world_size"], content["scheduled"], dict(content["facts"])
        checkpoint = Checkpoint(folder, *told, environment)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        got = "nothing there" if isinstance(error, FileNotFoundError) else f"{type(error).__name__} ({error})"
        raise _damaged(manifest, got, "the manifest of a complete checkpoint") from None
    if folder.name != f"checkpoint-{checkpoint.step}":
        raise _damaged(manifest, f"step {checkpoint.step}", "the step in the folder's name")
    for path, (size, _) in files.items():
        try:
            found = path.stat().st_size if path.is_file() else None
        except OSError as error:
            raise _damaged(path, error, "a file that can be read") from None
        if found != size:
            raise _damaged(path, "no file" if found is None else f"{found} bytes", f"{size} bytes")
    with ThreadPoolExecutor() as threads:
        for path, hashed in {path: threads.submit(sha256, path) for path in files}.items():
            try:
                same = hashed.result() == files[path][1]
            except OSError as error:
                raise _damaged(path, error, "a file that can be read") from None
            if not same:
                raise _damaged(path, "another content", "what was written (SHA-256 in manifest.json)")
    return checkpoint


def checkpoints(run: Path) -> list[Path]:
    """The folders checkpoint-<step> of a run, newest first; whether they are whole `verify` tells."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in run.glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path, step in steps.items() if step.isdigit()), key=lambda path: -int(steps[path]))


def newest_whole(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with each newer one.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    faults: list[str] = []
    for path in checkpoints(run):
        try:
            return verify(path), faults
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError(f"--resume {run}, no checkpoint is whole, the newest: {faults[0]}")
    return None, faults


def keep_newest(run: Path, limit: int | None, whole: Path) -> None:
    """Removes older checkpoints that are not of the schedule, and the oldest beyond `limit`; never `whole`, the one
    that was just written.

    Newer ones than it are damaged: the run went on from before them. With a limit they are the first to go.
    """
    others = [path for path in checkpoints(run) if path != whole]
    older = [path for path in others if step_of(path) < step_of(whole)]
    kept = [path for path in older if _scheduled(path)][: None if limit is None else limit - 1]
    for path in others:
        if path not in kept and (limit is not None or path in older):
            shutil.rmtree(_put_aside(path), ignore_errors=True)


def keep_scheduled(run: Path) -> None:
    """Removes the checkpoints of signals, once a run has come to its end."""
    for path in checkpoints(run):
        if not _scheduled(path):
            shutil.rmtree(_put_aside(path), ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _scheduled(checkpoint: Path) -> bool:
    """As its manifest says; a damaged one is left to those who verify it."""
    try:
        return bool(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["scheduled"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return True


def clean(run: Path) -> None:
    """Removes what a process that died has left half done."""
    for path in half_done(run):
        shutil.rmtree(path, ignore_errors=True)


def half_done(run: Path) -> list[Path]:
    """What is being written or removed, by this process or one that died."""
    return [run / WRITING, *run.glob(f"{REMOVING}*")]


def replace(written: Path, final: Path) -> None:
    """Publishes a sealed checkpoint, in the place of a damaged one of the same step if there is one."""
    if final.exists():
        _put_aside(final)
    publish(written, final)
    clean(final.parent)


def _put_aside(folder: Path) -> Path:
    """Under a name that is no checkpoint's, since a folder may be left half removed."""
    aside = folder.with_name(f"{REMOVING}-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    return aside


def _damaged(path: Path, got: str | OSError, expected: str) -> CheckpointError:
    return CheckpointError(
        f"file {path}", got=got, expected=expected, fix="bring the file back, or remove this checkpoint"
    )
