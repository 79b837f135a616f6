"""Model folders in, one model folder out: `codiemb fuse`.

The methods that are ours are linear in the checkpoints: delta-guided, uniform (model soup, Wortsman et al., 2022) and
given weights. SLERP, task arithmetic, TIES, DARE, SCE and model stock are mergekit's, handed one tensor at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from codiemb.config import Granularity, Method, Norm, Weighting
from codiemb.config import Mergekit as MergekitMethod
from codiemb.errors import CheckpointError, ConfigError
from codiemb.files import publish, require_folder, sha256, told_of_full_disk
from codiemb.fusion.folder import ADAPTERS, Weights
from codiemb.fusion.merge import Linear, Rule, Tiles, merge
from codiemb.versions import versions

logger = logging.getLogger(__name__)

METHODS = ("delta", "uniform", "weighted", *get_args(MergekitMethod))
MERGEKIT = {  # its name there, and settings where it has no default of its own
    "slerp": ("slerp", {"t": 0.5}),
    "task_arithmetic": ("task_arithmetic", {"weight": 1.0}),
    "ties": ("ties", {"weight": 1.0, "density": 0.2}),
    "dare": ("dare_linear", {"weight": 1.0, "density": 0.5}),
    "dare_ties": ("dare_ties", {"weight": 1.0, "density": 0.5}),
    "sce": ("sce", {"select_topk": 0.1}),
    "model_stock": ("model_stock", {}),
}
# Of a checkpoint, not of a model.
_LEFT_OUT = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "adapter_config.json", "README.md"),
    *("manifest.json", "trainer_state.json", "balance.json", "fusion.json"),
)
# What must be the same in all checkpoints; of JSON files these keys may differ.
_MAY_DIFFER = {"__version__", "_name_or_path", "transformers_version", "torch_dtype", "dtype"}


@dataclass(frozen=True)
class Fused:
    """A fused model.

    Attributes:
        path: its folder.
        facts: what `fusion.json` in it says.
    """

    path: Path
    facts: dict[str, Any]


def fuse(
    checkpoints: Sequence[str | Path],
    base: str | Path,
    out: str | Path,
    *,
    method: Method = "delta",
    granularity: Granularity = "tensor",
    norm: Norm = "l2",
    weighting: Weighting = "proportional",
    temperature: float = 1.0,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
    by_run: bool = False,
    parameters: dict[str, Any] | None = None,
    force: bool = False,
) -> Fused:
    """Merges the weights of checkpoints into a model folder.

    Args:
        checkpoints: at least two model folders of one architecture: safetensors in one file or shards, or LoRA
            adapters, which are added to `base` on the way.
        base: the model that they were trained from.
        out: the new folder; written under another name first.
        method: `delta`, `uniform`, `weighted`, or one of mergekit's.
        granularity: of `delta`: one weight for a checkpoint, for each tensor, row or element.
        norm: of `delta`: of the distance from the base.
        weighting: of `delta`: `proportional`, `inverse`, `softmax`.
        temperature: of `softmax`, above 0.
        scale: how far to go from the base (0) to the merged weights (1), or beyond; of `delta`, `uniform`, `weighted`.
        weights: of `weighted`, one for each checkpoint, with a sum above 0; they are divided by it.
        by_run: of `delta`: weights within each run (the folder that a checkpoint is in), then across runs.
        parameters: of mergekit's methods, as its documentation names them.
        force: merge checkpoints of other prompts, pooling or tokenizer; `fusion.json` says what differed.

    Raises:
        ConfigError: settings that do not go together.
        CheckpointError: folders that cannot be merged, or no room on the disk.
    """
    folders, base, out = [Path(checkpoint) for checkpoint in checkpoints], Path(base), Path(out)
    _require_settings(folders, method, granularity, norm, weighting, temperature, weights)
    _require_empty(out)
    order = sorted(range(len(folders)), key=lambda place: str(folders[place].resolve()))
    linear = method not in MERGEKIT
    folders = [folders[place] for place in order] if linear else folders
    with contextlib.ExitStack() as stack, torch.inference_mode(), _one_thread():
        of_base = Weights(base)
        parents = [Weights(folder, of_base) for folder in folders]
        for opened in (of_base, *parents):
            stack.callback(opened.close)
        require_alike(parents, of_base)
        differences = [difference for folder in folders[1:] for difference in _differences(folders[0], folder)]
        if differences and not force:
            raise CheckpointError(
                f"checkpoint {differences[0]}",
                got=f"another value than in {folders[0]}",
                expected="checkpoints that read texts alike",
                fix="leave it out, or --force to keep what the first has",
            )
        rule: Rule
        if linear:
            given = _given(method, len(folders), [weights[place] for place in order] if weights else None)
            runs = _by_run(folders) if by_run else []
            rule = Linear(granularity, norm, weighting, temperature, scale, given, runs)
            settings: dict[str, Any] = {"scale": scale}
            if method == "delta":
                settings |= {"granularity": granularity, "norm": norm, "weighting": weighting, "by_run": by_run}
                settings |= {"temperature": temperature} if weighting == "softmax" else {}
        else:
            settings = {**MERGEKIT[method][1], **(parameters or {})}
            rule = Mergekit(MERGEKIT[method][0], settings)
        hashes = stack.enter_context(_hashes([base, *folders], [of_base, *parents]))
        template = next((parent for parent in parents if not parent.has_adapters), of_base)
        unfinished = out.with_name(f".writing-{out.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        with told_of_full_disk(out), _removed_unless_published(unfinished):
            unfinished.mkdir(parents=True)
            lengths = merge(parents, of_base, template, rule, unfinished)
            facts = {
                "method": method,
                **settings,
                "base": {"path": str(base), "sha256": hashes(base)},
                "parents": [{"path": str(folder), "sha256": hashes(folder)} for folder in folders],
                "weights": rule.summary or f"one for each {granularity}",
                **lengths,
                **({"forced": differences} if differences else {}),
                "versions": versions(),
            }
            _copy_rest(folders[0], base, unfinished)
            _write_indexes(template, unfinished)
            (unfinished / "fusion.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", "utf-8")
            (unfinished / "README.md").write_text(_card(out, facts), "utf-8")
            if out.exists():
                out.rmdir()
            publish(unfinished, out)
    return Fused(out, facts)


@dataclass
class Mergekit:
    """A method of mergekit, on one tensor after the other."""

    method: str
    parameters: dict[str, Any]
    whole: bool = True
    summary: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            import mergekit.merge_methods  # noqa: F401
        except ImportError:
            raise ConfigError(
                f"method {self.method}",
                got="no mergekit",
                expected="the extra merge",
                fix="pip install 'codiemb[merge]'",
            ) from None

    def look(self, tensors: Sequence[Tiles]) -> None:
        pass

    def weigh(self, tensor: Tiles) -> None:
        pass

    def merge(self, tensor: Tiles, weighed: None, parts: list[Tensor], base: Tensor | None) -> Tensor:
        from mergekit.merge_methods import BasePolicy, get, merge_state_dicts

        if base is None:
            return torch.stack(parts).mean(dim=0)
        takes_base = get(self.method).spec.contract.base != BasePolicy.IGNORED
        states: dict[Any, Any] = {place: {"x": part} for place, part in enumerate(parts)}
        if takes_base and self.method != "slerp":
            states["base"] = {"x": base}
        origin = None if not takes_base else 0 if self.method == "slerp" else "base"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(tensor.name.encode()).digest()[:4], "little"))
            try:
                return merge_state_dicts(states, self.method, base=origin, parameters=self.parameters)["x"]
            except (ValueError, TypeError, RuntimeError) as error:
                raise ConfigError(f"method {self.method}", got=str(error).splitlines()[0]) from None


def _require_settings(
    folders: list[Path],
    method: str,
    granularity: str,
    norm: str,
    weighting: str,
    temperature: float,
    weights: Sequence[float] | None,
) -> None:
    for name, value, known in (
        ("method", method, METHODS),
        ("granularity", granularity, get_args(Granularity)),
        ("norm", norm, get_args(Norm)),
        ("weighting", weighting, get_args(Weighting)),
    ):
        if value not in known:
            raise ConfigError(name, got=repr(value), expected=f"one of {', '.join(known)}")
    if len(folders) < 2:
        raise ConfigError("checkpoints", got=len(folders), expected="at least two")
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise ConfigError("checkpoints", got=f"{twice[0]} twice", expected="each once")
    if not temperature > 0:
        raise ConfigError("temperature", got=temperature, expected="a number above 0")
    if (weights is not None) != (method == "weighted"):
        raise ConfigError(
            "weights", got=weights or "none", expected="weights for the method weighted, and for no other"
        )
    if weights is not None and (len(weights) != len(folders) or not sum(weights) > 0):
        raise ConfigError(
            "weights", got=list(weights), expected=f"{len(folders)} numbers, one a checkpoint, sum above 0"
        )


def _require_empty(out: Path) -> None:
    require_folder("--out", out)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--out {out}", got="a folder with files", expected="a new folder", fix="change --out")


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
            if not first.stored[name].dtype.is_floating_point:
                rows = first.stored[name].rows
                if not torch.equal(first.read(name, 0, rows), parent.read(name, 0, rows)):
                    raise CheckpointError(
                        f"checkpoint {parent.folder}, tensor {name}",
                        got="other whole numbers",
                        expected=f"those of {first.folder}, because they cannot be averaged",
                    )
    modules = {name.rpartition("/")[0] for name in base.stored}
    for name, stored in first.stored.items():
        of_base = base.stored[name].shape if name in base.stored else None
        new_module = name.rpartition("/")[0] not in modules
        if stored.dtype.is_floating_point and of_base != stored.shape and not new_module:
            raise CheckpointError(
                f"base {base.folder}, tensor {name}",
                got=_shape(of_base),
                expected=f"{_shape(stored.shape)}, as in {first.folder}",
                fix="give the model that the checkpoints were trained from",
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no such tensor" if shape is None else f"{list(shape)}"


def _given(method: str, models: int, weights: Sequence[float] | None) -> list[float] | None:
    if method == "delta":
        return None
    if weights is None:
        return [1 / models] * models
    return [weight / sum(weights) for weight in weights]


def _by_run(folders: list[Path]) -> list[list[int]]:
    runs: dict[Path, list[int]] = {}
    for place, folder in enumerate(folders):
        runs.setdefault(folder.resolve().parent, []).append(place)
    return list(runs.values())


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
        contents = []
        for folder in (one, other):
            try:
                contents.append(_without(json.loads((folder / file).read_text(encoding="utf-8"))))
            except FileNotFoundError:
                contents.append(None)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"file {folder / file}", got=error, expected="a readable JSON file") from None
        if contents[0] != contents[1]:
            keys = (
                [
                    key
                    for key in {**(contents[0] or {}), **(contents[1] or {})}
                    if (contents[0] or {}).get(key) != (contents[1] or {}).get(key)
                ]
                if all(isinstance(content, dict) for content in contents)
                else []
            )
            found.append(f"{other / file}" + (f", {', '.join(keys[:3])}" if keys else ""))
    return found


def _without(content: Any) -> Any:
    return (
        {key: value for key, value in content.items() if key not in _MAY_DIFFER}
        if isinstance(content, dict)
        else content
    )


def _copy_rest(first: Path, base: Path, out: Path) -> None:
    """All that a model folder holds beside its weights; the base's config where adapters have none."""
    shutil.copytree(first, out, ignore=shutil.ignore_patterns(*_LEFT_OUT, "checkpoint-*", ".*"), dirs_exist_ok=True)
    if (first / ADAPTERS).is_file() and not (out / "config.json").exists():
        shutil.copy2(base / "config.json", out)


