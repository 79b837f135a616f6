"""The encoder is a `SentenceTransformer`; this module loads one, sets it up by role, and saves it.

Prompts and lengths are kept where sentence-transformers keeps them (`prompts`, `query_length`, `document_length`), so
that `encode_query` and `encode_document` of the saved model do what training did. The role `similarity`, which
sentence-transformers does not know, has its prompt under that name and its length in `codiemb.json`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router, Transformer
from transformers import AutoConfig, PreTrainedModel

from codiemb.config import ROLES, ModelSection, Role
from codiemb.encoder import cpu, gpu
from codiemb.encoder.adapters import adapt, has_adapters, require_peft
from codiemb.encoder.location import locate
from codiemb.errors import CheckpointError, EvaluationError

ROLE_FILE = "codiemb.json"
HIDDEN_DROPOUT = (
    "hidden_dropout_prob",
    "resid_pdrop",
    "embd_pdrop",
    "mlp_dropout",
    "embedding_dropout",
    "dropout",
    "dropout_rate",
)
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.onnx")


def load_encoder(settings: ModelSection, device: str | None = None) -> SentenceTransformer:
    """The base model of a config in float32, with its prompts, lengths, dropout, adapters and head.

    Raises:
        CheckpointError: no such model, no weights, a broken tokenizer or hidden size.
        ConfigError: adapters or a head that it cannot have.
    """
    if settings.lora:
        require_peft()
    path = locate(settings.base)
    encoder = open_model(path, _dropout(path, settings), device=device, dtype=torch.float32)
    require_one_way(encoder)
    given = {role: getattr(settings.prompts, role) for role in ROLES}
    encoder.prompts = {
        **dict.fromkeys(ROLES, ""),
        **encoder.prompts,
        **{role: prompt for role, prompt in given.items() if prompt is not None},
    }
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
    adapt(encoder, settings)
    return encoder


def require_one_way(encoder: Any) -> None:
    """Refuses a model that takes queries and documents through different modules.

    Raises:
        EvaluationError: it names the ways.
    """
    for module in encoder.modules() if isinstance(encoder, torch.nn.Module) else ():
        if isinstance(module, Router) and {"query", "document"} & {*module.sub_modules}:
            raise EvaluationError(
                "model",
                got=f"a Router with ways for {', '.join(module.sub_modules)}",
                expected="one encoder for all texts",
                fix="choose another model",
            )


def open_model(
    path: str,
    config_kwargs: dict[str, Any] | None = None,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> SentenceTransformer:
    """The model in a folder or on the hub; device and number type as sentence-transformers chooses if not given.

    Raises:
        CheckpointError: it cannot be loaded, or is not what its files say.
    """
    folder = Path(path)
    if folder.is_dir():
        check_weights(folder)
    try:
        model_kwargs = {"attn_implementation": _attention()} | ({"dtype": dtype} if dtype is not None else {})
        encoder = SentenceTransformer(path, device=device, config_kwargs=config_kwargs, model_kwargs=model_kwargs)
        if isinstance(encoder[0], Transformer):
            encoder[0].unpad_inputs = False  # micro-batches are cut by their attention mask
            if encoder.device.type == "cpu" and isinstance(encoder[0].model, PreTrainedModel):
                cpu.speed_up(encoder[0].model)
            gpu.speed_up(encoder[0])
        _check_loaded(encoder, path)
        if encoder.tokenizer is not None:
            _check_vocabulary(encoder, path)
            _check_embedding(encoder, path)
    except CheckpointError:
        raise
    except Exception as error:  # loaders of many libraries raise many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "ignore_mismatched_sizes" in reason:
            reason = "weights of other sizes than config.json says"
        raise CheckpointError(
            f"model {path}", got=reason, expected="a folder or hub id of a SentenceTransformer or Transformers model"
        ) from error
    if (folder / ROLE_FILE).is_file():
        set_lengths(encoder, _read_lengths(folder / ROLE_FILE))
    return encoder


def set_lengths(encoder: SentenceTransformer, lengths: Mapping[Role, int]) -> None:
    """Sets the tokens kept per role, where sentence-transformers reads them."""
    resolved = [lengths.get(role, max_length(encoder, role)) for role in ROLES]
    for role, length in zip(ROLES, resolved, strict=True):
        setattr(encoder[0], f"{role}_length", length)
    known = [length for length in resolved if length is not None]
    if len(known) == len(ROLES):
        encoder.max_seq_length = max(known)  # what a plain `encode` keeps


def max_length(encoder: SentenceTransformer, role: Role) -> int | None:
    """Tokens kept of a text in this role."""
    length = getattr(encoder[0], f"{role}_length", None)
    return length if length is not None else encoder.max_seq_length


def prompt(encoder: SentenceTransformer, role: Role) -> str:
    """Text put before every input of this role: the prompt of its name, else the model's default; empty if none."""
    name = role if role in encoder.prompts else encoder.default_prompt_name
    return encoder.prompts.get(name) or "" if name is not None else ""


def instructed(instruction: str) -> str:
    """The prompt of a record that brings its own instruction (the reference's form)."""
    return f"Instruction: {instruction} Query: "


def save_encoder(encoder: SentenceTransformer, folder: Path) -> None:
    """Writes the model folder, with the length of every role."""
    encoder.save(str(folder), create_model_card=False)
    lengths = {role: max_length(encoder, role) for role in ROLES}
    (folder / ROLE_FILE).write_text(json.dumps({"max_length": lengths}, indent=2) + "\n", encoding="utf-8")


