"""What one section of a configuration allows another: the faults that no section can see alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from codiemb.settings_file import nearest
from codiemb.tasks import TASKS

if TYPE_CHECKING:
    from codiemb.config import Config


def faults_across(config: Config) -> list[str]:
    """Each fault as "key: got ..., expected ..."; empty if the sections agree."""
    return [
        *_schedule(config),
        *_emphasis(config),
        *_frozen(config),
        *_dimensions(config),
        *_sharded(config),
        *_conflict(config),
        *_fusion(config),
    ]


def _schedule(config: Config) -> list[str]:
    """Weights and stages name the sources."""
    batching, names, faults = config.batching, [source.name for source in config.data], []
    if batching.schedule == "weights":
        if missing := [name for name in names if name not in batching.weights]:
            faults.append(f"batching.weights: got none for {missing[0]!r}, expected a weight for every source")
        faults += [
            f"batching.weights.{name}: got an unknown source, expected one of {', '.join(names)}{nearest(name, names)}"
            for name in batching.weights
            if name not in names
        ]
    if batching.schedule == "staged":
        staged, known = [entry for stage in batching.stages for entry in stage], {*names, *TASKS}
        faults += [
            f"batching.stages: got {entry!r}, expected names of sources or tasks{nearest(entry, known)}"
            for entry in staged
            if entry not in known
        ]
        faults += [
            f"batching.stages: got no stage with source {source.name!r}, expected every source in one"
            for source in config.data
            if source.name not in staged and source.task not in staged
        ]
    return faults


def _emphasis(config: Config) -> list[str]:
    """Some source has a loss."""
    losses, tasks = config.losses, {source.task for source in config.data}
    weights = {"lists": losses.emphasis, "pairs": 1 - losses.emphasis}
    if not any(weights[TASKS[task].shape] for task in tasks):
        return [f"losses.emphasis: got {losses.emphasis:g}, expected a value that trains some source"]
    if not any(weights[TASKS[task].shape] * getattr(losses, task).weight for task in tasks):
        return ["losses.<task>.weight: got 0 for every source that counts, expected one above 0"]
    return []


def _frozen(config: Config) -> list[str]:
    """A frozen backbone leaves something to train, and is asked for nothing that it cannot give."""
    model, faults = config.model, []
    if not model.freeze_backbone:
        return []
    if model.lora:
        faults.append("model.freeze_backbone: got true with model.lora, expected one of them")
    elif not model.head:
        faults.append("model.freeze_backbone: got true without model.head, expected a head to be trained")
    if config.train.gradient_checkpointing:
        faults.append(
            "train.gradient_checkpointing: got true with model.freeze_backbone, expected false, because a frozen "
            "backbone keeps nothing for the backward pass"
        )
    return faults + [
        f"losses.{task}.mid_nce: got {getattr(config.losses, task).mid_nce:g} with model.freeze_backbone, expected 0, "
        "because the middle layer is not trained"
        for task in sorted({source.task for source in config.data if TASKS[source.task].shape == "pairs"})
        if getattr(config.losses, task).mid_nce
    ]


def _dimensions(config: Config) -> list[str]:
    head, matryoshka = config.model.head, config.losses.matryoshka
    if head and matryoshka and max(matryoshka.dims) > head.dim:
        return [
            f"losses.matryoshka.dims: got {max(matryoshka.dims)}, expected at most {head.dim}, which is model.head.dim"
        ]
    return []


def _sharded(config: Config) -> list[str]:
    if (config.train.fsdp or config.train.deepspeed) and config.evaluation.every_steps:
        return [
            f"evaluation.every_steps: got {config.evaluation.every_steps} with a sharded model, expected null, because "
            "no rank holds a whole encoder while it is trained; checkpoints can be evaluated afterwards"
        ]
    return []


def _conflict(config: Config) -> list[str]:
    """There are two gradients to compare, and they are whole."""
    if not config.train.conflict_every:
        return []
    setting, losses = f"train.conflict_every: got {config.train.conflict_every}", config.losses
    emphasis = {"retrieval": losses.emphasis, "similarity": 1 - losses.emphasis}
    present = {source.task for source in config.data}
    missing = [task for task in emphasis if task not in present or not emphasis[task] * getattr(losses, task).weight]
    if missing:
        return [f"{setting} and {missing[0]} not trained, expected both retrieval and similarity to be, else null"]
    if config.train.fsdp or config.train.deepspeed:
        return [f"{setting} with a sharded model, expected null, because no rank holds a whole gradient"]
    return []


def _fusion(config: Config) -> list[str]:
    faults: list[str] = []
    if config.fusion is None:
        return faults
    if config.fusion.methods != ["ema"] and (config.train.save_strategy == "no" or config.train.save_total_limit == 1):
        faults.append("fusion: got a run that keeps no two checkpoints, expected train.save_total_limit of 2 or more")
    if "ema" in config.fusion.methods and (config.train.fsdp or config.train.deepspeed):
        faults.append(
            "fusion.method: got ema with a sharded model, expected another, because no rank holds all weights"
        )
    return faults
