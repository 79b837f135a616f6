"""The weights of a model folder, read piece by piece: safetensors in one file or in shards, and LoRA adapters.

Files are read at an offset into buffers that go, not mapped, so that a process never holds more than the pieces it
works on, whatever the size of the model.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from codiemb.errors import CheckpointError
from codiemb.fusion.layout import ADAPTERS, modules_of, no_weights, read_json, weight_files
from codiemb.fusion.numbers import FLOATING, TYPES, widened

_OF_ADAPTERS = "base_model.model."
_OLD_NAMES = re.compile(r"(?<=LayerNorm\.)(gamma|beta)$")  # of BERTs that were converted from TensorFlow
_NEW_NAMES = {"gamma": "weight", "beta": "bias"}
_NOT_PLAIN = ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: where its bytes begin, and what they are.

    Attributes:
        place: the file, relative to its model folder.
        key: the tensor's name in the file.
        dtype: as safetensors names it.
    """

    file: Path
    place: Path
    key: str
    begin: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Of the tensor as a matrix; what has fewer than two dimensions is one row."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def width(self) -> int:
        return math.prod(self.shape) // max(1, self.rows)

    @property
    def itemsize(self) -> int:
        return TYPES[self.dtype].itemsize

    @property
    def is_floating_point(self) -> bool:
        return self.dtype in FLOATING