def attention_dropout(encoder: SentenceTransformer) -> float:
    """Dropout of attention weights while training."""
    config = getattr(encoder[0], "config", None)
    return max((getattr(config, name, None) or 0.0 for name in ATTENTION_DROPOUT), default=0.0)


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


def idle_parameters(encoder: SentenceTransformer) -> list[torch.nn.Parameter]:
    """Biases of attention keys that change nothing: they add the same number to all logits of a query.

    So it is where positions are added to the input; rotated keys (RoPE) and scores between keys and relative positions
    are another matter. Their true gradient is 0, and Adam would turn its rounding into steps of full size.
    """
    config = getattr(encoder[0], "config", None)
    if getattr(config, "model_type", "") not in _ADDED_POSITIONS:
        return []
    if getattr(config, "position_embedding_type", "absolute") not in ("absolute", None):
        return []
    return [parameter for name, parameter in encoder.named_parameters() if name.endswith(_KEY_BIASES)]


_ADDED_POSITIONS = ("bert", "camembert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl")
_KEY_BIASES = ("attention.self.key.bias", "attention.k_lin.bias", "attention.attn.k.bias")


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
    """Refuses a model folder without weight files or with truncated ones, before a loader would make random ones."""
    if not any(file for pattern in WEIGHT_FILES for file in folder.rglob(pattern)):
        raise CheckpointError(
            f"model {folder}",
            got="a folder without weights",
            expected="model.safetensors (or its shards) in it",
            fix="check the path, or download the model again",
        )
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):  # reads the header, which says how long the file must be
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"model {folder}, {file.relative_to(folder)}",
                got=error,
                expected="a whole safetensors file",
                fix="download or copy it again",
            ) from None


def _read_lengths(file: Path) -> dict[Role, int]:
    try:
        lengths = json.loads(file.read_text(encoding="utf-8"))["max_length"]
        return {role: int(lengths[role]) for role in ROLES if lengths.get(role) is not None}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"file {file}",
            got=f"{type(error).__name__} ({error})",
            expected='{"max_length": {"query": ..., "document": ..., "similarity": ...}}',
            fix="mend or delete the file",
        ) from None


def _check_loaded(encoder: SentenceTransformer, path: str) -> None:
    """Weights that the files lack are made up at random by transformers, so they are refused here.

    A missing pooler is usual and harmless. transformers marks each parameter it has loaded; adapters are not marked.
    """
    model = encoder[0].model if isinstance(encoder[0], Transformer) else None
    if model is None or has_adapters(encoder):
        return
    loaded = {name: getattr(weight, "_is_hf_initialized", False) for name, weight in model.named_parameters()}
    missing = [name for name, is_loaded in loaded.items() if not is_loaded and "pooler" not in name]
    if missing and any(loaded.values()):
        raise CheckpointError(
            f"model {path}",
            got=f"no weights for {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
            expected="all weights that its config.json names",
            fix="use the config.json the weights were saved with, or download the model again",
        )


def _check_embedding(encoder: SentenceTransformer, path: str) -> None:
    """One text through all modules: sizes that do not fit raise, damaged weights give NaN."""
    embedding = encoder.encode(["a"], convert_to_tensor=True, show_progress_bar=False)
    if not bool(torch.isfinite(embedding).all()):
        raise CheckpointError(
            f"model {path}", got="an embedding that holds nan", expected="finite weights", fix="use an undamaged model"
        )


def _check_vocabulary(encoder: SentenceTransformer, path: str) -> None:
    """A tokenizer of another model, or one without words, trains without complaint, so it is refused here."""
    if len(encoder.tokenizer) <= len(set(encoder.tokenizer.all_special_ids)):
        raise CheckpointError(
            f"model {path}, tokenizer",
            got="special tokens only",
            expected="a vocabulary (tokenizer.json, vocab.txt or a SentencePiece model) in the folder",
            fix="copy the tokenizer files of the model into it",
        )
    rows = encoder[0].model.get_input_embeddings().weight.shape[0] if isinstance(encoder[0], Transformer) else None
    if rows is not None and len(encoder.tokenizer) > rows:
        raise CheckpointError(
            f"model {path}, tokenizer",
            got=f"{len(encoder.tokenizer)} tokens",
            expected=f"at most {rows}, the rows of its embedding matrix",
            fix="use the tokenizer the model was trained with",
        )


_OFFSET = ("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "data2vec-text")


def _position_limit(encoder: SentenceTransformer) -> int | None:
    config = getattr(encoder[0], "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    # RoBERTa and its kin number their positions from padding_idx + 1.
    return limit - 2 if limit is not None and getattr(config, "model_type", "") in _OFFSET else limit


def _dropout(path: str, settings: ModelSection) -> dict[str, float]:
    """The dropout settings under the names that this architecture uses."""
    inner = [
        str(file.parent) for file in Path(path).glob("0_*/config.json")
    ]  # where older folders keep the transformer
    try:
        if (adapters := Path(path) / "adapter_config.json").is_file():
            path = json.loads(adapters.read_text(encoding="utf-8"))["base_model_name_or_path"]
        config = AutoConfig.from_pretrained((inner or [path])[0])
    except Exception:  # transformers raises many kinds
        return {}  # not a transformers folder, or a broken one: open_model says which
    wanted: dict[str, float] = {}
    for names, value in ((HIDDEN_DROPOUT, settings.dropout.hidden), (ATTENTION_DROPOUT, settings.dropout.attention)):
        if value is not None:
            wanted |= {name: value for name in names if hasattr(config, name)}
    return wanted


def _attention() -> str | None:
    """On processors eager is as fast in float32 and 1.4 to 2 times as fast in bf16 (training, up to 256 tokens)."""
    return None if torch.cuda.is_available() else "eager"