def _write_indexes(template: Weights, out: Path) -> None:
    """Of each module in shards, which file holds which tensor."""
    for folder in {file.parent for file in template.files}:
        if (folder / "model.safetensors.index.json").is_file():
            stored = {name: held for name, held in template.stored.items() if held.file.parent == folder}
            own = folder.relative_to(template.folder)
            weight_map = {name.removeprefix(f"{own}/"): held.file.name for name, held in stored.items()}
            size = sum(held.rows * held.width * held.dtype.itemsize for held in stored.values())
            content = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2)
            (out / own / "model.safetensors.index.json").write_text(content + "\n", encoding="utf-8")


@contextlib.contextmanager
def _hashes(folders: list[Path], weights: list[Weights]) -> Iterator[Callable[[Path], dict[str, str]]]:
    """SHA-256 of the weight files of each folder, found in a thread while the merge runs."""

    def of(files: list[Path], folder: Path) -> dict[str, str]:
        return {str(file.relative_to(folder)): sha256(file) for file in files}

    with ThreadPoolExecutor(1) as thread:
        jobs = {folder: thread.submit(of, model.files, folder) for folder, model in zip(folders, weights, strict=True)}
        yield lambda folder: jobs[folder].result()


@contextlib.contextmanager
def _removed_unless_published(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors are merged side by side, each by one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _card(out: Path, facts: dict[str, Any]) -> str:
    parents = "\n".join(f"- {parent['path']}" for parent in facts["parents"])
    head = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["codiemb", "merge"],
    }
    return (
        f"---\n{json.dumps(head, indent=2)}\n---\n\n# {out.name}\n\nA text-embedding model, fused by CoDiEmb with the "
        f"method `{facts['method']}` from\n\n{parents}\n\nwhich were trained from {facts['base']['path']}. "
        "`fusion.json` holds settings, weights and hashes.\n"
    )
