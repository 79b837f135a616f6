"""CoDiEmb: fine-tune one text-embedding model that is good at both retrieval and semantic similarity, and prove it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from codiemb.config import load_config
    from codiemb.evaluation.analysis import analyze
    from codiemb.evaluation.evaluate import evaluate
    from codiemb.fusion.fuse import fuse
    from codiemb.training.run import train

__all__ = ["__version__", "analyze", "evaluate", "fuse", "load_config", "train"]

_HOMES = {
    "analyze": "codiemb.evaluation.analysis",
    "evaluate": "codiemb.evaluation.evaluate",
    "fuse": "codiemb.fusion.fuse",
    "load_config": "codiemb.config",
    "train": "codiemb.training.run",
}


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `import codiemb` does not load torch."""
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "losses":
        return importlib.import_module("codiemb.losses")
    raise AttributeError(f"module 'codiemb' has no attribute {name!r}")
