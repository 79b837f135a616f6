"""Evaluation suites: those that come with the library, and how a suite is read (`suite.py`)."""

from __future__ import annotations

from pathlib import Path

READY = Path(__file__).parent


def suite_file(path: Path, folder: Path = Path()) -> Path:
    """The file itself, or where there is none the ready suite of this name."""
    local, ready = folder / path.expanduser(), READY / f"{path}.yaml"
    return ready if not local.exists() and len(path.parts) == 1 and ready.is_file() else local
