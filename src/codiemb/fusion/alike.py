"""Whether model folders can be merged, and what they hold beside their weights."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codiemb.errors import CheckpointError
from codiemb.files import write_json
from codiemb.fusion.folder import Stored, Weights
from codiemb.fusion.layout import read_json, rest_of
from codiemb.fusion.weights import layer_of

# Keys of JSON files that may differ: who wrote them, and what a tokenizer was last asked for.
_MAY_DIFFER = {"__version__", "_name_or_path", "transformers_version", "torch_dtype", "dtype", "truncation", "padding"}


@contextlib.contextmanager
def opened(
    folders: Sequence[Path], base: Path, force: bool = False
) -> Iterator[tuple[dict[Path, Weights], Weights, list[str]]]:
    """The weights of checkpoints and base, and in what the checkpoints' other files differ.

    Raises:
        CheckpointError: they cannot be merged; or, without `force`, they read texts in different ways.
    """
    with contextlib.ExitStack() as stack:
        of_base = stack.enter_context(contextlib.closing(Weights(base)))
        parents = {}
        for folder in folders:
            parents[folder] = stack.enter_context(contextlib.closing(Weights(folder, of_base)))
        of_base.without_prefix(parents[folders[0]].stored)
        require_alike(list(parents.values()), of_base)
        differences = [difference for folder in folders[1:] for difference in _differences(folders[0], folder)]
        if differences and not force:
            raise CheckpointError(
                f"checkpoint {differences[0]}",
                got=f"another value than in {folders[0]}",
                expected="checkpoints that read texts alike",
                fix="leave it out, or --force to keep what the first has",
            )
        yield parents, of_base, differences


def _differences(one: Path, other: Path) -> list[str]:
    """Settings of tokenizer, modules, pooling, prompts and lengths in which two folders differ, and vocabularies."""
    found = []
    for file in sorted({*rest_of(one), *rest_of(other)}):
        if file.suffix == ".json":
            before, after = (_settings(folder / file) for folder in (one, other))
            if keys := [key for key in {**before, **after} if before.get(key) != after.get(key)]:
                found.append(f"{other / file}, {', '.join(keys[:3])}")
        elif file.suffix in (".txt", ".model") and _bytes(one / file) != _bytes(other / file):
            found.append(str(other / file))
    return found


def _settings(file: Path) -> dict[str, Any]:
    """What a JSON file says about how texts are read; nothing if it is not there."""
    content = read_json(file) if file.exists() else {}
    known = content if isinstance(content, dict) else {"content": content}
    return {key: value for key, value in known.items() if key not in _MAY_DIFFER}


def _bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


def copy_rest(folder: Path, out: Path) -> None:
    """All that a model folder holds beside its weights."""
    for place in list(rest_of(folder)):
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / place, out / place)


def write_indexes(model: Weights, out: Path) -> None:
    """Of each module in shards, which file holds which tensor."""
    shards: dict[Path, list[Stored]] = {}
    for stored in model.stored.values():
        if stored.place.name != "model.safetensors":
            shards.setdefault(stored.place.parent, []).append(stored)
    for module, held in shards.items():
        content = {"metadata": {}, "weight_map": {stored.key: stored.place.name for stored in held}}
        write_json(out / module / "model.safetensors.index.json", content)


def require_alike(parents: list[Weights], base: Weights) -> None:
    """The same tensors in the same shapes, floating ones in the base too; the others equal."""
    first = parents[0]
    for parent in parents[1:]:
        for name in [*first.stored, *parent.stored]:
            found = [model.stored[name].shape if name in model.stored else None for model in (first, parent)]
            if found[0] != found[1]:
                raise CheckpointError(
                    f"checkpoint {parent.folder}, tensor {name}",
                    got=_shape(found[1]),
                    expected=f"{_shape(found[0])}, as in {first.folder}",
                )
            if not first.stored[name].is_floating_point and not np.array_equal(
                first.bytes_of(name), parent.bytes_of(name)
            ):
                raise CheckpointError(
                    f"checkpoint {parent.folder}, tensor {name}",
                    got="other whole numbers",
                    expected=f"those of {first.folder}, because they cannot be averaged",
                )
    known = {_part(name) for name in base.stored}
    for name, stored in first.stored.items():
        of_base = base.stored.get(name)
        new = _part(name) not in known and not layer_of(name).startswith("layer ")
        if of_base is None and (new or not stored.is_floating_point):
            continue  # a head or pooler that the base has nothing of, or a buffer
        if of_base is not None and not (of_base.is_floating_point or stored.is_floating_point):
            continue  # the checkpoints' own is kept
        if of_base is None or (of_base.shape, of_base.is_floating_point) != (stored.shape, stored.is_floating_point):
            raise CheckpointError(
                f"base {base.folder}, tensor {name}",
                got=_shape(None if of_base is None else of_base.shape),
                expected=f"{_shape(stored.shape)}, {stored.dtype}, as in {first.folder}",
                fix="give the model that the checkpoints were trained from",
            )


def _part(name: str) -> str:
    """Of a tensor's name the module and what comes first in it, such as `pooler`."""
    module, _, within = name.rpartition("/")
    return f"{module}/{within.partition('.')[0]}"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no such tensor" if shape is None else f"{list(shape)}"
