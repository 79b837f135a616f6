"""Whether model folders can be merged, and what they hold beside their weights."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codiemb.errors import CheckpointError
from codiemb.files import write_whole
from codiemb.fusion.folder import Stored, Weights

# Of a checkpoint, not of a model.
_LEFT_OUT = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.distcp", "*.onnx", "*.h5", "*.msgpack"),
    *("adapter_config.json", "README.md", "manifest.json", "trainer_state.json", "balance.json", "fusion.json"),
    *("latest", "openvino_model.*", "*.partial"),
)
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
        of_base = Weights(base)
        stack.callback(of_base.close)
        parents = {folder: Weights(folder, of_base) for folder in folders}
        for parent in parents.values():
            stack.callback(parent.close)
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
    """Settings of tokenizer, modules, pooling, prompts and lengths in which two folders differ."""
    files = {
        file.relative_to(folder)
        for folder in (one, other)
        for file in folder.rglob("*.json")
        if not any(file.match(pattern) for pattern in _LEFT_OUT)
    }
    found = []
    for file in sorted(files):
        before, after = (_settings(folder / file) for folder in (one, other))
        if keys := [key for key in {**before, **after} if before.get(key) != after.get(key)]:
            found.append(f"{other / file}, {', '.join(keys[:3])}")
    return found


def _settings(file: Path) -> dict[str, Any]:
    """What a JSON file says about how texts are read; nothing if it is not there."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"file {file}", got=error, expected="a readable JSON file", fix="copy it again") from None
    known = content if isinstance(content, dict) else {"content": content}
    return {key: value for key, value in known.items() if key not in _MAY_DIFFER}


def copy_rest(folder: Path, out: Path) -> None:
    """All that a model folder holds beside its weights."""
    for file in sorted(folder.rglob("*")):
        place = file.relative_to(folder)
        hidden = any(part.startswith((".", "checkpoint-")) for part in place.parts)
        if file.is_file() and not hidden and not any(place.match(pattern) for pattern in _LEFT_OUT):
            (out / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, out / place)


def write_indexes(model: Weights, out: Path) -> None:
    """Of each module in shards, which file holds which tensor."""
    shards: dict[Path, list[Stored]] = {}
    for stored in model.stored.values():
        if stored.place.name != "model.safetensors":
            shards.setdefault(stored.place.parent, []).append(stored)
    for module, held in shards.items():
        content = {"metadata": {}, "weight_map": {stored.key: stored.place.name for stored in held}}
        write_whole(out / module / "model.safetensors.index.json", json.dumps(content, indent=2) + "\n")


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
    modules = {name.rpartition("/")[0] for name in base.stored}
    for name, stored in first.stored.items():
        of_base = base.stored[name].shape if name in base.stored else None
        new_module = name.rpartition("/")[0] not in modules
        if stored.is_floating_point and of_base != stored.shape and not new_module:
            raise CheckpointError(
                f"base {base.folder}, tensor {name}",
                got=_shape(of_base),
                expected=f"{_shape(stored.shape)}, as in {first.folder}",
                fix="give the model that the checkpoints were trained from",
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no such tensor" if shape is None else f"{list(shape)}"
