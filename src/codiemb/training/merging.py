"""The end of a run with a `fusion` section: its checkpoints merged, the merges scored, the best kept."""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from codiemb.config import Config, Fusion, Source
from codiemb.distributed import barrier, on_first
from codiemb.encoder.adapters import merge_adapters
from codiemb.encoder.location import folder_of
from codiemb.encoder.model import WEIGHT_FILES, open_model, save_encoder
from codiemb.errors import CheckpointError
from codiemb.evaluation.suite import Results, average, evaluate_suite
from codiemb.files import publish, sha256, write_json, write_whole
from codiemb.fusion.fuse import card, fuse
from codiemb.training.checkpoint import WRITING, checkpoints, verify
from codiemb.training.ema import Ema
from codiemb.training.sharding import loading_whole
from codiemb.versions import versions

logger = logging.getLogger(__name__)


def merge_run(
    config: Config,
    arguments: Any,
    encoder: SentenceTransformer,
    averaged: SentenceTransformer | None,
    suite: Sequence[Source],
    dev: Sequence[Source],
) -> dict[str, Results]:
    """Merges the checkpoints of the run into fused/<method> and scores each merge on the suite.

    With a dev suite the models are compared on it, the trained one among them; fused/choice.json says how they
    scored, and of the merges only the best stays.

    Args:
        encoder: the trained model.
        averaged: with the mean weights of the run, for the method `ema`.
        dev: data sets to choose on; empty: all merges stay.

    Returns:
        Metrics on the suite by method.
    """
    assert config.fusion is not None
    settings, run = config.fusion, Path(config.output_dir)
    made = on_first(lambda: _merges(config, settings, averaged))
    barrier()
    results, scores = {}, {"model": _means(encoder, dev)}
    for method in made:
        with loading_whole(arguments):
            merged = open_model(str(run / "fused" / method), dtype=torch.float32)
        if suite:
            logger.info(f"evaluation of the merge {method}")
        results[method] = evaluate_suite(merged, suite, run / "eval" / method)
        scores[method] = _means(merged, dev)
        told = {"scores": average(results[method], suite)} if suite else {}
        told |= {"dev_scores": scores[method]} if dev else {}
        on_first(partial(_add_to_facts, run / "fused" / method / "fusion.json", told))
    if dev and made:
        on_first(lambda: _choose(run, settings, scores))
    return results


def averaged_encoder(encoder: SentenceTransformer, ema: Ema | None) -> SentenceTransformer | None:
    """A copy of the encoder with the mean weights of the run, adapters merged; None where no mean was kept."""
    if ema is None:
        return None
    averaged = copy.deepcopy(encoder)
    ema.put_into(averaged)
    merge_adapters(averaged)
    return averaged


def _merges(config: Config, settings: Fusion, averaged: SentenceTransformer | None) -> list[str]:
    """Writes every merge that is asked for; returns which."""
    run, base = Path(config.output_dir), folder_of(config.model.base)
    wanted = None if settings.checkpoints == "all" else settings.checkpoints
    chosen = list(islice(_whole(checkpoints(run)), wanted)) if {*settings.methods} - {"ema"} else []
    made: list[str] = []
    for method in settings.methods:
        out = run / "fused" / method
        for left in (out, *out.parent.glob(f"{WRITING}-{method}-*")):  # by a run that was ended here
            shutil.rmtree(left, ignore_errors=True)
        if method == "ema":
            assert averaged is not None
            _write_average(averaged, out, settings.ema_decay, run, base)
            made.append(method)
        elif len(chosen) < 2:
            logger.info(f"method {method}: nothing to fuse, {run} has {len(chosen)} checkpoint(s)")
        else:
            of_delta = settings.model_dump(include={"granularity", "norm", "weighting", "temperature"})
            linear = {"scale": settings.scale} | (of_delta if method == "delta" else {})
            fuse(chosen, base, out, method=method, **(linear if method in ("delta", "uniform") else {}))
            logger.info(f"fused {len(chosen)} checkpoints into {out}")
            made.append(method)
    return made


def _whole(found: Sequence[Path]) -> Iterator[Path]:
    """The checkpoints that are as they were written; a run may have passed over one that is not."""
    for folder in found:
        try:
            yield verify(folder).path
        except CheckpointError as error:
            logger.warning(f"not merged: {error}")


def _write_average(averaged: SentenceTransformer, out: Path, decay: float, run: Path, base: Path) -> None:
    written = run / WRITING / "ema"
    save_encoder(averaged, written)
    facts: dict[str, Any] = {
        "method": "ema",
        "decay": decay,
        "weights": "of each step, falling by the decay with every later one",
        "base": {"path": str(base), "sha256": _hashes_of(base)},
        "parents": [{"path": str(run)}],
        "versions": versions(),
    }
    write_json(written / "fusion.json", facts)
    write_whole(written / "README.md", card(out, facts))
    out.parent.mkdir(parents=True, exist_ok=True)
    publish(written, out)
    logger.info(f"mean of the weights of all steps in {out}")


def _hashes_of(folder: Path) -> dict[str, str]:
    """SHA-256 by name of the weight files of a model folder."""
    files = sorted(file for pattern in WEIGHT_FILES for file in folder.rglob(pattern))
    return {str(file.relative_to(folder)): sha256(file) for file in files}


def _add_to_facts(file: Path, told: dict[str, Any]) -> None:
    facts = json.loads(file.read_text(encoding="utf-8")) | told
    write_json(file, facts)


def _means(encoder: SentenceTransformer, dev: Sequence[Source]) -> dict[str, float]:
    """By task the mean over the dev data sets."""
    return average(evaluate_suite(encoder, dev, None), dev) if dev else {}


def _choose(run: Path, settings: Fusion, scores: dict[str, dict[str, float]]) -> None:
    """The highest mean over the tasks; at a tie what comes first, the trained model."""
    means = {name: mean(found.values()) for name, found in scores.items()}
    chosen = max(means, key=lambda name: -math.inf if math.isnan(means[name]) else means[name])
    for name in scores:
        if name not in ("model", chosen):
            shutil.rmtree(run / "fused" / name)
    content = {"suite": settings.suite, "scores": scores, "chosen": chosen}
    write_json(run / "fused" / "choice.json", content)
    place = run / "model" if chosen == "model" else run / "fused" / chosen
    told = ", ".join(f"{name} {100 * value:.2f}" for name, value in means.items())
    logger.info(f"on the dev suite: {told}; best: {place}")
