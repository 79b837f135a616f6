"""One model from several, tensor by tensor and tile by tile: memory does not grow with the models.

Arithmetic is one type wider than what is stored (float32 for halves, float64 for float32; for float64 there is none),
so that models that are equal come out as they went in, to the last bit, and so does a model whose weight is 1.
Checkpoints are added in the order of their paths, so the order in which they are named does not matter.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from codiemb.config import Granularity, Norm, Weighting
from codiemb.errors import CheckpointError
from codiemb.fusion.folder import Stored, Weights
from codiemb.fusion.numbers import narrowed, sum_of_squares, widened, wider
from codiemb.fusion.weights import layer_of, norm_from_sums, norm_of_parts, of_elements, weights_of

TILE = 1 << 15  # elements worked on at once: what stays in a cache, and is not given back to the system each time
THREADS = min(8, os.cpu_count() or 1)  # each holds a tile of every model


@dataclass(frozen=True)
class Tiles:
    """A tensor of all models, to be gone through in tiles of whole rows.

    Attributes:
        name: of the tensor.
        parents: the models.
        base: where they began; None if it has no such tensor.
        like: shape and type of the result.
    """

    name: str
    parents: Sequence[Weights]
    base: Weights | None
    like: Stored
    whole: bool = False

    def __iter__(self) -> Iterator[tuple[int, list[np.ndarray], np.ndarray | None]]:
        """First row, the models' rows and the base's, as [row, width] in a type one wider than what is stored."""
        step = max(1, self.like.rows if self.whole else TILE // max(1, self.like.width))
        for begin in range(0, self.like.rows, step):
            end = min(begin + step, self.like.rows)
            wide = wider(self.like.dtype)
            parts = [parent.read(self.name, begin, end, wide) for parent in self.parents]
            yield begin, parts, None if self.base is None else self.base.read(self.name, begin, end, wide)


class Rule(Protocol):
    """A way to merge.

    Attributes:
        whole: whether it must see a tensor at once.
        summary: what it weighed, for `fusion.json`: by tensor where weights differ by tensor.
    """

    whole: bool
    summary: dict[str, Any]

    def look(self, tensors: Sequence[Tiles]) -> None:
        """Sees all tensors before any is merged."""

    def weigh(self, tensor: Tiles) -> Any:
        """What `merge` needs to know of a tensor as a whole."""

    def merge(self, tensor: Tiles, weighed: Any, parts: list[np.ndarray], base: np.ndarray | None) -> np.ndarray:
        """The rows of the result; those of `parts` may be used up."""


@dataclass
class Linear:
    """theta = theta_0 + scale * sum_k w_k (theta_k - theta_0), with weights given or delta-guided.

    Attributes:
        given: the weights of all tensors, or by layer (`layer_of`); None: delta-guided.
        groups: by group the places of its models; weights are found within each group, then across groups.
    """

    granularity: Granularity = "tensor"
    norm: Norm = "l2"
    weighting: Weighting = "proportional"
    temperature: float = 1.0
    scale: float = 1.0
    given: Sequence[float] | Mapping[str, Sequence[float]] | None = None
    groups: Sequence[Sequence[int]] = ()
    whole: bool = False
    summary: dict[str, Any] = field(default_factory=dict)

    def look(self, tensors: Sequence[Tiles]) -> None:
        if self.given is None and self.granularity == "model":
            known = [tensor for tensor in tensors if tensor.base is not None]
            if not known:
                raise CheckpointError("base", got="none of the checkpoints' tensors", expected="their base model")
            elements = sum(tensor.like.rows * tensor.like.width for tensor in known)

            def norms(mixes: np.ndarray) -> np.ndarray:
                with workers() as threads:
                    parts = list(threads.map(lambda tensor: self._sums(tensor, mixes), known))
                return norm_from_sums(np.stack(parts).sum(axis=0), self.norm, elements)

            self.summary = {"model": self._guided(norms, len(known[0].parents)).tolist()}
        if isinstance(self.given, Mapping):
            self.summary = dict(self.given)
        elif self.given is not None:
            self.summary = {"model": list(self.given)}

    def weigh(self, tensor: Tiles) -> list[float] | None:
        """Weights of a whole tensor; None where they differ by row or element. Where weights are found from the base,
        what the base lacks is averaged."""
        if self.given is not None:
            return list(self.given[layer_of(tensor.name)] if isinstance(self.given, Mapping) else self.given)
        models = len(tensor.parents)
        if tensor.base is None:
            weights = [1 / models] * models
        elif self.granularity == "model":
            return list(self.summary["model"])
        elif self.granularity == "tensor":
            elements = tensor.like.rows * tensor.like.width
            weights = self._guided(
                lambda mixes: norm_from_sums(self._sums(tensor, mixes), self.norm, elements), models
            ).tolist()
        else:
            return None
        self.summary[tensor.name] = weights
        return weights

    def merge(
        self, tensor: Tiles, weighed: list[float] | None, parts: list[np.ndarray], base: np.ndarray | None
    ) -> np.ndarray:
        weights: Any = weighed
        if weights is None:
            assert base is not None
            deltas = np.empty((len(parts), *base.shape), base.dtype)
            for part, delta in zip(parts, deltas, strict=True):
                np.subtract(part, base, out=delta)

            def norms(mixes: np.ndarray) -> np.ndarray:
                mixed = deltas if mixes.ndim == 2 else (mixes * deltas).sum(axis=1, dtype=deltas.dtype)
                if self.granularity == "element":
                    return of_elements(mixed, self.norm)
                rows = np.stack([norm_of_parts(delta, self.norm, rows=True) for delta in mixed])
                return norm_from_sums(rows.astype(np.float64), self.norm, tensor.like.width)[..., None]

            weights = self._guided(norms, len(parts))
        total = None
        for weight, part in zip(weights, parts, strict=True):
            if isinstance(weight, np.ndarray) or weight:  # adding 0 would turn a -0 around
                part *= weight
                total = part if total is None else np.add(total, part, out=total)
            elif not np.isfinite(part).all():  # refused as anywhere else
                return np.full_like(part, np.nan)
        assert total is not None
        return total if base is None or self.scale == 1 else base + self.scale * (total - base)

    def _guided(self, norms: Callable[[np.ndarray], np.ndarray], models: int) -> Float[np.ndarray, "model ..."]:
        """Weights from `norms`, which takes mixes of deltas, [mix, model, ...], and gives [mix, ...]."""
        each = norms(np.eye(models))
        if len(self.groups) < 2:
            return weights_of(each, self.weighting, self.temperature)
        within = np.zeros((len(self.groups), *each.shape), each.dtype)
        for number, group in enumerate(self.groups):
            within[number, group] = weights_of(each[group], self.weighting, self.temperature)
        across = weights_of(norms(within), self.weighting, self.temperature)
        return (across[:, None] * within).sum(axis=0)

    def _sums(self, tensor: Tiles, mixes: Float[np.ndarray, "mix model"]) -> Float[np.ndarray, " mix"]:
        """Of each mix of the deltas the sum over the tensor, which `norm_from_sums` makes a norm of."""
        sums = np.zeros(len(mixes))
        for begin, parts, base in tensor:
            assert base is not None
            deltas = [np.subtract(part, base, out=part) for part in parts]
            for place, mix in enumerate(mixes.tolist()):
                used = [(weight, delta) for weight, delta in zip(mix, deltas, strict=True) if weight]
                alone = len(used) == 1 and used[0][0] == 1
                mixed = used[0][1] if alone else np.stack([weight * delta for weight, delta in used]).sum(axis=0)
                sums[place] += norm_of_parts(mixed, self.norm, rows=False).item()
            if not np.isfinite(sums).all():
                refuse_not_finite(tensor, begin, len(base))
        return sums


def merge(parents: Sequence[Weights], base: Weights, rule: Rule, out: Path) -> dict[str, float]:
    """Writes the merged weights into `out`, in files as the first parent has them (its base's, if it has adapters).

    Args:
        parents: models of the same tensors.
        base: where they began; its types are those of the result.
        rule: how.
        out: an existing folder.

    Returns:
        `delta_length`: the l2 distance of what is written from the base, over the tensors that the base has.

    Raises:
        CheckpointError: nan or inf in a tensor of a parent or of the base, or where the result is rounded to it.
    """
    tensors = tensors_of(parents, base, rule.whole)
    rule.look(list(tensors.values()))
    lengths = []
    files: dict[Path, list[str]] = {}
    for name, stored in parents[0].stored.items():
        files.setdefault(stored.place, []).append(name)
    for place, names in files.items():
        written = out / place
        written.parent.mkdir(parents=True, exist_ok=True)
        keys = {name: parents[0].stored[name].key for name in names}
        places = _write_header(written, {keys[name]: _like(base, parents[0].stored[name], name) for name in names})
        # A method that sees whole tensors would hold one of every model in each thread.
        with written.open("r+b") as opened, workers(1 if rule.whole else THREADS) as pool:
            write = partial(_write_tensor, tensors, parents[0], rule, opened.fileno())
            lengths += list(pool.map(write, names, [places[keys[name]] for name in names]))
    rule.summary = {name: rule.summary[name] for name in sorted(rule.summary)}  # threads came in any order
    return {"delta_length": math.sqrt(math.fsum(lengths))}


def workers(number: int = THREADS) -> ThreadPoolExecutor:
    """Threads in which NumPy does not warn of inf and nan, which are told by name in the end."""
    return ThreadPoolExecutor(number, initializer=np.seterr, initargs=(None, None, "ignore", None, "ignore"))


def tensors_of(parents: Sequence[Weights], base: Weights, whole: bool = False) -> dict[str, Tiles]:
    """The floating-point tensors of all models by name."""
    return {
        name: Tiles(name, parents, base if name in base.stored else None, _like(base, stored, name), whole)
        for name, stored in parents[0].stored.items()
        if stored.is_floating_point
    }


def _write_tensor(
    tensors: dict[str, Tiles], first: Weights, rule: Rule, descriptor: int, name: str, place: int
) -> float:
    """Writes a tensor at its place, merged or, of whole numbers, as it is; returns its squared length from the base."""
    squared = 0.0
    if name not in tensors:
        _write(descriptor, first.bytes_of(name), place)
        return squared
    tensor = tensors[name]
    weighed = rule.weigh(tensor)
    for begin, parts, base in tensor:
        merged = rule.merge(tensor, weighed, parts, base)
        rows = narrowed(merged, tensor.like.dtype)
        written = widened(rows, tensor.like.dtype, merged.dtype)
        length = sum_of_squares(written if base is None else np.subtract(written, base, out=base))
        if not math.isfinite(length):
            refuse_not_finite(tensor, begin, len(rows))
        squared += 0.0 if base is None else length
        _write(descriptor, rows, place + begin * tensor.like.width * tensor.like.itemsize)
    return squared


def refuse_not_finite(tensor: Tiles, begin: int, rows: int) -> None:
    """Says which model has the nan or inf that rows came out with.

    Raises:
        CheckpointError: always; if none has, the result is beyond its number type.
    """
    for model in [*tensor.parents, *([tensor.base] if tensor.base else [])]:
        if not np.isfinite(model.read(tensor.name, begin, begin + rows, wider(tensor.like.dtype))).all():
            raise CheckpointError(
                f"checkpoint {model.folder}, tensor {tensor.name}",
                got="nan or inf",
                expected="finite numbers",
                fix="leave this checkpoint out",
            )
    raise CheckpointError(
        f"tensor {tensor.name}", got=f"numbers beyond {tensor.like.dtype}", expected="a smaller scale or a wider base"
    )


def _like(base: Weights, stored: Stored, name: str) -> Stored:
    """Shape and type of the result: of numbers that are merged those of the base where it has them."""
    return base.stored.get(name, stored) if stored.is_floating_point else stored


def _write_header(file: Path, tensors: dict[str, Stored]) -> dict[str, int]:
    """Makes a safetensors file of its full size; returns by tensor where its bytes begin."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for key, stored in tensors.items():
        begins[key], end = end, end + stored.rows * stored.width * stored.itemsize
        header[key] = {
            "dtype": stored.dtype,
            "shape": list(stored.shape),
            "data_offsets": [begins[key], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)
    return {key: 8 + len(text) + begin for key, begin in begins.items()}


def _write(descriptor: int, rows: np.ndarray, place: int) -> None:
    view: Any = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
    while len(view):
        done = os.pwrite(descriptor, view, place)
        view, place = view[done:], place + done