class Weights:
    """The tensors of a model folder by name: those of the first module by their own, others after the module's path.

    Raises:
        CheckpointError: no safetensors, a damaged file, pickled weights, or adapters that are not plain LoRA.
    """

    def __init__(self, folder: Path, base: Weights | None = None) -> None:
        """`base` holds the weights that adapters stand beside."""
        self.folder = folder
        self.files: list[Path] = []
        self.stored: dict[str, Stored] = {}
        self._open: dict[Path, int] = {}
        self._lora: dict[str, tuple[Stored, Stored]] = {}
        self._scaling = 0.0
        self._base = base
        modules = modules_of(folder)
        for number, module in enumerate(modules):
            for file in weight_files(folder, module):
                self.files.append(file)
                for stored in _header(file, folder):
                    name = _OLD_NAMES.sub(lambda old: _NEW_NAMES[old[1]], stored.key)
                    self.stored[f"{module}/{name}" if number else name] = stored
        if (folder / modules[0] / ADAPTERS).is_file():
            self._read_adapters(folder / modules[0], Path(modules[0]))
        if not self.stored:
            raise no_weights(folder)
        try:
            for file in self.files:
                self._open[file] = os.open(file, os.O_RDONLY)
        except OSError as error:
            self.close()
            raise CheckpointError(f"checkpoint {folder}", got=error, expected="files that can be opened") from None

    @property
    def has_adapters(self) -> bool:
        return bool(self._lora)

    def read(self, name: str, begin: int, end: int, wide: np.dtype) -> np.ndarray:
        """Rows of a tensor as [row, width], in the type to do arithmetic in."""
        if name not in self._lora:
            return self._read(self.stored[name], begin, end, wide)
        assert self._base is not None
        down, up = self._lora[name]
        rows = self._base.read(name, begin, end, np.dtype(np.float32))
        product = self._read(up, begin, end, rows.dtype) @ self._read(down, 0, down.rows, rows.dtype)
        return (rows + np.float32(self._scaling) * product).astype(wide, copy=False)

    def _read(self, stored: Stored, begin: int, end: int, wide: np.dtype) -> np.ndarray:
        return widened(self._bytes(stored, begin, end), stored.dtype, wide)

    def bytes_of(self, name: str) -> np.ndarray:
        """A whole tensor as it is stored, as [row, width]."""
        return self._bytes(self.stored[name], 0, self.stored[name].rows)

    def _bytes(self, stored: Stored, begin: int, end: int) -> np.ndarray:
        if stored.file not in self._open:  # what an adapter stands beside
            assert self._base is not None
            return self._base._bytes(stored, begin, end)
        size = stored.itemsize
        wanted = (end - begin) * stored.width * size
        rows = np.empty((end - begin, stored.width), TYPES[stored.dtype])
        view = rows.reshape(-1).view(np.uint8).data
        done = 0
        while done < wanted:
            got = os.preadv(self._open[stored.file], [view[done:]], stored.begin + begin * stored.width * size + done)
            if got == 0:
                raise _damaged(stored.file, "a file that became shorter while it was read")
            done += got
        return rows

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def without_prefix(self, names: Iterable[str]) -> None:
        """Takes the prefix of a model with a head (`bert.`) off all names, if those wanted are there with one."""
        name = next((name for name in names if name not in self.stored), "")
        found = next((known for known in self.stored if name and known.endswith(f".{name}")), None)
        if found is not None:
            prefix = found.removesuffix(name)
            self.stored = {known.removeprefix(prefix): stored for known, stored in self.stored.items()}

    def _read_adapters(self, module: Path, place: Path) -> None:
        """Replaces the names of LoRA's matrices by those of the weights they are added to."""
        base, config = self._base, read_json(module / "adapter_config.json")
        adapters = {
            name.removeprefix(_OF_ADAPTERS): self.stored.pop(name)
            for name in list(self.stored)
            if name.startswith(_OF_ADAPTERS)
        }
        downs, ups = (
            {name.removesuffix(end) for name in adapters if name.endswith(end)}
            for end in (".lora_A.weight", ".lora_B.weight")
        )
        if not _plain(config) or downs != ups or base is None or len(adapters) != 2 * len(downs):
            raise CheckpointError(
                f"checkpoint {self.folder}",
                got="adapters that are not plain LoRA on linear layers",
                expected="LoRA, or whole weights",
                fix="merge the adapters into their model first (docs/training.md, LoRA)",
            )
        self._scaling = config["lora_alpha"] / config["r"]
        base.without_prefix(f"{target}.weight" for target in downs)
        of_base = {name: replace(stored, place=place / stored.place.name) for name, stored in base.stored.items()}
        self.stored = of_base | self.stored
        for target in downs:
            name = f"{target}.weight"
            if name not in base.stored:
                raise CheckpointError(
                    f"checkpoint {self.folder}", got=f"an adapter of {name}", expected=f"a tensor of {base.folder}"
                )
            down, up = adapters[f"{target}.lora_A.weight"], adapters[f"{target}.lora_B.weight"]
            wanted = (base.stored[name].rows, down.rows, base.stored[name].width)
            if (up.rows, up.width, down.width) != wanted:
                raise CheckpointError(
                    f"checkpoint {self.folder}, adapter of {name}",
                    got=f"{list(up.shape)} and {list(down.shape)}",
                    expected=f"a product of {list(base.stored[name].shape)}, as in {base.folder}",
                )
            self._lora[name] = (down, up)


def _plain(config: Any) -> bool:
    """Whether adapters are matrices that are multiplied, scaled and added."""
    return (
        isinstance(config, dict)
        and config.get("peft_type") == "LORA"
        and not any(config.get(setting) for setting in _NOT_PLAIN)
        and all(isinstance(config.get(setting), int | float) and config[setting] > 0 for setting in ("r", "lora_alpha"))
    )


def _header(file: Path, folder: Path) -> list[Stored]:
    """The tensors of a safetensors file; that it is whole is checked by its own library."""
    try:
        with safe_open(file, framework="np"):
            pass
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        if unknown := {facts["dtype"] for facts in header.values()} - set(TYPES):
            raise CheckpointError(f"file {file}", got=f"number type {min(unknown)}", expected=", ".join(TYPES))
        return [
            Stored(
                file,
                file.relative_to(folder),
                key,
                8 + length + facts["data_offsets"][0],
                facts["dtype"],
                tuple(facts["shape"]),
            )
            for key, facts in header.items()
        ]
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(file, str(error)) from None


def _damaged(file: Path, got: str) -> CheckpointError:
    return CheckpointError(
        f"file {file}", got=got, expected="a whole safetensors file", fix="download or copy it again"
    )
