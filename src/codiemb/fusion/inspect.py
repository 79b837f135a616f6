"""Where checkpoints went: how far each moved, and whether they pull the same way, by tensor and by layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from codiemb.fusion.folder import Weights
from codiemb.fusion.merge import THREADS, Tiles, tensors_of


@dataclass(frozen=True)
class Moves:
    """Of one tensor, or of several together.

    Attributes:
        name: of the tensor or the layer.
        products: inner products of the deltas of all checkpoints, [checkpoint, checkpoint].
        conflicts: share of elements, weighted by size, where a checkpoint goes against the sum of all; 0 to 1.
        base: squared length of the base's weights.
    """

    name: str
    products: torch.Tensor
    conflicts: float
    base: float

    def facts(self) -> dict[str, Any]:
        """`moved`: length of each delta; `relative`: over that of the base; `cosines` between deltas."""
        lengths = self.products.diagonal().sqrt()
        cosines = self.products / (lengths[:, None] * lengths).clamp(min=1e-30)
        return {
            "name": self.name,
            "moved": lengths.tolist(),
            "relative": (lengths / max(self.base, 1e-30) ** 0.5).tolist(),
            "cosines": cosines.tolist(),
            "sign_conflicts": self.conflicts,
        }


def moves(checkpoints: Sequence[Path], base: Path) -> tuple[list[Moves], list[Moves]]:
    """By layer and by tensor, over all tensors that the base has.

    Raises:
        CheckpointError: folders that cannot be compared.
    """
    of_base = Weights(base)
    tensors = tensors_of([Weights(folder, of_base) for folder in checkpoints], of_base)
    known = [tensor for tensor in tensors.values() if tensor.base is not None]
    with torch.inference_mode(), ThreadPoolExecutor(THREADS) as threads:
        sums = list(threads.map(_sums, known))
    layers: dict[str, list[torch.Tensor]] = {}
    for tensor, found in zip(known, sums, strict=True):
        layers.setdefault(layer(tensor.name), []).append(found)
    by_layer = [_moves(name, torch.stack(parts).sum(dim=0)) for name, parts in layers.items()]
    return by_layer, [_moves(tensor.name, found) for tensor, found in zip(known, sums, strict=True)]


def layer(name: str) -> str:
    """The group a tensor belongs to: `layer 3`, or what comes before its own name."""
    number = re.search(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.", name)
    return f"layer {number[1]}" if number else name.rpartition(".")[0].partition(".")[0] or name


def _sums(tensor: Tiles) -> torch.Tensor:
    """Inner products [model * model], then size in conflict, size in all, squared length of the base."""
    models = len(tensor.parents)
    sums = torch.zeros(models * models + 3, dtype=torch.float64)
    for _, parts, base in tensor:
        assert base is not None
        deltas = torch.stack(parts).flatten(1) - base.flatten()
        sums[: models * models] += (deltas @ deltas.T).flatten()
        size = deltas.abs()
        sums[-3] += size[deltas * deltas.sum(dim=0) < 0].sum()
        sums[-2] += size.sum()
        sums[-1] += base.square().sum()
    return sums


def _moves(name: str, sums: torch.Tensor) -> Moves:
    models = round((len(sums) - 3) ** 0.5)
    conflict = (sums[-3] / sums[-2]).item() if sums[-2] > 0 else 0.0
    return Moves(name, sums[: models * models].view(models, models), conflict, sums[-1].item())
