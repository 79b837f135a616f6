"""Training a part of the encoder only: LoRA adapters (Hu et al., 2022), or a new head on a frozen backbone.

The adapters are those of `peft`, put in by sentence-transformers. While a run lasts they stay apart, so that a
checkpoint holds them alone and names its base; the final model has them merged into its weights and needs no peft. The
head is a `Dense` module of sentence-transformers without activation, which starts as the identity, so training starts
from the base.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import check_peft_version

from codiemb.config import Head, Lora, ModelSection
from codiemb.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)


def adapt(encoder: SentenceTransformer, settings: ModelSection) -> None:
    """Leaves what `settings` asks for as the parameters that are trained; without lora and head, all of them.

    Raises:
        ConfigError: adapters or a head that this model cannot have.
    """
    if has_adapters(encoder):
        if settings.lora:
            raise ConfigError(
                f"model.lora, base {settings.base}",
                got="a folder of adapters",
                expected="a model with weights of its own, because a checkpoint names one base",
                fix="merge the adapters first (docs/training.md, LoRA), or leave model.lora out to train all weights",
            )
        merge_adapters(encoder)
        encoder.requires_grad_(True)
        logger.info(f"model {settings.base} is a folder of adapters: they are merged into the weights of their base")
    if settings.freeze_backbone:
        encoder.requires_grad_(False)
    if settings.lora:
        _add_lora(encoder, settings.lora)
    if settings.head:
        _add_head(encoder, settings.head)


def require_peft() -> None:
    """Refuses adapters where peft is missing or older than transformers asks for.

    Raises:
        ConfigError: with what to install.
    """
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            "model.lora",
            got=error,
            expected=f"peft {MIN_PEFT_VERSION} or newer, as the installed transformers asks",
            fix="pip install 'codiemb[lora]'",
        ) from None


def has_adapters(encoder: SentenceTransformer) -> bool:
    return isinstance(encoder[0], Transformer) and getattr(encoder[0].model, "_hf_peft_config_loaded", False)


def load_adapters(encoder: SentenceTransformer, folder: Path) -> None:
    """Fills adapters and head from a checkpoint; the base stays as it is, wherever the checkpoint says that it was.

    Raises:
        CheckpointError: the checkpoint has no weights for some of the adapters.
    """
    from peft import set_peft_model_state_dict

    stored = load_file(folder / "adapter_model.safetensors")
    weights = {name.removeprefix("base_model.model."): weight for name, weight in stored.items()}
    found: Any = set_peft_model_state_dict(encoder[0].model, weights, adapter_name="default")
    if absent := [name for name in found.missing_keys if ".lora_" in name]:
        raise CheckpointError(f"checkpoint {folder}", got=f"no weights for {absent[0]}", expected="all adapters")
    for module in json.loads((folder / "modules.json").read_text(encoding="utf-8"))[1:]:
        if (file := folder / module["path"] / "model.safetensors").is_file():
            encoder[module["idx"]].load_state_dict(load_file(file))


def merge_adapters(encoder: SentenceTransformer) -> None:
    """Adds the adapters to the weights they stand beside and takes them out; without adapters nothing changes."""
    if not has_adapters(encoder):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    model: Any = encoder[0].model
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, module in adapted.items():
        module.merge(safe_merge=True)
        model.set_submodule(name, module.get_base_layer())
    model.delete_adapter(list(model.peft_config))
    # Adapters that came from files leave the renaming of their names behind, which saving would undo on all weights.
    vars(model).pop("_weight_conversions", None)


@contextlib.contextmanager
def without_head(encoder: SentenceTransformer, settings: ModelSection) -> Iterator[None]:
    """Inside, the encoder is the untouched base: texts pass its new head by."""
    if settings.head is None:
        yield
        return
    name, head = [(name, module) for name, module in encoder.named_children() if isinstance(module, Dense)][-1]
    setattr(encoder, name, nn.Identity())
    try:
        yield
    finally:
        setattr(encoder, name, head)


def _add_lora(encoder: SentenceTransformer, settings: Lora) -> None:
    from peft import LoraConfig

    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
    )
    try:
        encoder.add_adapter(config)
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            "model.lora",
            got=str(error).splitlines()[0],
            expected="names of linear modules of this model in target_modules, or all-linear",
            fix="change model.lora.target_modules",
        ) from None
    # A checkpoint names its base; a relative path would hold in one working directory only.
    model: Any = encoder[0].model
    base = Path(model.name_or_path)
    model.peft_config["default"].base_model_name_or_path = str(base.resolve()) if base.is_dir() else str(base)


def _add_head(encoder: SentenceTransformer, settings: Head) -> None:
    """Appends the head, before a last Normalize so that embeddings stay normalised."""
    dim = encoder.get_embedding_dimension()
    if dim is None or settings.dim > dim:
        raise ConfigError("model.head.dim", got=settings.dim, expected=f"at most {dim}, the dimensions of the base")
    head = Dense(dim, settings.dim, activation_function=None, init_weight=torch.eye(settings.dim, dim))
    nn.init.zeros_(head.linear.bias)
    modules = list(encoder)
    place = len(modules) - isinstance(modules[-1], Normalize)
    encoder.insert(place, head.to(encoder.device))
