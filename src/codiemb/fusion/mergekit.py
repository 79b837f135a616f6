"""The methods that are mergekit's, handed one tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from codiemb.errors import ConfigError
from codiemb.fusion.merge import Tiles

MERGEKIT = {  # its name there, and settings where ours differ from its defaults
    "slerp": ("slerp", {"t": 0.5}),
    "task_arithmetic": ("task_arithmetic", {"weight": 1.0}),
    "ties": ("ties", {"weight": 1.0, "density": 0.2}),
    "dare": ("dare_linear", {"weight": 1.0, "density": 0.5}),
    "dare_ties": ("dare_ties", {"weight": 1.0, "density": 0.5}),
    "sce": ("sce", {"select_topk": 0.1}),
    "model_stock": ("model_stock", {}),
}


@dataclass
class Mergekit:
    """A method of mergekit, on one tensor after the other."""

    method: str
    parameters: dict[str, Any]
    whole: bool = True
    summary: dict[str, Any] = field(default_factory=dict)

    def look(self, tensors: Sequence[Tiles]) -> None:
        pass

    def weigh(self, tensor: Tiles) -> None:
        pass

    def merge(self, tensor: Tiles, weighed: None, parts: list[np.ndarray], base: np.ndarray | None) -> np.ndarray:
        import torch
        from mergekit.merge_methods import BasePolicy, get, merge_state_dicts

        if base is None:
            return np.mean(parts, axis=0)
        takes_base = get(self.method).spec.contract.base != BasePolicy.IGNORED
        states: dict[Any, Any] = {place: {"x": torch.from_numpy(part)} for place, part in enumerate(parts)}
        if takes_base and self.method != "slerp":
            states["base"] = {"x": torch.from_numpy(base)}
        origin = None if not takes_base else 0 if self.method == "slerp" else "base"
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(int.from_bytes(hashlib.sha256(tensor.name.encode()).digest()[:4], "little"))
            try:
                return merge_state_dicts(states, self.method, base=origin, parameters=self.parameters)["x"].numpy()
            except (ValueError, TypeError, RuntimeError) as error:
                raise ConfigError(f"method {self.method}", got=str(error).splitlines()[0]) from None


def require_mergekit() -> None:
    try:
        import mergekit.merge_methods  # noqa: F401
    except ImportError:
        raise ConfigError(
            "method", got="no mergekit", expected="the extra merge", fix="pip install 'codiemb[merge]'"
        ) from None
