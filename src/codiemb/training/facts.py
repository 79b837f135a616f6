"""What a run is: every setting, the data and the base model, as flat facts that can be compared and named.

Ranks compare them before the first step, and a run that goes on compares them with those of its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from transformers import TrainingArguments

from codiemb.config import ROLES, Config, used_settings
from codiemb.data.store import Records
from codiemb.distributed import world_size
from codiemb.encoder.model import max_length
from codiemb.errors import CodiembError, ConfigError, DataError
from codiemb.training.checkpoint import Checkpoint
from codiemb.versions import versions

# Where things lie; what they hold is compared instead.
_PLACES = ("data_root", "output_dir", "model.base", "evaluation.suite", "fusion.suite")
# What a run may change when it goes on, because the trained weights do not depend on it.
_FREE = (
    "evaluation.",
    "fusion",
    *(
        f"train.{name}"
        for name in (
            "conflict_every",
            "dataloader_num_workers",
            "ddp_timeout",
            "logging_steps",
            "memory_budget",
            "rank_check_steps",
            "report_to",
            "run_name",
            "save_",
        )
    ),
)
_DATA, _BASE = "data of source ", "base model"
_OF_A_FILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")  # of a config; not of the model


def facts_of(config: Config, records: dict[str, Records], base: SentenceTransformer) -> dict[str, str]:
    """Settings by dotted key, a digest of each source by name, and one of the base model."""
    facts = {f"{_DATA}{name!r}": source.digest() for name, source in records.items()}
    facts[_BASE] = _digest(base)

    def flatten(value: Any, key: str) -> None:
        if isinstance(value, dict | list) and value:
            for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
                flatten(inner, f"{key}.{name}" if key else str(name))
        elif key == "train.deepspeed" and isinstance(value, str):
            facts[key] = Path(value).read_text(encoding="utf-8")
        elif not key.endswith(".path") and key not in _PLACES:
            facts[key] = str(value)

    flatten(used_settings(config), "")
    return facts


def require_same_run(checkpoint: Checkpoint, facts: dict[str, str], config_file: str) -> None:
    """Refuses a checkpoint of another run: its plan, its schedule or its data would be another's.

    Raises:
        DataError: a source holds something else.
        ConfigError: the base model or a setting is another; the first three are named with both values.
    """
    then = checkpoint.facts
    keys = [key for key in {**then, **facts} if then.get(key) != facts.get(key) and not key.startswith(_FREE)]
    if data := [key.removeprefix(_DATA) for key in keys if key.startswith(_DATA)]:
        raise _other(
            DataError, f"source {data[0]}", "other rows", f"those that {checkpoint.path} was trained on", "data"
        )
    if keys == [_BASE]:
        raise _other(ConfigError, "model.base", "another model", f"the one that {checkpoint.path} began with", "model")
    if keys := [key for key in keys if key != _BASE]:  # adapters and heads are part of the base's digest
        named = ", ".join(f"{key} {facts.get(key, 'absent')} (was {then.get(key, 'absent')})" for key in keys[:3])
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise ConfigError(
            f"--resume, {named}{more}",
            got="other settings than the run was started with",
            expected=f"those of {checkpoint.path}",
            fix=f"resume with them (codiemb train {config_file} --resume), or start a new run",
        )


def _other(kind: type[CodiembError], what: str, got: str, expected: str, place: str) -> CodiembError:
    return kind(f"--resume, {what}", got=got, expected=expected, fix=f"bring the old {place} back, or start a new run")


def environment_of(arguments: TrainingArguments, micro_batch_tokens: int, packed: bool) -> dict[str, Any]:
    """What roundings depend on: versions, device, threads, precision, the cut into micro-batches."""
    gpu = torch.cuda.is_available()
    return {
        "versions": versions(),
        "device": str(arguments.device),
        "device_name": torch.cuda.get_device_name() if gpu else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "world_size": world_size(),
        "bf16": arguments.bf16,
        "micro_batch_tokens": micro_batch_tokens,
        "packed": packed,
    }


def changed(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Each difference of two environments, as it is told; the number of processes aside."""
    flat = [{**environment["versions"], **environment} for environment in (now, then)]
    names = [name for name in {**flat[1], **flat[0]} if name not in ("versions", "world_size")]
    return [
        f"{name} {flat[0].get(name, 'absent')} (was {flat[1].get(name, 'absent')})"
        for name in names
        if flat[0].get(name) != flat[1].get(name)
    ]


def _digest(encoder: SentenceTransformer) -> str:
    """Of all weights and buffers by name, the settings of the modules, the tokenizer and the prompts."""
    found = hashlib.sha256()
    for name, weight in sorted(encoder.state_dict().items()):
        found.update(name.encode())
        found.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    settings: list[Any] = [encoder.prompts, [max_length(encoder, role) for role in ROLES]]
    modules: list[Any] = list(encoder)
    for module in modules:
        config = module.config.to_dict() if hasattr(module, "config") else module.get_config_dict()
        settings.append({name: value for name, value in config.items() if name not in _OF_A_FILE})
    if (backend := getattr(encoder.tokenizer, "backend_tokenizer", None)) is not None:
        settings.append(backend.to_str())
    found.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return found.hexdigest()
