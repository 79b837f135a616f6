"""What a run is: every setting, the data and the base model, as flat facts that can be compared and named.

Ranks compare them before the first step, and a run that goes on compares them with those of its checkpoint.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from codiemb.config import Config, used_settings
from codiemb.data.store import Records
from codiemb.errors import CodiembError, ConfigError, DataError
from codiemb.training.checkpoint import Checkpoint

# Where things lie; what they hold is compared instead.
_PLACES = ("data_root", "output_dir", "model.base", "evaluation.suite")
# What a run may change when it goes on, because the trained weights do not depend on it.
_FREE = (
    "evaluation.",
    *(
        f"train.{name}"
        for name in (
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
_DATA, _BASE = "data of source ", "weights of the base"


def facts_of(config: Config, records: dict[str, Records], base: SentenceTransformer) -> dict[str, str]:
    """Settings by dotted key, a digest of each source by name, and one of the base model."""
    facts = {f"{_DATA}{name!r}": source.digest() for name, source in records.items()}
    facts[_BASE] = _digest(base)

    def flatten(value: Any, key: str) -> None:
        if isinstance(value, dict | list) and value:
            for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
                flatten(inner, f"{key}.{name}" if key else str(name))
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
    if _BASE in keys:
        raise _other(ConfigError, "model.base", "other weights", f"those that {checkpoint.path} began with", "model")
    if keys:
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


def _digest(encoder: SentenceTransformer) -> str:
    """Of the names and bits of all weights and buffers."""
    found = hashlib.sha256()
    for name, weight in sorted(encoder.state_dict().items()):
        found.update(name.encode())
        found.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
