"""Where results are written, and how: under a temporary name, then renamed, so that what bears its name is whole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from codiemb.errors import CheckpointError, ConfigError

LOCK = ".lock"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WRITERS_SAY = (  # safetensors and torch
    *(f"os error {number})" for number in _NO_ROOM),
    "PytorchStreamWriter failed",
    "iostream error",
)


def write_whole(path: Path, content: str) -> None:
    """Writes a text file that is there with all of its content, on the disk, or not at all.

    What is not UTF-8 in the names of files is escaped, `\\udcff`.
    """
    with replacing(path) as partial, partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: Any) -> None:
    """`write_whole` of JSON for people too: indented, letters as they are."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write into, which takes its name at the end; it is gone after an error."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(written: Path, final: Path) -> None:
    """Gives a finished folder its name once all of it is on the disk: a power cut leaves the whole or none."""
    for path in (*written.rglob("*"), written):
        sync(path)
    os.replace(written, final)
    sync(final.parent)


@contextlib.contextmanager
def held(folder: Path, unfinished: Path) -> Iterator[None]:
    """Inside, no other process can hold `folder`; the kernel lets go of it when this process ends, however it ends.

    A POSIX record lock, which forked data workers do not inherit, so those of a killed run keep nothing. A file system
    without locks is used without. After an error, of this process or of another rank, `unfinished` is removed.

    Raises:
        ConfigError: another process holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ConfigError(
                    f"output_dir {folder}",
                    got="a folder that a running process is training in",
                    expected="one run to a folder",
                    fix="wait for that run, stop it, or change output_dir",
                ) from None
        try:
            yield
        except Exception:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


@contextlib.contextmanager
def told_of_full_disk(folder: Path, fix: str = "free some disk, then go on with --resume") -> Iterator[None]:
    """Ends with one line when there is no room left to write into `folder`.

    Raises:
        CheckpointError: instead of the error of the system, of safetensors or of torch.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if (cause := _of_full_disk(error)) is None:
            raise
        raise CheckpointError(
            f"writing {getattr(cause, 'filename', None) or folder}",
            got=str(cause).splitlines()[0],
            expected="room to write",
            fix=fix,
        ) from error


def _of_full_disk(error: BaseException | None) -> BaseException | None:
    """The error that tells it, which another may hide: torch's writer fails once more when it is closed."""
    while error is not None:
        if getattr(error, "errno", None) in _NO_ROOM or any(words in str(error) for words in _WRITERS_SAY):
            return error
        error = error.__context__
    return None


def nearest_folder(path: Path) -> Path:
    """The path itself, or the nearest of its parents that exists."""
    path = path.resolve()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def require_folder(what: str, path: Path) -> None:
    """Refuses an output folder that is a file, or that cannot be made or written.

    Raises:
        ConfigError: it names `what` (the setting or option) and the path.
    """
    existing = nearest_folder(path)
    if not existing.is_dir():
        raise ConfigError(f"{what} {path}", got=f"a file at {existing}", expected="a folder", fix=f"change {what}")
    if not os.access(existing, os.W_OK):
        raise ConfigError(
            f"{what} {path}", got=f"no right to write in {existing}", expected="a folder of yours", fix=f"change {what}"
        )
