"""What makes a GPU train faster with the same mathematics: texts stand one behind the other, without padding.

A packed micro-batch is one row of all its tokens. Each token sees those of its own text: attention goes through
`torch.nn.attention.varlen` (FlashAttention), which wants bf16 and has no dropout. The form is the one that transformers
takes and sentence-transformers pools (`cu_seq_lens_q`). A padded micro-batch takes SDPA, as ever.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Float
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None  # type: ignore[assignment]

ATTENTION = "codiemb_gpu"
# softmax(scale * query key^T) value within a text, a causal or sliding window at most, and positions that are given.
_PACKED = ("bert", "electra", "llama", "mistral", "modernbert", "qwen2", "qwen3")
_PACKED_WITH_PADDING_POSITION = ("camembert", "roberta", "xlm-roberta")  # positions from padding_idx + 1
_DTYPE = torch.bfloat16  # FlashAttention computes in no other that autocast uses
_OF_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def speed_up(transformer: Transformer) -> None:
    """Lets a model on a GPU take packed micro-batches, if it is of a kind that can."""
    model: Any = transformer.model
    if not isinstance(model, PreTrainedModel) or model.config.model_type not in _PACKED + _PACKED_WITH_PADDING_POSITION:
        return
    config: Any = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width % 8 == 0 and width <= 256 and _has_flash_attention(model.device):
        use(transformer)


def _has_flash_attention(device: torch.device) -> bool:
    """On NVIDIA's GPUs from Ampere on, with torch 2.12 or newer."""
    return bool(
        device.type == "cuda"
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and varlen_attn is not None
        and {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)
    )


def use(transformer: Transformer) -> None:
    """Puts `attention` into a model, and lets through what it needs."""
    transformer.model.set_attn_implementation(ATTENTION)
    if transformer.model_forward_params is not None:
        transformer.model_forward_params |= set(_OF_PACKED)


def packs(encoder: SentenceTransformer, bf16: bool, attention_dropout: float = 0.0) -> bool:
    """Whether micro-batches of this encoder can be packed."""
    config = getattr(encoder[0], "config", None)
    return bf16 and attention_dropout == 0 and getattr(config, "_attn_implementation", None) == ATTENTION


def pack(encoder: SentenceTransformer, features: dict[str, Any]) -> dict[str, Any]:
    """A padded micro-batch without its padding.

    Args:
        features: `attention_mask` and whatever else has its shape, [text, token].

    Returns:
        Those of shape [1, all tokens], without the mask; `position_ids`; where each text begins.
    """
    mask = features["attention_mask"].bool()
    lengths = mask.sum(dim=1)
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    config: Any = encoder[0].config
    first = config.pad_token_id + 1 if config.model_type in _PACKED_WITH_PADDING_POSITION else 0
    packed = {
        key: value[mask].unsqueeze(0) if isinstance(value, Tensor) and value.shape == mask.shape else value
        for key, value in features.items()
        if key != "attention_mask"
    }
    return packed | {
        "position_ids": (mask.cumsum(dim=1) - 1 + first)[mask].unsqueeze(0),
        "seq_idx": torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths).unsqueeze(0),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def attention(
    module: torch.nn.Module,
    query: Float[Tensor, "batch head query dim"],
    key: Float[Tensor, "batch key_head key dim"],
    value: Float[Tensor, "batch key_head key dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **more: Any,
) -> tuple[Float[Tensor, "batch query head dim"], None]:
    """Attention as transformers calls it, for packed and for padded micro-batches."""
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal
        )
    assert varlen_attn is not None
    assert not (dropout and module.training), "packed micro-batches have no dropout in attention"
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    back = -1 if sliding_window is None else sliding_window - 1
    flat_query, flat_key, flat_value = (part.squeeze(0).transpose(0, 1).to(_DTYPE) for part in (query, key, value))
    out = varlen_attn(
        flat_query,
        flat_key,
        flat_value,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(back, 0 if causal else back),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out.unsqueeze(0), None


def _mask(*, attention_mask: Tensor | None = None, **more: Any) -> Tensor | None:
    """None for packed micro-batches, which alone come without a mask: attention itself keeps texts apart."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **more)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, _mask)
