"""Where checkpoints went: how far each moved, and whether they pull the same way, by tensor and by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codiemb.figures.charts import bars
from codiemb.figures.picture import picture
from codiemb.files import require_folder, write_json, write_whole
from codiemb.fusion.alike import opened
from codiemb.fusion.merge import Tiles, refuse_not_finite, tensors_of, workers
from codiemb.fusion.settings import require_settings
from codiemb.fusion.weights import layer_of


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
    products: np.ndarray
    conflicts: float
    base: float

    def facts(self) -> dict[str, Any]:
        """`moved`: length of each delta; `relative`: over that of the base; `cosines` between deltas."""
        lengths = np.sqrt(self.products.diagonal())
        cosines = self.products / np.maximum(lengths[:, None] * lengths, 1e-30)
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
    with opened(checkpoints, base, force=True) as (parents, of_base, _):
        tensors = tensors_of(list(parents.values()), of_base)
        known = [tensor for tensor in tensors.values() if tensor.base is not None]
        with workers() as threads:
            sums = list(threads.map(_sums, known))
    layers: dict[str, list[np.ndarray]] = {}
    for tensor, found in zip(known, sums, strict=True):
        layers.setdefault(layer_of(tensor.name), []).append(found)
    by_layer = [_moves(name, np.sum(parts, axis=0)) for name, parts in layers.items()]
    return by_layer, [_moves(tensor.name, found) for tensor, found in zip(known, sums, strict=True)]


def inspect(checkpoints: Sequence[Path], base: Path, out: Path) -> str:
    """Writes `moves.json` and `moves.svg` into `out`; returns a table by layer.

    Raises:
        CheckpointError: folders that cannot be compared.
        ConfigError: `out` cannot be written.
    """
    require_folder("--out", out)
    require_settings(checkpoints)
    layers, tensors = moves(checkpoints, base)
    out.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "base": str(base),
        "checkpoints": [str(folder) for folder in checkpoints],
        "layers": [found.facts() for found in layers],
        "tensors": [found.facts() for found in tensors],
    }
    write_json(out / "moves.json", content)
    lowest = [(facts["name"], _lowest(facts)) for facts in content["layers"]]
    title = "Lowest cosine between the moves of two checkpoints"
    write_whole(out / "moves.svg", picture([(title, bars(lowest, "cosine"))], height=24 * len(lowest) + 30))
    rows = [
        "| layer | moved (share of the base's length) | cosine, lowest pair | sign conflicts |",
        "|---|---|---:|---:|",
    ]
    for facts in content["layers"]:
        moved = ", ".join(f"{100 * value:.2f} %" for value in facts["relative"])
        rows.append(f"| {facts['name']} | {moved} | {_lowest(facts):.3f} | {100 * facts['sign_conflicts']:.1f} % |")
    return "\n".join([*(f"{n + 1}: {folder}" for n, folder in enumerate(checkpoints)), "", *rows])


def _lowest(facts: dict[str, Any]) -> float:
    return min(value for n, row in enumerate(facts["cosines"]) for value in row[n + 1 :])


def _sums(tensor: Tiles) -> np.ndarray:
    """Inner products [model * model], then size in conflict, size in all, squared length of the base."""
    models = len(tensor.parents)
    sums = np.zeros(models * models + 3)
    for begin, parts, base in tensor:
        assert base is not None
        deltas = np.stack(parts).reshape(models, -1) - base.reshape(-1)
        sums[: models * models] += (deltas @ deltas.T).reshape(-1)
        size = np.abs(deltas)
        sums[-3] += size[deltas * deltas.sum(axis=0) < 0].sum()
        sums[-2] += size.sum()
        sums[-1] += np.square(base).sum()
        if not np.isfinite(sums).all():
            refuse_not_finite(tensor, begin, len(base))
    return sums


def _moves(name: str, sums: np.ndarray) -> Moves:
    models = round((len(sums) - 3) ** 0.5)
    conflict = float(sums[-3] / sums[-2]) if sums[-2] > 0 else 0.0
    return Moves(name, sums[: models * models].reshape(models, models), conflict, float(sums[-1]))
