"""Results on disk: what is equal in model, data and settings is scored once.

`$CODIEMB_CACHE/evaluations` (else under `~/.cache/codiemb`) holds the two files of each result, under a key of all that
it depends on. The folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from codiemb.data.store import cache_folder
from codiemb.encoder.elsewhere import OtherEncoder
from codiemb.files import replacing, write_json

logger = logging.getLogger(__name__)

_FORMAT = 2  # raise it when what is scored, or how, changes


def model_hash(encoder: SentenceTransformer | OtherEncoder) -> str | None:
    """Equal for models of equal weights, modules, settings and tokenizer; None if that cannot be told.

    What is no SentenceTransformer, runs on another backend than torch or has a module of another library hides what it
    computes, so its results are not kept.
    """
    if not isinstance(encoder, SentenceTransformer) or getattr(encoder, "backend", "torch") != "torch":
        return None
    if not all(type(module).__module__.startswith("sentence_transformers.") for module in encoder):
        return None
    found = blake2b(digest_size=16)
    for name, weight in sorted(encoder.state_dict().items()):
        if isinstance(weight, Tensor):
            found.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
            found.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    described = [str(encoder.truncate_dim), _tokenizer(getattr(encoder, "tokenizer", None))]
    for module in encoder:
        described += [type(module).__qualname__, repr(getattr(module, "get_config_dict", dict)())]
        for part in module.modules():
            names = ("config", "peft_config", "_disable_adapters", "_active_adapter")
            described += [repr(getattr(part, name, None)) for name in names]
    found.update(json.dumps(described).encode())
    return found.hexdigest()


def _tokenizer(tokenizer: Any) -> str:
    """What it does to a text, without the lengths of its last call."""
    if tokenizer is None or not hasattr(tokenizer, "backend_tokenizer"):
        return repr(tokenizer)
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    sides = [getattr(tokenizer, f"{what}_side", None) for what in ("truncation", "padding")]
    return json.dumps([sides, {name: part for name, part in parts.items() if name not in ("truncation", "padding")}])


def key_of(settings: dict[str, Any]) -> str:
    return blake2b(json.dumps([_FORMAT, settings], sort_keys=True).encode(), digest_size=16).hexdigest()


def find(key: str) -> tuple[dict[str, Any], pa.Table] | None:
    """The content of a result's file and its items, or None."""
    stem = cache_folder("evaluations").absolute() / key  # pyarrow takes `a:b` for an address
    with contextlib.suppress(OSError, ValueError, RecursionError, pa.ArrowException):  # nothing there, or damaged
        content = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(content.get("metrics"), dict) and {"n", "seconds"} <= set(content):
            return content, pq.read_table(f"{stem}.parquet")
    return None


def write(stem: Path, content: dict[str, Any], items: pa.Table, suffix: str = ".parquet") -> None:
    """Writes `<stem>.json` and its items beside it; the first is there last."""
    stem = stem.absolute()
    stem.parent.mkdir(parents=True, exist_ok=True)
    table = stem.with_name(stem.name + suffix)
    with replacing(table) as partial:
        pq.write_table(items, partial)
    write_json(stem.with_name(stem.name + ".json"), content)


def keep(key: str, content: dict[str, Any], items: pa.Table) -> None:
    """Keeps a result, whoever else keeps the same one now; a cache that cannot be written is told, and no error."""
    try:
        folder = cache_folder("evaluations")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="writing-") as own:
            write(Path(own) / key, content, items)
            for suffix in (".parquet", ".json"):
                os.replace(Path(own) / f"{key}{suffix}", folder / f"{key}{suffix}")
    except OSError as error:
        logger.warning(f"the result is not kept for the next time: {error}")
