"""Fusion beside `cat` and beside `SentenceTransformer.merge`: seconds and peak memory of whole processes, in turn.

    python benchmarks/fuse.py [--only large small] [--folder DIR] [--repeats 3] [--parameters 2.4e9]

    large   4 checkpoints and their base, random bf16 weights of `--parameters` numbers in shards, written into
            `--folder` (54 GB of disk in all at 2.4e9). `codiemb fuse` beside `cat` of the same five models into a file
            on the same disk; each time the files are put out of the page cache first. Throughput is bytes read by the
            second.
    small   5 moved copies of the bundled model: `codiemb fuse --method uniform` beside a script that calls
            `SentenceTransformer.merge(..., method="linear")` and saves (extra merge).

Prints one JSON line each, with medians and range.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import commit, machine
from safetensors.torch import load_file, save_file

from codiemb.encoder.location import folder_of
from codiemb.versions import versions

WIDTH, LAYERS, SHARD = 2560, 40, 8  # layers to a shard
THEIRS = """
import sys
from sentence_transformers import SentenceTransformer
*models, out = sys.argv[1:]
SentenceTransformer.merge(models, method="linear").save_pretrained(out)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["large", "small"], default=["large", "small"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parameters", type=float, default=2.4e9)
    arguments = parser.parse_args()
    for part in arguments.only:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            line = {"large": large, "small": small}[part](Path(folder), arguments.repeats, int(arguments.parameters))
        facts = {"machine": machine(), "versions": versions(), "commit": commit()}
        print(json.dumps({"benchmark": f"fuse {part}", **line, **facts}), flush=True)


def large(folder: Path, repeats: int, parameters: int) -> dict[str, Any]:
    models = [folder / name for name in ("base", "a", "b", "c", "d")]
    for seed, model in enumerate(models):
        make(model, seed, parameters)
    files = [file for model in models for file in sorted(model.glob("*.safetensors"))]
    size = sum(file.stat().st_size for file in files)
    command = fuse(models[1:], models[0], folder / "out")
    sides = {
        "ours": command,
        "ours, weights by element": [*command, "--granularity", "element"],
        "cat": ["sh", "-c", f"cat {' '.join(map(str, files))} > {folder / 'out'} && sync {folder / 'out'}"],
    }
    runs = in_turn(sides, folder / "out", repeats, files)
    rates = {side: [size / 1e9 / seconds for seconds, _ in runs[side]] for side in sides}
    return {
        "parameters": parameters,
        "gigabytes_read": round(size / 1e9, 2),
        "sides": {side: {"gb_per_second": spread(rates[side]), **memory(runs[side])} for side in sides},
        "throughput_over_cat": {
            side: spread([one / other for one, other in zip(rates[side], rates["cat"], strict=True)])
            for side in list(sides)[:2]
        },
    }


def small(folder: Path, repeats: int, parameters: int) -> dict[str, Any]:
    base = folder_of("bundled:all-MiniLM-L6-v2")
    weights = load_file(base / "model.safetensors")
    models = [folder / f"checkpoint-{number}" for number in range(5)]
    for seed, model in enumerate(models):
        shutil.copytree(base, model)
        torch.manual_seed(seed)
        moved = {
            name: value + 0.01 * torch.randn_like(value) if value.is_floating_point() else value
            for name, value in weights.items()
        }
        save_file(moved, model / "model.safetensors", {"format": "pt"})
    out = folder / "out"
    sides = {
        "ours": [*fuse(models, base, out), "--method", "uniform"],
        "ours, delta": fuse(models, base, out),
        "sentence-transformers": [sys.executable, "-c", THEIRS, *map(str, models), str(out)],
    }
    runs = in_turn(sides, out, repeats, [])
    times = {side: [seconds for seconds, _ in runs[side]] for side in sides}
    return {
        "sides": {side: {"seconds": spread(times[side]), **memory(runs[side])} for side in sides},
        "times_as_fast": {
            side: spread([b / a for a, b in zip(times[side], times["sentence-transformers"], strict=True)])
            for side in list(sides)[:2]
        },
    }


def fuse(models: Sequence[Path], base: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "codiemb", "fuse", *map(str, models), "--base", str(base), "--out", str(out)]


def make(model: Path, seed: int, parameters: int) -> None:
    """A decoder's shapes with random weights: an embedding, and layers of four matrices, in shards."""
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "random"}))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1 << 24, generator=generator, dtype=torch.float32).bfloat16()

    def random(*shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return noise.repeat(-(-count // len(noise)))[:count].view(shape)

    a_layer = WIDTH * WIDTH * 12
    layers = max(1, min(LAYERS, (parameters - 50_000_000) // a_layer))
    rows = max(8, (parameters - layers * a_layer) // WIDTH)
    shards: list[dict[str, torch.Tensor]] = [{"embed_tokens.weight": random(rows, WIDTH)}]
    for layer in range(layers):
        if layer % SHARD == 0:
            shards.append({})
        for name, shape in (("qkv", (3, 1)), ("out", (1, 1)), ("up", (4, 1)), ("down", (1, 4))):
            shards[-1][f"layers.{layer}.{name}.weight"] = random(shape[0] * WIDTH, shape[1] * WIDTH)
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, model / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def in_turn(
    sides: dict[str, list[str]], out: Path, repeats: int, files: Sequence[Path]
) -> dict[str, list[tuple[float, float]]]:
    """Seconds and peak memory in GB of each side in each turn; what it wrote is removed, outside of the time."""
    runs: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, command in sides.items():
            for file in files:
                forget(file)
            began = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
            peak = 0
            while process.poll() is None:
                peak = max(peak, peak_of(process.pid))
                time.sleep(0.01)
            seconds = time.perf_counter() - began
            if process.returncode:
                raise SystemExit(f"{' '.join(command)} failed")
            runs[side].append((seconds, peak / 1e9))
            print(f"{side}: {runs[side][-1][0]:.1f} s, {runs[side][-1][1]:.2f} GB", file=sys.stderr, flush=True)
            shutil.rmtree(out) if out.is_dir() else out.unlink()
    return runs


def peak_of(process: int) -> int:
    """Bytes of memory that a process has held at most, so far; what it was started from does not count."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{process}/status").read_text()
        if found := re.search(r"VmHWM:\s+(\d+) kB", status):
            return 1024 * int(found[1])
    return 0


def forget(file: Path) -> None:
    """Puts a file out of the page cache."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory(runs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    return {"peak_gb": spread([peak for _, peak in runs])}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(median(values), 3), "lowest": round(min(values), 3), "highest": round(max(values), 3)}


if __name__ == "__main__":
    main()
