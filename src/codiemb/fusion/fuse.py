"""Model folders in, one model folder out: `codiemb fuse`.

The methods that are ours are linear in the checkpoints: delta-guided, uniform (model soup, Wortsman et al., 2022) and
given weights. SLERP, task arithmetic, TIES, DARE, SCE and model stock are mergekit's, handed one tensor at a time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from codiemb.config import Granularity, Method, Norm, Weighting
from codiemb.encoder.allocator import keep_memory
from codiemb.errors import ConfigError
from codiemb.files import publish, require_folder, sha256, told_of_full_disk, write_json, write_whole
from codiemb.fusion.alike import copy_rest, opened, write_indexes
from codiemb.fusion.folder import Weights
from codiemb.fusion.layout import modules_of
from codiemb.fusion.merge import Linear, Rule, merge
from codiemb.fusion.mergekit import MERGEKIT, Mergekit
from codiemb.fusion.settings import require_settings
from codiemb.fusion.weights import layer_of
from codiemb.versions import versions

logger = logging.getLogger(__name__)


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
    weights: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
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
        weights: of `weighted`, one for each checkpoint, with a sum above 0, by which they are divided; or such a list
            for each layer, by the names that `codiemb fuse --inspect` shows.
        by_run: of `delta`: weights within each run (the folder that a checkpoint is in), then across runs.
        parameters: of mergekit's methods, as its documentation names them.
        force: merge checkpoints of other prompts, pooling or tokenizer; `fusion.json` says what differed.

    Raises:
        ConfigError: settings that do not go together.
        CheckpointError: folders that cannot be merged, or no room on the disk.
    """
    folders, base, out = [Path(checkpoint) for checkpoint in checkpoints], Path(base), Path(out).resolve()
    require_settings(
        folders,
        method=method,
        granularity=granularity,
        norm=norm,
        weighting=weighting,
        temperature=temperature,
        scale=scale,
        weights=weights,
        by_run=by_run,
        parameters=parameters,
    )
    require_empty(out)
    _require_replaceable(out)
    keep_memory()  # else every tile of a merge is taken anew from the system: by element five times slower
    first, linear = folders[0], method not in MERGEKIT
    if linear:  # in an order of their own, so that the order they are named in does not matter
        order = sorted(range(len(folders)), key=lambda place: str(folders[place].resolve()))
        folders = [folders[place] for place in order]
        given = _given(method, len(folders), weights, order)
    with opened([first, *(folder for folder in folders if folder != first)], base, force) as (
        models,
        of_base,
        differences,
    ):
        parents = [models[folder] for folder in folders]
        rule: Rule
        if linear:
            runs = _by_run(folders) if by_run else []
            rule = Linear(granularity, norm, weighting, temperature, scale, given, runs)
            if isinstance(given, Mapping):
                _require_layers(given, parents[0])
            settings: dict[str, Any] = {"scale": scale}
            if method == "delta":
                settings |= {"granularity": granularity, "norm": norm, "weighting": weighting, "by_run": by_run}
                settings |= {"temperature": temperature} if weighting == "softmax" else {}
        else:
            settings = {**MERGEKIT[method][1], **(parameters or {})}
            rule = Mergekit(MERGEKIT[method][0], settings)
        with (
            _hashes({base: of_base, **dict(zip(folders, parents, strict=True))}) as hashes,
            _unfinished(out) as unfinished,
            threadpool_limits(1),  # tensors are merged side by side, each by one thread
        ):
            lengths = merge(parents, of_base, rule, unfinished)
            facts = {
                "method": method,
                **settings,
                "base": {"path": str(base), "sha256": hashes(base)},
                "parents": [{"path": str(folder), "sha256": hashes(folder)} for folder in folders],
                "weights": rule.summary or (f"one for each {granularity}" if linear else "those of mergekit"),
                **lengths,
                **({"forced": differences} if differences else {}),
                "versions": versions(),
            }
            copy_rest(first, unfinished)
            if models[first].has_adapters:
                _copy_config(base, first, unfinished)
            write_indexes(parents[0], unfinished)
            write_json(unfinished / "fusion.json", facts)
            write_whole(unfinished / "README.md", card(out, facts))
            if out.exists():
                out.rmdir()
            publish(unfinished, out)
    return Fused(out, facts)


def require_empty(out: Path) -> None:
    """Refuses an output folder that holds files."""
    require_folder("--out", out)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--out {out}", got="a folder with files", expected="a new folder", fix="change --out")


def _require_replaceable(out: Path) -> None:
    """Refuses an empty folder whose name no finished one can be given."""
    if out.exists():
        require_folder("--out", out.parent)
        if out.is_mount():
            raise ConfigError(f"--out {out}", got="a mount point", expected="a new folder", fix="name one in it")


def _given(
    method: str, models: int, weights: Sequence[float] | Mapping[str, Sequence[float]] | None, order: list[int]
) -> list[float] | dict[str, list[float]] | None:
    """The weights that are not to be found, in another order of the models, with the sum 1."""
    if method == "delta":
        return None
    if weights is None:
        return [1 / models] * models
    if isinstance(weights, Mapping):
        return {layer: [given[place] / math.fsum(given) for place in order] for layer, given in weights.items()}
    return [weights[place] / math.fsum(weights) for place in order]


def _require_layers(given: Mapping[str, Sequence[float]], model: Weights) -> None:
    layers = layers_of(model)
    if set(given) != set(layers):
        raise ConfigError("weights", got=f"those of {', '.join(given)}", expected=f"those of {', '.join(layers)}")


def layers_of(model: Weights) -> list[str]:
    """The layers of a model that can be merged with weights of their own."""
    floating = [name for name, stored in model.stored.items() if stored.is_floating_point]
    return list(dict.fromkeys(map(layer_of, floating)))


def _by_run(folders: list[Path]) -> list[list[int]]:
    runs: dict[Path, list[int]] = {}
    for place, folder in enumerate(folders):
        runs.setdefault(folder.resolve().parent, []).append(place)
    return list(runs.values())


@contextlib.contextmanager
def _hashes(models: dict[Path, Weights]) -> Iterator[Callable[[Path], dict[str, str]]]:
    """SHA-256 of the weight files of each folder, found in a thread while the merge runs, shard by shard as it does."""
    files = [(file.relative_to(model.folder), folder, file) for folder, model in models.items() for file in model.files]
    thread = ThreadPoolExecutor(1)
    try:
        jobs = {(folder, place): thread.submit(sha256, file) for place, folder, file in sorted(files)}
        yield lambda folder: {str(place): job.result() for (of, place), job in jobs.items() if of == folder}
    finally:
        thread.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _parents(out: Path) -> Iterator[None]:
    """Makes the folders that `out` is to be in, and takes those back that are empty in the end."""
    made = [parent for parent in out.parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()


@contextlib.contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into; gone afterwards, unless it was renamed."""
    with told_of_full_disk(out, "free some disk"), _parents(out):
        folder = Path(tempfile.mkdtemp(prefix=f".writing-{out.name}-", dir=out.parent))
        folder.chmod(0o755)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _copy_config(base: Path, first: Path, out: Path) -> None:
    """The architecture, which a folder of adapters does not say."""
    of_first, of_base = (Path(modules_of(folder)[0]) / "config.json" for folder in (first, base))
    if not (out / of_first).exists() and (base / of_base).exists():
        shutil.copy2(base / of_base, out / of_first)


def card(out: Path, facts: dict[str, Any]) -> str:
    """The README of a merged model, from what `fusion.json` says."""
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
