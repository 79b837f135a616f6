"""Where results are written."""

from __future__ import annotations

import os
from pathlib import Path

from codiemb.errors import ConfigError


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
