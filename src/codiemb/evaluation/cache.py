"""Results on disk: what is equal in model, data and settings is scored once.

`$CODIEMB_CACHE/evaluations` (else under `~/.cache/codiemb`) holds the two files of each result, under a key of all that
it depends on. The folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import json
import os
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
from codiemb.files import write_whole

_FORMAT = 1  # raise it when what is scored, or how, changes


def model_hash(encoder: SentenceTransformer | OtherEncoder) -> str | None:
    """Equal for models of equal weights, modules, settings and tokenizer; None if that cannot be told.

    An object that is no SentenceTransformer hides what it computes, so its results are not kept.
    """
    if not isinstance(encoder, SentenceTransformer):
        return None
    found = blake2b(digest_size=16)
    for name, weight in sorted(encoder.state_dict().items()):
        if isinstance(weight, Tensor):
            found.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
            found.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    described = [str(encoder.truncate_dim), _tokenizer(encoder.tokenizer)]
    for module in encoder:
        described += [type(module).__qualname__, repr(getattr(module, "get_config_dict", dict)())]
        for part in module.modules():
            described += [repr(getattr(part, name, None)) for name in ("config", "peft_config")]
    found.update(json.dumps(described).encode())
    return found.hexdigest()


def _tokenizer(tokenizer: Any) -> str:
    """What it does to a text, without the lengths of its last call."""
    if tokenizer is None or not hasattr(tokenizer, "backend_tokenizer"):
        return repr(tokenizer)
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({name: part for name, part in parts.items() if name not in ("truncation", "padding")})


def key_of(settings: dict[str, Any]) -> str:
    return blake2b(json.dumps([_FORMAT, settings], sort_keys=True).encode(), digest_size=16).hexdigest()


def find(key: str) -> tuple[dict[str, Any], pa.Table] | None:
    """The content of a result's file and its items, or None."""
    stem = cache_folder("evaluations") / key
    with contextlib.suppress(OSError, ValueError, pa.ArrowException):  # nothing there, or damaged
        return json.loads(stem.with_suffix(".json").read_text(encoding="utf-8")), pq.read_table(f"{stem}.parquet")
    return None


def write(stem: Path, content: dict[str, Any], items: pa.Table, suffix: str = ".parquet") -> None:
    """Writes `<stem>.json` and its items beside it; the first is there last."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    table = stem.with_name(stem.name + suffix)
    pq.write_table(items, f"{table}.partial")
    os.replace(f"{table}.partial", table)
    write_whole(stem.with_name(stem.name + ".json"), json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def keep(key: str, content: dict[str, Any], items: pa.Table) -> None:
    write(cache_folder("evaluations") / key, content, items)
