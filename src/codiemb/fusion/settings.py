"""Which settings of a fusion go together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from codiemb.config import Granularity, Norm, Weighting
from codiemb.errors import ConfigError
from codiemb.fusion.folder import Weights
from codiemb.fusion.mergekit import MERGEKIT, require_mergekit

METHODS = ("delta", "uniform", "weighted", *MERGEKIT)
_DEFAULTS: dict[str, Any] = {
    "granularity": "tensor",
    "norm": "l2",
    "weighting": "proportional",
    "temperature": 1.0,
    "scale": 1.0,
    "weights": None,
    "by_run": False,
    "parameters": None,
}


def _used(method: str, weighting: str) -> set[str]:
    """The settings that a method looks at."""
    if method in MERGEKIT:
        return {"parameters"}
    if method == "delta":
        used = {"granularity", "norm", "weighting", "scale", "by_run"}
        return used | {"temperature"} if weighting == "softmax" else used
    return {"scale", "weights"} if method == "weighted" else {"scale"}


def require_settings(checkpoints: Sequence[str | Path], *, method: str = "delta", **settings: Any) -> None:
    """Refuses settings of `fuse` that do not go together, or that the method would not look at.

    Raises:
        ConfigError: with what was expected.
    """
    settings = _DEFAULTS | settings
    for name, value, known in (
        ("method", method, METHODS),
        ("granularity", settings["granularity"], get_args(Granularity)),
        ("norm", settings["norm"], get_args(Norm)),
        ("weighting", settings["weighting"], get_args(Weighting)),
    ):
        if value not in known:
            raise ConfigError(name, got=repr(value), expected=f"one of {', '.join(known)}")
    used = _used(method, settings["weighting"])
    for name, value in settings.items():
        if name not in used and value != _DEFAULTS[name]:
            because = f"the method is {method}" if name != "temperature" or method != "delta" else "it is of softmax"
            raise ConfigError(name, got=value, expected=f"none, because {because}")
    if len(checkpoints) < 2:
        raise ConfigError("checkpoints", got=len(checkpoints), expected="at least two")
    if method == "slerp" and len(checkpoints) > 2:
        raise ConfigError("checkpoints", got=len(checkpoints), expected="two, because the method is slerp")
    folders = [str(Path(checkpoint).resolve()) for checkpoint in checkpoints]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise ConfigError("checkpoints", got=f"{twice[0]} twice", expected="each once")
    if not 0 < settings["temperature"] < math.inf:
        raise ConfigError("temperature", got=settings["temperature"], expected="a number above 0")
    if not math.isfinite(settings["scale"]):
        raise ConfigError("scale", got=settings["scale"], expected="a number")
    weights = settings["weights"]
    if weights is None and method == "weighted":
        raise ConfigError("weights", got="none", expected="one a checkpoint")
    lists = [] if weights is None else [*weights.values()] if isinstance(weights, Mapping) else [weights]
    for given in lists:
        if len(given) != len(folders) or not 0 < sum(given) < math.inf or not all(map(math.isfinite, given)):
            raise ConfigError(
                "weights", got=list(given), expected=f"{len(folders)} numbers, one a checkpoint, sum above 0"
            )
    if method in MERGEKIT:
        require_mergekit()


def require_base(base: Path, methods: Sequence[str]) -> None:
    """Refuses at once what a fusion at the end of a run would be refused for.

    Raises:
        CheckpointError: weights that cannot be read.
        ConfigError: a method whose library is not installed.
    """
    if set(methods) - {"ema"}:
        Weights(base).close()
    if set(methods) & set(MERGEKIT):
        require_mergekit()
