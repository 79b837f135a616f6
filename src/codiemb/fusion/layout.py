"""What lies where in a model folder: its modules, their weight files, and the rest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from codiemb.errors import CheckpointError

ADAPTERS = "adapter_model.safetensors"
_INDEX = "model.safetensors.index.json"
# Of a checkpoint, not of a model.
_LEFT_OUT = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.distcp", "*.onnx", "*.h5", "*.msgpack"),
    *("adapter_config.json", "README.md", "manifest.json", "trainer_state.json", "balance.json", "fusion.json"),
    *("latest", "openvino_model.*", "*.partial"),
)


def modules_of(folder: Path) -> list[str]:
    """Folders of the modules of a SentenceTransformer, and of modules within modules; a folder of transformers is one.

    Raises:
        CheckpointError: no such folder, or `modules.json` is damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"checkpoint {folder}", got="no such folder", expected="a model folder", fix="check the path"
        )
    listing = folder / "modules.json"
    if not listing.is_file():
        return [""]
    content = read_json(listing)
    try:
        paths = [_inside(listing, module["path"]) for module in content]
    except (TypeError, KeyError):
        paths = []
    if not paths:
        raise _unreadable(listing, "another content")
    files = [file for path in paths if path for file in (folder / path).rglob("*.safetensors")]
    within = {str(file.parent.relative_to(folder)) for file in files}
    return [*paths, *sorted(within - set(paths))]


def weight_files(folder: Path, module: str) -> list[Path]:
    """The files that hold the weights of a module; none if it has none.

    Raises:
        CheckpointError: pickled weights, or a damaged index of shards.
    """
    place = folder / module
    if files := [file for name in ("model.safetensors", ADAPTERS) if (file := place / name).is_file()]:
        return files
    if (index := place / _INDEX).is_file():
        content = read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise _unreadable(index, "no weight_map")
        return [place / name for name in sorted({_inside(index, name) for name in weight_map.values()})]
    if any(place.glob("*.bin")):
        raise no_weights(place)
    return []


def rest_of(folder: Path) -> Iterator[Path]:
    """What a model folder holds beside its weights, relative to it: the files in it and in its modules.

    Raises:
        CheckpointError: a link to nowhere.
    """
    own = [folder / module for module in modules_of(folder) if module]
    for file in sorted({*folder.glob("*"), *(file for module in own for file in module.rglob("*"))}):
        place = file.relative_to(folder)
        if file.is_symlink() and not file.exists():
            raise CheckpointError(
                f"file {file}", got="a link to nowhere", expected="a file", fix="download or copy it again"
            )
        hidden = any(part.startswith((".", "checkpoint-")) for part in place.parts)
        if file.is_file() and not hidden and not any(place.match(pattern) for pattern in _LEFT_OUT):
            yield place


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from None


def no_weights(folder: Path) -> CheckpointError:
    """That a folder has no safetensors, or weights that are pickled."""
    pickled = next((file for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(f"*model{pattern}")), None)
    if pickled is None:
        return CheckpointError(
            f"checkpoint {folder}", got="no safetensors", expected="a model folder", fix="check the path"
        )
    return CheckpointError(
        f"file {pickled}",
        got="pickled weights, which can run any code when they are opened",
        expected="model.safetensors",
        fix="convert a model you trust: SentenceTransformer(folder).save(other_folder)",
    )


def _inside(file: Path, name: Any) -> str:
    """A place named in a file, which must be below its folder."""
    if not isinstance(name, str) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise _unreadable(file, f"the place {name!r}")
    return name


def _unreadable(file: Path, got: str | Exception) -> CheckpointError:
    return CheckpointError(f"file {file}", got=got, expected="that of a model folder", fix="download or copy it again")
